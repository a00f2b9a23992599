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

// Two numbers times `inverse` to FP8 bytes, E5M2 or E4M3, `low` in the low one.
template <bool E5M2>
__device__ __forceinline__ u32 pack_scaled(float low, float high, float inverse) {
  low *= inverse, high *= inverse;
  return E5M2 ? pack_e5m2(low, high) : pack_e4m3(low, high);
}

// What makes bytes of the numbers of a tensor whose amax has these bits.
template <bool E5M2> struct Bytes {
  float scale, inverse;
  __device__ __forceinline__ explicit Bytes(u32 amax)
      : scale(fp8_scale(amax, E5M2 ? 15 : 8)), inverse(1.0f / scale) {}
  // Of eight.
  __device__ __forceinline__ uint2 pack(const float v[8]) const {
    return make_uint2(pack_scaled<E5M2>(v[0], v[1], inverse) |
                          pack_scaled<E5M2>(v[2], v[3], inverse) << 16,
                      pack_scaled<E5M2>(v[4], v[5], inverse) |
                          pack_scaled<E5M2>(v[6], v[7], inverse) << 16);
  }
};

// out (len) = v (len) / *scale to FP8 bytes, and *scale, the one that *amax asks for: the same
// numbers as above. From compute capability 8.9 on. Grid: len / (16 block), rounded up; block: 256.
template <class T, bool E5M2>
__global__ void convert_to_fp8(u8 *out, float *scale_out, const T *v, const u32 *amax, u64 len) {
  begin();
  Bytes<E5M2> of(*amax);
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 16;
  if (i == 0) *scale_out = of.scale;
  if (i + 16 <= len) {
    float x[16];
    load8(v + i, x), load8(v + i + 8, x + 8);
    uint2 low = of.pack(x), high = of.pack(x + 8);
    *(uint4 *)(out + i) = make_uint4(low.x, low.y, high.x, high.y);
  } else {
    for (; i < len; i++) out[i] = (u8)pack_scaled<E5M2>(to_f32(v[i]), 0.0f, of.inverse);
  }
}

// The scale of a tensor, by one thread of a grid of tiles.
template <bool E5M2> __device__ __forceinline__ void write_scale(float *scale_out, u32 amax) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *scale_out = Bytes<E5M2>(amax).scale;
}

// Both kernels: from compute capability 8.9 on. Grid: cols / 128, rows / 128, rounded up; block:
// 256.

// out (cols, rows) = the transposed bytes.
template <class T, bool E5M2>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 2 : 3)
    turn_to_fp8(u8 *out, float *scale_out, const T *v, const u32 *amax, u32 rows, u32 cols) {
  begin();
  turn_tile<T, Bytes<E5M2>, false>(nullptr, out, nullptr, v, amax, rows, cols);
  write_scale<E5M2>(scale_out, *amax);
}

// Both forms, and sums if there is room for them.
template <class T, bool E5M2>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 2 : 3)
    convert_both_to_fp8(u8 *rows_out, u8 *columns_out, float *scale_out, float *sums, const T *v,
                        const u32 *amax, u32 rows, u32 cols) {
  begin();
  turn_tile<T, Bytes<E5M2>, true>(rows_out, columns_out, sums, v, amax, rows, cols);
  write_scale<E5M2>(scale_out, *amax);
}
