// MXFP4 operands as FP8 numbers, which tensor cores multiply exactly: dy in E5M2, x and W in E4M3.
//
// An E2M1 element times a power of two is such a number as long as the block's scale lies within
// the format's range below that of the tensor, one power of two that the GEMM applies. It comes
// from the tensor's largest magnitude, which whoever wrote the tensor has noted, so nothing here
// waits for a maximum. A rotation can raise a magnitude by sqrt(group). A block further down is
// rounded with the lowest scale that fits: a valid one, without bias where the rounding is; it is
// counted.
//
// A tile kernel makes the form down the columns, transposed, of a tile in shared memory, and for
// dy, which both products need, from the same tile and the same random bits the form along the
// rows. After the tile is there no thread waits for another warp's. The usual group of 64 has a
// kernel of its own.
//
// Rounding without bias needs no cases: scaled so that the block's unit is f32's smallest normal
// number, a value's bits count even steps below it and keep one mantissa bit above, as E2M1 does.
// Adding random bits below rounds, the bits above are E2M1's code, and a permutation of bytes looks
// up its FP8 number.

// `HIGHEST`: biased exponent of a block's scale that lies highest; `RANGE`: how many binades others
// may lie below it.
template <Format FORMAT> struct Binades {
  static constexpr int HIGHEST = FORMAT == E4M3 ? 133 : 140, RANGE = FORMAT == E4M3 ? 14 : 28;
};

// ---- Scales -------------------------------------------------------------------------------------

// The scale byte that no block of a tensor exceeds, within what the other numbers can hold, and the
// factor that gives values back. A NaN makes the whole product NaN, as does an amax whose scale
// would have the byte 253.
struct Whole {
  u32 top;
  float factor;
  u32 rounds_up; // as `Quantize` has it
};
template <Format FORMAT> __device__ __forceinline__ Whole whole_up_to(u32 top) {
  Whole whole;
  whole.top = top > 252 ? 127 : max(top, 16u);
  whole.factor = top > 252 ? __uint_as_float(0x7fc00000u)
                           : power(whole.top - (Binades<FORMAT>::HIGHEST - 127));
  whole.rounds_up = 0;
  return whole;
}
template <Format FORMAT>
__device__ __forceinline__ Whole whole_scale(u32 amax, u32 group, u32 rounds_up = 0) {
  // NOTE: a scale byte is 0 from an exponent of 2 down, but all low ones become one.
  int room = group == 0 ? 0 : group <= 64 ? 3 : 4;
  Whole whole = whole_up_to<FORMAT>(max((int)(amax + rounds_up >> 23) - 2 + room, 0));
  whole.rounds_up = rounds_up;
  return whole;
}

// Numbers that will be rounded without bias are this many binades lower than their FP8 form, so
// that `shift` is ordinary.
#define LOWERED 32

// What numbers are multiplied by to be rounded in units of a tensor's scale. `norm` is what
// block_amax leaves of it.
template <bool UNBIASED, Format FORMAT>
__device__ __forceinline__ float factor_in_tensor(float norm, float range, u32 top) {
  float rest = __float_as_uint(norm) & 0x007fffffu ? 1.0f : norm;
  return __fmul_rn(range * rest,
                   power(127 + Binades<FORMAT>::HIGHEST - (UNBIASED ? LOWERED : 0) - top));
}

// The unit that a block with this largest magnitude is rounded to; `factor` is that of the tensor,
// and changes where the block has to be moved. Whether its scale is clamped.
template <bool UNBIASED, Format FORMAT>
__device__ __forceinline__ bool scale_in_tensor(float v[BLOCK], float norm, float range,
                                                u32 amax, const Whole &whole, float &factor,
                                                float &unit) {
  // A scale byte is its amax's exponent, rounded up, less 2, and at least 0: so is all of this, 23
  // bits up.
  u32 top = whole.top;
  int lowest = (int)top - Binades<FORMAT>::RANGE;
  u32 floor = (u32)max(lowest, 0) + 2 << 23;
  unit = __uint_as_float(max(amax + whole.rounds_up & 0x7f800000u, floor) +
                         (Binades<FORMAT>::HIGHEST - 2 - top << 23));
  if (extreme(top)) {
    move(v, top, norm);
    factor = factor_in_tensor<UNBIASED, FORMAT>(1.0f, range, moved(top));
  }
  // 0 < amax < floor - rounds_up.
  return amax - 1 < (lowest > 0 ? floor - whole.rounds_up - 1 : 0);
}

// Adds the numbers that the threads of a warp have counted.
__device__ __forceinline__ void add_clamped(u32 *counter, u32 clamped) {
  clamped = __reduce_add_sync(FULL_WARP, clamped);
  if (clamped && threadIdx.x % WARP == 0) atomicAdd(counter, clamped);
}

// ---- Rounding -----------------------------------------------------------------------------------

// Four numbers rounded without bias, as FP8. `shift` makes the block's unit 2^-126, where f32's
// even steps begin: from there down a number's bits count steps of 2^-23 units, so that adding
// random bits below bit 22 rounds to the grid's steps everywhere, and the bits from 22 on are
// E2M1's code. No sign needs to be taken off for that. `numbers` holds the FP8 number of each code,
// for a permutation of bytes to look up four at once.
template <class Bits>
__device__ __forceinline__ u32 round_four(const float v[4], float factor, float shift, u64 numbers,
                                          Bits &bits, int i) {
  const Draw &draw = bits.draw;
  float y[4];
  u32 code[4]; // in the top byte
#pragma unroll
  for (int j = 0; j < 4; j++) {
    // NOTE: two multiplications, since the definition rounds the product with `factor` before it
    // loses what lies deeper.
    y[j] = __fmul_rn(__fmul_rn(v[j], factor), shift);
    code[j] = __float_as_uint(y[j]) * draw.shift2 + bits.addend(i + j);
  }
  u32 even = __byte_perm(code[0], code[2], 0x73), odd = __byte_perm(code[1], code[3], 0x73);
  u32 out = pick_bytes(numbers, odd * draw.shift4 + even);
  // As FP8, y is a zero of its sign.
  return or_bits(out, pack_e5m2(y[0], y[1]) | pack_e5m2(y[2], y[3]) << 16);
}

// The FP8 numbers of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 units.
template <Format FORMAT> __device__ __forceinline__ u64 fp8_numbers(float unit) {
  u32 low = pack_fp8<FORMAT>(0.0f, 0.5f * unit) | pack_fp8<FORMAT>(unit, 1.5f * unit) << 16, high;
  if (FORMAT == E5M2) {
    // From 2 units on they are ordinary, with two bits below the exponent, whose bias is 15.
    high =
        (__float_as_uint(unit) >> 21) * 0x01010101u + (0x0a080604u - (127 - 15 << 2) * 0x01010101u);
  } else {
    u32 last = pack_fp8<FORMAT>(4.0f * unit, 6.0f * unit);
    high = pack_fp8<FORMAT>(2.0f * unit, 3.0f * unit) | last << 16;
  }
  return (u64)high << 32 | low;
}

// Rounds a block and stores its 32 bytes at `to`. `unit`: as an FP8 number.
template <bool UNBIASED, Format FORMAT, class Bits>
__device__ __forceinline__ void round_to(void *to, const float v[BLOCK], float factor, float unit,
                                         Bits bits, bool inside) {
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
    ((uint4 *)to)[i] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// ---- Tiles --------------------------------------------------------------------------------------

// Lines of a tile in shared memory, of 64 numbers of SIZE bytes. Each 32 lines are shifted by
// SHIFT, so that threads that read down columns 32 lines apart do so from different banks.
template <u32 SIZE, u32 LINES, u32 SHIFT> struct Lines {
  static constexpr u32 PITCH = 64 * SIZE + 16, BYTES = LINES * PITCH + (LINES / 32 - 1) * SHIFT;
  static __device__ __forceinline__ u32 at(u32 line) { return line * PITCH + line / 32 * SHIFT; }
};

// Numbers, with their sign changed by a sign bit. For bf16 that takes no more than making an f32 of
// it.
__device__ __forceinline__ float with_sign(float v, u32 sign, const Draw &) {
  return __uint_as_float(__float_as_uint(v) ^ sign);
}
__device__ __forceinline__ float with_sign(bf16 v, u32 sign, const Draw &draw) {
  return __uint_as_float(v.bits * draw.shift16 + sign);
}
__device__ __forceinline__ void pair_with_signs(u32 pair, u32 low_sign, u32 high_sign,
                                                const Draw &draw, float v[2]) {
  v[0] = __uint_as_float(pair * draw.shift16 + low_sign);
  v[1] = __uint_as_float(pair & 0xffff0000u ^ high_sign);
}

// Two numbers as E4M3 holds them with a scale.
__device__ __forceinline__ void keep_as_e4m3(float &a, float &b, float scale, float inverse) {
  a *= inverse, b *= inverse;
  through_e4m3(a, b);
  a *= scale, b *= scale;
}

// The numbers of a tile as they lie in memory, with the largest magnitude of the tensor.
template <class T> struct Stored {
  using Number = T;
  static constexpr bool IS_MADE = false;
  struct Piece {};
  static __device__ __forceinline__ bool has_pieces(u32) { return false; }
  const T *numbers;
  const u32 *amax;
  __device__ __forceinline__ T at(u32 row, u32 column, u32 cols) const {
    return numbers[(size_t)row * cols + column];
  }
  __device__ __forceinline__ void note(u32, u32) const {}
};

// Rounds a rotated block, which still lacks the factor `norm`, and stores its 32 bytes at `to`.
// Whether its scale was clamped.
template <bool UNBIASED, Format FORMAT, class Bits, class Source>
__device__ __forceinline__ bool round_rotated(void *to, float v[BLOCK], float norm, float range,
                                              const Whole &whole, const Bits &bits, bool inside,
                                              const Source &source) {
  float factor = factor_in_tensor<UNBIASED, FORMAT>(norm, range, whole.top), unit;
  u32 amax = block_amax(v, norm);
  source.note(amax, whole.top);
  bool clamped = scale_in_tensor<UNBIASED, FORMAT>(v, norm, range, amax, whole, factor, unit) &&
                 inside;
  round_to<UNBIASED, FORMAT>(to, v, factor, unit, bits, inside);
  return clamped;
}

// Starts copying pieces of 8 numbers, each APART rows below the one before: to `to` and as many
// lines below it. `column` is a multiple of 8. Where the tile is not whole, zeros stand for what
// lies outside.
template <u32 PIECES, u32 APART, class Data, class Source>
__device__ __forceinline__ void load_pieces(u8 *to, const Source &source, u32 row, u32 column,
                                            u32 rows, u32 cols, bool whole_tile) {
  using T = typename Source::Number;
  if constexpr (!Source::IS_MADE) {
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
    if (r < rows && c < cols) number = source.at(r, c, cols);
    ((T *)(to + Data::at(i / 8 * APART)))[i % 8] = number;
  }
}

// Which of a stored tensor's numbers are quantized: themselves, or what the forward pass made of
// them, as E4M3 or as MXFP4 in blocks along rows.
enum Kept { AS_STORED, AS_E4M3, AS_MXFP4 };

// A block of MXFP4 rounded to nearest: what values are multiplied by, and what gives them back.
struct ForwardBlock {
  float factor, scale;
  __device__ __forceinline__ ForwardBlock(const Quantize &q, u32 amax) {
    // NOTE: of what is not finite the whole tensor's scale is NaN.
    u32 byte = min(max(amax + q.forward_rounds_up >> 23, 2u) - 2, 252u);
    factor = q.forward_range * power(254 - byte);
    scale = byte == 0 ? __uint_as_float(1u << 22) : power(byte);
  }
  __device__ __forceinline__ float keep(float v) const {
    return __fmul_rn(round_nearest(v, factor, 1.0f), scale);
  }
};

// A block of a tile in shared memory, which becomes what MXFP4 holds of it.
template <class T> __device__ __forceinline__ void keep_as_mxfp4(T *block, const Quantize &q) {
  float v[BLOCK], norm = 1.0f;
#pragma unroll
  for (int i = 0; i < BLOCK; i += 8) load8(block + i, v + i);
  ForwardBlock kept(q, block_amax(v, norm));
#pragma unroll
  for (int i = 0; i < BLOCK; i++) v[i] = kept.keep(v[i]);
#pragma unroll
  for (int i = 0; i < BLOCK; i += 8) store8(block + i, v + i);
}

// The scale for rounding of a stored tensor, of which the forward pass may have made other numbers;
// of E4M3 their scale, too. Rounding keeps the order, so the largest is what the largest became.
template <Format FORMAT, Kept KEPT>
__device__ __forceinline__ Whole whole_of_stored(const Quantize &q, u32 largest, u32 group,
                                                 float &scale, float &inverse) {
  if (KEPT == AS_E4M3) {
    scale = e4m3_scale(largest), inverse = 1.0f / scale;
    float kept = __uint_as_float(largest), also = 0.0f;
    keep_as_e4m3(kept, also, scale, inverse);
    largest = __float_as_uint(kept);
  } else if (KEPT == AS_MXFP4 && largest < 0x7f800000u) {
    largest = __float_as_uint(ForwardBlock(q, largest).keep(__uint_as_float(largest)));
  }
  return whole_scale<FORMAT>(largest, group, q.rounds_up);
}

// Four numbers down a column, PITCH bytes apart, with signs.
template <Kept KEPT, u32 PITCH, class T>
__device__ __forceinline__ void load_down(const u8 *from, const u32 *row_signs, float scale,
                                          float inverse, const Draw &draw, float v[4]) {
  uint4 sign = *(const uint4 *)row_signs;
  u32 signs[4] = {sign.x, sign.y, sign.z, sign.w};
  if (KEPT == AS_E4M3) {
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = to_f32(*(const T *)(from + j * PITCH));
#pragma unroll
    for (int j = 0; j < 4; j += 2) keep_as_e4m3(v[j], v[j + 1], scale, inverse);
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = with_sign(v[j], signs[j], draw);
  } else {
    // NOTE: loading matrices (ldmatrix, transposed) takes fewer instructions, but pairs are taken
    // apart on the pipe of integer operations, the busier one. Of these numbers it gained nothing
    // for both forms, and 2% for columns alone; of the random bits it lost 2% (H100).
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = with_sign(*(const T *)(from + j * PITCH), signs[j], draw);
  }
}

// Eight numbers along a row, with signs.
__device__ __forceinline__ void load_along(const u8 *from, const u32 *column_signs,
                                           const Draw &draw, float v[8]) {
  uint4 raw = *(const uint4 *)from, first = *(const uint4 *)column_signs,
        second = *(const uint4 *)(column_signs + 4);
  pair_with_signs(raw.x, first.x, first.y, draw, v);
  pair_with_signs(raw.y, first.z, first.w, draw, v + 2);
  pair_with_signs(raw.z, second.x, second.y, draw, v + 4);
  pair_with_signs(raw.w, second.z, second.w, draw, v + 6);
}

// The sum of numbers to which signs have been applied, without them. `factors`: +1 and -1, one for
// each. NOTE: on tensor cores, a product with ones, sums took 14% of the kernel's time (H100); so
// 3%.
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
