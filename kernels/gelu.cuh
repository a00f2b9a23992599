// GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415), as GPT-2 has it, GELU itself, and
// their derivatives: what the files that compute them begin with.
//
// With u = sqrt(2 / pi) (x + 0.044715 x^3) and s = 1 / (1 + exp(-2 u)), gelu = x s and gelu' = s +
// x s (1 - s) 2 u'. Errors are those of f32 relative to 1 or x, and no finite number gives a NaN up
// to 1e19, where x^2 overflows. Every operation is named, so that all who compute them get the same
// bits. A derivative takes 8 operations, an exponential and a reciprocal.

#define GELU_A 0.7978845608028654 // sqrt(2 / pi)
#define GELU_B 0.044715
#define LOG2_E 1.4426950408889634

// s, given x^2. exp(-2 u) may be infinite.
__device__ __forceinline__ float gelu_sigmoid(float x, float x2) {
  constexpr float c0 = -2 * LOG2_E * GELU_A, c1 = c0 * GELU_B;
  float e = exp2_fast(__fmul_rn(x, __fmaf_rn(x2, c1, c0)));
  return reciprocal_of(__fadd_rn(1.0f, e));
}

__device__ __forceinline__ float gelu(float x) {
  return __fmul_rn(x, gelu_sigmoid(x, __fmul_rn(x, x)));
}

__device__ __forceinline__ float gelu_derivative(float x) {
  constexpr float d0 = 2 * GELU_A, d1 = 3 * d0 * GELU_B; // of 2 u'
  float x2 = __fmul_rn(x, x), s = gelu_sigmoid(x, x2);
  // NOTE: x last: x^3 overflows where s (1 - s) has long been 0.
  float slope = __fmul_rn(__fmaf_rn(x2, d1, d0), __fmaf_rn(-s, s, s));
  return __fmaf_rn(x, slope, s);
}

// GELU itself is x p, with p the probability that a normal number is less than x, and its
// derivative p + x times the normal density. The probability of less than -|x| is exp(-x^2 / 2) t
// q(t) with t = 1 / (1 + 0.35 |x|); q is the polynomial of degree 8 that is nearest to it in
// relative error (3e-8).
__device__ __forceinline__ float normal_below(float x, float &e) {
  e = exp2_fast(__fmul_rn(__fmul_rn(x, x), (float)(-0.5 * LOG2_E)));
  float t = reciprocal_of(__fmaf_rn(0.35f, fabsf(x), 1.0f)), q = -0.029146073f;
  q = __fmaf_rn(q, t, 0.1439724f);
  q = __fmaf_rn(q, t, -0.25571567f);
  q = __fmaf_rn(q, t, 0.15917577f);
  q = __fmaf_rn(q, t, -0.023110922f);
  q = __fmaf_rn(q, t, 0.105508454f);
  q = __fmaf_rn(q, t, 0.119832754f);
  q = __fmaf_rn(q, t, 0.13986188f);
  q = __fmaf_rn(q, t, 0.1396214f);
  float tail = __fmul_rn(e, __fmul_rn(t, q));
  return x > 0.0f ? __fadd_rn(1.0f, -tail) : tail;
}

__device__ __forceinline__ float exact_gelu(float x) {
  float e;
  return __fmul_rn(x, normal_below(x, e));
}

__device__ __forceinline__ float exact_gelu_derivative(float x) {
  float e, p = normal_below(x, e);
  return __fmaf_rn(__fmul_rn(0.3989423f, x), e, p); // 1 / sqrt(2 pi)
}
