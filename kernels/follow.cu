// Weights from step to step: the slow means that the forward pass may round them by
// (src/formats/ema.rs), bit for bit.
//
// NOTE: every operation is rounded by itself, so sums and products go by names, which the compiler
// does not contract.

// mean (len) = decay mean + (1 - decay) w (len). Grid: len / 256, rounded up; block: 256.
__global__ void update_mean(float *mean, const float *w, u64 len, float decay) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= len) return;
  float kept = __fmul_rn(decay, mean[i]), added = __fmul_rn(__fsub_rn(1.0f, decay), w[i]);
  mean[i] = __fadd_rn(kept, added);
}
