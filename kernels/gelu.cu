// GELU of whole tensors, and its derivative.

// Eight elements a thread at a time; the last ones one by one.
template <class T, bool BACKWARD>
__device__ void gelu_all(T *out, u32 *most, const T *x, u64 len) {
  float largest = 0.0f;
  u64 step = (u64)gridDim.x * blockDim.x * 8;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len; i += step) {
    float v[8], d[8];
    if (i + 8 <= len) {
      load8(x + i, v);
      if (BACKWARD) load8(out + i, d);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        v[j] = BACKWARD ? __fmul_rn(d[j], gelu_derivative(v[j])) : gelu(v[j]);
        largest = max_nan(largest, fabsf(v[j]));
      }
      store8(out + i, v);
    } else {
      for (u64 k = i; k < len; k++) {
        float value = to_f32(x[k]);
        value = BACKWARD ? __fmul_rn(to_f32(out[k]), gelu_derivative(value)) : gelu(value);
        largest = max_nan(largest, fabsf(value));
        out[k] = from_f32<T>(value);
      }
    }
  }
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_most(most, to_f32(from_f32<T>(largest)));
}

// out (len) = gelu(x), the largest magnitude to most. Grid: any; block: 256.
extern "C" __global__ void gelu_forward_bf16(bf16 *out, u32 *most, const bf16 *x, u64 len) {
  begin();
  gelu_all<bf16, false>(out, most, x, len);
}
extern "C" __global__ void gelu_forward_f32(float *out, u32 *most, const float *x, u64 len) {
  begin();
  gelu_all<float, false>(out, most, x, len);
}

// d (len) = d gelu'(x), in place. Launch as forward.
extern "C" __global__ void gelu_backward_bf16(bf16 *d, u32 *most, const bf16 *x, u64 len) {
  begin();
  gelu_all<bf16, true>(d, most, x, len);
}
extern "C" __global__ void gelu_backward_f32(float *d, u32 *most, const float *x, u64 len) {
  begin();
  gelu_all<float, true>(d, most, x, len);
}
