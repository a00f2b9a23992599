// Normal random values by Box and Muller's method, bit for bit as src/formats/normal.rs makes them
// on a CPU: every operation rounds once, to nearest, and the compiler may fuse none.

// A number in [0, 1) with 24 random bits.
__device__ __forceinline__ float unit(u32 word) {
  return __fmul_rn((float)(word >> 8), 1.0f / (1 << 24));
}

// 1 + q (a + q (b + q (c + q d))).
__device__ __forceinline__ float series(float q, float a, float b, float c, float d) {
  float sum = __fadd_rn(c, __fmul_rn(q, d));
  sum = __fadd_rn(a, __fmul_rn(q, __fadd_rn(b, __fmul_rn(q, sum))));
  return __fadd_rn(1.0f, __fmul_rn(q, sum));
}

// The natural logarithm of a normal positive number: x = m 2^e with m in [0.7, 1.4], ln m = 2
// atanh((m - 1) / (m + 1)).
__device__ __forceinline__ float natural_log(float x) {
  u32 shifted = __float_as_uint(x) + (0x3f800000u - 0x3f3504f3u);
  float exponent = (float)((int)(shifted >> 23) - 127);
  float m = __uint_as_float((shifted & 0x007fffffu) + 0x3f3504f3u);
  float s = __fdiv_rn(__fsub_rn(m, 1.0f), __fadd_rn(m, 1.0f));
  float sum = series(__fmul_rn(s, s), 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9);
  return __fadd_rn(__fmul_rn(__fmul_rn(2.0f, s), sum), __fmul_rn(exponent, 0.693147181f));
}

// Cosine and sine of so many turns, from 0 to 1: of the angle from the nearest quarter, turned by
// that.
__device__ __forceinline__ float2 cos_sin(float turns) {
  int quarter = (int)__fadd_rn(__fmul_rn(turns, 4.0f), 0.5f);
  float angle = __fmul_rn(__fsub_rn(turns, __fmul_rn((float)quarter, 0.25f)), 6.283185307f);
  float q = __fmul_rn(angle, angle);
  float sin = __fmul_rn(angle, series(q, -1.0f / 6, 1.0f / 120, -1.0f / 5040, 1.0f / 362880));
  float cos = series(q, -0.5f, 1.0f / 24, -1.0f / 720, 1.0f / 40320);
  float2 out = quarter & 1 ? make_float2(-sin, cos) : make_float2(cos, sin);
  return quarter & 2 ? make_float2(-out.x, -out.y) : out;
}

// values (len): two for each counter (row, 0), from row 0 on. Grid: len / 512, rounded up; block:
// 256.
__global__ void fill_normal(float *values, u64 len, float std, const __grid_constant__ Draw draw) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (2 * i >= len) return;
  uint4 words = philox(draw, (u32)i, 0);
  // The first lies in (0, 1], so its logarithm is finite.
  float radius =
      __fmul_rn(std, __fsqrt_rn(__fmul_rn(-2.0f, natural_log(__fsub_rn(1.0f, unit(words.x))))));
  float2 turn = cos_sin(unit(words.z));
  values[2 * i] = __fmul_rn(radius, turn.x);
  if (2 * i + 1 < len) values[2 * i + 1] = __fmul_rn(radius, turn.y);
}
