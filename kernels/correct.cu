// What rounding to nearest made of the operands of a product, and the product's factor corrected by
// it, as src/formats/slope.rs has it.

#define THREADS 256

// An operand: sums that round_values left, pairs of them, and what its numbers are multiplied by.
struct Measured {
  const double *sums; // of products, then of squares
  const float *scale; // of the tensor; null for 1
  u32 count;
  float range;
};

// `Correct` of backend/cuda/quantize/values.rs.
struct Correct {
  Measured operands[2];
  float *factors;
};

// In a fixed order: every thread those 256 apart, then pairwise.
__device__ __forceinline__ double sum_of(const double *pairs, u32 count, double *scratch) {
  double sum = 0.0;
  for (u32 i = threadIdx.x; i < count; i += THREADS) sum += pairs[2 * (size_t)i];
  scratch[threadIdx.x] = sum;
  for (u32 half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  __syncthreads();
  sum = scratch[0];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ float correction(const Measured &q, double *scratch) {
  double products = sum_of(q.sums, q.count, scratch);
  double squares = sum_of(q.sums + 1, q.count, scratch);
  double scale = q.scale ? *q.scale : 1.0f;
  float correction = (float)((double)q.range * squares / (products * scale));
  bool finite = (__float_as_uint(correction) & 0x7fffffffu) < 0x7f800000u;
  return finite && correction > 0.0f ? correction : 1.0f;
}

// Grid: 1; block: 256.
__global__ void __launch_bounds__(THREADS) correct_factors(const __grid_constant__ Correct q) {
  begin();
  __shared__ double scratch[THREADS];
  float of_a = correction(q.operands[0], scratch), of_b = correction(q.operands[1], scratch);
  if (threadIdx.x == 0) q.factors[0] = __fmul_rn(q.factors[0], __fmul_rn(of_a, of_b));
}
