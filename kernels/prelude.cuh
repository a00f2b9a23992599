// What every kernel file begins with, behind ptx.cuh: conversions, reductions.
//
// A file is compiled as these texts followed by its own, by NVRTC on the user's machine. There may
// be no CUDA headers there, so nothing is included, and bf16 is handled by its bits and by PTX.
//
// Vocabulary: B sequences of T tokens, rows = B T, C channels, H heads, V tokens in the vocabulary.
// All matrices are dense and row-major. Kernels that meet activations are templates of their type
// T; the host lists which instances there are (backend/cuda/kernels.rs). What kernels sum, they sum
// in f32, in an order that depends on shapes alone, so that two runs give the same bits. No kernel
// adds floats atomically.
//
// A kernel starts while the one before it ends (programmatic dependent launch): every kernel waits in
// `begin` for those before, all but the few that `begin` speaks of before anything else, and a test
// sees to that. It gains a microsecond a kernel, which matters to small models.

#define WARP 32
#define FULL_WARP 0xffffffffu

// A bfloat16 number, by its bits.
struct bf16 {
  u16 bits;
};

__device__ __forceinline__ float to_f32(float v) { return v; }
__device__ __forceinline__ float to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }

__device__ __forceinline__ float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <class T> __device__ __forceinline__ T from_f32(float v);
template <> __device__ __forceinline__ float from_f32<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float v) {
  bf16 out;
  out.bits = (u16)pack_bf16(v, 0.0f);
  return out;
}

// Loads and stores of 8 elements, 16 bytes (bf16) or 32 (f32) that are aligned to 16.
__device__ __forceinline__ void load8(const bf16 *p, float v[8]) {
  uint4 raw = *(const uint4 *)p;
  v[0] = low_f32(raw.x), v[1] = high_f32(raw.x), v[2] = low_f32(raw.y), v[3] = high_f32(raw.y);
  v[4] = low_f32(raw.z), v[5] = high_f32(raw.z), v[6] = low_f32(raw.w), v[7] = high_f32(raw.w);
}
__device__ __forceinline__ void load8(const float *p, float v[8]) {
  float4 a = *(const float4 *)p, b = *(const float4 *)(p + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void store8(bf16 *p, const float v[8]) {
  uint4 raw;
  raw.x = pack_bf16(v[0], v[1]), raw.y = pack_bf16(v[2], v[3]);
  raw.z = pack_bf16(v[4], v[5]), raw.w = pack_bf16(v[6], v[7]);
  *(uint4 *)p = raw;
}
__device__ __forceinline__ void store8(float *p, const float v[8]) {
  *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
  *(float4 *)(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) v += __shfl_xor_sync(FULL_WARP, v, i);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, i));
  return v;
}

// Makes *amax the largest of itself and the magnitudes that all threads of a warp have seen, by
// their bits, in which a NaN is larger than everything. Nothing where `amax` is null. The largest
// does not depend on the order.
__device__ __forceinline__ void note_amax(u32 *amax, float largest) {
  if (!amax) return;
  u32 bits = __reduce_max_sync(FULL_WARP, __float_as_uint(largest) & 0x7fffffffu);
  // NOTE: looking first spares nearly all of the atomic operations, which one address takes one
  // after the other.
  if (threadIdx.x % WARP == 0 && bits > *(volatile u32 *)amax) atomicMax(amax, bits);
}

// Sum over a block of at most 1,024 threads, a whole number of warps, in every thread. `scratch`
// holds 32 floats of shared memory that nobody else uses until the next __syncthreads.
__device__ __forceinline__ float block_sum(float v, float *scratch) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? scratch[lane] : 0.0f);
  __syncthreads();
  return v;
}

// The same for the largest value. NaN is not seen.
__device__ __forceinline__ float block_max(float v, float *scratch) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  v = warp_max(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = warp_max(lane < warps ? scratch[lane] : -__int_as_float(0x7f800000));
  __syncthreads();
  return v;
}

// The scale of a tensor in FP8 whose largest magnitude has these bits: the smallest power of two s
// for which |v| / s is at most 1.75 * 2^`largest`, within 2^-100 .. 2^100; 1 for zeros, NaN for
// what is not finite.
__device__ __forceinline__ float fp8_scale(u32 amax, int largest) {
  if (amax == 0) return 1.0f;
  if (amax >= 0x7f800000u) return __uint_as_float(0x7fc00000u);
  int exponent = (int)(amax >> 23) - 127 - largest + ((amax & 0x7fffff) > 0x600000);
  return __uint_as_float((u32)(min(max(exponent, -100), 100) + 127) << 23);
}
// Of E4M3, up to 448.
__device__ __forceinline__ float e4m3_scale(u32 amax) { return fp8_scale(amax, 8); }
