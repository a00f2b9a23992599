// Softmax and cross-entropy over rows of logits, in place: each row becomes its own gradient.
//
// A row of 50,304 bf16 logits is 100 KB: the second pass finds it in the L2 cache.

// Losses of rows of logits, and their gradients.
struct Losses {
  void *logits;         // (rows, stride)
  float *losses;        // (rows)
  const u32 *targets;   // (rows)
  const float *weights; // (rows): a factor of each gradient, or null
  u32 vocab, stride;
  float scale; // of all gradients
  u32 gradient;
};

// losses (rows) = log sum exp(logits) - logits[target], overwritten; with `gradient` not 0, logits
// become weight scale (softmax - one_hot) in columns 0 .. vocab - 1 and 0 beyond.
// stride is a multiple of 8. Grid: rows; block: 1024.
template <class T> __global__ void __launch_bounds__(1024) softmax_loss(Losses l) {
  begin();
  __shared__ float scratch[WARP];
  u32 vocab = l.vocab, stride = l.stride;
  T *row = (T *)l.logits + (size_t)blockIdx.x * stride;
  u32 target = l.targets[blockIdx.x], step = blockDim.x * 8;
  const float infinity = __int_as_float(0x7f800000);
  float at_target = to_f32(row[target]);

  // The largest logit and the sum of exponentials, one pass: a thread rescales its sum when its
  // maximum grows.
  float largest = -infinity, sum = 0.0f;
  for (u32 i = threadIdx.x * 8; i < vocab; i += step) {
    float v[8];
    load8(row + i, v);
    float most = largest;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (i + j >= vocab) v[j] = -infinity;
      most = fmaxf(most, v[j]);
    }
    if (most > largest) {
      sum *= __expf(largest - most);
      largest = most;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum += __expf(v[j] - largest);
  }
  float most = block_max(largest, scratch);
  // A thread that saw no column has the maximum -infinity and the sum 0.
  sum = block_sum(sum == 0.0f ? 0.0f : sum * __expf(largest - most), scratch);
  if (threadIdx.x == 0) l.losses[blockIdx.x] = logf(sum) + most - at_target;
  if (!l.gradient) return;

  float scale = l.weights ? l.scale * l.weights[blockIdx.x] : l.scale, factor = scale / sum;
  for (u32 i = threadIdx.x * 8; i < stride; i += step) {
    float v[8];
    load8(row + i, v);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] = i + j < vocab ? __expf(v[j] - most) * factor : 0.0f;
      if (i + j == target) v[j] -= scale;
    }
    store8(row + i, v);
  }
}

// The worst losses of rows of logits that may each move, and how large the logits are.
struct Worst {
  const void *logits; // (rows, stride)
  float *worst, *amax; // (rows)
  const u32 *targets; // (rows)
  u32 vocab, stride;
  float epsilon;
};

// Moved against the loss: the target down, all others up. NOTE: it is never stored, because bf16
// numbers are as far apart as an epsilon of 1/256.
__device__ __forceinline__ float moved(float y, float epsilon, bool is_target) {
  float by = epsilon * (fabsf(y) + 1.0f);
  return is_target ? y - by : y + by;
}

// worst (rows) = log sum exp(z) - z[target] of the moved logits z; amax (rows) = the largest |y|.
// Overwrites both. stride is a multiple of 8. Grid: rows; block: 1024.
template <class T> __global__ void __launch_bounds__(1024) worst_loss(Worst w) {
  begin();
  __shared__ float scratch[WARP];
  const T *row = (const T *)w.logits + (size_t)blockIdx.x * w.stride;
  u32 target = w.targets[blockIdx.x], step = blockDim.x * 8;
  const float infinity = __int_as_float(0x7f800000);

  // As in softmax_loss.
  float largest = -infinity, sum = 0.0f, amax = 0.0f;
  for (u32 i = threadIdx.x * 8; i < w.vocab; i += step) {
    float v[8];
    load8(row + i, v);
    float most = largest;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      bool inside = i + j < w.vocab;
      if (inside) amax = fmaxf(amax, fabsf(v[j]));
      v[j] = inside ? moved(v[j], w.epsilon, i + j == target) : -infinity;
      most = fmaxf(most, v[j]);
    }
    if (most > largest) {
      sum *= __expf(largest - most);
      largest = most;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) sum += __expf(v[j] - largest);
  }
  float most = block_max(largest, scratch);
  sum = block_sum(sum == 0.0f ? 0.0f : sum * __expf(largest - most), scratch);
  amax = block_max(amax, scratch);
  if (threadIdx.x == 0) {
    float at_target = moved(to_f32(row[target]), w.epsilon, true);
    w.worst[blockIdx.x] = logf(sum) + most - at_target;
    w.amax[blockIdx.x] = amax;
  }
}
