// Operands of products in any format, as bf16 or f32 numbers, bit for bit as src/formats defines
// them (quantized.rs): what the files that make them begin with.
//
// Vectors lie along the reduction dimension, padded with zeros, are rotated and rounded. A thread
// block takes 256 elements of 32 vectors, which hold whole groups and whole blocks of every format,
// squares too. What needs the largest magnitude of more than that, of the tensor or of a vector,
// reads a word that another kernel has written before, from the source once more: cheaper than to
// store numbers in f32 between.
//
// Every operation is rounded by itself. NOTE: so sums, products and quotients of floats go by
// names, which the compiler does not contract.

#define CHUNK 256
#define VECTORS 32
#define THREADS 256
#define BLOCK 32
#define SIXTEEN 16
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
enum Rounding { TO_NEAREST, UNBIASED, EDEN, BY_MEAN };
// What is above the scales of blocks of 16.
enum Outer { OF_TENSOR, OF_128, POWER_OF_128 };

// What is made from what. `Values` of values.rs.
struct Values {
  const void *source;   // (vectors, length), or with `transposed` (length, vectors)
  const float *of_source; // what that is multiplied by first, by NVFP4's own kernels; null for 1
  const float *mean;    // (vectors, length), which BY_MEAN rounds by
  float *block_scales;  // (vectors, blocks): what elements are multiplied by; may be null
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

// ---- Numbers ------------------------------------------------------------------------------------

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

__device__ __forceinline__ float nearest_e2m1(float y) { return decode(nearest_code(y)); }
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

// NVFP4's limits: 17/16 less than 6; and of MS-EDEN. NOTE: as constants, which quotients by name
// are not.
constexpr float WITH_HEADROOM = 96.0f / 17.0f, EDEN_MAX = 6.0f / (1.0625f * 0.93f);

__device__ __forceinline__ Tensor nvfp4_tensor(const Values &q, u32 bits) {
  float amax = __uint_as_float(bits);
  if (!is_finite(amax)) return {not_a_number(), not_a_number()};
  if (q.rounding == EDEN) {
    float decode = amax == 0.0f ? 1.0f : __fdiv_rn(__fdiv_rn(amax, 255.99f), EDEN_MAX);
    decode = fmaxf(decode, smallest_normal());
    return {__fdiv_rn(1.0f, decode), decode};
  }
  float largest = q.rule == HEADROOM        ? __fmul_rn(WITH_HEADROOM, 448.0f)
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

// ---- Scales of NVFP4 ----------------------------------------------------------------------------

// What values are multiplied by to become elements.
__device__ __forceinline__ float encoding(float scale, float tensor) {
  return fminf(__fdiv_rn(1.0f, __fmul_rn(scale, tensor)), largest_float());
}
__device__ __forceinline__ float element_of(float scaled) { return fminf(fabsf(scaled), 6.0f); }

// The scale of 128 elements with this amax.
__device__ __forceinline__ float outer_scale(u32 amax, bool power) {
  if (amax >= 0x7f800000u) return not_a_number();
  float outer = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), 448.0f), 6.0f);
  if (outer < smallest_normal()) return 1.0f;
  return power ? __uint_as_float((__float_as_uint(outer) + 0x007fffffu) & 0xff800000u) : outer;
}

// Behind a tensor's numbers: its scale, and what the product is multiplied by. One thread does it.
__device__ __forceinline__ void write_scale(const Values &q, Tensor tensor) {
  if (blockIdx.x != 0 || blockIdx.y != 0 || threadIdx.x != 0) return;
  if (q.scale) *q.scale = tensor.decode;
  if (q.factors) {
    q.factors[0] = __fmul_rn(q.alpha, __fmul_rn(q.other ? *q.other : 1.0f, tensor.decode));
    q.factors[1] = q.beta;
  }
}
