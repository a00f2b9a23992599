// SwiGLU of whole tensors, and its gradient.
//
// y (rows, 2 M) has gate and up of a row side by side. Where M is a multiple of 8 a thread takes 8
// columns at a time, else one.

// Calls f(row, column, count) for this thread's share of (rows, M).
template <class F> __device__ __forceinline__ void each_piece(u32 rows, u32 m, F f) {
  u32 count = m % 8 == 0 ? 8 : 1, pieces = m / count;
  u64 all = (u64)rows * pieces, step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    // NOTE: there are fewer than 2^32, which divide faster than 64 bits.
    u32 row = (u32)i / pieces;
    f(row, ((u32)i - row * pieces) * count, count);
  }
}

// out (rows, M) = silu(gate) up. The largest magnitude to amax. Grid: any; block: 256.
template <class T>
__global__ void swiglu_forward(T *out, u32 *amax, const T *y, u32 rows, u32 m) {
  begin();
  float largest = 0.0f;
  each_piece(rows, m, [&](u32 row, u32 column, u32 count) {
    const T *gate = y + (size_t)row * 2 * m + column;
    float g[8], u[8];
    load_group(gate, count, g), load_group(gate + m, count, u);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      u[j] = swiglu(g[j], u[j]);
      if (j < count) largest = max_nan(largest, fabsf(u[j]));
    }
    store_group(out + (size_t)row * m + column, count, u);
  });
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_amax(amax, to_f32(from_f32<T>(largest)));
}

// y becomes its gradient, d (rows, M) being that of silu(gate) up. Launch as above.
template <class T>
__global__ void swiglu_backward(T *y, u32 *amax, const T *d, u32 rows, u32 m) {
  begin();
  float largest = 0.0f;
  each_piece(rows, m, [&](u32 row, u32 column, u32 count) {
    T *gate = y + (size_t)row * 2 * m + column;
    float g[8], u[8], of[8];
    load_group(gate, count, g), load_group(gate + m, count, u);
    load_group(d + (size_t)row * m + column, count, of);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float of_up = swiglu_of_up(of[j], g[j]);
      g[j] = swiglu_of_gate(of[j], g[j], u[j]), u[j] = of_up;
      if (j < count) largest = max_nan(largest, max_nan(fabsf(g[j]), fabsf(u[j])));
    }
    store_group(gate, count, g), store_group(gate + m, count, u);
  });
  note_amax(amax, to_f32(from_f32<T>(largest)));
}

// *amax = the larger of itself and the largest magnitude of the gradient of y (rows, 2 M), rounded,
// in rows 0, 32, 64 and so on, d (rows, M) being that of silu(gate) up. Grid: M / 2048, rows / 32,
// rounded up; block: 256.
__global__ void sample_swiglu_gradient(u32 *amax, const bf16 *d, const bf16 *y, u32 m) {
  begin();
  __shared__ float of_warps[8];
  u32 count = m % 8 == 0 ? 8 : 1;
  size_t row = blockIdx.y * 32;
  float largest = 0.0f;
  for (u32 i = 0; i < 8; i += count) {
    u32 column = (blockIdx.x * 256 + threadIdx.x) * 8 + i;
    if (column >= m) break;
    const bf16 *gate = y + row * 2 * m + column;
    float g[8], u[8], of[8];
    load_group(gate, count, g), load_group(gate + m, count, u);
    load_group(d + row * m + column, count, of);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (j < count)
        largest = max_nan(largest, max_nan(fabsf(swiglu_of_gate(of[j], g[j], u[j])),
                                           fabsf(swiglu_of_up(of[j], g[j]))));
  }
  // One note a thread block, as sample_gelu_gradient has it.
  largest = __uint_as_float(
      __reduce_max_sync(FULL_WARP, __float_as_uint(to_f32(from_f32<bf16>(largest)))));
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = largest;
  __syncthreads();
  if (threadIdx.x < WARP) note_amax(amax, threadIdx.x < 8 ? of_warps[threadIdx.x] : 0.0f);
}
