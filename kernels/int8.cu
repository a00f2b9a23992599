// Operands in int8, for sizes that 16 divides, as bf16 numbers or bytes: rows with a scale each,
// and tensors with one. A thread has 16 numbers in registers, and a thread block whole rows, so
// that their amaxes are found on the way: a source is read once.

// Numbers of a thread.
#define EACH 16

// What makes integers of numbers with one amax: the definition's v / amax, rounded, times 127,
// rounded.
//
// NOTE: not by a division each, which would take as long as memory does. The reciprocal, correctly
// rounded, and two steps that add what is left of a quotient give the same bits, as long as nothing
// is lost below f32's range: so the amax is brought to 2 .. 4 first (of what is below that range,
// as near as a power of two comes), and of smaller numbers only such lose bits as become 0.
struct Integers {
  float by, amax, inverse;
  __device__ __forceinline__ explicit Integers(u32 bits) {
    // 0, and so NaN throughout, where the amax is not finite.
    by = __uint_as_float(min(255 - (bits >> 23), 254u) << 23);
    // Zeros by whatever they are divided.
    amax = bits == 0 ? 1.0f : __fmul_rn(__uint_as_float(bits), by);
    inverse = __fdiv_rn(1.0f, amax);
  }
  // 127 v / amax, not yet a whole number.
  __device__ __forceinline__ float times_127(float v) const {
    float moved = __fmul_rn(v, by), quotient = __fmul_rn(moved, inverse);
#pragma unroll
    for (int i = 0; i < 2; i++)
      quotient = __fmaf_rn(__fmaf_rn(-quotient, amax, moved), inverse, quotient);
    return __fmul_rn(quotient, 127.0f);
  }
  // Eight as bytes. Adding 1.5 * 2^23 rounds to a whole number, whose last bits are the integer's;
  // any byte of what is not finite, whose scale is NaN.
  __device__ __forceinline__ uint2 pack(const float v[8]) const {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32 x[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        x[j] = __float_as_uint(__fadd_rn(times_127(v[4 * i + j]), 12582912.0f));
      words[i] = __byte_perm(__byte_perm(x[0], x[1], 0x40), __byte_perm(x[2], x[3], 0x40), 0x5410);
    }
    return make_uint2(words[0], words[1]);
  }
};

template <class T>
__device__ __forceinline__ void load(const void *from, size_t at, float v[EACH]) {
#pragma unroll
  for (int i = 0; i < EACH; i += 8) load8((const T *)from + at + i, v + i);
}

// Those of a tensor or a row with an amax of these bits, as they go to memory.
__device__ __forceinline__ void store(bf16 *out, float v[EACH], u32 amax) {
  Integers of(amax);
#pragma unroll
  for (int i = 0; i < EACH; i++)
    v[i] = amax == 0 ? 0.0f : with_sign(rintf(of.times_127(v[i])), v[i]);
#pragma unroll
  for (int i = 0; i < EACH; i += 8) store8(out + i, v + i);
}
__device__ __forceinline__ void store(u8 *out, const float v[EACH], u32 amax) {
  Integers of(amax);
  uint2 low = of.pack(v), high = of.pack(v + 8);
  *(uint4 *)out = make_uint4(low.x, low.y, high.x, high.y);
}

// out (vectors, length) = the integers of vectors along the reduction, and vector_scales; the
// tensor's scale is 1. A vector has whole warps, a thread block whole vectors. Grid: vectors /
// those of a thread block, rounded up; block: at most 1,024.
template <class T, class N>
__global__ void __launch_bounds__(1024) round_int8_rows(const __grid_constant__ Values q) {
  begin();
  __shared__ u32 amaxes[WARP];
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 warps = (q.length + EACH * WARP - 1) / (EACH * WARP), local = warp / warps;
  u32 vector = blockIdx.x * (blockDim.x / WARP / warps) + local;
  u32 k = (threadIdx.x - local * warps * WARP) * EACH;
  bool inside = vector < q.vectors && k < q.length;
  size_t at = (size_t)vector * q.length + k;
  float v[EACH] = {};
  if (inside) load<T>(q.source, at, v);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; i++) largest = max_nan(largest, fabsf(v[i]));
  u32 amax = __reduce_max_sync(FULL_WARP, __float_as_uint(largest) & 0x7fffffffu);
  if (lane == 0) amaxes[warp] = amax;
  __syncthreads();
  amax = __reduce_max_sync(FULL_WARP, lane < warps ? amaxes[local * warps + lane] : 0);
  write_scale(q, tensor_scale(q));
  if (!inside) return;
  if (k == 0) q.vector_scales[vector] = int8_scale(__uint_as_float(amax));
  store((N *)q.out + at, v, amax);
}

// out = the integers of a tensor, in the order of the source, and what its scale goes to. Grid:
// numbers / (16 block), rounded up; block: 256.
template <class T, class N>
__global__ void __launch_bounds__(THREADS) round_int8_tensor(const __grid_constant__ Values q) {
  begin();
  size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
  write_scale(q, tensor_scale(q));
  if (at >= (size_t)q.vectors * q.length) return;
  float v[EACH];
  load<T>(q.source, at, v);
  store((N *)q.out + at, v, *q.amax);
}

// The same as bytes of a tensor that is stored transposed, along the reduction. Grid: vectors /
// 128, length / 128, rounded up; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 2 : 3)
    turn_int8(const __grid_constant__ Values q) {
  begin();
  const T *source = (const T *)q.source;
  turn_tile<T, Integers, false>(nullptr, (u8 *)q.out, nullptr, source, q.amax, q.length, q.vectors);
  write_scale(q, tensor_scale(q));
}
