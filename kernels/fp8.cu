// FP8 E4M3 with current scaling: one power-of-two scale a tensor. As bytes, and as the numbers that
// they stand for, which bf16 holds exactly.

// *amax = the largest bits of |v| over v (len), where *amax was 0 before. A NaN is larger than
// everything. Integer maxima do not depend on the order. Grid: any; block: 256.
template <class T>
__global__ void find_amax(u32 *amax, const T *v, u64 len) {
  begin();
  u32 largest = 0;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len;
       i += (u64)gridDim.x * blockDim.x * 8) {
    if (i + 8 <= len) {
      float x[8];
      load8(v + i, x);
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max(largest, __float_as_uint(x[j]) & 0x7fffffff);
    } else {
      for (u64 k = i; k < len; k++)
        largest = max(largest, __float_as_uint(to_f32(v[k])) & 0x7fffffff);
    }
  }
  largest = __reduce_max_sync(FULL_WARP, largest);
  if (threadIdx.x % WARP == 0) atomicMax(amax, largest);
}

// The E4M3 value nearest to v, ties to even, saturated. NaN stays NaN.
__device__ __forceinline__ float round_to_e4m3(float v) {
  float magnitude = fminf(fabsf(v), 448.0f);
  // Below 2^-6 the grid is even, with steps of 2^-9; above, steps are 2^-3 of the binade. Adding
  // and subtracting 1.5 * 2^23 steps rounds to a whole number of them.
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, -6);
  float magic = __uint_as_float((u32)(exponent - 3 + 23 + 127) << 23) * 1.5f;
  float rounded = __fsub_rn(__fadd_rn(magnitude, magic), magic);
  return isnan(v) ? v : copysignf(rounded, v);
}

// out (len) = v (len) as E4M3 holds it with the scale that *amax asks for, and *kept_amax the bits
// of the largest magnitude of that: rounding keeps the order. Grid: len / (8 block), rounded up;
// block: 256.
template <class T>
__global__ void round_to_fp8(bf16 *out, u32 *kept_amax, const T *v, const u32 *amax, u64 len) {
  begin();
  float scale = e4m3_scale(*amax), inverse = 1.0f / scale;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *kept_amax =
        __float_as_uint(round_to_e4m3(__uint_as_float(*amax) * inverse) * scale) & 0x7fffffffu;
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

// out (len) = v (len) / *scale to E4M3 bytes, and *scale, the one that *amax asks for: the same
// numbers as above. From compute capability 8.9 on. Grid: len / (8 block), rounded up; block: 256.
template <class T>
__global__ void convert_to_e4m3(u8 *out, float *scale_out, const T *v, const u32 *amax, u64 len) {
  begin();
  float scale = e4m3_scale(*amax), inverse = 1.0f / scale;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i == 0) *scale_out = scale;
  auto pair = [&](float low, float high) { return pack_e4m3(low * inverse, high * inverse); };
  if (i + 8 <= len) {
    float x[8];
    load8(v + i, x);
    *(uint2 *)(out + i) = make_uint2(pair(x[0], x[1]) | pair(x[2], x[3]) << 16,
                                     pair(x[4], x[5]) | pair(x[6], x[7]) << 16);
  } else {
    for (; i < len; i++) out[i] = (u8)pair(to_f32(v[i]), 0.0f);
  }
}
