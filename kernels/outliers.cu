// Quantiles of vectors, as src/formats/outlier.rs has them.

#define THREADS 256

// `Outliers` of backend/cuda/quantize/values.rs.
struct Outliers {
  const void *source; // (vectors, length)
  u32 *amax;          // (vectors): bits of the largest magnitude between the quantiles
  float *bounds;      // (vectors, 2)
  u32 vectors, length;
  u32 ranks[2]; // of the quantiles
};

// A number that orders as the float does, and the float.
__device__ __forceinline__ u32 key(float v) {
  u32 bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(u32 key) {
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// Sums of two counts over the block, in every thread.
__device__ __forceinline__ void sum_counts(u32 counts[2], u32 scratch[2][THREADS / WARP]) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  for (u32 i = 0; i < 2; i++) {
    u32 sum = __reduce_add_sync(FULL_WARP, counts[i]);
    if (lane == 0) scratch[i][warp] = sum;
  }
  __syncthreads();
  for (u32 i = 0; i < 2; i++) {
    counts[i] = 0;
    for (u32 other = 0; other < THREADS / WARP; other++) counts[i] += scratch[i][other];
  }
  __syncthreads();
}

// Both quantiles bit by bit: a bit stays where no more than `rank` numbers are below. A vector with
// a number that is not finite gets that as its amax. Grid: vectors; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS) find_bounds(const __grid_constant__ Outliers q) {
  begin();
  __shared__ u32 scratch[2][THREADS / WARP];
  const T *vector = (const T *)q.source + (size_t)blockIdx.x * q.length;
  u32 found[2] = {0, 0}, infinite[2] = {0, 0};
  for (u32 k = threadIdx.x; k < q.length; k += THREADS)
    infinite[0] += (__float_as_uint(to_f32(vector[k])) & 0x7fffffffu) >= 0x7f800000u;
  sum_counts(infinite, scratch);
  for (int bit = 31; bit >= 0; bit--) {
    u32 counts[2] = {0, 0}, tried[2] = {found[0] | 1u << bit, found[1] | 1u << bit};
    for (u32 k = threadIdx.x; k < q.length; k += THREADS) {
      u32 of = key(to_f32(vector[k]));
      counts[0] += of < tried[0], counts[1] += of < tried[1];
    }
    sum_counts(counts, scratch);
    for (u32 i = 0; i < 2; i++)
      if (counts[i] <= q.ranks[i]) found[i] = tried[i];
  }
  if (threadIdx.x != 0) return;
  float low = of_key(found[0]), high = of_key(found[1]);
  float most = fmaxf(fabsf(low), fabsf(high));
  q.bounds[2 * blockIdx.x] = low, q.bounds[2 * blockIdx.x + 1] = high;
  q.amax[blockIdx.x] = infinite[0] ? 0x7fc00000u : __float_as_uint(most);
}
