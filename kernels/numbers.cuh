// Numbers of FP8 and FP4 and the powers of two that scale them, as src/formats defines them.
//
// Every operation is rounded by itself. NOTE: so sums, products and quotients of floats go by
// names, which the compiler does not contract.

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

// The FP8 number nearest to v, ties to even, saturated. NaN stays NaN. Below 2^`lowest` the grid is
// even; adding and subtracting 1.5 * 2^23 steps rounds to a whole number of them.
__device__ __forceinline__ float nearest_fp8(float v, int mantissa, int lowest, float largest) {
  float magnitude = fminf(fabsf(v), largest);
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, lowest);
  float magic = __fmul_rn(__uint_as_float((u32)(exponent - mantissa + 23 + 127) << 23), 1.5f);
  float rounded = __fsub_rn(__fadd_rn(magnitude, magic), magic);
  return is_nan(v) ? v : with_sign(rounded, v);
}
__device__ __forceinline__ float round_to_e4m3(float v) { return nearest_fp8(v, 3, -6, 448.0f); }

// The magnitude of E2M1's code.
__device__ __forceinline__ float decode(u32 code) {
  return code < 2 ? (float)code * 0.5f : __uint_as_float((code + 252) << 22);
}
// The code nearest to y >= 0, ties to even.
__device__ __forceinline__ u32 nearest_code(float y) {
  return (y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) +
         (y > 5.0f);
}

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
// The scale byte of a block of E2M1 with this largest magnitude, by its exponent's rules.
__device__ __forceinline__ u32 power_byte(u32 rule, u32 amax) {
  if (amax >> 23 == 255) return 255;
  u32 biased = (amax + (rule == CEIL ? 0x003fffffu : rule == EVEN ? 0x00200000u : 0)) >> 23;
  return biased < 2 ? 0 : biased - 2;
}
