// Weights from step to step: the slow means that the forward pass may round them by
// (src/formats/ema.rs), what is seen of them (observe.rs), the reset of those that oscillate
// (reset.rs) and how often they are updated (src/optim/ramping.rs), bit for bit but for the order
// of sums.
//
// NOTE: every operation is rounded by itself, so sums and products go by names, which the compiler
// does not contract.

#define SUMS 9

// mean (len) = decay mean + (1 - decay) w (len). Grid: len / 256, rounded up; block: 256.
__global__ void update_mean(float *mean, const float *w, u64 len, float decay) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= len) return;
  float kept = __fmul_rn(decay, mean[i]), added = __fmul_rn(__fsub_rn(1.0f, decay), w[i]);
  mean[i] = __fadd_rn(kept, added);
}

// before (len) = w (len), and nothing moved yet. Grid: len / 256, rounded up; block: 256.
__global__ void begin_track(float *before, float *moved, float *rounded_moved, const float *w,
                            u64 len) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= len) return;
  before[i] = w[i], moved[i] = rounded_moved[i] = 0.0f;
}

// Between the magnitudes of a code and the next.
__device__ __forceinline__ float middle(u32 code) {
  return __fmul_rn(__fadd_rn(decode(code), decode(code + 1)), 0.5f);
}

// A weight or its number over its scale; 0 where the block vanishes.
__device__ __forceinline__ float element_of(float v, float scale) {
  return scale == 0.0f ? 0.0f : __fdiv_rn(v, scale);
}

// The distance of y from the nearest midpoint over the largest in its bin.
__device__ __forceinline__ float confidence(float y) {
  u32 code = nearest_code(y);
  float distance, largest;
  if (code == 0) {
    largest = middle(0), distance = __fsub_rn(largest, y);
  } else if (code == 7) {
    distance = __fsub_rn(y, middle(6)), largest = __fsub_rn(6.0f, middle(6));
  } else {
    float low = middle(code - 1), high = middle(code);
    distance = fminf(__fsub_rn(y, low), __fsub_rn(high, y));
    largest = __fmul_rn(__fsub_rn(high, low), 0.5f);
  }
  return fminf(__fdiv_rn(distance, largest), 1.0f);
}

// A weight that is observed: `Observed` of backend/cuda/follow.rs.
struct Observed {
  const float *w;                        // (rows, inputs), after the step
  float *before, *moved, *rounded_moved; // likewise
  const float *rounded[2], *block_scales[2]; // views: (rows, inputs), and (rows, blocks)
  double *partials;                      // (SUMS, grid)
  u64 len;
  u32 inputs, blocks, block; // elements of a block
};

__device__ __forceinline__ double sum_or_most(double v, double *scratch, bool most) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) {
    double other = __shfl_xor_sync(FULL_WARP, v, i);
    v = most ? fmax(v, other) : v + other;
  }
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  double all = scratch[0];
  for (u32 w = 1; w < blockDim.x / WARP; w++)
    all = most ? fmax(all, scratch[w]) : all + scratch[w];
  __syncthreads();
  return all;
}

// Adds what moved, keeps w as what was before the next step, and sums up what a thread block sees:
// squares of changes, squares before, both of rounded weights, confidence, codes that changed,
// weights above the grid, weights that oscillate, and the largest magnitude. Grid: fixed; block:
// 256.
__global__ void observe(const __grid_constant__ Observed q) {
  begin();
  __shared__ double scratch[WARP];
  double sums[SUMS] = {};
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < q.len;
       i += (u64)gridDim.x * blockDim.x) {
    float before = q.before[i], after = q.w[i];
    float q_before = q.rounded[0][i], q_after = q.rounded[1][i];
    u64 block = i / q.inputs * q.blocks + i % q.inputs / q.block;
    float change = __fsub_rn(after, before), q_change = __fsub_rn(q_after, q_before);
    float moved = __fadd_rn(q.moved[i], fabsf(change));
    float q_moved = __fadd_rn(q.rounded_moved[i], fabsf(q_change));
    float scale_before = q.block_scales[0][block], scale = q.block_scales[1][block];
    float y = fabsf(element_of(after, scale));
    float was = element_of(q_before, scale_before), is = element_of(q_after, scale);
    q.before[i] = after, q.moved[i] = moved, q.rounded_moved[i] = q_moved;
    sums[0] += (double)change * change, sums[1] += (double)before * before;
    sums[2] += (double)q_change * q_change, sums[3] += (double)q_before * q_before;
    sums[4] += confidence(y);
    sums[5] += nearest_code(fabsf(was)) != nearest_code(fabsf(is)) || (was < 0.0f) != (is < 0.0f);
    sums[6] += y > 6.0f;
    sums[7] += moved > 0.0f && __fdiv_rn(q_moved, moved) > 16.0f;
    sums[8] = fmax(sums[8], (double)fabsf(after));
  }
#pragma unroll
  for (u32 j = 0; j < SUMS; j++) {
    double all = sum_or_most(sums[j], scratch, j == SUMS - 1);
    if (threadIdx.x == 0) q.partials[(size_t)j * gridDim.x + blockIdx.x] = all;
  }
}

// sums (SUMS) = those of all thread blocks, in order. Grid: 1; block: 256.
__global__ void add_observations(double *sums, const double *partials, u32 parts) {
  begin();
  __shared__ double scratch[WARP];
  for (u32 j = 0; j < SUMS; j++) {
    double all = 0.0;
    bool most = j == SUMS - 1;
    for (u32 i = threadIdx.x; i < parts; i += blockDim.x) {
      double part = partials[(size_t)j * parts + i];
      all = most ? fmax(all, part) : all + part;
    }
    all = sum_or_most(all, scratch, most);
    if (threadIdx.x == 0) sums[j] = all;
  }
}

// intervals (len) of weights that moved so far (len), in periods of so many steps. Grid: len / 256,
// rounded up; block: 256.
__global__ void find_intervals(float *intervals, const float *moved, const float *rounded_moved,
                               u64 len, float period) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= len) return;
  float ratio = __fdiv_rn(rounded_moved[i], __fadd_rn(moved[i], 1e-8f));
  float interval = __fadd_rn(__fmul_rn(floorf(__fdiv_rn(ratio, 16.0f)), 5.0f), 1.0f);
  intervals[i] = fminf(interval, period);
}

// w (len) = rounded (len) where that moved at least `threshold` times as far. Grid: len / 256,
// rounded up; block: 256.
__global__ void reset_oscillating(float *w, const float *rounded, const float *moved,
                                  const float *rounded_moved, u64 len, float threshold) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= len) return;
  if (moved[i] > 0.0f && __fdiv_rn(rounded_moved[i], moved[i]) >= threshold) w[i] = rounded[i];
}
