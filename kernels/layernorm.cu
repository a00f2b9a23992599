// LayerNorm and its backward pass. One warp owns a row; it reads the row again for each of its passes,
// from the L1 cache.
//
// Backward *adds* to dx, which is the gradient of the residual stream, and leaves partial sums of dw
// and db, which another kernel adds up in order.

// Calls f(column, count) for this lane's share of a row: groups of 8 columns, the last shorter, or
// where rows are not aligned, single columns.
template <class F>
__device__ __forceinline__ void each_group(u32 lane, u32 channels, F f) {
  if (channels % 8 == 0) {
    for (u32 i = lane * 8; i < channels; i += WARP * 8) f(i, 8u);
  } else {
    for (u32 i = lane; i < channels; i += WARP) f(i, 1u);
  }
}

template <class T>
__device__ __forceinline__ void load_group(const T *p, u32 count, float v[8]) {
  if (count == 8) {
    load8(p, v);
  } else {
    v[0] = to_f32(p[0]);
#pragma unroll
    for (int j = 1; j < 8; j++) v[j] = 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_group(T *p, u32 count, const float v[8]) {
  if (count == 8) {
    store8(p, v);
  } else {
    p[0] = from_f32<T>(v[0]);
  }
}

// out (rows, C) = (x - mean) rstd w + b, and mean and rstd (rows); with ADD first sum (rows, C) = x + y,
// rounded to T, which is then what is normalized. The largest magnitude of out is noted in most.
template <class T, bool ADD>
__device__ void normalize(T *out, T *sum, u32 *most, float *mean_out, float *rstd_out, const T *x, const T *y,
                          const T *w, const T *b, u32 rows, u32 channels, float epsilon) {
  u32 lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (row >= rows) return;
  size_t start = (size_t)row * channels;
  float total = 0.0f;
  each_group(lane, channels, [&](u32 i, u32 count) {
    float v[8], u[8];
    load_group(x + start + i, count, v);
    if (ADD) {
      load_group(y + start + i, count, u);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = to_f32(from_f32<T>(v[j] + u[j]));
      store_group(sum + start + i, count, v);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) total += v[j];
  });
  const T *in = ADD ? sum : x;
  float mean = warp_sum(total) / channels, squares = 0.0f;
  each_group(lane, channels, [&](u32 i, u32 count) {
    float v[8];
    load_group(in + start + i, count, v);
#pragma unroll
    for (int j = 0; j < 8; j++) squares += j < count ? (v[j] - mean) * (v[j] - mean) : 0.0f;
  });
  float rstd = rsqrtf(warp_sum(squares) / channels + epsilon), largest = 0.0f;
  each_group(lane, channels, [&](u32 i, u32 count) {
    float v[8], scale[8], shift[8];
    load_group(in + start + i, count, v);
    load_group(w + i, count, scale);
    load_group(b + i, count, shift);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] = (v[j] - mean) * rstd * scale[j] + shift[j];
      if (j < count) largest = max_nan(largest, fabsf(v[j]));
    }
    store_group(out + start + i, count, v);
  });
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_most(most, to_f32(from_f32<T>(largest)));
  if (lane == 0) mean_out[row] = mean, rstd_out[row] = rstd;
}

// Grid: rows / 8, rounded up; block: 256.
extern "C" __global__ void layernorm_forward_bf16(bf16 *out, u32 *most, float *mean, float *rstd, const bf16 *x,
                                                  const bf16 *w, const bf16 *b, u32 rows,
                                                  u32 channels, float epsilon) {
  normalize<bf16, false>(out, 0, most, mean, rstd, x, 0, w, b, rows, channels, epsilon);
}
extern "C" __global__ void layernorm_forward_f32(float *out, u32 *most, float *mean, float *rstd, const float *x,
                                                 const float *w, const float *b, u32 rows,
                                                 u32 channels, float epsilon) {
  normalize<float, false>(out, 0, most, mean, rstd, x, 0, w, b, rows, channels, epsilon);
}
extern "C" __global__ void add_layernorm_forward_bf16(bf16 *out, bf16 *sum, u32 *most, float *mean, float *rstd,
                                                      const bf16 *x, const bf16 *y, const bf16 *w,
                                                      const bf16 *b, u32 rows, u32 channels,
                                                      float epsilon) {
  normalize<bf16, true>(out, sum, most, mean, rstd, x, y, w, b, rows, channels, epsilon);
}
extern "C" __global__ void add_layernorm_forward_f32(float *out, float *sum, u32 *most, float *mean, float *rstd,
                                                     const float *x, const float *y, const float *w,
                                                     const float *b, u32 rows, u32 channels,
                                                     float epsilon) {
  normalize<float, true>(out, sum, most, mean, rstd, x, y, w, b, rows, channels, epsilon);
}

// Rows that a block takes at a time: what it read for dx is still in the L1 cache for dw and db.
#define ROWS_AT_ONCE 8

// dx (rows, C) += the norm's part; partial (grid, 2, C) = this block's sums for dw and db.
template <class T>
__device__ void layernorm_backward(T *dx, float *partial, const T *dy, const T *x, const float *mean,
                                   const float *rstd, const T *w, u32 rows, u32 channels) {
  extern __shared__ float sums[];  // (2, C): a thread touches only its own columns
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  u32 width = channels % 8 == 0 ? 8 : 1;
  for (u32 i = threadIdx.x; i < 2 * channels; i += blockDim.x) sums[i] = 0.0f;
  __syncthreads();
  for (u32 first = blockIdx.x * ROWS_AT_ONCE; first < rows; first += gridDim.x * ROWS_AT_ONCE) {
    u32 last = min(first + ROWS_AT_ONCE, rows);
    for (u32 row = first + warp; row < last; row += warps) {
      size_t start = (size_t)row * channels;
      float m = mean[row], r = rstd[row], sum_g = 0.0f, sum_gn = 0.0f;
      each_group(lane, channels, [&](u32 i, u32 count) {
        float v[8], d[8], scale[8];
        load_group(x + start + i, count, v);
        load_group(dy + start + i, count, d);
        load_group(w + i, count, scale);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          float g = d[j] * scale[j];
          sum_g += g;
          sum_gn += g * (v[j] - m) * r;
        }
      });
      float mean_g = warp_sum(sum_g) / channels, mean_gn = warp_sum(sum_gn) / channels;
      each_group(lane, channels, [&](u32 i, u32 count) {
        float v[8], d[8], scale[8], out[8];
        load_group(x + start + i, count, v);
        load_group(dy + start + i, count, d);
        load_group(w + i, count, scale);
        load_group(dx + start + i, count, out);
#pragma unroll
        for (int j = 0; j < 8; j++)
          out[j] += r * (d[j] * scale[j] - mean_g - (v[j] - m) * r * mean_gn);
        store_group(dx + start + i, count, out);
      });
    }
    for (u32 i = threadIdx.x * width; i < channels; i += blockDim.x * width) {
      float dw[8] = {0, 0, 0, 0, 0, 0, 0, 0}, db[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      for (u32 row = first; row < last; row++) {
        float v[8], d[8], m = mean[row], r = rstd[row];
        load_group(x + (size_t)row * channels + i, width, v);
        load_group(dy + (size_t)row * channels + i, width, d);
#pragma unroll
        for (int j = 0; j < 8; j++) dw[j] += d[j] * (v[j] - m) * r, db[j] += d[j];
      }
      for (u32 j = 0; j < width; j++) sums[i + j] += dw[j], sums[channels + i + j] += db[j];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < 2 * channels; i += blockDim.x)
    partial[(size_t)blockIdx.x * 2 * channels + i] = sums[i];
}

// Grid: as many blocks as there are parts; block: 256; dynamic shared memory: 8 C bytes.
extern "C" __global__ void layernorm_backward_bf16(bf16 *dx, float *partial, const bf16 *dy,
                                                   const bf16 *x, const float *mean,
                                                   const float *rstd, const bf16 *w, u32 rows,
                                                   u32 channels) {
  layernorm_backward(dx, partial, dy, x, mean, rstd, w, rows, channels);
}
extern "C" __global__ void layernorm_backward_f32(float *dx, float *partial, const float *dy,
                                                  const float *x, const float *mean,
                                                  const float *rstd, const float *w, u32 rows,
                                                  u32 channels) {
  layernorm_backward(dx, partial, dy, x, mean, rstd, w, rows, channels);
}
