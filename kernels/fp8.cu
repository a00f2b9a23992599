// FP8 E4M3 with current scaling: one power-of-two scale a tensor. As bytes, and as the numbers that they stand for, which
// bf16 holds exactly.

// *most = the largest bits of |v| over v (len), where *most was 0 before. A NaN is larger than
// everything. Integer maxima do not depend on the order. Grid: any; block: 256.
template <class T> __device__ void max_magnitude(u32 *most, const T *v, u64 len) {
  u32 largest = 0;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len;
       i += (u64)gridDim.x * blockDim.x * 8) {
    if (i + 8 <= len) {
      float x[8];
      load8(v + i, x);
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max(largest, __float_as_uint(x[j]) & 0x7fffffff);
    } else {
      for (u64 k = i; k < len; k++) largest = max(largest, __float_as_uint(to_f32(v[k])) & 0x7fffffff);
    }
  }
  largest = __reduce_max_sync(FULL_WARP, largest);
  if (threadIdx.x % WARP == 0) atomicMax(most, largest);
}

extern "C" __global__ void max_magnitude_bf16(u32 *most, const bf16 *v, u64 len) {
  begin();
  max_magnitude(most, v, len);
}
extern "C" __global__ void max_magnitude_f32(u32 *most, const float *v, u64 len) {
  begin();
  max_magnitude(most, v, len);
}

// The E4M3 value nearest to v, ties to even, saturated. NaN stays NaN.
__device__ __forceinline__ float round_to_e4m3(float v) {
  float magnitude = fminf(fabsf(v), 448.0f);
  // Below 2^-6 the grid is even, with steps of 2^-9; above, steps are 2^-3 of the binade. Adding and
  // subtracting 1.5 * 2^23 steps rounds to a whole number of them.
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, -6);
  float magic = __uint_as_float((u32)(exponent - 3 + 23 + 127) << 23) * 1.5f;
  float rounded = __fsub_rn(__fadd_rn(magnitude, magic), magic);
  return isnan(v) ? v : copysignf(rounded, v);
}

// out (len) = v (len) as E4M3 holds it with the scale that *most asks for, and *kept_most the bits of the largest
// magnitude of that: rounding keeps the order. Grid: len / (8 block), rounded up; block: 256.
template <class T> __device__ void round_to_fp8(bf16 *out, u32 *kept_most, const T *v, const u32 *most, u64 len) {
  float scale = e4m3_scale(*most), inverse = 1.0f / scale;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *kept_most = __float_as_uint(round_to_e4m3(__uint_as_float(*most) * inverse) * scale) & 0x7fffffffu;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i + 8 <= len) {
    float x[8];
    load8(v + i, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = round_to_e4m3(x[j] * inverse) * scale;
    store8(out + i, x);
  } else {
    for (; i < len; i++) out[i] = from_f32<bf16>(round_to_e4m3(to_f32(v[i]) * inverse) * scale);
  }
}

extern "C" __global__ void round_to_fp8_bf16(bf16 *out, u32 *kept_most, const bf16 *v, const u32 *most, u64 len) {
  begin();
  round_to_fp8(out, kept_most, v, most, len);
}
extern "C" __global__ void round_to_fp8_f32(bf16 *out, u32 *kept_most, const float *v, const u32 *most, u64 len) {
  begin();
  round_to_fp8(out, kept_most, v, most, len);
}

#if __CUDA_ARCH__ >= 890
// out (len) = v (len) / *scale to E4M3 bytes, and *scale, the one that *most asks for: the same numbers as above.
// Grid: len / (8 block), rounded up; block: 256.
template <class T> __device__ void convert_to_e4m3(u8 *out, float *scale_out, const T *v, const u32 *most, u64 len) {
  float scale = e4m3_scale(*most), inverse = 1.0f / scale;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i == 0) *scale_out = scale;
  auto pair = [&](float low, float high) {
    u16 both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high * inverse), "f"(low * inverse));
    return (u32)both;
  };
  if (i + 8 <= len) {
    float x[8];
    load8(v + i, x);
    *(uint2 *)(out + i) =
        make_uint2(pair(x[0], x[1]) | pair(x[2], x[3]) << 16, pair(x[4], x[5]) | pair(x[6], x[7]) << 16);
  } else {
    for (; i < len; i++) out[i] = (u8)pair(to_f32(v[i]), 0.0f);
  }
}

extern "C" __global__ void convert_to_e4m3_bf16(u8 *out, float *scale, const bf16 *v, const u32 *most, u64 len) {
  begin();
  convert_to_e4m3(out, scale, v, most, len);
}
extern "C" __global__ void convert_to_e4m3_f32(u8 *out, float *scale, const float *v, const u32 *most, u64 len) {
  begin();
  convert_to_e4m3(out, scale, v, most, len);
}
#endif
