// AdamW with Q-Ramping (optim/ramping.rs): weights of matrices are updated every so many steps, by
// the mean of the gradients since, and all others in every step.
//
// Every operation is rounded by itself, none fused, so that the processor has the same bits.

// A moment that takes in a number.
__device__ __forceinline__ float mean(float beta, float moment, float number) {
  return __fadd_rn(__fmul_rn(beta, moment), __fmul_rn(__fsub_rn(1.0f, beta), number));
}

// One step of every parameter, unless loss or gradient norm is not finite or the norm above the
// limit. sums, trial: as of `adamw` in optimize.cu; a trial notes the larger of first moments and
// sums. Grid: any; block: 256.
__global__ void update_ramping(const Entry *table, u32 entries, u64 first, u64 pieces,
                               const double *sums, u32 *trial, Step s) {
  begin();
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  for (u64 piece = first + blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    float keep = e->decays ? __fsub_rn(1.0f, __fmul_rn(s.lr, s.weight_decay)) : 1.0f;
    float largest = 0.0f, largest_m = 0.0f, largest_v = 0.0f;
    float *of_m = (float *)e->m, *of_v = (float *)e->v;
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    for (u64 i = start + threadIdx.x; i < end; i += blockDim.x) {
      float p = __fmul_rn(e->param[i], keep), m = of_m[i], v = of_v[i];
      float count = 1.0f, sum = ((const float *)e->gradient)[i], times = 1.0f;
      if (e->interval) {
        count = __fadd_rn(e->count[i], 1.0f), sum = __fadd_rn(e->sum[i], sum);
        times = __fdiv_rn(count, e->interval[i]);
      }
      if (times == truncf(times)) {
        float g = __fdiv_rn(sum, count);
        m = mean(s.beta1, m, g), v = mean(s.beta2, v, __fmul_rn(g, g));
        float divisor = __fadd_rn(__fmul_rn(__fsqrt_rn(v), s.root), s.epsilon);
        p = __fsub_rn(p, __fmul_rn(__fmul_rn(s.size, count), __fdiv_rn(m, divisor)));
        count = sum = 0.0f;
      }
      largest = max_nan(largest, fabsf(p));
      if (trial) {
        largest_m = max_nan(max_nan(largest_m, fabsf(m)), fabsf(sum));
        largest_v = max_nan(largest_v, fabsf(v));
        continue;
      }
      e->param[i] = p, e->copy[i] = from_f32<bf16>(p), of_m[i] = m, of_v[i] = v;
      if (e->interval) e->count[i] = count, e->sum[i] = sum;
    }
    u32 *of_one = trial + 3 * (e - table);
    note_amax(trial ? of_one : e->amax, largest);
    if (trial) note_amax(of_one + 1, largest_m), note_amax(of_one + 2, largest_v);
  }
}
