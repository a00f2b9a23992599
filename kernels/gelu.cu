// GELU of whole tensors, and its derivative.

// out (len) = gelu(x), or with BACKWARD out gelu'(x), in place; of GELU itself where EXACT, else in
// its tanh form. The largest magnitude to amax. Eight elements a thread at a time; the last ones
// one by one. Grid: any; block: 256.
template <class T, bool EXACT, bool BACKWARD>
__global__ void gelu_of_all(T *out, u32 *amax, const T *x, u64 len) {
  begin();
  auto value_of = [](float x) { return EXACT ? exact_gelu(x) : gelu(x); };
  auto slope = [](float x) { return EXACT ? exact_gelu_derivative(x) : gelu_derivative(x); };
  float largest = 0.0f;
  u64 step = (u64)gridDim.x * blockDim.x * 8;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len; i += step) {
    float v[8], d[8];
    if (i + 8 <= len) {
      load8(x + i, v);
      if (BACKWARD) load8(out + i, d);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        v[j] = BACKWARD ? __fmul_rn(d[j], slope(v[j])) : value_of(v[j]);
        largest = max_nan(largest, fabsf(v[j]));
      }
      store8(out + i, v);
    } else {
      for (u64 k = i; k < len; k++) {
        float value = to_f32(x[k]);
        value = BACKWARD ? __fmul_rn(to_f32(out[k]), slope(value)) : value_of(value);
        largest = max_nan(largest, fabsf(value));
        out[k] = from_f32<T>(value);
      }
    }
  }
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_amax(amax, to_f32(from_f32<T>(largest)));
}

// *amax = the larger of itself and the largest magnitude of d gelu'(pre), rounded, in rows 0, 32,
// 64 and so on of (rows, cols). Grid: cols / 2048, rows / 32, rounded up; block: 256.
__global__ void sample_gelu_gradient(u32 *amax, const bf16 *d, const bf16 *pre, u32 cols) {
  begin();
  __shared__ float of_warps[8];
  u32 column = (blockIdx.x * 256 + threadIdx.x) * 8;
  size_t at = (size_t)(blockIdx.y * 32) * cols + column;
  float largest = 0.0f;
  if (cols % 8 == 0 && column < cols) {
    float v[8], x[8];
    load8(d + at, v), load8(pre + at, x);
#pragma unroll
    for (int i = 0; i < 8; i++)
      largest = max_nan(largest, fabsf(__fmul_rn(v[i], gelu_derivative(x[i]))));
  } else {
#pragma unroll 1
    for (u32 i = 0; i < 8 && column + i < cols; i++)
      largest = max_nan(largest,
                        fabsf(__fmul_rn(to_f32(d[at + i]), gelu_derivative(to_f32(pre[at + i])))));
  }
  // One note a thread block: all of them look at the same time, so that looking first would spare
  // few.
  largest = __uint_as_float(
      __reduce_max_sync(FULL_WARP, __float_as_uint(to_f32(from_f32<bf16>(largest)))));
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = largest;
  __syncthreads();
  if (threadIdx.x < WARP) note_amax(amax, threadIdx.x < 8 ? of_warps[threadIdx.x] : 0.0f);
}
