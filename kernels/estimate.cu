// The gradient of weights through the differentiable estimator of E2M1's steps, as
// src/formats/dge.rs and restore.rs have it.

#define THREADS 256

// `Estimate` of backend/cuda/quantize/values.rs.
struct Estimate {
  float *out;          // (rows, columns)
  const float *c;      // likewise: the gradient of what weights became
  const float *tensor; // likewise: the weights
  u32 columns, accumulate;
  float steepness;
};

// f'(y) = min(3, |2 (y - lo) / d - 1|^(1/k - 1) / k) in the bin [lo, lo + d) of the magnitude.
__device__ __forceinline__ float derivative(float y, float steepness) {
  const float edges[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  float magnitude = fminf(fabsf(y), 6.0f);
  u32 low = 0;
  for (u32 code = 1; code < 7; code++)
    if (edges[code] <= magnitude) low = code;
  float from = edges[low], width = __fsub_rn(edges[low + 1], from);
  float part = __fdiv_rn(__fmul_rn(2.0f, __fsub_rn(magnitude, from)), width);
  double distance = fabsf(__fsub_rn(part, 1.0f));
  double power = pow(distance, 1.0 / (double)steepness - 1.0) / (double)steepness;
  return fminf((float)power, 3.0f);
}

// out = c f'(tensor / scale), or with `accumulate` that is added. Grid: rows; block: 256.
__global__ void __launch_bounds__(THREADS) estimate(const __grid_constant__ Estimate q) {
  begin();
  __shared__ u32 scratch[THREADS / WARP];
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, amax = 0;
  size_t row = (size_t)blockIdx.x * q.columns;
  for (u32 i = threadIdx.x; i < q.columns; i += THREADS)
    amax = max(amax, __float_as_uint(q.tensor[row + i]) & 0x7fffffffu);
  amax = __reduce_max_sync(FULL_WARP, amax);
  if (lane == 0) scratch[warp] = amax;
  __syncthreads();
  for (u32 i = 0; i < THREADS / WARP; i++) amax = max(amax, scratch[i]);
  bool finite = amax < 0x7f800000u;
  // The smallest power of two by which nothing in the row exceeds 6.
  float inverse = finite ? __uint_as_float((254 - power_byte(CEIL, amax)) << 23) : 0.0f;
  for (u32 i = threadIdx.x; i < q.columns; i += THREADS) {
    float slope = derivative(__fmul_rn(q.tensor[row + i], inverse), q.steepness);
    if (!finite) slope = not_a_number();
    float g = __fmul_rn(q.c[row + i], slope);
    q.out[row + i] = q.accumulate ? __fadd_rn(q.out[row + i], g) : g;
  }
}
