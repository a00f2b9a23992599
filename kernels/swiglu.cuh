// SwiGLU, silu(gate) up with silu(x) = x / (1 + exp(-x)) (Shazeer, arXiv 2002.05202), and its
// gradients: what the files that compute them begin with. Every operation is named, so that all who
// compute them get the same bits. No finite number gives a NaN.

// s = 1 / (1 + e), with e = exp(-x), which may be infinite.
__device__ __forceinline__ float sigmoid(float x, float &e) {
  e = exp2_fast(__fmul_rn(x, -1.4426950408889634f));
  return reciprocal_of(__fadd_rn(1.0f, e));
}

__device__ __forceinline__ float silu(float x) {
  float e;
  return __fmul_rn(x, sigmoid(x, e));
}

// s + x s (1 - s). NOTE: e s in the place of 1 - s, which would cancel; where e is infinite, s is
// 0.
__device__ __forceinline__ float silu_derivative(float x) {
  float e, s = sigmoid(x, e);
  return __fmaf_rn(__fmul_rn(x, s), __fmul_rn(fminf(e, 1e38f), s), s);
}

__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fmul_rn(silu(gate), up);
}

// Of gate and of up, d being the gradient of the result.
__device__ __forceinline__ float swiglu_of_gate(float d, float gate, float up) {
  return __fmul_rn(__fmul_rn(d, up), silu_derivative(gate));
}
__device__ __forceinline__ float swiglu_of_up(float d, float gate) {
  return __fmul_rn(d, silu(gate));
}
