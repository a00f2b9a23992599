// Operands of products in any format, as bf16 or f32 numbers, bit for bit as src/formats defines
// them (quantized.rs): vectors along the reduction dimension, padded with zeros, rotated, rounded.
//
// A thread block takes 256 elements of 32 vectors, which hold whole groups and whole blocks of
// every format, squares too: a warp gathers and rotates four of the vectors, lanes along them; then
// a thread has 32 elements of one vector, in order, for sums are part of the definition. What needs
// the largest magnitude of more than that, of the tensor or of a vector, reads a word that
// find_value_amax has written before, from the source once more: cheaper than to store numbers in
// f32 between.
//
// Every operation is rounded by itself. NOTE: so sums, products and quotients of floats go by
// names, which the compiler does not contract.

#define CHUNK 256
#define VECTORS 32
#define THREADS 256
#define BLOCK 32
#define SIXTEEN 16
// Odd, so that threads beside each other meet different banks along either dimension.
#define PITCH (CHUNK + 1)

// What numbers are made by: `Kind` of backend/cuda/quantize/values.rs.
enum Kind {
  NEAREST,    // with `mantissa` bits of mantissa
  CUT,        // without the others
  E4M3,       // with one scale a tensor
  E5M2,       // likewise
  INT8,       // by the tensor's amax, or by every vector's
  E2M1,       // with a scale for every vector
  POWERS,     // blocks of 32, a power of two each
  TWO_LEVELS, // blocks of 16, an E4M3 scale each and another above
};
// How scales are made.
enum Rule {
  FLOOR,
  CEIL,
  EVEN,
  QUEST,
  QUEST_FLOOR,
  FULL,
  HEADROOM,
  FOUR_OVER_SIX,
  AMAX,
};
enum Rounding { TO_NEAREST, UNBIASED, EDEN, BY_MEAN };
// What is above the scales of blocks of 16.
enum Outer { OF_TENSOR, OF_128, POWER_OF_128 };

// What is made from what. `Values` of values.rs.
struct Values {
  const void *source;   // (vectors, length), or with `transposed` (length, vectors)
  const float *mean;    // (vectors, length), which BY_MEAN rounds by
  float *units;         // (vectors, blocks): what elements are multiplied by; may be null
  void *out;            // (vectors, depth) of bf16, or with `wide` f32
  u32 *amax;            // bits of the tensor's, or with `by_vector` of each vector's
  float *vector_scales; // (vectors), where there are such
  float *scale;         // of the tensor; may be null
  const float *other;   // that of the other operand of the product; null for 1
  float *factors;       // gets what the product is multiplied by, and `beta`; may be null
  const float *bounds;  // (vectors, 2), beyond which numbers are apart; may be null
  double *sums;         // of each warp: sums of source times number and of squares; may be null
  u32 vectors, length, depth, transposed;
  u32 group; // of the transform, 0 without one
  u32 kind, mantissa, rule, square, rounding, outer, by_vector;
  u32 wide;
  u32 dequantized; // the result is multiplied by all scales, and f32, without padding where
                   // nothing is rotated
  float range, alpha, beta;
  Transform transform;
  Draw elements, of_scales; // of_scales: by vector and block
};

// ---- Gathering ----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float element(const Values &q, u32 vector, u32 k) {
  if (vector >= q.vectors || k >= q.length) return 0.0f;
  size_t at = q.transposed ? (size_t)k * q.vectors + vector : (size_t)vector * q.length + k;
  return to_f32(((const T *)q.source)[at]);
}

// The butterfly of the groups of 256 elements, of which a lane has those 32 apart.
__device__ __forceinline__ void rotate(float v[8], const Transform &transform, u32 group) {
  u32 lane = threadIdx.x % WARP;
#pragma unroll
  for (u32 i = 0; i < 8; i++) {
    u32 index = (lane + 32 * i) & (group - 1);
    u32 sign = transform.signs[index / 32] >> (index % 32) << 31;
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ sign);
  }
#pragma unroll
  for (u32 mask = 1; mask < WARP; mask *= 2)
    if (mask < group)
#pragma unroll
      for (u32 i = 0; i < 8; i++) {
        float other = __shfl_xor_sync(FULL_WARP, v[i], mask);
        v[i] = lane & mask ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other);
      }
#pragma unroll
  for (u32 stride = 1; stride < 8; stride *= 2)
    if (32 * stride < group)
#pragma unroll
      for (u32 i = 0; i < 8; i++)
        if ((i & stride) == 0) {
          float a = v[i], b = v[i + stride];
          v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
        }
#pragma unroll
  for (u32 i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], transform.scale);
}

// 256 elements from `first` on of the warp's four vectors, rotated: lane i has elements i, i + 32
// and so on.
template <class T>
__device__ __forceinline__ void gather(const Values &q, float tile[VECTORS][PITCH],
                                       u32 first_vector, u32 first, float v[4][8]) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (q.transposed) {
    for (u32 k = warp; k < CHUNK; k += THREADS / WARP)
      tile[lane][k] = element<T>(q, first_vector + lane, first + k);
    __syncthreads();
  }
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 vector = 4 * warp + j;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 k = lane + 32 * i;
      v[j][i] = q.transposed ? tile[vector][k] : element<T>(q, first_vector + vector, first + k);
    }
    if (q.group) rotate(v[j], q.transform, q.group);
  }
}

// Makes the words at `amax` the bits of the largest magnitudes, where they were 0 before. A NaN is
// larger than everything. Grid: (vectors / 32, depth / 256), rounded up; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS) find_value_amax(const __grid_constant__ Values q) {
  begin();
  __shared__ float tile[VECTORS][PITCH];
  u32 warp = threadIdx.x / WARP, first_vector = blockIdx.x * VECTORS;
  float v[4][8];
  gather<T>(q, tile, first_vector, blockIdx.y * CHUNK, v);
  u32 all = 0;
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 most = 0, vector = first_vector + 4 * warp + j;
#pragma unroll
    for (u32 i = 0; i < 8; i++) most = max(most, __float_as_uint(v[j][i]) & 0x7fffffffu);
    if (q.by_vector && vector < q.vectors) note_amax(q.amax + vector, __uint_as_float(most));
    all = max(all, most);
  }
  if (!q.by_vector) note_amax(q.amax, __uint_as_float(all));
}

// ---- Numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ bool is_nan(float v) {
  return (__float_as_uint(v) & 0x7fffffffu) > 0x7f800000u;
}
__device__ __forceinline__ bool is_finite(float v) {
  return (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u;
}
__device__ __forceinline__ float largest_float() { return __uint_as_float(0x7f7fffffu); }
__device__ __forceinline__ float smallest_normal() { return __uint_as_float(0x00800000u); }
__device__ __forceinline__ float with_sign(float magnitude, float of) {
  return __uint_as_float((__float_as_uint(magnitude) & 0x7fffffffu) |
                         (__float_as_uint(of) & 0x80000000u));
}

__device__ __forceinline__ float round_mantissa(float v, u32 bits) {
  if (is_nan(v)) return v;
  u32 cut = 23 - bits, word = __float_as_uint(v), even = word >> cut & 1;
  return __uint_as_float((word + (1u << (cut - 1)) - 1 + even) >> cut << cut);
}
__device__ __forceinline__ float cut_mantissa(float v, u32 bits) {
  v = round_mantissa(v, 7);
  u32 cut = 23 - bits;
  return is_nan(v) ? v : __uint_as_float(__float_as_uint(v) >> cut << cut);
}

// The FP8 number nearest to v, ties to even, saturated.
__device__ __forceinline__ float round_to_fp8(float v, int mantissa, int lowest, float largest) {
  float magnitude = fminf(fabsf(v), largest);
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, lowest);
  float magic = __fmul_rn(__uint_as_float((u32)(exponent - mantissa + 23 + 127) << 23), 1.5f);
  float rounded = __fsub_rn(__fadd_rn(magnitude, magic), magic);
  return is_nan(v) ? v : with_sign(rounded, v);
}
__device__ __forceinline__ float round_to_e4m3(float v) { return round_to_fp8(v, 3, -6, 448.0f); }

__device__ __forceinline__ float round_to_int8(float v, float amax) {
  if (amax == 0.0f) return 0.0f;
  if (!is_finite(amax)) return not_a_number();
  return rintf(__fmul_rn(__fdiv_rn(v, amax), 127.0f));
}
__device__ __forceinline__ float int8_scale(float amax) {
  if (amax == 0.0f) return 1.0f;
  if (!is_finite(amax)) return not_a_number();
  return fmaxf(__fdiv_rn(amax, 127.0f), smallest_normal());
}

// The magnitude of E2M1's code.
__device__ __forceinline__ float decode(u32 code) {
  return code < 2 ? (float)code * 0.5f : __uint_as_float((code + 252) << 22);
}
__device__ __forceinline__ float nearest_e2m1(float y) {
  return decode((y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) +
                (y > 5.0f));
}
__device__ __forceinline__ float stochastic_e2m1(float y, u32 bits) {
  u32 first = 252;
  if (y < 1.0f) y = __fadd_rn(y, 1.0f), first = 254;
  return decode(((__float_as_uint(y) + (bits << 6 | 32)) >> 22) - first);
}

// The magnitude of the neighbour of y that the mean is nearer to, up to 6.
__device__ __forceinline__ float by_mean_e2m1(float y, float mean) {
  float magnitude = fabsf(y);
  u32 low = (magnitude >= 0.5f) + (magnitude >= 1.0f) + (magnitude >= 1.5f) +
            (magnitude >= 2.0f) + (magnitude >= 3.0f) + (magnitude >= 4.0f);
  float middle = __fmul_rn(__fadd_rn(decode(low), decode(low + 1)), 0.5f);
  if (__float_as_uint(y) >> 31) mean = -mean;
  return decode(low + (mean >= middle));
}
// The slow mean of an element; 0 for padding.
__device__ __forceinline__ float mean_of(const Values &q, u32 vector, u32 k) {
  return vector < q.vectors && k < q.length ? q.mean[(size_t)vector * q.length + k] : 0.0f;
}

// A scale byte's value.
__device__ __forceinline__ float decode_e8m0(u32 byte) {
  return byte == 255 ? not_a_number() : __uint_as_float(byte == 0 ? 1u << 22 : byte << 23);
}

// ---- The scale of a tensor, and of a vector -----------------------------------------------------

// `encode`: what values are multiplied by first, of integers the amax; `decode`: what gives them
// back.
struct Tensor {
  float encode, decode;
};

// NVFP4's limits: 17/16 less than 6; and of MS-EDEN.
__device__ __forceinline__ float with_headroom() { return __fdiv_rn(96.0f, 17.0f); }
__device__ __forceinline__ float eden_max() { return __fdiv_rn(6.0f, __fmul_rn(1.0625f, 0.93f)); }

__device__ __forceinline__ Tensor nvfp4_tensor(const Values &q, u32 bits) {
  float amax = __uint_as_float(bits);
  if (!is_finite(amax)) return {not_a_number(), not_a_number()};
  if (q.rounding == EDEN) {
    float decode = amax == 0.0f ? 1.0f : __fdiv_rn(__fdiv_rn(amax, 255.99f), eden_max());
    decode = fmaxf(decode, smallest_normal());
    return {__fdiv_rn(1.0f, decode), decode};
  }
  float largest = q.rule == HEADROOM        ? __fmul_rn(with_headroom(), 448.0f)
                  : q.rule == FOUR_OVER_SIX ? 6.0f * 256.0f
                                            : 6.0f * 448.0f;
  float encode = fminf(__fdiv_rn(largest, amax), largest_float());
  if (amax == 0.0f || encode == 0.0f) encode = 1.0f;
  return {encode, __fdiv_rn(1.0f, encode)};
}

__device__ __forceinline__ Tensor tensor_scale(const Values &q) {
  float decode = 1.0f;
  if (q.kind == TWO_LEVELS && q.outer == OF_TENSOR) return nvfp4_tensor(q, *q.amax);
  if (q.kind == INT8 && !q.by_vector) {
    float amax = __uint_as_float(*q.amax);
    return {amax, int8_scale(amax)};
  }
  if (q.kind == E4M3) decode = fp8_scale(*q.amax, 8);
  if (q.kind == E5M2) decode = fp8_scale(*q.amax, 15);
  return {__fdiv_rn(1.0f, decode), decode};
}

__device__ __forceinline__ u32 power_byte(u32 rule, u32 amax) {
  if (amax >> 23 == 255) return 255;
  u32 biased = (amax + (rule == CEIL ? 0x003fffffu : rule == EVEN ? 0x00200000u : 0)) >> 23;
  return biased < 2 ? 0 : biased - 2;
}

// Of E2M1, the scale of a vector with this amax.
__device__ __forceinline__ float unit_of_vector(const Values &q, u32 bits) {
  float amax = __uint_as_float(bits);
  if (!is_finite(amax)) return not_a_number();
  if (q.rule != AMAX) return decode_e8m0(power_byte(q.rule, bits));
  return amax == 0.0f ? 1.0f : __fdiv_rn(amax, 6.0f);
}

// What the product is multiplied by for a vector.
__device__ __forceinline__ float vector_scale(const Values &q, u32 vector) {
  if (!q.by_vector || q.rule != AMAX) return 1.0f;
  u32 amax = q.amax[vector];
  return q.kind == INT8 ? int8_scale(__uint_as_float(amax)) : unit_of_vector(q, amax);
}

// ---- Random bits --------------------------------------------------------------------------------

// Those of a source that is stored transposed go to shared memory, 16 for each of (256, 32): one
// call of the generator gives those of eight vectors.
__device__ __forceinline__ void draw_transposed(const Values &q, u32 first_vector, u32 first) {
  for (u32 i = threadIdx.x; i < CHUNK * VECTORS / 8; i += THREADS)
    ((uint4 *)shared)[i] =
        philox(q.elements, first + i / (VECTORS / 8), first_vector / 8 + i % (VECTORS / 8));
}

// Of a thread's 32 elements, which are asked for in order, from k on in the vector.
struct Bits {
  const Values &q;
  u32 vector, k;
  uint4 words;
  __device__ __forceinline__ Bits(const Values &q, u32 vector, u32 k)
      : q(q), vector(vector), k(k) {}
  __device__ __forceinline__ u32 of(u32 i) {
    if (q.transposed) return ((const u16 *)shared)[((k + i) % CHUNK) * VECTORS + vector % VECTORS];
    if (i % 8 == 0) words = philox(q.elements, vector, (k + i) / 8);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    return i % 2 ? word >> 16 : word & 0xffff;
  }
};

// Notes what the elements of a block, of so many, are multiplied by.
__device__ __forceinline__ void note_unit(const Values &q, u32 vector, u32 block, u32 length,
                                          float unit) {
  u32 blocks = q.depth / length;
  if (q.units && vector < q.vectors && block < blocks)
    q.units[(size_t)vector * blocks + block] = unit;
}

// ---- Blocks of 32 -------------------------------------------------------------------------------

__device__ __forceinline__ void round_powers(const Values &q, float *block, u32 vector, u32 k,
                                             u32 rows) {
  u32 amax = amax_of(block, BLOCK);
  bool deviation = q.rule == QUEST || q.rule == QUEST_FLOOR;
  if (q.square) amax = __reduce_max_sync(FULL_WARP, amax);
  u32 byte;
  if (!deviation) {
    byte = power_byte(q.rule, amax);
  } else if (!q.square) {
    byte = deviation_byte(q.rule == QUEST, block, 1, PITCH, amax);
  } else {
    // The sum of a square is one after the other, too.
    bool first = threadIdx.x % WARP == 0;
    byte = first ? deviation_byte(q.rule == QUEST, block, rows, PITCH, amax) : 0;
    byte = __reduce_max_sync(FULL_WARP, byte);
  }
  float scale = decode_e8m0(byte);
  note_unit(q, vector, k / BLOCK, BLOCK, scale);
  if (byte == 255) {
    for (u32 i = 0; i < BLOCK; i++) block[i] = scale;
    return;
  }
  float factor = __fmul_rn(q.range, decode_e8m0(254 - byte));
  Bits bits(q, vector, k);
#pragma unroll 8
  for (u32 i = 0; i < BLOCK; i++) {
    float v = block[i], y = __fmul_rn(fabsf(v), factor);
    float magnitude = q.rounding == UNBIASED ? stochastic_e2m1(y, bits.of(i)) : nearest_e2m1(y);
    if (q.rounding == BY_MEAN)
      magnitude = by_mean_e2m1(__fmul_rn(v, factor), __fmul_rn(mean_of(q, vector, k + i), factor));
    block[i] = with_sign(__fmul_rn(magnitude, scale), v);
  }
}

// ---- Blocks of 16 -------------------------------------------------------------------------------

// What values are multiplied by to become elements.
__device__ __forceinline__ float encoding(float scale, float tensor) {
  return fminf(__fdiv_rn(1.0f, __fmul_rn(scale, tensor)), largest_float());
}
__device__ __forceinline__ float element_of(float scaled) { return fminf(fabsf(scaled), 6.0f); }

// Of a block rounded to nearest with a scale, in units of the tensor's.
__device__ __forceinline__ float squared_error(const float *block, float scale, float tensor) {
  float encode = encoding(scale, tensor), sum = 0.0f;
  for (u32 i = 0; i < SIXTEEN; i++) {
    float x = __fmul_rn(block[i], encode);
    float rounded = with_sign(nearest_e2m1(element_of(x)), block[i]);
    float error = __fmul_rn(__fsub_rn(rounded, x), scale);
    sum = __fadd_rn(sum, __fmul_rn(error, error));
  }
  return sum;
}

// The E4M3 neighbour of v >= 0 above it as often as it is near.
__device__ __forceinline__ float stochastic_e4m3(float v, u32 bits) {
  if (!is_finite(v)) return not_a_number();
  v = fminf(v, 448.0f);
  int exponent = max((int)(__float_as_uint(v) >> 23) - 127, -6);
  float steps = __fmul_rn(v, __uint_as_float((u32)(3 - exponent + 127) << 23));
  float whole = floorf(steps);
  float position = __fmul_rn(__fadd_rn((float)bits, 0.5f), 1.0f / 65536.0f);
  float up = position < __fsub_rn(steps, whole) ? 1.0f : 0.0f;
  return __fmul_rn(__fadd_rn(whole, up), __uint_as_float((u32)(exponent - 3 + 127) << 23));
}

// Errors of a warp's blocks with the full scale and the wide one.
typedef float Errors[2][THREADS / WARP][WARP];

// The scale of a block, or of a square of `rows` of them, with this amax. All threads come here at
// once.
__device__ __forceinline__ float nvfp4_scale(const Values &q, const float *block, u32 bits,
                                             Tensor tensor, u32 rows, Errors errors) {
  float amax = __uint_as_float(bits);
  float inverse = q.rule == HEADROOM ? __fdiv_rn(1.0f, with_headroom()) : __fdiv_rn(1.0f, 6.0f);
  float scale = __fmul_rn(amax, __fmul_rn(tensor.encode, inverse));
  float full = round_to_e4m3(scale > 448.0f ? 448.0f : scale);
  if (q.rule != FOUR_OVER_SIX) return full;
  float wide = round_to_e4m3(fminf(__fmul_rn(scale, 1.5f), 448.0f));
  float of_full = squared_error(block, full, tensor.decode),
        of_wide = squared_error(block, wide, tensor.decode);
  if (!q.square) return of_wide < of_full ? wide : full;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = lane & ~15u;
  errors[0][warp][lane] = of_full, errors[1][warp][lane] = of_wide;
  __syncthreads();
  double sums[2] = {0.0, 0.0};
  for (u32 row = first; row < min(first + SIXTEEN, rows); row++)
    sums[0] += errors[0][warp][row], sums[1] += errors[1][warp][row];
  __syncthreads();
  return sums[1] < sums[0] ? wide : full;
}

// MS-EDEN of a block.
__device__ __forceinline__ void round_eden(float *block, float tensor, u32 bits) {
  float amax = __uint_as_float(amax_of(block, SIXTEEN));
  float scale = round_to_e4m3(__fdiv_rn(__fdiv_rn(amax, eden_max()), tensor));
  if (scale == 0.0f) scale = 1.0f;
  float encode = encoding(scale, tensor), squares = 0.0f, products = 0.0f;
  for (u32 i = 0; i < SIXTEEN; i++) {
    float r = __fmul_rn(block[i], encode);
    float rounded = with_sign(nearest_e2m1(element_of(r)), block[i]);
    squares = __fadd_rn(squares, __fmul_rn(r, r));
    products = __fadd_rn(products, __fmul_rn(r, rounded));
    block[i] = rounded;
  }
  float correction = products == 0.0f ? 1.0f : __fdiv_rn(squares, products);
  scale = stochastic_e4m3(__fmul_rn(scale, correction), bits);
  for (u32 i = 0; i < SIXTEEN; i++) block[i] = __fmul_rn(block[i], scale);
}

// The scale of 128 elements with this amax.
__device__ __forceinline__ float outer_scale(u32 amax, bool power) {
  if (amax >= 0x7f800000u) return not_a_number();
  float outer = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), 448.0f), 6.0f);
  if (outer < smallest_normal()) return 1.0f;
  return power ? __uint_as_float((__float_as_uint(outer) + 0x007fffffu) & 0xff800000u) : outer;
}

// Two blocks.
__device__ __forceinline__ void round_two_levels(const Values &q, float *block, u32 vector, u32 k,
                                                 u32 rows, Tensor tensor, Errors errors) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float outer = 1.0f;
  if (q.outer != OF_TENSOR) {
    u32 *amaxes = (u32 *)errors[0];
    amaxes[warp * WARP + lane] = amax_of(block, BLOCK);
    __syncthreads();
    u32 amax = 0;
    for (u32 i = 0; i < 4; i++) amax = max(amax, amaxes[(warp / 4 * 4 + i) * WARP + lane]);
    outer = outer_scale(amax, q.outer == POWER_OF_128);
  }
  Bits bits(q, vector, k);
  uint4 words;
  if (q.rounding == EDEN) words = philox(q.of_scales, vector, k / SIXTEEN / 8);
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float *sixteen = block + SIXTEEN * b;
    if (q.rounding == EDEN) {
      u32 j = (k / SIXTEEN + b) % 8;
      u32 word = j < 2 ? words.x : j < 4 ? words.y : j < 6 ? words.z : words.w;
      round_eden(sixteen, tensor.decode, j % 2 ? word >> 16 : word & 0xffff);
      continue;
    }
    u32 amax = amax_of(sixteen, SIXTEEN);
    if (q.square)
#pragma unroll
      for (u32 mask = 1; mask < SIXTEEN; mask *= 2)
        amax = max(amax, __shfl_xor_sync(FULL_WARP, amax, mask));
    float scale, encode = 1.0f;
    if (q.outer == OF_TENSOR) {
      scale = nvfp4_scale(q, sixteen, amax, tensor, rows, errors);
      encode = encoding(scale, tensor.decode);
    } else {
      float of = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), outer), 6.0f);
      scale = round_to_e4m3(fminf(of, 448.0f));
      // E4M3's smallest number.
      if (scale == 0.0f) scale = 1.0f / 512.0f;
      scale = __fmul_rn(scale, outer);
    }
    float unit = q.outer == OF_TENSOR ? __fmul_rn(scale, tensor.decode) : scale;
    note_unit(q, vector, k / SIXTEEN + b, SIXTEEN, unit);
#pragma unroll 8
    for (u32 i = 0; i < SIXTEEN; i++) {
      float v = sixteen[i];
      float y = element_of(q.outer == OF_TENSOR ? __fmul_rn(v, encode) : __fdiv_rn(v, scale));
      float magnitude =
          q.rounding == UNBIASED ? stochastic_e2m1(y, bits.of(SIXTEEN * b + i)) : nearest_e2m1(y);
      if (q.rounding == BY_MEAN) {
        float mean = mean_of(q, vector, k + SIXTEEN * b + i);
        bool whole = q.outer == OF_TENSOR;
        magnitude = by_mean_e2m1(whole ? __fmul_rn(v, encode) : __fdiv_rn(v, scale),
                                 whole ? __fmul_rn(mean, encode) : __fdiv_rn(mean, scale));
      }
      sixteen[i] = __fmul_rn(with_sign(magnitude, v), scale);
    }
  }
}

// ---- Rounding -----------------------------------------------------------------------------------

// A thread's 32 elements, from k on in their vector; `rows`: vectors of the thread block.
__device__ __forceinline__ void round_block(const Values &q, float *block, u32 vector, u32 k,
                                            u32 rows, Tensor tensor, Errors errors) {
  switch (q.kind) {
  case NEAREST:
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_mantissa(block[i], q.mantissa);
    break;
  case CUT:
    for (u32 i = 0; i < BLOCK; i++) block[i] = cut_mantissa(block[i], q.mantissa);
    break;
  case E4M3:
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_to_e4m3(__fmul_rn(block[i], tensor.encode));
    break;
  case E5M2:
    for (u32 i = 0; i < BLOCK; i++)
      block[i] = round_to_fp8(__fmul_rn(block[i], tensor.encode), 2, -14, 57344.0f);
    break;
  case INT8: {
    if (vector >= q.vectors) break;
    float amax = q.by_vector ? __uint_as_float(q.amax[vector]) : tensor.encode;
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_to_int8(block[i], amax);
    break;
  }
  case E2M1: {
    if (vector >= q.vectors) break;
    float unit = unit_of_vector(q, q.amax[vector]), value = q.rule == AMAX ? 1.0f : unit;
    for (u32 i = 0; i < BLOCK; i++) {
      float v = block[i], inside = v;
      if (q.bounds) {
        float low = q.bounds[2 * vector], high = q.bounds[2 * vector + 1];
        inside = v < low ? low : v > high ? high : v;
      }
      float magnitude = __fmul_rn(nearest_e2m1(fabsf(__fdiv_rn(inside, unit))), value);
      float number = with_sign(magnitude, inside);
      // What clamping took is in bf16.
      if (q.bounds) number = __fadd_rn(number, round_mantissa(__fsub_rn(v, inside), 7));
      block[i] = is_nan(unit) ? unit : number;
    }
    break;
  }
  case POWERS: round_powers(q, block, vector, k, rows); break;
  case TWO_LEVELS: round_two_levels(q, block, vector, k, rows, tensor, errors); break;
  }
}

// The numbers of an operand to `out`, the scales of its vectors and of the tensor, and what the
// product is multiplied by. Grid: (vectors / 32, depth / 256), rounded up; block: 256. Rounding
// without bias of a transposed source takes 16 KiB of dynamic shared memory.
template <class T>
__global__ void __launch_bounds__(THREADS) round_values(const __grid_constant__ Values q) {
  begin();
  __shared__ float tile[VECTORS][PITCH];
  __shared__ Errors errors;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first_vector = blockIdx.x * VECTORS, first = blockIdx.y * CHUNK;
  float v[4][8];
  gather<T>(q, tile, first_vector, first, v);
  if (q.rounding == UNBIASED && q.transposed) draw_transposed(q, first_vector, first);
  // Nobody else reads the warp's vectors.
#pragma unroll
  for (u32 j = 0; j < 4; j++)
#pragma unroll
    for (u32 i = 0; i < 8; i++) tile[4 * warp + j][lane + 32 * i] = v[j][i];
  __syncthreads();
  Tensor tensor = tensor_scale(q);
  u32 vector = first_vector + lane, rows = min(q.vectors - first_vector, (u32)VECTORS);
  round_block(q, &tile[lane][BLOCK * warp], vector, first + BLOCK * warp, rows, tensor, errors);
  if (q.vector_scales && blockIdx.y == 0 && warp == 0 && vector < q.vectors)
    q.vector_scales[vector] = vector_scale(q, vector);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    if (q.scale) *q.scale = tensor.decode;
    if (q.factors) {
      q.factors[0] = __fmul_rn(q.alpha, __fmul_rn(q.other ? *q.other : 1.0f, tensor.decode));
      q.factors[1] = q.beta;
    }
  }
  __syncthreads();
  u32 depth = q.dequantized && !q.group ? q.length : q.depth;
  double products = 0.0, squares = 0.0;
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 local = 4 * warp + j, vector = first_vector + local;
    if (vector >= q.vectors) break;
    float scale = q.dequantized ? __fmul_rn(tensor.decode, vector_scale(q, vector)) : 1.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 k = first + lane + 32 * i;
      if (k >= depth) continue;
      float number = tile[local][lane + 32 * i];
      if (q.sums) {
        products += (double)v[j][i] * number;
        squares += (double)v[j][i] * v[j][i];
      }
      size_t at = (size_t)vector * depth + k;
      if (q.dequantized) ((float *)q.out)[at] = __fmul_rn(number, scale);
      else if (q.wide) ((float *)q.out)[at] = number;
      else ((bf16 *)q.out)[at] = from_f32<bf16>(number);
    }
  }
  if (q.sums) {
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
      products += __shfl_xor_sync(FULL_WARP, products, mask);
      squares += __shfl_xor_sync(FULL_WARP, squares, mask);
    }
    u32 chunks = (q.depth + CHUNK - 1) / CHUNK;
    size_t at = ((size_t)blockIdx.x * chunks + blockIdx.y) * (THREADS / WARP) + warp;
    if (lane == 0) q.sums[2 * at] = products, q.sums[2 * at + 1] = squares;
  }
}

// ---- Behind the product -------------------------------------------------------------------------

// `Scaling` of values.rs.
struct Scaling {
  void *out;                         // (rows, columns)
  const float *c;                    // likewise
  const float *of_rows, *of_columns; // null for 1
  const void *bias;                  // (columns) of the type of `out`; may be null
  u32 rows, columns;
};

// out = c times scales of its rows and of its columns, plus a bias. Grid: rows; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS) scale_result(const __grid_constant__ Scaling q) {
  begin();
  float of_row = q.of_rows ? q.of_rows[blockIdx.x] : 1.0f;
  for (u32 column = threadIdx.x; column < q.columns; column += THREADS) {
    size_t at = (size_t)blockIdx.x * q.columns + column;
    float scale = __fmul_rn(of_row, q.of_columns ? q.of_columns[column] : 1.0f);
    float bias = q.bias ? to_f32(((const T *)q.bias)[column]) : 0.0f;
    ((T *)q.out)[at] = from_f32<T>(__fadd_rn(__fmul_rn(q.c[at], scale), bias));
  }
}
