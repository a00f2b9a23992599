// MXFP4 operands as FP8 numbers, which tensor cores multiply exactly: dy in E5M2, x and W in E4M3.
//
// An E2M1 element times a power of two is such a number as long as the block's scale lies within the format's range below
// that of the tensor, one power of two that the GEMM applies. It comes from the tensor's largest magnitude, which whoever
// wrote the tensor has noted, so nothing here waits for a maximum. A rotation can raise a magnitude by sqrt(group). A block
// further down is rounded with the lowest scale that fits: a valid one, without bias where the rounding is; it is counted.
//
// A tile kernel makes the form down the columns, transposed, of a tile in shared memory, and for dy, which both products
// need, from the same tile and the same random bits the form along the rows. After the tile is there no thread waits for
// another warp's.
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
  return whole_up_to<FORMAT>(scale_byte(most) + (group == 0 ? 0 : group <= 64 ? 3 : 4));
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
  int byte = max((int)(magnitude >> 23), 2) - 2, lowest = (int)top - Format<FORMAT>::RANGE;
  unit = power(max(byte, lowest) + Format<FORMAT>::HIGHEST - top);
  if (extreme(top)) {
    move(v, top, norm);
    factor = factor_in_tensor<UNBIASED, FORMAT>(1.0f, moved(top));
  }
  return byte < lowest && magnitude > 0;
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
  u32 low = pack_fp8<FORMAT>(0.0f, 0.5f * unit) | pack_fp8<FORMAT>(unit, 1.5f * unit) << 16;
  u32 high = pack_fp8<FORMAT>(2.0f * unit, 3.0f * unit) | pack_fp8<FORMAT>(4.0f * unit, 6.0f * unit) << 16;
  return (u64)high << 32 | low;
}

// Rounds a block and stores its 32 bytes at `to`. `unit`: as an FP8 number.
template <bool UNBIASED, int FORMAT, class Bits>
__device__ __forceinline__ void round_to(void *to, const float v[BLOCK], float factor, float unit, Bits bits, bool inside) {
  u32 words[4];
  u64 numbers = UNBIASED ? fp8_numbers<FORMAT>(unit) : 0;
  float shift = __uint_as_float((128u + LOWERED << 23) - __float_as_uint(unit));
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4) {
    if (UNBIASED) {
      words[i / 4 % 4] = round_four(v + i, factor, shift, numbers, bits, i);
    } else {
      float q[4];
#pragma unroll
      for (int j = 0; j < 4; j++) q[j] = round_nearest(v[i + j], factor, unit);
      words[i / 4 % 4] = pack_fp8<FORMAT>(q[0], q[1]) | pack_fp8<FORMAT>(q[2], q[3]) << 16;
    }
    if (i % 16 == 12 && inside) ((uint4 *)to)[i / 16] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// ---- Tiles --------------------------------------------------------------------------------------

// A tile has 32 PARTS rows and 64 columns; for groups of 256, 256 rows and 32 columns, which lie in shared memory as two
// halves side by side. In a line of it are 64 numbers of SIZE bytes; each 32 lines are shifted, so that threads that read
// down columns 32 lines apart do so from different banks.
template <u32 SIZE, u32 PARTS> struct Lines {
  static constexpr u32 PITCH = 64 * SIZE + 16, SHIFT = SIZE == 4 || PARTS == 2 ? 32 : 16;
  static constexpr u32 BYTES = 32 * PARTS * PITCH + (PARTS - 1) * SHIFT;
  static __device__ __forceinline__ u32 at(u32 line) { return line * PITCH + line / 32 * SHIFT; }
  // From one of the first 8 PARTS lines to the one `i` times as many below it.
  static __device__ __forceinline__ u32 below(u32 i) { return i * 8 * PARTS * PITCH + i * 8 * PARTS / 32 * SHIFT; }
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

// The butterfly; a group of 64 known at compile time needs no loop.
template <u32 GROUP> __device__ __forceinline__ void rotate_in_tile(float v[BLOCK], u32 blocks, u32 distance) {
  if constexpr (GROUP == 64) {
#pragma unroll
    for (int stride = 1; stride < BLOCK; stride *= 2) add_and_subtract(v, stride);
    exchange(v, distance);
  } else {
    rotate(v, blocks, distance);
  }
}

// The numbers of a tile as they lie in memory, with the largest magnitude of the tensor.
template <class T> struct Stored {
  using Number = T;
  static constexpr bool BEHIND_GELU = false;
  const T *numbers;
  const u32 *most;
};

// An attempt to quantize numbers whose largest magnitude is not known: that of a sample, the highest scale byte that
// does not fit what was made of it (0 where all fit), and how many blocks were raised.
struct Attempt {
  u32 most, above, raised;
};

// The numbers d gelu'(pre), rounded to bf16, which lie nowhere: in an attempt, or `AGAIN` after one that failed.
template <bool AGAIN> struct BehindGelu {
  using Number = bf16;
  static constexpr bool BEHIND_GELU = true;
  const bf16 *d, *pre;
  Attempt *attempt;
  __device__ __forceinline__ Whole whole() const {
    return AGAIN ? whole_up_to<E5M2>(attempt->above) : whole_scale<E5M2>(attempt->most, 64);
  }
  // Notes a block that does not fit, as one that is not finite never does. Then what else was made is of no use.
  __device__ __forceinline__ void note(u32 magnitude, u32 top) const {
    u32 byte = max(magnitude >> 23, 2u) - 2;
    if (!AGAIN && byte > top && byte > *(volatile u32 *)&attempt->above) atomicMax(&attempt->above, byte);
  }
};

__device__ __forceinline__ u32 behind_gelu(u32 d, u32 pre) {
  return pack_bf16(__fmul_rn(low_f32(d), gelu_derivative(low_f32(pre))),
                   __fmul_rn(high_f32(d), gelu_derivative(high_f32(pre))));
}

// GROUP: the group of both transforms where it is 64, and then a tile has 64 rows; else 0, and `any_group` tells. KEPT: the
// source is what an FP8 forward pass made its own form from, with which the columns begin.
template <bool UNBIASED, int FORMAT, bool BOTH, bool KEPT, u32 GROUP, class Source>
__device__ __forceinline__ void quantize_tile(u32 tile_x, u32 tile_y, u8 *by_rows, u8 *by_columns, float *whole_factor,
                                              u32 *raised, float *sums, const Source &source, u32 rows, u32 cols,
                                              u32 rows_depth, u32 depth, u32 any_group,
                                              const Transform &rows_transform, const Transform &transform,
                                              const Draw &draw) {
  using T = typename Source::Number;
  constexpr u32 PARTS = GROUP ? 2 : 4, LINES = 32 * PARTS;
  using Data = Lines<sizeof(T), PARTS>;
  using Bits = Lines<2, PARTS>;
  const u32 group = GROUP ? GROUP : any_group;
  extern __shared__ __align__(16) u8 shared[];
  u8 *data = shared, *bits = data + Data::BYTES;
  u32 *row_signs = (u32 *)(bits + Bits::BYTES);    // (256): sign bits
  float *row_factors = (float *)(row_signs + 256); // (256): +1 and -1
  u32 *column_signs = (u32 *)(row_factors + 256);  // (2, SIGNS), so that threads read both halves from different banks
  constexpr u32 SIGNS = BLOCK + 4;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  // Blocks of a group, as a power of two; columns of a tile, and of those that a warp takes.
  u32 across = group > BLOCK ? __ffs(group) - 6 : 0, halves = !GROUP && across == 3 ? 1 : 0, columns = 6 - halves;
  u32 width = PARTS == 2 ? 4 : halves ? 2 : 3, all_rows = LINES << halves;
  u32 first_row = tile_y * all_rows, first_column = tile_x << columns;

  // Loading: piece `piece`, of 8 columns, of every `8 PARTS`th line from `line` on.
  u32 piece = threadIdx.x % 8, half = halves ? piece / 4 : 0, line = threadIdx.x / 8;
  u32 row = first_row + half * LINES + line, column = first_column + piece * 8 - (half << columns);
  u8 *piece_data = data + line * Data::PITCH + piece * 8 * sizeof(T), *piece_bits = bits + line * Bits::PITCH + piece * 16;
  bool whole_tile = first_row + all_rows <= rows && first_column + (1 << columns) <= cols && cols % 8 == 0;
  uint4 d[4], pre[4];
  if (whole_tile) {
    if constexpr (Source::BEHIND_GELU) {
      size_t at = (size_t)row * cols + column;
#pragma unroll
      for (u32 i = 0; i < 4; i++, at += (size_t)(8 * PARTS) * cols)
        d[i] = *(const uint4 *)(source.d + at), pre[i] = *(const uint4 *)(source.pre + at);
    } else {
      const T *from = source.numbers + (size_t)row * cols + column;
#pragma unroll
      for (u32 i = 0; i < 4; i++, from += (size_t)(8 * PARTS) * cols) {
        u8 *to = piece_data + Data::below(i);
        copy_async(to, from);
        if (sizeof(T) == 4) copy_async(to + 16, from + 4);
      }
    }
  } else {
#pragma unroll 1
    for (u32 i = 0; i < 32; i++) {
      u32 r = row + i / 8 * 8 * PARTS, c = column + i % 8;
      T number = {};
      if (r < rows && c < cols) {
        size_t at = (size_t)r * cols + c;
        if constexpr (Source::BEHIND_GELU) number.bits = (u16)behind_gelu(source.d[at].bits, source.pre[at].bits);
        else number = source.numbers[at];
      }
      ((T *)(piece_data + Data::below(i / 8)))[i % 8] = number;
    }
  }
  Whole whole;
  float kept_scale = 1.0f, kept_inverse = 1.0f;
  if constexpr (Source::BEHIND_GELU) {
    whole = source.whole();
  } else {
    u32 largest = *source.most;
    if (KEPT) {
      kept_scale = e4m3_scale(largest), kept_inverse = 1.0f / kept_scale;
      float kept = __uint_as_float(largest), also = 0.0f;
      keep_as_e4m3(kept, also, kept_scale, kept_inverse);
      largest = __float_as_uint(kept);
    }
    whole = whole_scale<FORMAT>(largest, group);
  }
  if (tile_x == 0 && tile_y == 0 && threadIdx.x == 0) *whole_factor = whole.factor;
  if (threadIdx.x < all_rows) {
    u32 word = group ? transform.signs[threadIdx.x / 32 & (1 << across) - 1] : 0;
    u32 sign = word << (31 - threadIdx.x % 32) & 0x80000000u;
    row_signs[threadIdx.x] = sign, row_factors[threadIdx.x] = __uint_as_float(0x3f800000u | sign);
  }
  if (BOTH && threadIdx.x < 64) {
    u32 word = group ? rows_transform.signs[group > BLOCK ? threadIdx.x / 32 : 0] : 0;
    column_signs[threadIdx.x / 32 * SIGNS + threadIdx.x % 32] = word << (31 - threadIdx.x % 32) & 0x80000000u;
  }
  // NOTE: who loads a piece draws its bits meanwhile.
  if (UNBIASED)
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      *(uint4 *)(piece_bits + Bits::below(i)) = philox(draw, row + i * 8 * PARTS, column / 8);
  if constexpr (Source::BEHIND_GELU) {
    if (whole_tile)
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        *(uint4 *)(piece_data + Data::below(i)) =
            make_uint4(behind_gelu(d[i].x, pre[i].x), behind_gelu(d[i].y, pre[i].y), behind_gelu(d[i].z, pre[i].z),
                       behind_gelu(d[i].w, pre[i].w));
  } else {
    asm volatile("cp.async.wait_all;");
  }
  __syncthreads();

  float v[BLOCK], unit;
  u32 lifted = 0;
  if (BOTH) {
    // A block along a row: columns 32 `side` to 32 `side` + 31 of a line.
    u32 line = threadIdx.x / 2, side = threadIdx.x % 2, row = first_row + line, column = first_column + 32 * side;
    const u8 *from = data + Data::at(line) + 64 * side;
    const u32 *signs = column_signs + SIGNS * side;
#pragma unroll
    for (int i = 0; i < BLOCK; i += 8) {
      uint4 raw = *(const uint4 *)(from + 2 * i), first = *(const uint4 *)(signs + i), second = *(const uint4 *)(signs + i + 4);
      pair_with_signs(raw.x, first.x, first.y, draw, v + i);
      pair_with_signs(raw.y, first.z, first.w, draw, v + i + 2);
      pair_with_signs(raw.z, second.x, second.y, draw, v + i + 4);
      pair_with_signs(raw.w, second.z, second.w, draw, v + i + 6);
    }
    float norm = GROUP ? 0.125f : group ? rows_transform.scale : 1.0f;
    float factor = factor_in_tensor<UNBIASED, FORMAT>(norm, whole.top);
    if (group) rotate_in_tile<GROUP>(v, group > BLOCK ? 2 : 1, 1);
    bool inside = row < rows && column < rows_depth;
    u32 magnitude = block_magnitude(v, norm);
    if constexpr (Source::BEHIND_GELU) source.note(magnitude, whole.top);
    lifted += scale_in_tensor<UNBIASED, FORMAT>(v, norm, magnitude, whole.top, factor, unit) && inside;
    SharedRowBits addends(bits + Bits::at(line) + 64 * side, draw);
    round_to<UNBIASED, FORMAT>(by_rows + (size_t)row * rows_depth + column, v, factor, unit, addends, inside);
  }

  // A block down the columns: 32 rows from 32 `part`, of column `x` of the tile.
  u32 x = (warp << width) + (lane & ((1 << width) - 1)), part = lane >> width, place = x + (part / PARTS << columns);
  const u8 *from = data + part % PARTS * (32 * Data::PITCH + Data::SHIFT) + place * sizeof(T);
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4) {
    uint4 sign = *(const uint4 *)&row_signs[part * BLOCK + i];
    u32 signs[4] = {sign.x, sign.y, sign.z, sign.w};
    if (KEPT) {
#pragma unroll
      for (int j = 0; j < 4; j++) v[i + j] = to_f32(*(const T *)(from + (i + j) * Data::PITCH));
#pragma unroll
      for (int j = 0; j < 4; j += 2) keep_as_e4m3(v[i + j], v[i + j + 1], kept_scale, kept_inverse);
#pragma unroll
      for (int j = 0; j < 4; j++) v[i + j] = with_sign(v[i + j], signs[j], draw);
    } else {
      // NOTE: loading matrices (ldmatrix, transposed) takes fewer instructions, but pairs are taken apart on the pipe of
      // integer operations, the busier one. Of these numbers it gained nothing for both forms, and 2% for columns alone; of
      // the random bits it lost 2% (H100).
#pragma unroll
      for (int j = 0; j < 4; j++) v[i + j] = with_sign(*(const T *)(from + (i + j) * Data::PITCH), signs[j], draw);
    }
  }
  if (sums) {
    // NOTE: on tensor cores, a product with ones, sums took 14% of the kernel's time (H100); so 3%.
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4) {
      float4 sign = *(const float4 *)&row_factors[part * BLOCK + i];
      sum[0] = __fmaf_rn(v[i], sign.x, sum[0]), sum[1] = __fmaf_rn(v[i + 1], sign.y, sum[1]);
      sum[2] = __fmaf_rn(v[i + 2], sign.z, sum[2]), sum[3] = __fmaf_rn(v[i + 3], sign.w, sum[3]);
    }
    float total = sum[0] + sum[1] + (sum[2] + sum[3]);
    for (u32 mask = 1u << width; mask < WARP; mask *= 2) total += __shfl_xor_sync(FULL_WARP, total, mask);
    if (part == 0 && first_column + x < cols) sums[(size_t)tile_y * cols + first_column + x] = total;
  }
  float norm = GROUP ? 0.125f : group ? transform.scale : 1.0f;
  float factor = factor_in_tensor<UNBIASED, FORMAT>(norm, whole.top);
  if (group) rotate_in_tile<GROUP>(v, 1u << across, 1u << width);
  u32 first = first_row + part * BLOCK;
  bool inside = first < depth && first_column + x < cols;
  u32 magnitude = block_magnitude(v, norm);
  if constexpr (Source::BEHIND_GELU) source.note(magnitude, whole.top);
  lifted += scale_in_tensor<UNBIASED, FORMAT>(v, norm, magnitude, whole.top, factor, unit) && inside;
  SharedColumnBits<Bits::PITCH> addends(bits + part % PARTS * (32 * Bits::PITCH + Bits::SHIFT) + place * 2, draw);
  round_to<UNBIASED, FORMAT>(by_columns + (size_t)(first_column + x) * depth + first, v, factor, unit, addends, inside);
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
  float row_factor = factor_in_tensor<UNBIASED, E5M2>(norm, whole.top), unit;
  u32 magnitude = block_magnitude(v, norm);
  bool lifted = scale_in_tensor<UNBIASED, E5M2>(v, norm, magnitude, whole.top, row_factor, unit);
  add_raised(raised, lifted && place.inside);
  round_to<UNBIASED, E5M2>(out + (size_t)place.row * depth + place.column, v, row_factor, unit,
                           RowBits(draw, place.row, place.column), place.inside);
}

// ---- Names --------------------------------------------------------------------------------------

// In all: *factor times the result is the value; *raised += the number of raised blocks; *most holds the bits of the
// source's largest magnitude. `depth` is the reduction's length padded. MODE is nearest or unbiased.
//
// quantize_rows_e5m2_bf16_MODE: vectors are the rows of source (rows, cols). Overwrites out (rows, depth).
// Launch as quantize_rows_values_*.
//
// quantize_columns_{e4m3_{bf16,f32},e5m2_bf16}_MODE: vectors are the columns. Overwrites out (cols, depth), and where `sums`
// is not null, sums (grid y, cols) with the column sums of each tile's rows (of what was kept, in names with _kept). Grid:
// cols / 64, depth / 128, rounded up; with a group of 256, cols / 32, depth / 256. Block: 256. For names with _g64 group is
// 64, grid: cols / 64, depth / 64, block: 128.
// Dynamic shared memory: `Tiles::bytes` of the host. In names with _kept the source is first rounded as an FP8 forward pass
// keeps it, by current scaling.
// NOTE: blocks that take more tiles, one after the other, were slower (2 to 8 tiles: 0 to 14%), as were results that went
// through shared memory to be written in whole lines (5%).
//
// quantize_both_e5m2_bf16_MODE: both forms with one reading and one drawing of random bits, for groups of at most 64.
// Overwrites by_rows (rows, rows_depth) and by_columns (cols, depth). Launch as quantize_columns, with a grid that covers
// rows_depth.
//
// [re]quantize_both_gelu_e5m2_g64_bf16_MODE: the same of the gradient d gelu'(pre), which is made in the tiles alone.
// That saves writing and reading it, but its largest magnitude is not known then: *attempt, zeroed, gets that of a sample
// (sample_gelu_gradient_bf16), and where a rotated block does not fit what that leaves room for, 8 times it, requantize_*
// does all once more, with the scale that the highest block asks for. It is launched in any case, with a grid of any x
// and y 1; where there is nothing to do, it only adds to *raised.
#define SHAPE u32 rows, u32 cols, u32 depth, u32 group
#define RANDOM const __grid_constant__ Transform transform, const __grid_constant__ Draw draw
#define BOUNDS(T, GROUP) __launch_bounds__(GROUP ? 128 : 256, (sizeof(T) == 4 ? 3 : 4) * (GROUP ? 2 : 1))
#define COLUMNS(T, FORMAT, KEPT, NAME, MODE, UNBIASED, GROUP)                                                       \
  extern "C" __global__ void BOUNDS(T, GROUP) quantize_columns_##NAME##_##MODE(                                     \
      u8 *out, float *factor, u32 *raised, const u32 *most, float *sums, const T *source, SHAPE, RANDOM) {          \
    begin();                                                                                                        \
    quantize_tile<UNBIASED, FORMAT, false, KEPT, GROUP>(blockIdx.x, blockIdx.y, nullptr, out, factor, raised, sums, \
                                                        Stored<T>{source, most}, rows, cols, 0, depth, group,       \
                                                        transform, transform, draw);                                \
  }
#define BOTH_FORMS(NAME, MODE, UNBIASED, GROUP)                                                                     \
  extern "C" __global__ void BOUNDS(bf16, GROUP) quantize_both_##NAME##_##MODE(                                     \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, const u32 *most, float *sums, const bf16 *source,    \
      u32 rows, u32 cols, u32 rows_depth, u32 depth, u32 group,                                                     \
      const __grid_constant__ Transform rows_transform, RANDOM) {                                                   \
    begin();                                                                                                        \
    quantize_tile<UNBIASED, E5M2, true, false, GROUP>(blockIdx.x, blockIdx.y, by_rows, by_columns, factor, raised,  \
                                                      sums, Stored<bf16>{source, most}, rows, cols, rows_depth,     \
                                                      depth, group, rows_transform, transform, draw);               \
  }
#define GELU_FORMS(MODE, UNBIASED)                                                                                  \
  extern "C" __global__ void BOUNDS(bf16, 64) quantize_both_gelu_e5m2_g64_bf16_##MODE(                              \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, Attempt *attempt, float *sums, const bf16 *d,        \
      const bf16 *pre, u32 rows, u32 cols, u32 rows_depth, u32 depth,                                               \
      const __grid_constant__ Transform rows_transform, RANDOM) {                                                   \
    begin();                                                                                                        \
    quantize_tile<UNBIASED, E5M2, true, false, 64>(blockIdx.x, blockIdx.y, by_rows, by_columns, factor,             \
                                                   &attempt->raised, sums, BehindGelu<false>{d, pre, attempt},      \
                                                   rows, cols, rows_depth, depth, 64, rows_transform, transform,    \
                                                   draw);                                                           \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128, 4) requantize_both_gelu_e5m2_g64_bf16_##MODE(                   \
      u8 *by_rows, u8 *by_columns, float *factor, u32 *raised, Attempt *attempt, float *sums, const bf16 *d,        \
      const bf16 *pre, u32 rows, u32 cols, u32 rows_depth, u32 depth,                                               \
      const __grid_constant__ Transform rows_transform, RANDOM) {                                                   \
    begin();                                                                                                        \
    if (attempt->above == 0) {                                                                                      \
      if (blockIdx.x == 0 && threadIdx.x == 0) *raised += attempt->raised;                                          \
      return;                                                                                                       \
    }                                                                                                               \
    u32 x = blockIdx.x, y = 0, across = (rows_depth + 63) / 64, down = (depth + 63) / 64;                           \
    for (;; x += gridDim.x) {                                                                                       \
      while (x >= across) x -= across, y++;                                                                         \
      if (y >= down) return;                                                                                        \
      quantize_tile<UNBIASED, E5M2, true, false, 64>(x, y, by_rows, by_columns, factor, raised, sums,               \
                                                     BehindGelu<true>{d, pre, attempt}, rows, cols, rows_depth,     \
                                                     depth, 64, rows_transform, transform, draw);                   \
      __syncthreads();                                                                                              \
    }                                                                                                               \
  }
#define ALL(MODE, UNBIASED)                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_e5m2_bf16_##MODE(                             \
      u8 *out, float *factor, u32 *raised, const u32 *most, const bf16 *source, SHAPE, u32 each, RANDOM) {          \
    begin();                                                                                                        \
    quantize_rows<UNBIASED>(out, factor, raised, most, source, rows, cols, depth, group, each, transform, draw);    \
  }                                                                                                                 \
  COLUMNS(bf16, E4M3, false, e4m3_bf16, MODE, UNBIASED, 0)                                                          \
  COLUMNS(bf16, E4M3, false, e4m3_g64_bf16, MODE, UNBIASED, 64)                                                     \
  COLUMNS(bf16, E4M3, true, e4m3_kept_bf16, MODE, UNBIASED, 0)                                                      \
  COLUMNS(bf16, E4M3, true, e4m3_kept_g64_bf16, MODE, UNBIASED, 64)                                                 \
  COLUMNS(float, E4M3, false, e4m3_f32, MODE, UNBIASED, 0)                                                          \
  COLUMNS(float, E4M3, false, e4m3_g64_f32, MODE, UNBIASED, 64)                                                     \
  COLUMNS(bf16, E5M2, false, e5m2_bf16, MODE, UNBIASED, 0)                                                          \
  COLUMNS(bf16, E5M2, false, e5m2_g64_bf16, MODE, UNBIASED, 64)                                                     \
  BOTH_FORMS(e5m2_bf16, MODE, UNBIASED, 0)                                                                           \
  BOTH_FORMS(e5m2_g64_bf16, MODE, UNBIASED, 64)                                                                     \
  GELU_FORMS(MODE, UNBIASED)
ALL(nearest, false)
ALL(unbiased, true)
#endif
