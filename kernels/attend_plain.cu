// Causal attention in plain arithmetic, for f32 and for head sizes that no tile takes: a warp owns
// a query (or, for dk and dv, a key), and goes through the other side 32 rows at a time. Head sizes
// up to 256. attention_delta serves all kernels. Rows of qkv are R channels wide (heads.cuh).
//
// S is Heads or PackedHeads: of the latter a document has the bits that it has alone.

#define MOST_PER_LANE 8  // head_size / 32, rounded up

// Stores a value, and keeps the largest magnitude stored.
template <class T> __device__ __forceinline__ void store(T *to, float v, float &largest) {
  T rounded = from_f32<T>(v);
  *to = rounded;
  largest = max_nan(largest, fabsf(to_f32(rounded)));
}

template <class T>
__device__ __forceinline__ float dot(const float *a, const T *b, u32 n) {
  float sum = 0.0f;
  for (u32 i = 0; i < n; i++) sum += a[i] * to_f32(b[i]);
  return sum;
}

// out (B, T, C) and lse (B, H, T) from qkv (B, T, R).
// Grid: (T / 4 rounded up, H, B); block: 128; dynamic shared memory: 16 head_size bytes.
template <class T, class S = Heads>
__global__ void attention_forward(T *out, float *lse, u32 *amax, const T *qkv, S s) {
  begin();
  float *rows = (float *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, d = s.head_size, c = s.channels();
  u32 query = blockIdx.x * 4 + warp, h = blockIdx.y, wide = s.qkv_channels();
  if (query >= s.length) return;
  const T *base = qkv + (size_t)blockIdx.z * s.length * wide;
  const T *keys = base + s.keys(h / s.per_kv_head), *values = keys + s.to_values();
  float *q = rows + warp * d, scale = s.scale();
  for (u32 i = lane; i < d; i += WARP)
    q[i] = to_f32(base[(size_t)query * wide + h * d + i]) * scale;
  __syncwarp();
  float most = -__int_as_float(0x7f800000), sum = 0.0f, acc[MOST_PER_LANE] = {};
  for (u32 first = S::PACKED ? s.start(blockIdx.z, query) : 0; first <= query; first += WARP) {
    u32 key = first + lane;
    float score = -__int_as_float(0x7f800000);
    if (key <= query) score = dot(q, keys + (size_t)key * wide, d);
    float larger = fmaxf(most, warp_max(score)), shrink = expf(most - larger);
    float p = expf(score - larger);
    sum = sum * shrink + warp_sum(p);
    most = larger;
#pragma unroll
    for (int m = 0; m < MOST_PER_LANE; m++) acc[m] *= shrink;
    for (u32 j = 0; j < WARP && first + j <= query; j++) {
      float pj = __shfl_sync(FULL_WARP, p, j);
      const T *v = values + (size_t)(first + j) * wide;
#pragma unroll
      for (int m = 0; m < MOST_PER_LANE; m++)
        if (m * WARP + lane < d) acc[m] += pj * to_f32(v[m * WARP + lane]);
    }
  }
  size_t row = (size_t)blockIdx.z * s.length + query;
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < MOST_PER_LANE; m++)
    if (m * WARP + lane < d) store(out + row * c + h * d + m * WARP + lane, acc[m] / sum, largest);
  note_amax(amax, largest);
  if (lane == 0) lse[((size_t)blockIdx.z * s.heads + h) * s.length + query] = most + logf(sum);
}

// delta (B, H, T) = sums of dout * out over a head. A warp owns a row; where heads are whole groups
// of 8 channels, lanes read those in order and add up within a head. Grid: (B T / 4 rounded up);
// block: 128.
template <class T>
__global__ void attention_delta(float *delta, const T *dout, const T *out, u32 rows, Heads s) {
  begin();
  u32 lane = threadIdx.x % WARP, row = blockIdx.x * 4 + threadIdx.x / WARP, d = s.head_size;
  if (row >= rows) return;
  size_t start = (size_t)row * s.channels();
  float *to = delta + ((size_t)(row / s.length) * s.heads) * s.length + row % s.length;
  u32 lanes = d / 8;  // of a head
  if (d % 8 == 0 && lanes <= WARP && (lanes & (lanes - 1)) == 0) {
    for (u32 first = 0; first < s.channels(); first += WARP * 8) {
      u32 i = first + lane * 8;
      float sum = 0.0f;
      if (i < s.channels()) {
        float a[8], b[8];
        load8(dout + start + i, a);
        load8(out + start + i, b);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j] * b[j];
      }
      for (u32 step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
      if (i < s.channels() && lane % lanes == 0) to[(size_t)(i / d) * s.length] = sum;
    }
    return;
  }
  for (u32 h = 0; h < s.heads; h++) {
    float sum = 0.0f;
    for (u32 i = lane; i < d; i += WARP)
      sum += to_f32(dout[start + h * d + i]) * to_f32(out[start + h * d + i]);
    sum = warp_sum(sum);
    if (lane == 0) to[(size_t)h * s.length] = sum;
  }
}

// dq of dqkv (B, T, R). Launch as forward, with twice the shared memory.
template <class T, class S = Heads>
__global__ void attention_dq(T *dqkv, u32 *amax, const T *dout, const float *lse,
                             const float *delta, const T *qkv, S s) {
  begin();
  float *rows = (float *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, d = s.head_size, c = s.channels();
  u32 query = blockIdx.x * 4 + warp, h = blockIdx.y, wide = s.qkv_channels();
  if (query >= s.length) return;
  size_t row = (size_t)blockIdx.z * s.length + query;
  const T *base = qkv + (size_t)blockIdx.z * s.length * wide;
  const T *keys = base + s.keys(h / s.per_kv_head);
  u32 to_values = s.to_values();
  float *q = rows + warp * 2 * d, *g = q + d, scale = s.scale();
  for (u32 i = lane; i < d; i += WARP) {
    q[i] = to_f32(base[(size_t)query * wide + h * d + i]) * scale;
    g[i] = to_f32(dout[row * c + h * d + i]);
  }
  __syncwarp();
  size_t place = ((size_t)blockIdx.z * s.heads + h) * s.length + query;
  float log_sum = lse[place], mean = delta[place], acc[MOST_PER_LANE] = {};
  for (u32 first = S::PACKED ? s.start(blockIdx.z, query) : 0; first <= query; first += WARP) {
    u32 key = first + lane;
    float ds = 0.0f;
    if (key <= query) {
      const T *k = keys + (size_t)key * wide;
      ds = expf(dot(q, k, d) - log_sum) * (dot(g, k + to_values, d) - mean) * scale;
    }
    for (u32 j = 0; j < WARP && first + j <= query; j++) {
      float dsj = __shfl_sync(FULL_WARP, ds, j);
      const T *k = keys + (size_t)(first + j) * wide;
#pragma unroll
      for (int m = 0; m < MOST_PER_LANE; m++)
        if (m * WARP + lane < d) acc[m] += dsj * to_f32(k[m * WARP + lane]);
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < MOST_PER_LANE; m++)
    if (m * WARP + lane < d) store(dqkv + row * wide + h * d + m * WARP + lane, acc[m], largest);
  note_amax(amax, largest);
}

// dk and dv of dqkv (B, T, R): a warp owns a key, and goes through the heads of q that share it,
// one after the other. Launch as dq, but for kv heads.
template <class T, class S = Heads>
__global__ void attention_dkdv(T *dqkv, u32 *amax, const T *dout, const float *lse,
                               const float *delta, const T *qkv, S s) {
  begin();
  float *rows = (float *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, d = s.head_size, c = s.channels();
  u32 key = blockIdx.x * 4 + warp, kv_head = blockIdx.y, wide = s.qkv_channels();
  if (key >= s.length) return;
  u32 at_key = s.keys(kv_head), to_values = s.to_values();
  const T *base = qkv + (size_t)blockIdx.z * s.length * wide;
  float *k = rows + warp * 2 * d, *v = k + d, scale = s.scale();
  for (u32 i = lane; i < d; i += WARP) {
    k[i] = to_f32(base[(size_t)key * wide + at_key + i]) * scale;
    v[i] = to_f32(base[(size_t)key * wide + at_key + to_values + i]);
  }
  __syncwarp();
  float dk[MOST_PER_LANE] = {}, dv[MOST_PER_LANE] = {};
  u32 end = s.end(blockIdx.z, key);
  for (u32 h = kv_head * s.per_kv_head; h < (kv_head + 1) * s.per_kv_head; h++) {
    const T *queries = base + h * d, *gradient = dout + (size_t)blockIdx.z * s.length * c + h * d;
    size_t places = ((size_t)blockIdx.z * s.heads + h) * s.length;
    for (u32 first = key; first < end; first += WARP) {
      u32 query = first + lane;
      float p = 0.0f, ds = 0.0f;
      if (query < end) {
        p = expf(dot(k, queries + (size_t)query * wide, d) - lse[places + query]);
        ds = p * (dot(v, gradient + (size_t)query * c, d) - delta[places + query]) * scale;
      }
      for (u32 j = 0; j < WARP && first + j < end; j++) {
        float pj = __shfl_sync(FULL_WARP, p, j), dsj = __shfl_sync(FULL_WARP, ds, j);
        const T *q = queries + (size_t)(first + j) * wide, *g = gradient + (size_t)(first + j) * c;
#pragma unroll
        for (int m = 0; m < MOST_PER_LANE; m++)
          if (m * WARP + lane < d) {
            dk[m] += dsj * to_f32(q[m * WARP + lane]);
            dv[m] += pj * to_f32(g[m * WARP + lane]);
          }
      }
    }
  }
  T *to = dqkv + ((size_t)blockIdx.z * s.length + key) * wide + at_key;
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < MOST_PER_LANE; m++)
    if (m * WARP + lane < d) {
      store(to + m * WARP + lane, dk[m], largest);
      store(to + to_values + m * WARP + lane, dv[m], largest);
    }
  note_amax(amax, largest);
}
