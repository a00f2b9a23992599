// What kernels of the end of a step share: the table of parameters, factors of a step.
//
// The table says where each parameter and what belongs to it lies. Work is cut into pieces of PIECE
// elements, numbered through all parameters; blocks take pieces in turn and find the parameter by a
// binary search.

// As in optim/moments.rs.
enum Element : u32 { F32, BF16, INT8, E4M3, F16 };

struct Entry {
  float *param;     // f32 master values, or null where they are split
  u16 *low;         // then what the copies lack
  bf16 *copy;       // what GEMMs read
  void *m, *v;      // moments, as `element` says; v is null of a matrix that has none (Muon)
  float *m_scales, *v_scales; // of groups, or of the whole tensor, where they have any
  const void *gradient;       // bf16 where `narrow`, else f32
  u64 len;
  u64 first_piece;  // number of the parameter's first piece
  u16 decays;       // whether weight decay applies
  u16 narrow;
  u16 element[2];   // what first and second moments are stored as: `Element`
  u32 *amax;        // bits of the largest magnitude: of the master values, or where these are
                    // split of the copies
  float *interval, *count, *sum; // of Q-Ramping; null of what every step moves
};

#define PIECE 4096

// An element of a gradient.
__device__ __forceinline__ float gradient(const Entry *e, u64 i) {
  return e->narrow ? to_f32(((const bf16 *)e->gradient)[i]) : ((const float *)e->gradient)[i];
}

// Four that lie next to each other, from a multiple of 4 on.
__device__ __forceinline__ float4 gradients(const Entry *e, u64 i) {
  if (!e->narrow) return *(const float4 *)((const float *)e->gradient + i);
  uint2 pairs = *(const uint2 *)((const bf16 *)e->gradient + i);
  return make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u),
                     __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000u));
}

__device__ __forceinline__ const Entry *find(const Entry *table, u32 entries, u64 piece) {
  u32 low = 0, high = entries;
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (table[middle].first_piece <= piece) low = middle;
    else high = middle;
  }
  return table + low;
}

__device__ __forceinline__ double block_sum_double(double v, double *scratch) {
#pragma unroll
  for (int i = WARP / 2; i > 0; i /= 2) v += __shfl_xor_sync(FULL_WARP, v, i);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = v;
  __syncthreads();
  double sum = 0.0;
  for (u32 w = 0; w < blockDim.x / WARP; w++) sum += scratch[w];
  __syncthreads();
  return sum;
}

// The sum of a parameter's partials, which are one a piece, in every thread.
__device__ __forceinline__ double sum_of_pieces(const double *partials, const Entry *e,
                                                double *scratch) {
  u64 pieces = (e->len + PIECE - 1) / PIECE;
  double total = 0.0;
  for (u64 i = threadIdx.x; i < pieces; i += blockDim.x) total += partials[e->first_piece + i];
  return block_sum_double(total, scratch);
}

// Factors that do not depend on the element, computed by the host in f64.
struct Step {
  float lr, beta1, beta2, epsilon, weight_decay;
  float size;        // lr / (1 - beta1^t)
  float root;        // 1 / sqrt(1 - beta2^t)
  float clip;        // largest global norm; 0 does not clip
  float loss_scale;  // makes the sum of losses the step's loss
  float largest_gradient; // no update with a clipped gradient of a larger norm
};

// The gradient norm of a step, and whether it and the loss are finite and it is within the limit,
// so that the update is to be made.
__device__ __forceinline__ bool is_allowed(const double *sums, const Step &s, float &norm) {
  float loss = (float)(sums[0] * (double)s.loss_scale);
  norm = (float)sqrt(sums[1]);
  float clipped = s.clip > 0.0f ? fminf(norm, s.clip) : norm;
  return isfinite(loss) && isfinite(norm) && clipped <= s.largest_gradient;
}

// How the gradient of a parameter is normalized: elements beyond a limit are made smaller by a
// factor, then all by another. And what an update keeps of it for the next step.
struct Normal {
  float limit, shrink, scale;
  float statistics[3];
};

__device__ __forceinline__ float clip(float g, const Normal &normal) {
  return fabsf(g) > normal.limit ? __fmul_rn(g, normal.shrink) : g;
}

// Splits a number into a copy to nearest and what that lacks, and joins it again: optim/master.rs.
// What lies in the middle between two copies becomes the next number away from 0.
__device__ __forceinline__ void split(float p, bf16 &copy, u16 &low) {
  u32 bits = __float_as_uint(p), rounded = bits + 0x8000;
  copy.bits = (u16)(rounded >> 16), low = (u16)(bits + ((rounded & 0xffff) == 0));
}
__device__ __forceinline__ float join(bf16 copy, u16 low) {
  return __uint_as_float(((u32)copy.bits << 16) + (u32)(int)(short)low);
}

// What clipping makes gradients of a norm smaller by. PyTorch's clip_grad_norm_ adds the same 1e-6.
__device__ __forceinline__ float clipping(float norm, const Step &s) {
  return s.clip > 0.0f ? fminf(s.clip / (norm + 1e-6f), 1.0f) : 1.0f;
}
