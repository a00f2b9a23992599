// MXFP4 operands as FP8 numbers, which tensor cores multiply exactly: dy in E5M2, x and W in E4M3.
//
// An E2M1 element times a power of two is such a number as long as the block's scale lies within the format's range below
// that of the tensor, one power of two that the GEMM applies. It comes from the tensor's largest magnitude, which whoever
// wrote the tensor has noted, so nothing here waits for a maximum. A rotation can raise a magnitude by sqrt(group). A block
// further down is rounded with the lowest scale that fits: a valid one, without bias where the rounding is; it is counted.
//
// A tile kernel makes the form down the columns, transposed, of a tile in shared memory, and for dy, which both products
// need, from the same tile and the same random bits the form along the rows. After the tile is there no thread waits for
// another warp's. The usual group of 64 has a kernel of its own.
#if __CUDA_ARCH__ >= 890

// `HIGHEST`: biased exponent of a block's scale that lies highest; `RANGE`: how many binades others may lie below it.
template <int FORMAT> struct Format {
  static constexpr int HIGHEST = FORMAT == E4M3 ? 133 : 140, RANGE = FORMAT == E4M3 ? 14 : 28;
};

// ---- Scales -------------------------------------------------------------------------------------

// The scale byte that no block of a tensor exceeds, within what the other numbers can hold, and the factor that gives
// values back. A NaN makes the whole product NaN.
struct Whole {
  u32 top;
  float factor;
};
template <int FORMAT> __device__ __forceinline__ Whole whole_up_to(u32 top) {
  Whole whole;
  whole.top = top > 252 ? 127 : max(top, 16u);
  whole.factor = top > 252 ? __uint_as_float(0x7fc00000u) : power(whole.top - (Format<FORMAT>::HIGHEST - 127));
  return whole;
}
template <int FORMAT> __device__ __forceinline__ Whole whole_scale(u32 most, u32 group) {
  // NOTE: a scale byte is 0 from an exponent of 2 down, but all low ones become one.
  return whole_up_to<FORMAT>(max((int)(most >> 23) - 2 + (group == 0 ? 0 : group <= 64 ? 3 : 4), 0));
}

// Numbers that will be rounded without bias are this many binades lower than their FP8 form, so that `shift` is ordinary.
#define LOWERED 32

// What numbers are multiplied by to be rounded in units of a tensor's scale. `norm` is what block_magnitude leaves of it.
template <bool UNBIASED, int FORMAT> __device__ __forceinline__ float factor_in_tensor(float norm, u32 top) {
  float rest = __float_as_uint(norm) & 0x007fffffu ? 1.0f : norm;
  return __fmul_rn(UNBIASED ? 0.75f * rest : rest, power(127 + Format<FORMAT>::HIGHEST - (UNBIASED ? LOWERED : 0) - top));
}

// The unit that a block with this largest magnitude is rounded to; `factor` is that of the tensor, and changes where the
// block has to be moved. Whether the block is raised.
template <bool UNBIASED, int FORMAT>
__device__ __forceinline__ bool scale_in_tensor(float v[BLOCK], float norm, u32 magnitude, u32 top, float &factor,
                                                float &unit) {
  // A scale byte is its magnitude's exponent less 2, and at least 0: so is all of this, 23 bits up.
  int lowest = (int)top - Format<FORMAT>::RANGE;
  u32 floor = (u32)max(lowest, 0) + 2 << 23;
  unit = __uint_as_float(max(magnitude & 0x7f800000u, floor) + (Format<FORMAT>::HIGHEST - 2 - top << 23));
  if (extreme(top)) {
    move(v, top, norm);
    factor = factor_in_tensor<UNBIASED, FORMAT>(1.0f, moved(top));
  }
  // 0 < magnitude < floor.
  return magnitude - 1 < (lowest > 0 ? floor - 1 : 0);
}

// Adds the numbers that the threads of a warp have counted.
__device__ __forceinline__ void add_raised(u32 *counter, u32 raised) {
  raised = __reduce_add_sync(FULL_WARP, raised);
  if (raised && threadIdx.x % WARP == 0) atomicAdd(counter, raised);
}

// ---- Rounding -----------------------------------------------------------------------------------

// Four numbers rounded without bias, as FP8. `shift` makes the block's unit 2^-126, where f32's even steps begin: from there
// down a number's bits count steps of 2^-23 units, so that adding random bits below bit 22 rounds to the grid's steps
// everywhere, and the bits from 22 on are E2M1's code. No sign needs to be taken off for that. `numbers` holds the FP8 number
// of each code, for a permutation of bytes to look up four at once.
template <class Bits>
__device__ __forceinline__ u32 round_four(const float v[4], float factor, float shift, u64 numbers, Bits &bits, int i) {
  const Draw &draw = bits.draw;
  float y[4];
  u32 code[4]; // in the top byte
#pragma unroll
  for (int j = 0; j < 4; j++) {
    // NOTE: two multiplications, since the definition rounds the product with `factor` before it loses what lies deeper.
    y[j] = __fmul_rn(__fmul_rn(v[j], factor), shift);
    code[j] = __float_as_uint(y[j]) * draw.shift2 + bits.addend(i + j);
  }
  u32 even = __byte_perm(code[0], code[2], 0x73), odd = __byte_perm(code[1], code[3], 0x73), out;
  // NOTE: __byte_perm would clear bits of the selector that are clear. As FP8, y is a zero of its sign.
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"((u32)numbers), "r"((u32)(numbers >> 32)), "r"(odd * draw.shift4 + even));
  u32 signs = pack_fp8<E5M2>(y[0], y[1]) | pack_fp8<E5M2>(y[2], y[3]) << 16;
  asm("or.b32 %0, %0, %1;" : "+r"(out) : "r"(signs));
  return out;
}

// The FP8 numbers of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 units.
template <int FORMAT> __device__ __forceinline__ u64 fp8_numbers(float unit) {
  u32 low = pack_fp8<FORMAT>(0.0f, 0.5f * unit) | pack_fp8<FORMAT>(unit, 1.5f * unit) << 16, high;
  if (FORMAT == E5M2) {
    // From 2 units on they are ordinary, with two bits below the exponent, whose bias is 15.
    high = (__float_as_uint(unit) >> 21) * 0x01010101u + (0x0a080604u - (127 - 15 << 2) * 0x01010101u);
  } else {
    high = pack_fp8<FORMAT>(2.0f * unit, 3.0f * unit) | pack_fp8<FORMAT>(4.0f * unit, 6.0f * unit) << 16;
  }
  return (u64)high << 32 | low;
}

// Rounds a block and stores its 32 bytes at `to`. `unit`: as an FP8 number.
template <bool UNBIASED, int FORMAT, class Bits>
__device__ __forceinline__ void round_to(void *to, const float v[BLOCK], float factor, float unit, Bits bits, bool inside) {
  u32 words[BLOCK / 4];
  u64 numbers = UNBIASED ? fp8_numbers<FORMAT>(unit) : 0;
  float shift = __uint_as_float((128u + LOWERED << 23) - __float_as_uint(unit));
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4) {
    if (UNBIASED) {
      words[i / 4] = round_four(v + i, factor, shift, numbers, bits, i);
    } else {
      float q[4];
#pragma unroll
      for (int j = 0; j < 4; j++) q[j] = round_nearest(v[i + j], factor, unit);
      words[i / 4] = pack_fp8<FORMAT>(q[0], q[1]) | pack_fp8<FORMAT>(q[2], q[3]) << 16;
    }
  }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < 2; i++)
    ((uint4 *)to)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// ---- Tiles --------------------------------------------------------------------------------------

// Lines of a tile in shared memory, of 64 numbers of SIZE bytes. Each 32 lines are shifted by SHIFT, so that threads that
// read down columns 32 lines apart do so from different banks.
template <u32 SIZE, u32 LINES, u32 SHIFT> struct Lines {
  static constexpr u32 PITCH = 64 * SIZE + 16, BYTES = LINES * PITCH + (LINES / 32 - 1) * SHIFT;
  static __device__ __forceinline__ u32 at(u32 line) { return line * PITCH + line / 32 * SHIFT; }
};

__device__ __forceinline__ void copy_async(u8 *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}

// Numbers, with their sign changed by a sign bit. For bf16 that takes no more than making an f32 of it.
__device__ __forceinline__ float with_sign(float v, u32 sign, const Draw &) {
  return __uint_as_float(__float_as_uint(v) ^ sign);
}
__device__ __forceinline__ float with_sign(bf16 v, u32 sign, const Draw &draw) {
  return __uint_as_float(v.bits * draw.shift16 + sign);
}
__device__ __forceinline__ void pair_with_signs(u32 pair, u32 low_sign, u32 high_sign, const Draw &draw, float v[2]) {
  v[0] = __uint_as_float(pair * draw.shift16 + low_sign);
  v[1] = __uint_as_float(pair & 0xffff0000u ^ high_sign);
}

// Two numbers as E4M3 holds them with a scale.
__device__ __forceinline__ void keep_as_e4m3(float &a, float &b, float scale, float inverse) {
  u32 halves;
  asm("{.reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, %2, %1; cvt.rn.f16x2.e4m3x2 %0, both;}"
      : "=r"(halves)
      : "f"(a * inverse), "f"(b * inverse));
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(a), "=f"(b)
      : "r"(halves));
  a *= scale, b *= scale;
}

// The numbers of a tile as they lie in memory, with the largest magnitude of the tensor.
template <class T> struct Stored {
  using Number = T;
  static constexpr bool BEHIND_GELU = false;
  const T *numbers;
  const u32 *most;
  __device__ __forceinline__ T at(size_t i) const { return numbers[i]; }
  __device__ __forceinline__ void note(u32, u32) const {}
};

// An attempt to quantize numbers whose largest magnitude is not known: that of a sample, the highest scale byte that
// does not fit what was made of it (0 where all fit), and how many blocks were raised.
struct Attempt {
  u32 most, above, raised;
};

__device__ __forceinline__ u32 behind_gelu(u32 d, u32 pre) {
  return pack_bf16(__fmul_rn(low_f32(d), gelu_derivative(low_f32(pre))),
                   __fmul_rn(high_f32(d), gelu_derivative(high_f32(pre))));
}

// The numbers d gelu'(pre), rounded to bf16, which lie nowhere: in an attempt, or `AGAIN` after one that failed.
template <bool AGAIN> struct BehindGelu {
  using Number = bf16;
  static constexpr bool BEHIND_GELU = true;
  const bf16 *d, *pre;
  Attempt *attempt;
  __device__ __forceinline__ bf16 at(size_t i) const { return {(u16)behind_gelu(d[i].bits, pre[i].bits)}; }
  __device__ __forceinline__ Whole whole() const {
    return AGAIN ? whole_up_to<E5M2>(attempt->above) : whole_scale<E5M2>(attempt->most, 64);
  }
  // Notes a block that does not fit, as one that is not finite never does. Then what else was made is of no use.
  __device__ __forceinline__ void note(u32 magnitude, u32 top) const {
    u32 byte = max(magnitude >> 23, 2u) - 2;
    if (!AGAIN && byte > top && byte > *(volatile u32 *)&attempt->above) atomicMax(&attempt->above, byte);
  }
};

// Rounds a rotated block, which still lacks the factor `norm`, and stores its 32 bytes at `to`. Whether it was raised.
template <bool UNBIASED, int FORMAT, class Bits, class Source>
__device__ __forceinline__ bool round_rotated(void *to, float v[BLOCK], float norm, const Whole &whole, const Bits &bits,
                                              bool inside, const Source &source) {
  float factor = factor_in_tensor<UNBIASED, FORMAT>(norm, whole.top), unit;
  u32 magnitude = block_magnitude(v, norm);
  source.note(magnitude, whole.top);
  bool raised = scale_in_tensor<UNBIASED, FORMAT>(v, norm, magnitude, whole.top, factor, unit) && inside;
  round_to<UNBIASED, FORMAT>(to, v, factor, unit, bits, inside);
  return raised;
}

// Starts copying pieces of 8 numbers, each APART rows below the one before: to `to` and as many lines below it. `column` is a
// multiple of 8. Where the tile is not whole, zeros stand for what lies outside.
template <u32 PIECES, u32 APART, class Data, class Source>
__device__ __forceinline__ void load_pieces(u8 *to, const Source &source, u32 row, u32 column, u32 rows, u32 cols,
                                            bool whole_tile) {
  using T = typename Source::Number;
  if constexpr (!Source::BEHIND_GELU) {
    if (whole_tile) {
      const T *from = source.numbers + (size_t)row * cols + column;
#pragma unroll
      for (u32 i = 0; i < PIECES; i++, from += (size_t)APART * cols) {
        copy_async(to + Data::at(APART * i), from);
        if (sizeof(T) == 4) copy_async(to + Data::at(APART * i) + 16, from + 4);
      }
      return;
    }
  }
#pragma unroll 1
  for (u32 i = 0; i < 8 * PIECES; i++) {
    u32 r = row + i / 8 * APART, c = column + i % 8;
    T number = {};
    if (r < rows && c < cols) number = source.at((size_t)r * cols + c);
    ((T *)(to + Data::at(i / 8 * APART)))[i % 8] = number;
  }
}

// What a stored tensor's numbers become where KEPT: what E4M3 holds of them with `scale`. Its scale for rounding follows.
template <int FORMAT, bool KEPT>
__device__ __forceinline__ Whole whole_of_stored(u32 largest, u32 group, float &scale, float &inverse) {
  if (KEPT) {
    scale = e4m3_scale(largest), inverse = 1.0f / scale;
    float kept = __uint_as_float(largest), also = 0.0f;
    keep_as_e4m3(kept, also, scale, inverse);
    largest = __float_as_uint(kept);
  }
  return whole_scale<FORMAT>(largest, group);
}

// Four numbers down a column, PITCH bytes apart, with signs.
template <bool KEPT, u32 PITCH, class T>
__device__ __forceinline__ void load_down(const u8 *from, const u32 *row_signs, float scale, float inverse, const Draw &draw,
                                          float v[4]) {
  uint4 sign = *(const uint4 *)row_signs;
  u32 signs[4] = {sign.x, sign.y, sign.z, sign.w};
  if (KEPT) {
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = to_f32(*(const T *)(from + j * PITCH));
#pragma unroll
    for (int j = 0; j < 4; j += 2) keep_as_e4m3(v[j], v[j + 1], scale, inverse);
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = with_sign(v[j], signs[j], draw);
  } else {
    // NOTE: loading matrices (ldmatrix, transposed) takes fewer instructions, but pairs are taken apart on the pipe of
    // integer operations, the busier one. Of these numbers it gained nothing for both forms, and 2% for columns alone; of
    // the random bits it lost 2% (H100).
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = with_sign(*(const T *)(from + j * PITCH), signs[j], draw);
  }
}

// Eight numbers along a row, with signs.
__device__ __forceinline__ void load_along(const u8 *from, const u32 *column_signs, const Draw &draw, float v[8]) {
  uint4 raw = *(const uint4 *)from, first = *(const uint4 *)column_signs, second = *(const uint4 *)(column_signs + 4);
  pair_with_signs(raw.x, first.x, first.y, draw, v);
  pair_with_signs(raw.y, first.z, first.w, draw, v + 2);
  pair_with_signs(raw.z, second.x, second.y, draw, v + 4);
  pair_with_signs(raw.w, second.z, second.w, draw, v + 6);
}

// The sum of numbers to which signs have been applied, without them. `factors`: +1 and -1, one for each.
// NOTE: on tensor cores, a product with ones, sums took 14% of the kernel's time (H100); so 3%.
__device__ __forceinline__ float sum_without_signs(const float v[BLOCK], const float *factors) {
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4) {
    float4 sign = *(const float4 *)&factors[i];
    sum[0] = __fmaf_rn(v[i], sign.x, sum[0]), sum[1] = __fmaf_rn(v[i + 1], sign.y, sum[1]);
    sum[2] = __fmaf_rn(v[i + 2], sign.z, sum[2]), sum[3] = __fmaf_rn(v[i + 3], sign.w, sum[3]);
  }
  return sum[0] + sum[1] + (sum[2] + sum[3]);
}

// ---- Tiles of any group -------------------------------------------------------------------------

// A tile has 128 rows and 64 columns; for groups of 256, 256 rows and 32 columns, which lie in shared memory as two
// halves side by side. A thread takes a block of 32.
//
// KEPT: the source is what an FP8 forward pass made its own form from, with which the columns begin.
template <bool UNBIASED, int FORMAT, bool ROWS_TOO, bool KEPT, class T>
__device__ __forceinline__ void quantize_tile(u8 *by_rows, u8 *by_columns, float *whole_factor, u32 *raised, float *sums,
                                              const Stored<T> &source, u32 rows, u32 cols, u32 rows_depth, u32 depth,
                                              u32 group, const Transform &rows_transform, const Transform &transform,
                                              const Draw &draw) {
  constexpr u32 LINES = 128, PARTS = LINES / BLOCK;
  using Data = Lines<sizeof(T), LINES, sizeof(T) == 4 ? 32 : 16>;
  using Bits = Lines<2, LINES, 16>;
  extern __shared__ __align__(16) u8 shared[];
  u8 *data = shared, *bits = data + Data::BYTES;
  u32 *row_signs = (u32 *)(bits + Bits::BYTES);    // (256): sign bits
  float *row_factors = (float *)(row_signs + 256); // (256): +1 and -1
  u32 *column_signs = (u32 *)(row_factors + 256);  // (2, SIGNS), so that threads read both halves from different banks
  constexpr u32 SIGNS = BLOCK + 4;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  // Blocks of a group, as a power of two; columns of a tile, and of those that a warp takes.
  u32 across = group > BLOCK ? __ffs(group) - 6 : 0, halves = across == 3 ? 1 : 0, columns = 6 - halves;
  u32 width = halves ? 2 : 3, all_rows = LINES << halves;
  u32 first_row = blockIdx.y * all_rows, first_column = blockIdx.x << columns;

  // Loading: piece `piece`, of 8 columns, of every 32nd line from `line` on.
  u32 piece = threadIdx.x % 8, half = halves ? piece / 4 : 0, line = threadIdx.x / 8;
  u32 row = first_row + half * LINES + line, column = first_column + piece * 8 - (half << columns);
  u8 *piece_bits = bits + line * Bits::PITCH + piece * 16;
  bool whole_tile = first_row + all_rows <= rows && first_column + (1 << columns) <= cols && cols % 8 == 0;
  load_pieces<4, 32, Data>(data + line * Data::PITCH + piece * 8 * sizeof(T), source, row, column, rows, cols, whole_tile);
  float kept_scale = 1.0f, kept_inverse = 1.0f;
  Whole whole = whole_of_stored<FORMAT, KEPT>(*source.most, group, kept_scale, kept_inverse);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *whole_factor = whole.factor;
  if (threadIdx.x < all_rows) {
    u32 word = group ? transform.signs[threadIdx.x / 32 & (1 << across) - 1] : 0;
    u32 sign = word << (31 - threadIdx.x % 32) & 0x80000000u;
    row_signs[threadIdx.x] = sign, row_factors[threadIdx.x] = __uint_as_float(0x3f800000u | sign);
  }
  if (ROWS_TOO && threadIdx.x < 64) {
    u32 word = group ? rows_transform.signs[group > BLOCK ? threadIdx.x / 32 : 0] : 0;
    column_signs[threadIdx.x / 32 * SIGNS + threadIdx.x % 32] = word << (31 - threadIdx.x % 32) & 0x80000000u;
  }
  // NOTE: who loads a piece draws its bits meanwhile.
  if (UNBIASED)
#pragma unroll
    for (u32 i = 0; i < 4; i++) store_bits(piece_bits + Bits::at(32 * i), philox(draw, row + i * 32, column / 8));
  asm volatile("cp.async.wait_all;");
  __syncthreads();

  float v[BLOCK];
  u32 lifted = 0;
  if (ROWS_TOO) {
    // A block along a row: columns 32 `side` to 32 `side` + 31 of a line.
    u32 line = threadIdx.x / 2, side = threadIdx.x % 2, row = first_row + line, column = first_column + 32 * side;
#pragma unroll
    for (int i = 0; i < BLOCK; i += 8)
      load_along(data + Data::at(line) + 64 * side + 2 * i, column_signs + SIGNS * side + i, draw, v + i);
    if (group) rotate(v, group > BLOCK ? 2 : 1, 1);
    bool inside = row < rows && column < rows_depth;
    u8 *to = by_rows + (size_t)row * rows_depth + column;
    SharedRowBits addends(bits + Bits::at(line) + 64 * side, draw);
    lifted += round_rotated<UNBIASED, FORMAT>(to, v, group ? rows_transform.scale : 1.0f, whole, addends, inside, source);
  }

  // A block down the columns: 32 rows from 32 `part`, of column `x` of the tile.
  u32 x = (warp << width) + (lane & ((1 << width) - 1)), part = lane >> width, place = x + (part / PARTS << columns);
  const u8 *from = data + Data::at(part % PARTS * BLOCK) + place * sizeof(T);
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4)
    load_down<KEPT, Data::PITCH, T>(from + i * Data::PITCH, row_signs + part * BLOCK + i, kept_scale, kept_inverse, draw, v + i);
  if (sums) {
    float total = sum_without_signs(v, row_factors + part * BLOCK);
    for (u32 mask = 1u << width; mask < WARP; mask *= 2) total += __shfl_xor_sync(FULL_WARP, total, mask);
    if (part == 0 && first_column + x < cols) sums[(size_t)blockIdx.y * cols + first_column + x] = total;
  }
  if (group) rotate(v, 1u << across, 1u << width);
  u32 first = first_row + part * BLOCK;
  bool inside = first < depth && first_column + x < cols;
  u8 *to = by_columns + (size_t)(first_column + x) * depth + first;
  SharedColumnBits<Bits::PITCH> addends(bits + Bits::at(part % PARTS * BLOCK), place, draw);
  lifted += round_rotated<UNBIASED, FORMAT>(to, v, group ? transform.scale : 1.0f, whole, addends, inside, source);
  add_raised(raised, lifted);
}

// ---- Tiles of groups of 64 ----------------------------------------------------------------------

// A tile has 64 rows and 64 columns, a thread block 128 threads, of which two beside each other take a row and then a
// column, each a block of 32.
//
// NOTE: on an H100 both forms keep the issue slots 79% busy and the pipe to shared and global memory 70%, so that both
// count. Of the latter's time a store takes as much as the lines that eight threads beside each other write to: four here,
// eight if the two threads of a column were half a warp apart. A thread that took a whole group would need no exchange, and
// 15% fewer instructions, but with its 128 registers only half as many warps run at once: 179 us for (16384, 4096),
// where this takes 119.
#define GROUP 64

// What a tile kernel makes.
#define ALONG_ROWS 1
#define DOWN_COLUMNS 2
#define BOTH (ALONG_ROWS | DOWN_COLUMNS)

// Rotates, rounds and stores a block, whose group's other one has the thread beside. Whether it was raised.
template <bool UNBIASED, int FORMAT, class Bits, class Source>
__device__ __forceinline__ bool quantize_block(u8 *to, float v[BLOCK], const Whole &whole, const Bits &bits, bool inside,
                                               const Source &source) {
#pragma unroll
  for (int stride = 1; stride < BLOCK; stride *= 2) add_and_subtract(v, stride);
  exchange(v, 1);
  return round_rotated<UNBIASED, FORMAT>(to, v, 0.125f, whole, bits, inside, source);
}

// FORMS and KEPT: see above. `sums`, where it is not null, gets a line of column sums for every line of tiles.
template <bool UNBIASED, int FORMAT, int FORMS, bool KEPT, class Source>
__device__ __forceinline__ void quantize_groups(u32 tile_x, u32 tile_y, u8 *by_rows, u8 *by_columns, float *whole_factor,
                                                u32 *raised, float *sums, const Source &source, u32 rows, u32 cols,
                                                u32 rows_depth, u32 depth, const Transform &rows_transform,
                                                const Transform &transform, const Draw &draw) {
  using T = typename Source::Number;
  using Data = Lines<sizeof(T), GROUP, 64>;
  using Bits = Lines<2, GROUP, 64>;
  extern __shared__ __align__(16) u8 shared[];
  u8 *data = shared, *bits = data + Data::BYTES;
  constexpr u32 SIGNS = BLOCK + 4; // so that threads read both halves of 64 from different banks
  u32 *row_signs = (u32 *)(bits + Bits::BYTES);          // (2, SIGNS): sign bits
  float *row_factors = (float *)(row_signs + 2 * SIGNS); // (2, SIGNS): +1 and -1
  u32 *column_signs = (u32 *)(row_factors + 2 * SIGNS);  // (2, SIGNS)
  u32 first_row = tile_y * GROUP, first_column = tile_x * GROUP;

  // Loading: piece `piece`, of 8 columns, of every 16th line from `line` on.
  u32 piece = threadIdx.x % 8, line = threadIdx.x / 8, row = first_row + line, column = first_column + piece * 8;
  u8 *piece_data = data + line * Data::PITCH + piece * 8 * sizeof(T);
  bool whole_tile = first_row + GROUP <= rows && first_column + GROUP <= cols && cols % 8 == 0;
  uint4 d[4], pre[4];
  bool in_registers = Source::BEHIND_GELU && whole_tile;
  if constexpr (Source::BEHIND_GELU) {
    if (whole_tile) {
      size_t at = (size_t)row * cols + column;
#pragma unroll
      for (u32 i = 0; i < 4; i++, at += (size_t)16 * cols)
        d[i] = *(const uint4 *)(source.d + at), pre[i] = *(const uint4 *)(source.pre + at);
    }
  }
  if (!in_registers) load_pieces<4, 16, Data>(piece_data, source, row, column, rows, cols, whole_tile);
  Whole whole;
  float kept_scale = 1.0f, kept_inverse = 1.0f;
  if constexpr (Source::BEHIND_GELU) whole = source.whole();
  else whole = whole_of_stored<FORMAT, KEPT>(*source.most, GROUP, kept_scale, kept_inverse);
  if (tile_x == 0 && tile_y == 0 && threadIdx.x == 0) *whole_factor = whole.factor;
  if (threadIdx.x < GROUP) {
    u32 half = threadIdx.x / 32, up = 31 - threadIdx.x % 32, place = half * SIGNS + threadIdx.x % 32;
    if (FORMS & DOWN_COLUMNS) {
      u32 sign = transform.signs[half] << up & 0x80000000u;
      row_signs[place] = sign, row_factors[place] = __uint_as_float(0x3f800000u | sign);
    }
    if (FORMS & ALONG_ROWS) column_signs[place] = rows_transform.signs[half] << up & 0x80000000u;
  }
  // Every thread draws the random bits of its block along the row while numbers arrive. NOTE: four counters of one row have
  // more of Philox' first rounds in common than four of one column. Along rows alone nobody else needs them; but kept in
  // registers they would be drawn only when they are needed, one after the other (10% slower).
  u32 own_line = threadIdx.x / 2, side = threadIdx.x % 2;
  u8 *own_bits = bits + Bits::at(own_line) + 64 * side;
  if (UNBIASED)
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      store_bits(own_bits + 16 * i, philox(draw, first_row + own_line, first_column / 8 + 4 * side + i));
  if (in_registers) {
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      *(uint4 *)(piece_data + Data::at(16 * i)) =
          make_uint4(behind_gelu(d[i].x, pre[i].x), behind_gelu(d[i].y, pre[i].y), behind_gelu(d[i].z, pre[i].z),
                     behind_gelu(d[i].w, pre[i].w));
  }
  if constexpr (!Source::BEHIND_GELU) asm volatile("cp.async.wait_all;");
  __syncthreads();

  float v[BLOCK];
  u32 lifted = 0;
  if constexpr (FORMS & ALONG_ROWS) {
    u32 row = first_row + own_line, column = first_column + BLOCK * side;
#pragma unroll
    for (int i = 0; i < BLOCK; i += 8)
      load_along(data + Data::at(own_line) + 2 * BLOCK * side + 2 * i, column_signs + SIGNS * side + i, draw, v + i);
    bool inside = row < rows && column < rows_depth;
    u8 *to = by_rows + (size_t)row * rows_depth + column;
    SharedRowBits addends(own_bits, draw);
    lifted += quantize_block<UNBIASED, FORMAT>(to, v, whole, addends, inside, source);
  }
  if constexpr (FORMS & DOWN_COLUMNS) {
    u32 x = threadIdx.x / 2, part = threadIdx.x % 2, column = first_column + x;
    const u8 *from = data + Data::at(part * BLOCK) + x * sizeof(T);
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4)
      load_down<KEPT, Data::PITCH, T>(from + i * Data::PITCH, row_signs + part * SIGNS + i, kept_scale, kept_inverse, draw,
                                      v + i);
    if (sums) {
      float sum = sum_without_signs(v, row_factors + part * SIGNS);
      sum += __shfl_xor_sync(FULL_WARP, sum, 1);
      if (part == 0 && column < cols) sums[(size_t)tile_y * cols + column] = sum;
    }
    u32 row = first_row + part * BLOCK;
    bool inside = row < depth && column < cols;
    u8 *to = by_columns + (size_t)column * depth + row;
    SharedColumnBits<Bits::PITCH> addends(bits + Bits::at(part * BLOCK), x, draw);
    lifted += quantize_block<UNBIASED, FORMAT>(to, v, whole, addends, inside, source);
  }
  add_raised(raised, lifted);
}

// Along rows alone: a thread block takes `each` whole rows, a thread one block of them.
template <bool UNBIASED>
__device__ __forceinline__ void quantize_rows(u8 *out, float *factor, u32 *raised, const u32 *most, const bf16 *source,
                                              u32 rows, u32 cols, u32 depth, u32 group, u32 each,
                                              const Transform &transform, const Draw &draw) {
  Place place = place_in_rows(rows, depth, each);
  float v[BLOCK], norm;
  load_rotated(v, norm, source, place, cols, group, transform);
  Whole whole = whole_scale<E5M2>(*most, group);
  if (blockIdx.x == 0 && threadIdx.x == 0) *factor = whole.factor;
  u8 *to = out + (size_t)place.row * depth + place.column;
  RowBits addends(draw, place.row, place.column);
  add_raised(raised, round_rotated<UNBIASED, E5M2>(to, v, norm, whole, addends, place.inside, Stored<bf16>{source, most}));
}

// ---- Names --------------------------------------------------------------------------------------

// In all: *factor times the result is the value; *raised += the number of raised blocks; *most holds the bits of the
// source's largest magnitude. `depth` is the reduction's length padded. MODE is nearest or unbiased.
//
// quantize_rows_e5m2_bf16_MODE: vectors are the rows of source (rows, cols). Overwrites out (rows, depth).
// Launch as quantize_rows_values_*, with _g64 as below.
//
// quantize_columns_{e4m3_{bf16,f32},e5m2_bf16}_MODE: vectors are the columns. Overwrites out (cols, depth), and where `sums`
// is not null, sums (grid y, cols) with the column sums of each tile's rows (of what was kept, in names with _kept). Grid:
// cols / 64, depth / 128, rounded up; with a group of 256, cols / 32, depth / 256. Block: 256.
// Dynamic shared memory: `Tiles::bytes` of the host. In names with _kept the source is first rounded as an FP8 forward pass
// keeps it, by current scaling.
// NOTE: blocks that take more tiles, one after the other, were slower (2 to 8 tiles: 0 to 14%), as were results that went
// through shared memory to be written in whole lines (5%).
//
// quantize_both_e5m2_bf16_MODE: both forms with one reading and one drawing of random bits, for groups of at most 64.
// Overwrites by_rows (rows, rows_depth) and by_columns (cols, depth). Launch as quantize_columns, with a grid that covers
// rows_depth.
//
// In names with _g64 `group` is 64. Grid: what covers source and results, in columns / 64 and rows / 64, rounded up.
// Block: 128.
//
// [re]quantize_both_gelu_e5m2_g64_bf16_MODE: the same of the gradient d gelu'(pre), which is made in the tiles alone.
// That saves writing and reading it, but its largest magnitude is not known then: *attempt, zeroed, gets that of a sample
// (sample_gelu_gradient_bf16), and where a rotated block does not fit what that leaves room for, 8 times it, requantize_*
// does all once more, with the scale that the highest block asks for. It is launched in any case, with a grid of any x
// and y 1; where there is nothing to do, it only adds to *raised.
#define SHAPE u32 rows, u32 cols, u32 depth, u32 group
#define BOTH_SHAPE                                                                                                  \
  u32 rows, u32 cols, u32 rows_depth, u32 depth, u32 group, const __grid_constant__ Transform rows_transform
#define GELU_SHAPE u32 rows, u32 cols, u32 rows_depth, u32 depth, const __grid_constant__ Transform rows_transform
#define RANDOM const __grid_constant__ Transform transform, const __grid_constant__ Draw draw
#define COLUMNS(T, FORMAT, KEPT, NAME, MODE, UNBIASED)                                                              \
  extern "C" __global__ void __launch_bounds__(256, sizeof(T) == 4 ? 3 : 4) quantize_columns_##NAME##_##MODE(       \
      u8 *out, float *factor, u32 *raised, const u32 *most, float *sums, const T *source, SHAPE, RANDOM) {          \
    begin();                                                                                                        \
    quantize_tile<UNBIASED, FORMAT, false, KEPT>(nullptr, out, factor, raised, sums, Stored<T>{source, most}, rows, \
                                                 cols, 0, depth, group, transform, transform, draw);                \
  }
#define GROUPS_OF_COLUMNS(T, FORMAT, KEPT, NAME, MODE, UNBIASED)                                                    \
  extern "C" __global__ void __launch_bounds__(128, sizeof(T) == 4 ? 6 : 8) quantize_columns_##NAME##_##MODE(       \
      u8 *out, float *factor, u32 *raised, const u32 *most, float *sums, const T *source, SHAPE, RANDOM) {          \
    begin();                                                                                                        \
    quantize_groups<UNBIASED, FORMAT, DOWN_COLUMNS, KEPT>(blockIdx.x, blockIdx.y, nullptr, out, factor, raised,     \
                                                          sums, Stored<T>{source, most}, rows, cols, 0, depth,      \
                                                          transform, transform, draw);                              \
  }
#define ALL(MODE, UNBIASED)                                                                                         \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_e5m2_bf16_##MODE(                             \
      u8 *out, float *factor, u32 *raised, const u32 *most, const bf16 *source, SHAPE, u32 each, RANDOM) {          \
    begin();                                                                                                        \
    quantize_rows<UNBIASED>(out, factor, raised, most, source, rows, cols, depth, group, each, transform, draw);    \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 8) quantize_rows_e5m2_g64_bf16_##MODE(                          \
      u8 *out, float *factor, u32 *raised, const u32 *most, const bf16 *source, SHAPE, RANDOM) {                    \
    begin();                                                                                                        \
    quantize_groups<UNBIASED, E5M2, ALONG_ROWS, false>(blockIdx.x, blockIdx.y, out, nullptr, factor, raised,        \
                                                       nullptr, Stored<bf16>{source, most}, rows, cols, depth, 0,   \
                                                       transform, transform, draw);                                 \
  }                                                                                                                 \
  COLUMNS(bf16, E4M3, false, e4m3_bf16, MODE, UNBIASED)                                                             \
  COLUMNS(bf16, E4M3, true, e4m3_kept_bf16, MODE, UNBIASED)                                                         \
  COLUMNS(float, E4M3, false, e4m3_f32, MODE, UNBIASED)                                                             \
  COLUMNS(bf16, E5M2, false, e5m2_bf16, MODE, UNBIASED)                                                             \
  GROUPS_OF_COLUMNS(bf16, E4M3, false, e4m3_g64_bf16, MODE, UNBIASED)                                               \
  GROUPS_OF_COLUMNS(bf16, E4M3, true, e4m3_kept_g64_bf16, MODE, UNBIASED)                                           \
  GROUPS_OF_COLUMNS(float, E4M3, false, e4m3_g64_f32, MODE, UNBIASED)                                               \
  GROUPS_OF_COLUMNS(bf16, E5M2, false, e5m2_g64_bf16, MODE, UNBIASED)                                               \
  extern "C" __global__ void __launch_bounds__(256, 4) quantize_both_e5m2_bf16_##MODE(                              \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, const u32 *most, float *sums, const bf16 *source,    \
      BOTH_SHAPE, RANDOM) {                                                                                         \
    begin();                                                                                                        \
    quantize_tile<UNBIASED, E5M2, true, false>(by_rows, by_columns, factor, raised, sums,                           \
                                               Stored<bf16>{source, most}, rows, cols, rows_depth, depth, group,    \
                                               rows_transform, transform, draw);                                    \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 8) quantize_both_e5m2_g64_bf16_##MODE(                          \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, const u32 *most, float *sums, const bf16 *source,    \
      BOTH_SHAPE, RANDOM) {                                                                                         \
    begin();                                                                                                        \
    quantize_groups<UNBIASED, E5M2, BOTH, false>(blockIdx.x, blockIdx.y, by_rows, by_columns, factor, raised, sums, \
                                                 Stored<bf16>{source, most}, rows, cols, rows_depth, depth,         \
                                                 rows_transform, transform, draw);                                  \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 8) quantize_both_gelu_e5m2_g64_bf16_##MODE(                     \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, Attempt *attempt, float *sums, const bf16 *d,        \
      const bf16 *pre, GELU_SHAPE, RANDOM) {                                                                        \
    begin();                                                                                                        \
    quantize_groups<UNBIASED, E5M2, BOTH, false>(blockIdx.x, blockIdx.y, by_rows, by_columns, factor,               \
                                                 &attempt->raised, sums, BehindGelu<false>{d, pre, attempt}, rows,  \
                                                 cols, rows_depth, depth, rows_transform, transform, draw);         \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 4) requantize_both_gelu_e5m2_g64_bf16_##MODE(                   \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, Attempt *attempt, float *sums, const bf16 *d,        \
      const bf16 *pre, GELU_SHAPE, RANDOM) {                                                                        \
    begin();                                                                                                        \
    if (attempt->above == 0) {                                                                                      \
      if (blockIdx.x == 0 && threadIdx.x == 0) *raised += attempt->raised;                                          \
      return;                                                                                                       \
    }                                                                                                               \
    u32 x = blockIdx.x, y = 0, across = (rows_depth + 63) / 64, down = (depth + 63) / 64;                           \
    for (;; x += gridDim.x) {                                                                                       \
      while (x >= across) x -= across, y++;                                                                         \
      if (y >= down) return;                                                                                        \
      quantize_groups<UNBIASED, E5M2, BOTH, false>(x, y, by_rows, by_columns, factor, raised, sums,                 \
                                                   BehindGelu<true>{d, pre, attempt}, rows, cols, rows_depth,       \
                                                   depth, rows_transform, transform, draw);                         \
      __syncthreads();                                                                                              \
    }                                                                                                               \
  }
ALL(nearest, false)
ALL(unbiased, true)
#endif
