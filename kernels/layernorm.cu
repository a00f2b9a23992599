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
  begin();
  normalize<bf16, false>(out, 0, most, mean, rstd, x, 0, w, b, rows, channels, epsilon);
}
extern "C" __global__ void layernorm_forward_f32(float *out, u32 *most, float *mean, float *rstd, const float *x,
                                                 const float *w, const float *b, u32 rows,
                                                 u32 channels, float epsilon) {
  begin();
  normalize<float, false>(out, 0, most, mean, rstd, x, 0, w, b, rows, channels, epsilon);
}
extern "C" __global__ void add_layernorm_forward_bf16(bf16 *out, bf16 *sum, u32 *most, float *mean, float *rstd,
                                                      const bf16 *x, const bf16 *y, const bf16 *w,
                                                      const bf16 *b, u32 rows, u32 channels,
                                                      float epsilon) {
  begin();
  normalize<bf16, true>(out, sum, most, mean, rstd, x, y, w, b, rows, channels, epsilon);
}
extern "C" __global__ void add_layernorm_forward_f32(float *out, float *sum, u32 *most, float *mean, float *rstd,
                                                     const float *x, const float *y, const float *w,
                                                     const float *b, u32 rows, u32 channels,
                                                     float epsilon) {
  begin();
  normalize<float, true>(out, sum, most, mean, rstd, x, y, w, b, rows, channels, epsilon);
}

// Warps of a block of the backward kernel, and groups of 8 columns that one of its threads owns.
//
// NOTE: with 4 groups a thread, a row of 1,024 columns needs one warp and no waiting for others, but so many registers
// that only 16 warps fit a multiprocessor: 65 us for 16,384 rows on an H100.
#define BACKWARD_WARPS 8
#define OWNED 2

// 8 elements as they lie in memory.
template <class T> struct Group {
  uint4 raw[sizeof(T) / 2];
  __device__ __forceinline__ void load(const T *p) {
#pragma unroll
    for (int i = 0; i < sizeof(T) / 2; i++) raw[i] = ((const uint4 *)p)[i];
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < sizeof(T) / 2; i++) raw[i] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void values(float v[8]) const { load8((const T *)raw, v); }
};

// dx (rows, C) += the norm's part; partial (grid, 2, C) = this block's sums for dw and db.
//
// x, dy and dx are read once, all at the same time, and stay in registers; so do a thread's sums for its columns, which
// are OWNED groups of 8. A row is shared by WARPS warps. Where nobody's columns are groups of 8, or a row is too long for
// the block, a thread owns single columns in memory instead.
template <class T, int WARPS>
__device__ void backward_in_registers(float *sums, T *dx, u32 *most, const T *dy, const T *x, const float *mean,
                                      const float *rstd, const T *w, u32 rows, u32 channels) {
  constexpr u32 AT_ONCE = BACKWARD_WARPS / WARPS;  // rows of a block
  __shared__ float exchange[2][BACKWARD_WARPS][2];
  u32 warp = threadIdx.x / WARP, thread = threadIdx.x % (WARPS * WARP), turn = 0;
  float dw[OWNED][8] = {}, db[OWNED][8] = {}, largest = 0.0f;
  for (u32 first = blockIdx.x * AT_ONCE; first < rows; first += gridDim.x * AT_ONCE, turn ^= 1) {
    u32 row = first + warp / WARPS;
    bool inside = row < rows;
    size_t start = (size_t)row * channels;
    float m = inside ? mean[row] : 0.0f, r = inside ? rstd[row] : 0.0f, sum_g = 0.0f, sum_gn = 0.0f;
    Group<T> in[OWNED], gradient[OWNED], out[OWNED];
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
      u32 i = (k * WARPS * WARP + thread) * 8;
      in[k].clear(), gradient[k].clear(), out[k].clear();
      if (inside && i < channels) in[k].load(x + start + i), gradient[k].load(dy + start + i), out[k].load(dx + start + i);
    }
    // f(k, i, (x - mean) rstd, dy, dy w) for each of the thread's groups k, from column i on.
    auto each = [&](auto f) {
#pragma unroll
      for (int k = 0; k < OWNED; k++) {
        u32 i = (k * WARPS * WARP + thread) * 8;
        if (i >= channels) continue;
        float normed[8], d[8], g[8];
        in[k].values(normed), gradient[k].values(d), load8(w + i, g);
#pragma unroll
        for (int j = 0; j < 8; j++) normed[j] = (normed[j] - m) * r, g[j] *= d[j];
        f(k, i, normed, d, g);
      }
    };
    each([&](int k, u32, const float normed[8], const float d[8], const float g[8]) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        dw[k][j] += d[j] * normed[j], db[k][j] += d[j];
        sum_g += g[j], sum_gn += g[j] * normed[j];
      }
    });
    sum_g = warp_sum(sum_g), sum_gn = warp_sum(sum_gn);
    if (WARPS > 1) {
      // Two sets of places, so that one wait a turn is enough.
      if (threadIdx.x % WARP == 0) exchange[turn][warp][0] = sum_g, exchange[turn][warp][1] = sum_gn;
      asm volatile("bar.sync %0, %1;" ::"r"(warp / WARPS + 1), "n"(WARPS *WARP) : "memory");
      sum_g = sum_gn = 0.0f;
#pragma unroll
      for (int k = 0; k < WARPS; k++) {
        const float *theirs = exchange[turn][warp / WARPS * WARPS + k];
        sum_g += theirs[0], sum_gn += theirs[1];
      }
    }
    float mean_g = sum_g / channels, mean_gn = sum_gn / channels;
    each([&](int k, u32 i, const float normed[8], const float[8], const float g[8]) {
      float v[8];
      out[k].values(v);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] += r * (g[j] - mean_g - normed[j] * mean_gn);
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max_nan(largest, fabsf(v[j]));
      if (inside) store8(dx + start + i, v);
    });
  }
  note_most(most, to_f32(from_f32<T>(largest)));
  // The rows of the block, one after the other.
  for (u32 turn = 0; turn < AT_ONCE; turn++) {
    if (warp / WARPS == turn) {
#pragma unroll
      for (int k = 0; k < OWNED; k++) {
        u32 i = (k * WARPS * WARP + thread) * 8;
        if (i < channels)
#pragma unroll
          for (int j = 0; j < 8; j++) sums[i + j] += dw[k][j], sums[channels + i + j] += db[k][j];
      }
    }
    __syncthreads();
  }
}

// The same with columns in memory: a warp owns a row for dx, which is then read again, from the L1 cache, by threads that
// own a column.
template <class T>
__device__ void backward_by_columns(float *sums, T *dx, u32 *most, const T *dy, const T *x, const float *mean,
                                    const float *rstd, const T *w, u32 rows, u32 channels) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float largest = 0.0f;
  for (u32 first = blockIdx.x * BACKWARD_WARPS; first < rows; first += gridDim.x * BACKWARD_WARPS) {
    u32 last = min(first + BACKWARD_WARPS, rows), row = first + warp;
    if (row < last) {
      size_t start = (size_t)row * channels;
      float m = mean[row], r = rstd[row], sum_g = 0.0f, sum_gn = 0.0f;
      for (u32 i = lane; i < channels; i += WARP) {
        float g = to_f32(dy[start + i]) * to_f32(w[i]);
        sum_g += g, sum_gn += g * (to_f32(x[start + i]) - m) * r;
      }
      float mean_g = warp_sum(sum_g) / channels, mean_gn = warp_sum(sum_gn) / channels;
      for (u32 i = lane; i < channels; i += WARP) {
        float g = to_f32(dy[start + i]) * to_f32(w[i]), normed = (to_f32(x[start + i]) - m) * r;
        T sum = from_f32<T>(to_f32(dx[start + i]) + r * (g - mean_g - normed * mean_gn));
        dx[start + i] = sum, largest = max_nan(largest, fabsf(to_f32(sum)));
      }
    }
    for (u32 i = threadIdx.x; i < channels; i += blockDim.x) {
      float dw = 0.0f, db = 0.0f;
      for (u32 row = first; row < last; row++) {
        float d = to_f32(dy[(size_t)row * channels + i]);
        dw += d * (to_f32(x[(size_t)row * channels + i]) - mean[row]) * rstd[row], db += d;
      }
      sums[i] += dw, sums[channels + i] += db;
    }
  }
  note_most(most, largest);
  __syncthreads();
}

template <class T>
__device__ void layernorm_backward(T *dx, u32 *most, float *partial, const T *dy, const T *x, const float *mean,
                                   const float *rstd, const T *w, u32 rows, u32 channels) {
  extern __shared__ float sums[];  // (2, C)
  for (u32 i = threadIdx.x; i < 2 * channels; i += blockDim.x) sums[i] = 0.0f;
  __syncthreads();
  auto call = [&](auto backward) { backward(sums, dx, most, dy, x, mean, rstd, w, rows, channels); };
  if (channels % 8 != 0 || channels > 4096) call(backward_by_columns<T>);
  else if (channels <= 512) call(backward_in_registers<T, 1>);
  else if (channels <= 1024) call(backward_in_registers<T, 2>);
  else if (channels <= 2048) call(backward_in_registers<T, 4>);
  else call(backward_in_registers<T, 8>);
  for (u32 i = threadIdx.x; i < 2 * channels; i += blockDim.x)
    partial[(size_t)blockIdx.x * 2 * channels + i] = sums[i];
}

// *most is told the largest |dx| (note_most).
// Grid: as many blocks as there are parts; block: 256; dynamic shared memory: 8 C bytes.
extern "C" __global__ void __launch_bounds__(256, 3)
    layernorm_backward_bf16(bf16 *dx, u32 *most, float *partial, const bf16 *dy, const bf16 *x, const float *mean,
                            const float *rstd, const bf16 *w, u32 rows, u32 channels) {
  begin();
  layernorm_backward(dx, most, partial, dy, x, mean, rstd, w, rows, channels);
}
extern "C" __global__ void __launch_bounds__(256, 1)
    layernorm_backward_f32(float *dx, u32 *most, float *partial, const float *dy, const float *x, const float *mean,
                           const float *rstd, const float *w, u32 rows, u32 channels) {
  begin();
  layernorm_backward(dx, most, partial, dy, x, mean, rstd, w, rows, channels);
}
