// Scales of blocks of 32 by their standard deviation (QuEST), as src/formats/e8m0.rs defines them.
//
// Every operation is rounded by itself, as in quantize_values.cu.

// Bits of the largest magnitude.
__device__ __forceinline__ u32 amax_of(const float *v, u32 count) {
  u32 most = 0;
  for (u32 i = 0; i < count; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  return most;
}

// The scale byte of `count` vectors' blocks, `pitch` apart, whose largest magnitude has the bits
// `amax`: to the nearest power of two, or to that below.
__device__ __forceinline__ u32 deviation_byte(bool nearest, const float *blocks, u32 count,
                                              u32 pitch, u32 amax) {
  if (amax >> 23 == 255) return 255;
  if (amax == 0) return 0;
  u32 exponent = min(max(amax >> 23, 1u), 253u);
  float down = __uint_as_float((254 - exponent) << 23), up = __uint_as_float(exponent << 23);
  float sum = 0.0f, squares = 0.0f;
  for (u32 row = 0; row < count; row++)
    for (u32 i = 0; i < 32; i++) {
      float x = __fmul_rn(blocks[row * pitch + i], down);
      sum = __fadd_rn(sum, x);
      squares = __fadd_rn(squares, __fmul_rn(x, x));
    }
  float part = __fdiv_rn(1.0f, (float)(count * 32)), mean = __fmul_rn(sum, part);
  float variance = __fsub_rn(__fmul_rn(squares, part), __fmul_rn(mean, mean));
  float deviation = __fmul_rn(__fsqrt_rn(fmaxf(variance, 0.0f)), up);
  float unit = __fadd_rn(__fmul_rn(0.48707976f, deviation), 1e-8f);
  if (nearest) unit = __fmul_rn(unit, 1.41421356237309504880f);
  return min(__float_as_uint(unit) >> 23, 253u);
}
