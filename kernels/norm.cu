// LayerNorm, with RMS RMSNorm, and their backward passes. One warp owns a row; it reads the row
// again for each of its passes, from the L1 cache.
//
// RMSNorm has neither mean nor bias: nothing of them is read or written.
//
// Backward *adds* to dx, which is the gradient of the residual stream, and leaves partial sums of
// dw and db, which another kernel adds up in order.

// `Normalize` of the host.
template <class T> struct Normalize {
  T *out, *sum;
  u32 *amax;
  float *mean, *rstd;
  const T *x, *y, *w, *b;
  u32 rows, channels;
  float epsilon;
};

// out (rows, C) = (x - mean) rstd w + b, and mean and rstd (rows), or x rstd w, and rstd; with ADD
// first sum (rows, C) = x + y, rounded to T, which is then what is normalized. The largest
// magnitude of out is noted in amax. Grid: rows / 8, rounded up; block: 256.
template <class T, bool ADD, bool RMS>
__global__ void normalize(const __grid_constant__ Normalize<T> n) {
  // Where a text is written, weights come from far away, and a row waits for nothing else so long.
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    ask_for(n.w, n.channels * sizeof(T));
    if (!RMS) ask_for(n.b, n.channels * sizeof(T));
  }
  begin();
  T *out = n.out, *sum = n.sum;
  const T *x = n.x, *y = n.y, *w = n.w, *b = n.b;
  u32 rows = n.rows, channels = n.channels;
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
    for (int j = 0; j < 8; j++) total += RMS ? v[j] * v[j] : v[j];
  });
  const T *in = ADD ? sum : x;
  float mean = RMS ? 0.0f : warp_sum(total) / channels, squares = RMS ? total : 0.0f;
  if (!RMS)
    each_group(lane, channels, [&](u32 i, u32 count) {
      float v[8];
      load_group(in + start + i, count, v);
#pragma unroll
      for (int j = 0; j < 8; j++) squares += j < count ? (v[j] - mean) * (v[j] - mean) : 0.0f;
    });
  float rstd = rsqrtf(warp_sum(squares) / channels + n.epsilon), largest = 0.0f;
  each_group(lane, channels, [&](u32 i, u32 count) {
    float v[8], scale[8], shift[8];
    load_group(in + start + i, count, v);
    load_group(w + i, count, scale);
    if (!RMS) load_group(b + i, count, shift);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[j] = RMS ? v[j] * rstd * scale[j] : (v[j] - mean) * rstd * scale[j] + shift[j];
      if (j < count) largest = max_nan(largest, fabsf(v[j]));
    }
    store_group(out + start + i, count, v);
  });
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_amax(n.amax, to_f32(from_f32<T>(largest)));
  if (lane != 0) return;
  if (!RMS) n.mean[row] = mean;
  n.rstd[row] = rstd;
}

// Warps of a block of the backward kernel, and groups of 8 columns that one of its threads owns.
//
// NOTE: with 4 groups a thread, a row of 1,024 columns needs one warp and no waiting for others,
// but so many registers that only 16 warps fit a multiprocessor: 65 us for 16,384 rows on an H100.
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

// `Backward` of the host.
template <class T> struct Backward {
  T *dx;
  u32 *amax;  // is told the largest |dx|
  float *partial;
  const T *dy, *x;
  const float *mean, *rstd;
  const T *w;
  u32 rows, channels;
};

// dx (rows, C) += the norm's part; partial (grid, 2, C) = this block's sums for dw and db, or
// (grid, C) for dw alone.
//
// x, dy and dx are read once, all at the same time, and stay in registers; so do a thread's sums
// for its columns, which are OWNED groups of 8. A row is shared by WARPS warps. Where nobody's
// columns are groups of 8, or a row is too long for the block, a thread owns single columns in
// memory instead.
template <class T, int WARPS, bool RMS>
__device__ void backward_in_registers(float *sums, const Backward<T> &n) {
  T *dx = n.dx;
  const T *dy = n.dy, *x = n.x, *w = n.w;
  const float *mean = n.mean, *rstd = n.rstd;
  u32 rows = n.rows, channels = n.channels;
  constexpr u32 AT_ONCE = BACKWARD_WARPS / WARPS;  // rows of a block
  __shared__ float exchange[2][BACKWARD_WARPS][2];
  u32 warp = threadIdx.x / WARP, thread = threadIdx.x % (WARPS * WARP), turn = 0;
  float dw[OWNED][8] = {}, db[OWNED][8] = {}, largest = 0.0f;
  for (u32 first = blockIdx.x * AT_ONCE; first < rows; first += gridDim.x * AT_ONCE, turn ^= 1) {
    u32 row = first + warp / WARPS;
    bool inside = row < rows;
    size_t start = (size_t)row * channels;
    float m = inside && !RMS ? mean[row] : 0.0f, r = inside ? rstd[row] : 0.0f;
    float sum_g = 0.0f, sum_gn = 0.0f;
    Group<T> in[OWNED], gradient[OWNED], out[OWNED];
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
      u32 i = (k * WARPS * WARP + thread) * 8;
      in[k].clear(), gradient[k].clear(), out[k].clear();
      if (inside && i < channels)
        in[k].load(x + start + i), gradient[k].load(dy + start + i), out[k].load(dx + start + i);
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
        for (int j = 0; j < 8; j++)
          normed[j] = (RMS ? normed[j] : normed[j] - m) * r, g[j] *= d[j];
        f(k, i, normed, d, g);
      }
    };
    each([&](int k, u32, const float normed[8], const float d[8], const float g[8]) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        dw[k][j] += d[j] * normed[j];
        if (!RMS) db[k][j] += d[j], sum_g += g[j];
        sum_gn += g[j] * normed[j];
      }
    });
    if (!RMS) sum_g = warp_sum(sum_g);
    sum_gn = warp_sum(sum_gn);
    if (WARPS > 1) {
      // Two sets of places, so that one wait a turn is enough.
      if (threadIdx.x % WARP == 0)
        exchange[turn][warp][0] = sum_g, exchange[turn][warp][1] = sum_gn;
      wait_at<WARPS * WARP>(warp / WARPS + 1);
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
      for (int j = 0; j < 8; j++)
        v[j] += r * ((RMS ? g[j] : g[j] - mean_g) - normed[j] * mean_gn);
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max_nan(largest, fabsf(v[j]));
      if (inside) store8(dx + start + i, v);
    });
  }
  note_amax(n.amax, to_f32(from_f32<T>(largest)));
  // The rows of the block, one after the other.
  for (u32 turn = 0; turn < AT_ONCE; turn++) {
    if (warp / WARPS == turn) {
#pragma unroll
      for (int k = 0; k < OWNED; k++) {
        u32 i = (k * WARPS * WARP + thread) * 8;
        if (i < channels)
#pragma unroll
          for (int j = 0; j < 8; j++) {
            sums[i + j] += dw[k][j];
            if (!RMS) sums[channels + i + j] += db[k][j];
          }
      }
    }
    __syncthreads();
  }
}

// The same with columns in memory: a warp owns a row for dx, which is then read again, from the L1
// cache, by threads that own a column.
template <class T, bool RMS>
__device__ void backward_by_columns(float *sums, const Backward<T> &n) {
  T *dx = n.dx;
  const T *dy = n.dy, *x = n.x, *w = n.w;
  const float *mean = n.mean, *rstd = n.rstd;
  u32 rows = n.rows, channels = n.channels;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float largest = 0.0f;
  for (u32 first = blockIdx.x * BACKWARD_WARPS; first < rows; first += gridDim.x * BACKWARD_WARPS) {
    u32 last = min(first + BACKWARD_WARPS, rows), row = first + warp;
    if (row < last) {
      size_t start = (size_t)row * channels;
      float m = RMS ? 0.0f : mean[row], r = rstd[row], sum_g = 0.0f, sum_gn = 0.0f;
      for (u32 i = lane; i < channels; i += WARP) {
        float g = to_f32(dy[start + i]) * to_f32(w[i]);
        sum_g += g, sum_gn += g * (to_f32(x[start + i]) - m) * r;
      }
      float mean_g = RMS ? 0.0f : warp_sum(sum_g) / channels, mean_gn = warp_sum(sum_gn) / channels;
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
        float v = to_f32(x[(size_t)row * channels + i]);
        dw += d * (RMS ? v : v - mean[row]) * rstd[row], db += d;
      }
      sums[i] += dw;
      if (!RMS) sums[channels + i] += db;
    }
  }
  note_amax(n.amax, largest);
  __syncthreads();
}

// Grid: as many blocks as there are parts; block: 256; dynamic shared memory: 8 C bytes, or 4 C.
template <class T, bool RMS>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 1 : 3)
    norm_backward(const __grid_constant__ Backward<T> n) {
  begin();
  float *sums = (float *)shared;  // (2, C) or (C)
  u32 channels = n.channels, all = RMS ? channels : 2 * channels;
  for (u32 i = threadIdx.x; i < all; i += blockDim.x) sums[i] = 0.0f;
  __syncthreads();
  if (channels % 8 != 0 || channels > 4096) backward_by_columns<T, RMS>(sums, n);
  else if (channels <= 512) backward_in_registers<T, 1, RMS>(sums, n);
  else if (channels <= 1024) backward_in_registers<T, 2, RMS>(sums, n);
  else if (channels <= 2048) backward_in_registers<T, 4, RMS>(sums, n);
  else backward_in_registers<T, 8, RMS>(sums, n);
  for (u32 i = threadIdx.x; i < all; i += blockDim.x)
    n.partial[(size_t)blockIdx.x * all + i] = sums[i];
}
