// Rotary positions (Su et al., arXiv 2104.09864), and the norms of heads before them, RMSNorm each.
//
// Of a head's D channels i and i + D / 2 are a pair, which is turned by an angle. So a row of the
// table, the cosines of its D / 2 angles and then their sines, is laid out as a head is, and so are
// the weights of a norm. Rows of qkv have all heads of q, then those of k, then those of v.

// Pairs of the largest head.
#define MOST_PAIRS 128

// `Rotations` of the host.
struct Rotations {
  float *table;       // (rows, D)
  const u32 *starts;  // where the document of each row begins; null where that is 0. Or of rows
                      // behind others the position of the first, or with `of_each` of each
  u32 half;           // D / 2
  u32 length;         // T of whole sequences; 0 of rows behind others
  u32 of_each;
  float frequencies[MOST_PAIRS];
};

// The table of rows by their positions. An angle is the product of position and frequency, rounded
// to f32. Grid: rows; block: 128.
__global__ void find_rotations(const __grid_constant__ Rotations r) {
  begin();
  u32 row = blockIdx.x, pair = threadIdx.x, position;
  if (pair >= r.half) return;
  if (r.length) position = row % r.length - (r.starts ? r.starts[row] : 0);
  else position = r.of_each ? r.starts[row] : *r.starts + row;
  float sine, cosine;
  sincosf(__fmul_rn((float)position, r.frequencies[pair]), &sine, &cosine);
  float *to = r.table + (size_t)row * 2 * r.half + pair;
  to[0] = cosine, to[r.half] = sine;
}

// `OfHeads` of the host.
template <class T> struct OfHeads {
  T *to;               // (rows, R): what is written, by all but `norm_heads` in place
  u32 *amax;           // where it is not null, is told the largest magnitude of all of it
  const T *x;          // (rows, R): what is normalized
  const float *table;  // (rows, D)
  const T *q, *k;      // (D): weights of norms
  float *partial;      // (grid, 2, D)
  u32 rows, heads, kv_heads, half;
  float epsilon;
  __device__ __forceinline__ u32 qkv_channels() const {
    return (heads + 2 * kv_heads) * 2 * half;
  }
};

// How a warp divides heads: as many threads take one as have 8 pairs in a row each, or, where these
// do not fit, all of the warp, each every 32nd pair.
struct Split {
  u32 half, threads, at_once;  // threads of a head, and heads of a warp
  u32 head, thread;            // of this lane; beyond `at_once` it has none
  bool eight;
  // `sums`: threads add up, so that they have to be a power of two.
  __device__ __forceinline__ Split(u32 half, bool sums) : half(half) {
    u32 lane = threadIdx.x % WARP;
    threads = half / 8;
    eight = half % 8 == 0 && (!sums || (threads & (threads - 1)) == 0);
    if (!eight) threads = WARP;
    at_once = WARP / threads, head = lane / threads, thread = lane % threads;
  }
  // The sum over the threads of a head, in all of them.
  __device__ __forceinline__ float sum(float v) const {
    for (u32 step = threads / 2; step > 0; step /= 2) v += __shfl_xor_sync(FULL_WARP, v, step);
    return v;
  }
  // Pair j of this thread; one that is not there is `half` or more.
  __device__ __forceinline__ u32 pair(u32 j) const {
    if (eight) return thread * 8 + j;
    return j < MOST_PAIRS / WARP ? thread + j * WARP : half;
  }
};

// A thread's pairs of a head: channels i, and i + D / 2. Zeros where there are none.
struct Pairs {
  float low[8], high[8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < 8; j++) low[j] = high[j] = 0.0f;
  }
  template <class T> __device__ __forceinline__ void load(const T *from, const Split &s) {
    if (s.eight) {
      load8(from + s.pair(0), low), load8(from + s.half + s.pair(0), high);
      return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      u32 i = s.pair(j);
      bool inside = i < s.half;
      low[j] = inside ? to_f32(from[i]) : 0.0f;
      high[j] = inside ? to_f32(from[s.half + i]) : 0.0f;
    }
  }
  template <class T> __device__ __forceinline__ void store(T *to, const Split &s) const {
    if (s.eight) {
      store8(to + s.pair(0), low), store8(to + s.half + s.pair(0), high);
      return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      u32 i = s.pair(j);
      if (i < s.half) to[i] = from_f32<T>(low[j]), to[s.half + i] = from_f32<T>(high[j]);
    }
  }
  // By angles, cosines in `low` and sines in `high`, or BACK.
  template <bool BACK> __device__ __forceinline__ void turn(const Pairs &angles) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float a = low[j], b = high[j], cosine = angles.low[j];
      float sine = BACK ? -angles.high[j] : angles.high[j];
      low[j] = a * cosine - b * sine, high[j] = b * cosine + a * sine;
    }
  }
  __device__ __forceinline__ float larger_of(float largest) const {
#pragma unroll
    for (int j = 0; j < 8; j++)
      largest = max_nan(largest, max_nan(fabsf(low[j]), fabsf(high[j])));
    return largest;
  }
};

// Turns all heads of q and k, or BACK. Grid: rows; block: 128.
template <class T, bool BACK> __global__ void rotate(const __grid_constant__ OfHeads<T> h) {
  begin();
  Split s(h.half, false);
  u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, turned = h.heads + h.kv_heads;
  // Those of v are looked at for the largest magnitude alone.
  u32 heads = h.amax ? turned + h.kv_heads : turned;
  T *row = h.to + (size_t)blockIdx.x * h.qkv_channels();
  float largest = 0.0f;
  if (s.head < s.at_once) {
    Pairs angles;
    angles.load(h.table + (size_t)blockIdx.x * 2 * h.half, s);
    for (u32 head = warp * s.at_once + s.head; head < heads; head += warps * s.at_once) {
      T *at = row + head * 2 * h.half;
      Pairs v;
      v.load(at, s);
      if (head < turned) v.turn<BACK>(angles), v.store(at, s);
      largest = v.larger_of(largest);
    }
  }
  __syncwarp();
  // Rounding keeps the order, so the largest of what is stored is the largest, rounded.
  note_amax(h.amax, to_f32(from_f32<T>(largest)));
}

// to (rows, R): all heads of q and k of x, normalized and turned, and those of v as they are. Grid:
// rows; block: 128.
template <class T> __global__ void norm_heads(const __grid_constant__ OfHeads<T> h) {
  begin();
  Split s(h.half, true);
  u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, d = 2 * h.half;
  u32 turned = h.heads + h.kv_heads, heads = turned + h.kv_heads;
  size_t row = (size_t)blockIdx.x * h.qkv_channels();
  Pairs angles;
  angles.load(h.table + (size_t)blockIdx.x * d, s);
  for (u32 first = warp * s.at_once; first < heads; first += warps * s.at_once) {
    u32 head = first + s.head;
    bool inside = head < heads;
    size_t at = row + (inside ? head : 0) * d;
    Pairs v, w;
    v.load(h.x + at, s);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) squares += v.low[j] * v.low[j] + v.high[j] * v.high[j];
    float rstd = rsqrtf(s.sum(squares) / d + h.epsilon);
    if (head < turned) {
      w.load(head < h.heads ? h.q : h.k, s);
#pragma unroll
      for (int j = 0; j < 8; j++)
        v.low[j] = v.low[j] * rstd * w.low[j], v.high[j] = v.high[j] * rstd * w.high[j];
      v.turn<false>(angles);
    }
    if (inside) v.store(h.to + at, s);
  }
}

// to (rows, R), the gradient of what `norm_heads` put out, becomes that of x; partial (grid, 2, D)
// = this block's sums for the weights of q and of k. A warp owns a row: g = dy w and n = x rstd
// give rstd (g - n mean(g n)). Grid: as many blocks as there are parts; block: 256.
template <class T>
__global__ void __launch_bounds__(256, 2)
    norm_heads_backward(const __grid_constant__ OfHeads<T> h) {
  begin();
  __shared__ float sums[2 * 2 * MOST_PAIRS];  // (2, D)
  Split s(h.half, true);
  u32 warp = threadIdx.x / WARP, warps = blockDim.x / WARP, d = 2 * h.half;
  for (u32 i = threadIdx.x; i < 2 * d; i += blockDim.x) sums[i] = 0.0f;
  Pairs dq, dk;
  dq.clear(), dk.clear();
  float largest = 0.0f;
  for (u32 row = blockIdx.x * warps + warp; row < h.rows; row += gridDim.x * warps) {
    size_t start = (size_t)row * h.qkv_channels();
    Pairs angles;
    angles.load(h.table + (size_t)row * d, s);
    // `count` heads from number `from` on, whose weights are w.
    auto go = [&](u32 from, u32 count, const T *w, Pairs &dw) {
      for (u32 first = 0; first < count; first += s.at_once) {
        bool inside = first + s.head < count;
        size_t at = start + (from + (inside ? first + s.head : 0)) * d;
        Pairs x, dy, of_w;
        x.load(h.x + at, s), dy.load(h.to + at, s), of_w.load(w, s);
        dy.turn<true>(angles);
        float squares = 0.0f, sum_gx = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          squares += x.low[j] * x.low[j] + x.high[j] * x.high[j];
          sum_gx += dy.low[j] * of_w.low[j] * x.low[j] + dy.high[j] * of_w.high[j] * x.high[j];
        }
        float rstd = rsqrtf(s.sum(squares) / d + h.epsilon), mean = s.sum(sum_gx) * rstd / d;
        if (!inside) continue;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          float low = x.low[j] * rstd, high = x.high[j] * rstd;
          dw.low[j] += dy.low[j] * low, dw.high[j] += dy.high[j] * high;
          dy.low[j] = rstd * (dy.low[j] * of_w.low[j] - low * mean);
          dy.high[j] = rstd * (dy.high[j] * of_w.high[j] - high * mean);
        }
        dy.store(h.to + at, s);
        largest = dy.larger_of(largest);
      }
    };
    go(0, h.heads, h.q, dq);
    go(h.heads, h.kv_heads, h.k, dk);
    // Those of v stay as they are.
    if (h.amax)
      for (u32 head = s.head; head < h.kv_heads; head += s.at_once) {
        Pairs v;
        v.load(h.to + start + (h.heads + h.kv_heads + head) * d, s);
        largest = v.larger_of(largest);
      }
    __syncwarp();
  }
  note_amax(h.amax, to_f32(from_f32<T>(largest)));
  // Heads that a warp takes at once, then warps, one after the other.
#pragma unroll
  for (int j = 0; j < 8; j++)
    for (u32 step = s.threads; step < WARP; step *= 2) {
      dq.low[j] += __shfl_xor_sync(FULL_WARP, dq.low[j], step);
      dq.high[j] += __shfl_xor_sync(FULL_WARP, dq.high[j], step);
      dk.low[j] += __shfl_xor_sync(FULL_WARP, dk.low[j], step);
      dk.high[j] += __shfl_xor_sync(FULL_WARP, dk.high[j], step);
    }
  for (u32 turn = 0; turn < warps; turn++) {
    __syncthreads();
    if (warp != turn || s.head != 0) continue;
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      u32 i = s.pair(j);
      if (i >= h.half) continue;
      sums[i] += dq.low[j], sums[h.half + i] += dq.high[j];
      sums[d + i] += dk.low[j], sums[d + h.half + i] += dk.high[j];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < 2 * d; i += blockDim.x)
    h.partial[(size_t)blockIdx.x * 2 * d + i] = sums[i];
}
