// Attention of a few rows behind those whose keys and values are kept.
//
// What is kept of a kv head: its keys (positions, head size), then its values the other way around
// (head size, positions), of a number of positions that is a multiple of 32. So all operands of the
// tensor cores lie side by side in memory, 16 bytes a thread, as in decode.cu, and none goes
// through shared memory.
//
// Keys go in blocks of 32, from position 0 on, around to the warps of a block; a warp goes through
// its own from first to last, with the sums of FlashAttention, and these are joined in the order of
// warps. Which warp has which keys depends on their positions alone, and keys that a row does not
// see add nothing to it, not a bit: a row has the same bits whatever comes with it.

// `Behind` of the host.
struct Behind {
  void *out;         // (rows, C)
  const void *qkv;   // (rows, R), as heads.cuh says
  void *kept;        // of all kv heads
  const u32 *start;  // position of the first row
  u32 rows;
  u32 positions;  // that there is room for
  u32 keeps;      // whether a block keeps the keys and values that its head looks at first
  Heads heads;
};

// Number i of what is kept of all rows of a kv head: a key's element, and a value's.
template <class T>
__device__ __forceinline__ void keep(const Behind &p, u32 start, u32 kv_head, u32 i) {
  u32 d = p.heads.head_size, row = i / d, channel = i % d;
  const T *from =
      (const T *)p.qkv + (size_t)row * p.heads.qkv_channels() + p.heads.keys(kv_head) + channel;
  T *keys = (T *)p.kept + (size_t)kv_head * 2 * p.positions * d;
  keys[(size_t)(start + row) * d + channel] = from[0];
  keys[((size_t)d + channel) * p.positions + start + row] = from[p.heads.to_values()];
}

// Rows and channels that a block keeps.
#define TILE 64

// Keeps all rows. Values are turned in shared memory, so that both sides of it read and write what
// lies side by side. Grid: rows / TILE, rounded up, and as many times the kv heads as TILE goes
// into their size; block: 4 TILE.
template <class T> __global__ void keep_rows(Behind p) {
  begin();
  __shared__ T tile[TILE][TILE + 2];
  u32 d = p.heads.head_size, wide = p.heads.qkv_channels(), start = *p.start,
      tiles = (d + TILE - 1) / TILE;
  u32 kv_head = blockIdx.y / tiles, row = blockIdx.x * TILE, channel = blockIdx.y % tiles * TILE;
  u32 rows = min(p.rows - row, (u32)TILE), channels = min(d - channel, (u32)TILE);
  u32 to_values = p.heads.to_values();
  const T *from = (const T *)p.qkv + (size_t)row * wide + p.heads.keys(kv_head) + channel;
  T *keys = (T *)p.kept + (size_t)kv_head * 2 * p.positions * d;
  T *values = keys + (size_t)p.positions * d;
  u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE;
  if (x < channels)
#pragma unroll 4
    for (u32 i = y; i < rows; i += 4) {
      const T *line = from + (size_t)i * wide + x;
      keys[(size_t)(start + row + i) * d + channel + x] = line[0];
      tile[i][x] = line[to_values];
    }
  __syncthreads();
  if (x < rows)
#pragma unroll 4
    for (u32 i = y; i < channels; i += 4)
      values[(size_t)(channel + i) * p.positions + start + row + x] = tile[x][i];
}

// Rows of a block, as many as the tensor cores take.
#define QUERIES 16
// Keys of a block of them.
#define KEYS 32

// Eight elements of a line from `first` on; zeros from `end` on.
__device__ __forceinline__ void eight(u32 to[4], const bf16 *line, u32 first, u32 end) {
  uint4 raw = first < end ? *(const uint4 *)(line + first) : make_uint4(0, 0, 0, 0);
  to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
}

// Values of two keys, the first of them number `at`, without those from number `end` on.
__device__ __forceinline__ u32 values_before(u32 pair, u32 at, u32 end) {
  return at + 1 < end ? pair : at < end ? pair & 0xffffu : 0;
}

// Whether one of eight numbers is not finite.
__device__ __forceinline__ bool has_infinite(const u32 v[4]) {
  u32 carries = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) carries |= (v[i] & 0x7f807f80) + 0x00800080;
  return carries & 0x80008000;
}

// out + weights v of 16 rows, 32 keys and 8 channels, each row without the keys behind its own,
// which others see: a weight of 0 makes NaN of what is not finite. The first row is at `position`;
// `key` is the thread's first of v.
//
// NOTE: a function of its own, so that registers of what is common are not chosen for it.
__device__ __noinline__ float4 multiply_row_by_row(float4 out, uint4 low, uint4 high, uint4 v,
                                                   u32 key, u32 position) {
  u32 g = threadIdx.x % WARP / 4,
      weights[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
  float4 all = out;
#pragma unroll 1
  for (u32 row = 0; row < QUERIES; row++) {
    float sums[4] = {out.x, out.y, out.z, out.w};
    u32 end = position + row + 1;
    multiply_bf16_tiles(sums, weights[0], values_before(v.x, key, end),
                        values_before(v.y, key + 2, end));
    multiply_bf16_tiles(sums, weights[1], values_before(v.z, key + 4, end),
                        values_before(v.w, key + 6, end));
    if (g == row) all.x = sums[0], all.y = sums[1];
    if (g + 8 == row) all.z = sums[2], all.w = sums[3];
  }
  return all;
}

// out for heads of up to D channels, a multiple of 8. Where `keeps`, all rows are one block's, and
// blocks whose heads share keys keep the same in the same place, each before it reads it.
// Grid: rows / 16, rounded up, heads; block: 32 WARPS; dynamic shared memory: WARPS times 16 lines
// of D + 2 floats.
template <int D, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) attend_behind(Behind p) {
  const float NONE = -__int_as_float(0x7f800000);
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 head = blockIdx.y, kv_head = head / p.heads.per_kv_head, d = p.heads.head_size,
      c = p.heads.channels();
  const bf16 *keys = (const bf16 *)p.kept + (size_t)kv_head * 2 * p.positions * d;
  const bf16 *values = keys + (size_t)p.positions * d;
  // A thread's share of a block of keys: so that its scores are of keys side by side, column 2 n +
  // b of tile j is number 8 n + 2 j + b.
  u32 k[D / 32][4][4];
  auto load_keys = [&](u32 block) {
#pragma unroll
    for (int i = 0; i < D / 32; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 key = block + g / 2 * 8 + 2 * j + g % 2;
        eight(k[i][j], keys + (size_t)key * d, 32 * i + 8 * t, key < p.positions ? d : 0);
      }
  };
  // Those that were kept before, for which nothing is waited for (`begin` in ptx.cuh).
  if (p.keeps) load_keys(warp * KEYS);
  u32 first = blockIdx.x * QUERIES, rows = min(p.rows - first, (u32)QUERIES), start = *p.start;
  begin();
  if (p.keeps) {
    for (u32 i = threadIdx.x; i < p.rows * d; i += 32 * WARPS) keep<bf16>(p, start, kv_head, i);
    __syncthreads();
  }
  u32 wide = p.heads.qkv_channels();
  const bf16 *queries = (const bf16 *)p.qkv + (size_t)first * wide + head * d;
  float most[2] = {NONE, NONE}, sum[2] = {0.0f, 0.0f}, out[D / 8][4] = {};
  float scale = __fmul_rn(p.heads.scale(), LOG2E);
  // The last row sees these.
  u32 seen = start + first + rows;
  // Those that are new, too.
  if (!p.keeps || (start < (warp + 1) * KEYS && warp * KEYS < seen)) load_keys(warp * KEYS);
  for (u32 block = warp * KEYS; block < seen; block += WARPS * KEYS) {
    float scores[4][4] = {};
    u32 v[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      u32 q[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 row = g + 8 * half;
        eight(q[half], queries + (size_t)row * wide, 32 * i + 8 * t, row < rows ? d : 0);
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int step = 0; step < 2; step++) {
          u32 of_q[4] = {q[0][2 * step], q[1][2 * step], q[0][2 * step + 1], q[1][2 * step + 1]};
          multiply_bf16_tiles(scores[j], of_q, k[i][j][2 * step], k[i][j][2 * step + 1]);
        }
    }
    u32 at = block + 8 * t;  // the thread's first key
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      u32 channel = 8 * j + g;
      eight(v[j], values + (size_t)channel * p.positions, at, channel < d ? p.positions : 0);
      // NOTE: what lies behind is of an earlier text, and may be anything: 0 times that is no 0.
#pragma unroll
      for (int i = 0; i < 4; i++) v[j][i] = values_before(v[j][i], at + 2 * i, seen);
    }
    u32 weights[4][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 position = start + first + g + 8 * half;
      float largest = NONE;
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          float &score = scores[j][2 * half + b];
          score = at + 2 * j + b <= position ? __fmul_rn(score, scale) : NONE;
          largest = fmaxf(largest, score);
        }
      largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
      float next = fmaxf(most[half], largest);
      // A row that has not seen a key yet.
      float base = next == NONE ? 0.0f : next;
      float kept = exp2_fast(__fsub_rn(most[half], base));
      most[half] = next;
      sum[half] = __fmul_rn(sum[half], kept);
#pragma unroll
      for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) out[j][2 * half + b] = __fmul_rn(out[j][2 * half + b], kept);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float a = exp2_fast(__fsub_rn(scores[j][2 * half], base));
        float b = exp2_fast(__fsub_rn(scores[j][2 * half + 1], base));
        sum[half] = __fadd_rn(sum[half], __fadd_rn(a, b));
        weights[j][half] = pack_bf16(a, b);
      }
    }
    // Whether there are keys that some rows see and others do not.
    bool is_edge = min(block + KEYS, seen) > start + first + 1;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      u32 of_keys[2][4];
#pragma unroll
      for (int step = 0; step < 2; step++) {
        of_keys[step][0] = weights[2 * step][0], of_keys[step][1] = weights[2 * step][1];
        of_keys[step][2] = weights[2 * step + 1][0], of_keys[step][3] = weights[2 * step + 1][1];
      }
      if (is_edge && __any_sync(FULL_WARP, has_infinite(v[j]))) {
        auto four = [](const u32 *of) { return make_uint4(of[0], of[1], of[2], of[3]); };
        float4 all =
            multiply_row_by_row(make_float4(out[j][0], out[j][1], out[j][2], out[j][3]),
                                four(of_keys[0]), four(of_keys[1]), four(v[j]), at, start + first);
        out[j][0] = all.x, out[j][1] = all.y, out[j][2] = all.z, out[j][3] = all.w;
        continue;
      }
#pragma unroll
      for (int step = 0; step < 2; step++)
        multiply_bf16_tiles(out[j], of_keys[step], v[j][2 * step], v[j][2 * step + 1]);
    }
    if (block + WARPS * KEYS < seen) load_keys(block + WARPS * KEYS);
  }
  float *of_warps = (float *)shared;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] = __fadd_rn(sum[half], __shfl_xor_sync(FULL_WARP, sum[half], 1));
    sum[half] = __fadd_rn(sum[half], __shfl_xor_sync(FULL_WARP, sum[half], 2));
    float *line = of_warps + (warp * QUERIES + g + 8 * half) * (D + 2);
    if (g + 8 * half < rows) {
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        line[8 * j + 2 * t] = out[j][2 * half], line[8 * j + 2 * t + 1] = out[j][2 * half + 1];
      }
      if (t == 0) line[D] = most[half], line[D + 1] = sum[half];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < rows * d; i += 32 * WARPS) {
    u32 row = i / d, channel = i % d;
    const float *lines = of_warps + row * (D + 2);
    float largest = NONE, above = 0.0f, below = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, lines[w * QUERIES * (D + 2) + D]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float *line = lines + w * QUERIES * (D + 2);
      float factor = exp2_fast(__fsub_rn(line[D], largest));
      above = __fmaf_rn(line[channel], factor, above);
      below = __fmaf_rn(line[D + 1], factor, below);
    }
    ((bf16 *)p.out)[(size_t)(first + row) * c + head * d + channel] =
        from_f32<bf16>(__fdiv_rn(above, below));
  }
}

// Keys that the plain kernel looks at together.
#define STRETCH 1024

// The same in plain arithmetic, of f32 numbers and of bf16 ones of any head size up to 256. Grid:
// rows, heads; block: 128.
template <class T> __global__ void attend_behind_plain(Behind p) {
  begin();
  __shared__ float q[256], weights[STRETCH], scratch[WARP];
  u32 head = blockIdx.y, row = blockIdx.x, d = p.heads.head_size, c = p.heads.channels();
  const T *query = (const T *)p.qkv + (size_t)row * p.heads.qkv_channels() + head * d;
  u32 kv_head = head / p.heads.per_kv_head;
  const T *keys = (const T *)p.kept + (size_t)kv_head * 2 * p.positions * d;
  const T *values = keys + (size_t)p.positions * d;
  for (u32 i = threadIdx.x; i < d; i += 128) q[i] = __fmul_rn(to_f32(query[i]), p.heads.scale());
  __syncthreads();
  u32 seen = *p.start + row + 1;
  float most = -__int_as_float(0x7f800000), sum = 0.0f, out[2] = {0.0f, 0.0f};
  for (u32 first = 0; first < seen; first += STRETCH) {
    u32 count = min(seen - first, (u32)STRETCH);
    float largest = most;
    for (u32 i = threadIdx.x; i < count; i += 128) {
      const T *key = keys + (size_t)(first + i) * d;
      float score = 0.0f;
      for (u32 j = 0; j < d; j++) score = __fmaf_rn(q[j], to_f32(key[j]), score);
      weights[i] = score;
      largest = fmaxf(largest, score);
    }
    largest = block_max(largest, scratch);
    float kept = expf(__fsub_rn(most, largest)), part = 0.0f;
    most = largest;
    for (u32 i = threadIdx.x; i < count; i += 128) {
      weights[i] = expf(__fsub_rn(weights[i], most));
      part = __fadd_rn(part, weights[i]);
    }
    sum = __fmaf_rn(sum, kept, block_sum(part, scratch));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 channel = threadIdx.x + 128 * half;
      if (channel >= d) continue;
      const T *line = values + (size_t)channel * p.positions + first;
      out[half] = __fmul_rn(out[half], kept);
      for (u32 i = 0; i < count; i++) out[half] = __fmaf_rn(weights[i], to_f32(line[i]), out[half]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 channel = threadIdx.x + 128 * half;
    if (channel < d)
      ((T *)p.out)[(size_t)row * c + head * d + channel] = from_f32<T>(__fdiv_rn(out[half], sum));
  }
}
