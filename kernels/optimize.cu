// The end of a step: sums of losses and of squared gradients, clipping, AdamW (Loshchilov and
// Hutter, arXiv 1711.05101) and StableAdamW (2304.13013), for all parameters at once.
//
// Here moments and, but for their squares, gradients are f32; optimize_moments.cu has those that are
// stored in less.

// partials (pieces) = sums of the squares of the gradients of a piece, of those from `first` up to
// `pieces`. What a piece is does not depend on the grid or on the rank that sums it, so that the sum
// of all has the same bits everywhere. A warp takes a piece. Grid: any; block: 256.
__global__ void square_gradients(double *partials, const Entry *table, u32 entries, u64 first,
                                 u64 pieces) {
  begin();
  u32 lane = threadIdx.x % WARP;
  u64 warp = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  u64 warps = (u64)gridDim.x * blockDim.x / WARP;
  for (u64 piece = first + warp; piece < pieces; piece += warps) {
    const Entry *e = find(table, entries, piece);
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    double total = 0.0;
    u64 i = start + lane * 4;
    for (; i + 4 <= end; i += WARP * 4) {
      float4 g = gradients(e, i);
      total += (double)g.x * g.x + (double)g.y * g.y + (double)g.z * g.z + (double)g.w * g.w;
    }
    for (; i < end; i++) {
      double g = gradient(e, i);
      total += g * g;
    }
#pragma unroll
    for (int i = WARP / 2; i > 0; i /= 2) total += __shfl_xor_sync(FULL_WARP, total, i);
    if (lane == 0) partials[piece] = total;
  }
}

// gradients (n) times a number. n is a multiple of 8. Grid: any; block: any.
template <class T> __global__ void scale_gradients(T *gradients, u64 n, float factor) {
  begin();
  u64 step = (u64)gridDim.x * blockDim.x * 8;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < n; i += step) {
    float v[8];
    load8(gradients + i, v);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= factor;
    store8(gradients + i, v);
  }
}

// *sum += the sum of losses (rows), or without `accumulate` = it; each times its weight, unless
// weights are null. Grid: 1; block: 1024.
__global__ void sum_losses(double *sum, const float *losses, const float *weights, u32 rows,
                           u32 accumulate) {
  begin();
  __shared__ double scratch[WARP];
  double total = 0.0;
  for (u32 i = threadIdx.x; i < rows; i += blockDim.x) {
    double weight = weights ? weights[i] : 1.0;
    if (weight != 0.0) total += losses[i] * weight; // whatever the loss of what does not count
  }
  total = block_sum_double(total, scratch);
  if (threadIdx.x == 0) *sum = accumulate ? *sum + total : total;
}

// sums[1] = the sum of the partials, in one order; sums[2] = *clamped, which starts again from 0.
// Makes the largest magnitudes of `count` parameters from `first` on ready for the update, if there
// will be one; those without elements are not trained and keep theirs. sums: losses, squares, clamped blocks. Grid: 1; block: 1024.
__global__ void sum_squares(double *sums, u32 *clamped, const double *partials, u64 parts,
                            const Entry *table, u32 first, u32 count, Step s) {
  begin();
  __shared__ double scratch[WARP];
  // Several chains, since there is one block and what it waits for is far.
  double chains[4] = {};
  u64 i = threadIdx.x;
  for (; i + 3 * blockDim.x < parts; i += 4 * blockDim.x)
#pragma unroll
    for (u32 k = 0; k < 4; k++) chains[k] += partials[i + k * blockDim.x];
  for (; i < parts; i += blockDim.x) chains[0] += partials[i];
  double total = block_sum_double((chains[0] + chains[1]) + (chains[2] + chains[3]), scratch);
  if (threadIdx.x == 0) sums[1] = total, sums[2] = (double)*clamped, *clamped = 0;
  __syncthreads();
  float norm;
  if (is_allowed(sums, s, norm))
    for (u32 i = threadIdx.x; i < count; i += blockDim.x)
      if (table[first + i].len > 0) *table[first + i].amax = 0;
}

// partials (pieces) = sums over a piece of g^2 / max(u, epsilon^2), u the corrected second moment
// after the update. Grid: any; block: 256.
__global__ void square_ratios(double *partials, const Entry *table, u32 entries, u64 pieces,
                              const double *sums, Step s) {
  begin();
  __shared__ double scratch[WARP];
  float scale = clipping((float)sqrt(sums[1]), s);
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    const float *moments = (const float *)e->v, *of_losses = (const float *)e->gradient;
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    double total = 0.0;
    auto add = [&](float v, float g) {
      g *= scale;
      v = s.beta2 * v + (1.0f - s.beta2) * (g * g);
      float ratio = g / fmaxf(sqrtf(v) * s.root, s.epsilon);
      total += (double)ratio * ratio;
    };
    u64 i = start + threadIdx.x * 4;
    for (; i + 4 <= end; i += blockDim.x * 4) {
      float4 g = *(const float4 *)(of_losses + i), v = *(const float4 *)(moments + i);
      add(v.x, g.x), add(v.y, g.y), add(v.z, g.z), add(v.w, g.w);
    }
    for (; i < end; i++) add(moments[i], of_losses[i]);
    total = block_sum_double(total, scratch);
    if (threadIdx.x == 0) partials[piece] = total;
  }
}

// rates (entries) = the learning rate of a parameter with the root mean square that its partials
// make, and it with the correction of first moments. Grid: entries; block: 256.
__global__ void find_rates(float2 *rates, const double *partials, const Entry *table,
                           double correction, Step s) {
  begin();
  __shared__ double scratch[WARP];
  const Entry *e = table + blockIdx.x;
  double total = sum_of_pieces(partials, e, scratch);
  if (threadIdx.x != 0) return;
  float rate = (float)((double)s.lr / fmax(sqrt(total / (double)e->len), 1.0));
  rates[blockIdx.x] = make_float2(rate, (float)((double)rate / correction));
}

// One update of every parameter of which there is a piece from `first` up to `pieces`, unless loss or
// gradient norm is not finite or the norm above the limit. sums: as above. rates: of `find_rates`,
// or null for the step's own. With `trial` (entries, 3), zeros before, nothing is stored but the
// bits of the largest magnitudes that the update would leave of each parameter: weights, first and
// second moments. It is the same code, so that both see the same numbers.
__device__ __forceinline__ void update_all(const Entry *table, u32 entries, u64 first,
                                           u64 pieces, const double *sums, const float2 *rates,
                                           u32 *trial, const Step &s) {
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  float scale = clipping(norm, s);
  for (u64 piece = first + blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    if (!e->v) continue;
    float lr = rates ? rates[e - table].x : s.lr, size = rates ? rates[e - table].y : s.size;
    float keep = e->decays ? 1.0f - lr * s.weight_decay : 1.0f;
    float largest = 0.0f, largest_m = 0.0f, largest_v = 0.0f;
    float *of_m = (float *)e->m, *of_v = (float *)e->v;
    const float *of_losses = (const float *)e->gradient;
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    auto update = [&](float &p, float &m, float &v, float g) {
      g *= scale;
      m = s.beta1 * m + (1.0f - s.beta1) * g;
      v = s.beta2 * v + (1.0f - s.beta2) * (g * g);
      p = p * keep - size * (m / (sqrtf(v) * s.root + s.epsilon));
      largest = max_nan(largest, fabsf(p));
      if (trial) largest_m = max_nan(largest_m, fabsf(m)), largest_v = max_nan(largest_v, fabsf(v));
    };
    u64 i = start + threadIdx.x * 4;
    for (; i + 4 <= end; i += blockDim.x * 4) {
      float4 g = *(const float4 *)(of_losses + i), p = *(float4 *)(e->param + i);
      float4 m = *(float4 *)(of_m + i), v = *(float4 *)(of_v + i);
      update(p.x, m.x, v.x, g.x), update(p.y, m.y, v.y, g.y);
      update(p.z, m.z, v.z, g.z), update(p.w, m.w, v.w, g.w);
      if (trial) continue;
      *(float4 *)(e->param + i) = p, *(float4 *)(of_m + i) = m, *(float4 *)(of_v + i) = v;
      *(uint2 *)(e->copy + i) = make_uint2(pack_bf16(p.x, p.y), pack_bf16(p.z, p.w));
    }
    for (; i < end; i++) {
      float p = e->param[i], m = of_m[i], v = of_v[i];
      update(p, m, v, of_losses[i]);
      if (trial) continue;
      e->param[i] = p, of_m[i] = m, of_v[i] = v;
      e->copy[i] = from_f32<bf16>(p);
    }
    u32 *of_one = trial + 3 * (e - table);
    note_amax(trial ? of_one : e->amax, largest);
    if (trial) note_amax(of_one + 1, largest_m), note_amax(of_one + 2, largest_v);
  }
}

// Grid: any; block: 256.
__global__ void adamw(const Entry *table, u32 entries, u64 first, u64 pieces, const double *sums,
                      u32 *trial, Step s) {
  begin();
  update_all(table, entries, first, pieces, sums, nullptr, trial, s);
}
__global__ void stable_adamw(const Entry *table, u32 entries, u64 first, u64 pieces,
                             const double *sums, const float2 *rates, u32 *trial, Step s) {
  begin();
  update_all(table, entries, first, pieces, sums, rates, trial, s);
}

// copy (len) = param (len), to nearest even; *amax, which is 0 before, the bits of the largest
// magnitude of param. Grid: len / 256, rounded up; block: 256.
__global__ void copy_to_bf16(bf16 *copy, u32 *amax, const float *param, u64 len) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < len ? param[i] : 0.0f;
  if (i < len) copy[i] = from_f32<bf16>(v);
  note_amax(amax, v);
}

// A parameter whose master values are split from here on: low (len) and copy (len) of param (len);
// *amax, which is 0 before, the bits of the largest magnitude of copy. Grid: len / 256, rounded up;
// block: 256.
__global__ void split_master(u16 *low, bf16 *copy, u32 *amax, const float *param, u64 len) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  float v = 0.0f;
  if (i < len) split(param[i], copy[i], low[i]), v = to_f32(copy[i]);
  note_amax(amax, v);
}

// param (len) of copy (len) and low (len). Grid: len / 256, rounded up; block: 256.
__global__ void join_master(float *param, const bf16 *copy, const u16 *low, u64 len) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < len) param[i] = join(copy[i], low[i]);
}
