// Causal softmax attention on tensor cores (mma.sync, so from Ampere on): FlashAttention-2 (Dao,
// arXiv 2307.08691), scores never stored.
//
// bf16 operands, f32 scores, sums and accumulators. Scores are kept as powers of two: the scale
// 1 / sqrt(head size) carries log2(e). The backward pass has one kernel for dk and dv, whose blocks
// own keys, and one for dq, whose blocks own queries; both compute the scores anew. That is 7
// products of tiles instead of the 5 of a single kernel, but a single kernel would have to add dq
// up atomically, in another order at every run. This is faster than cuDNN's even so.
//
// Rows of qkv are R channels wide (heads.cuh). The block of keys that several heads of q share goes
// through the queries of one head after the other.
//
// Head sizes are multiples of 8; tiles are D wide, columns beyond the head are zeros. Rows of tiles
// in shared memory are swizzled: chunk c of 16 bytes lies at c ^ (row % 8), so that the 8 rows that
// ldmatrix reads at a time lie in different banks.
//
// S is Heads or PackedHeads. Tiles of keys before the document of a warp's first query are left
// out, and so are tiles of queries behind the document of its last key; within those that are left,
// scores of other documents are masked. A query may then have seen no key after its first tile.

__device__ __forceinline__ void ldmatrix(u32 r[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_transposed(u32 r[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// A tile of rows of D bf16 numbers in shared memory, by its address there.
template <int D> struct Tile {
  u32 base;
  __device__ __forceinline__ u32 at(u32 row, u32 column) const {
    return base + row * (D * 2) + ((column / 8 ^ (row & 7)) * 16);
  }
  // The left operand (16 rows, 16 columns) of mma.
  __device__ __forceinline__ void left(u32 a[4], u32 row, u32 column) const {
    u32 lane = threadIdx.x % WARP;
    ldmatrix(a, at(row + lane % 16, column + lane / 16 * 8));
  }
  // Right operands whose columns are 16 of the tile's rows and whose depth is 16 of its columns:
  // two of mma, (b[0], b[1]) and (b[2], b[3]).
  __device__ __forceinline__ void right_by_rows(u32 b[4], u32 row, u32 column) const {
    u32 lane = threadIdx.x % WARP;
    ldmatrix(b, at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  }
  // The same whose depth is 16 of the tile's rows and whose columns are 16 of its columns.
  __device__ __forceinline__ void right_by_columns(u32 b[4], u32 row, u32 column) const {
    u32 lane = threadIdx.x % WARP;
    ldmatrix_transposed(b, at(row + lane % 8 + lane / 8 % 2 * 8, column + lane / 16 * 8));
  }
};

// Starts copying ROWS rows of `width` columns, `stride` elements apart, to a tile. Rows from
// `valid` on and columns from `width` on become zeros.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(Tile<D> to, const bf16 *from, size_t stride, u32 valid,
                                          u32 width) {
#pragma unroll
  for (u32 i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
    u32 row = i / (D / 8), column = i % (D / 8) * 8;
    bool inside = row < valid && column < width;
    const bf16 *source = inside ? from + row * stride + column : from;
    copy_piece(to.at(row, column), source, inside);
  }
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

extern __shared__ __align__(128) u8 tiles[];

// out (B, T, C) and lse (B, H, T), the natural logarithm of the sum of exponentials, from qkv
// (B, T, R). A warp owns MT x 16 queries; the block goes through the keys BN at a time.
// Grid: (T / (16 MT WARPS) rounded up, H, B); block: 32 WARPS; dynamic shared memory: 8 BN D bytes.
template <int D, int WARPS, int MT, int BN, class S = Heads>
__global__ void __launch_bounds__(WARP *WARPS)
    flash_forward(bf16 *out, float *lse, u32 *amax, const bf16 *qkv, S s) {
  begin();
  constexpr int BM = 16 * MT * WARPS, THREADS = WARP * WARPS;
  static_assert(BM * D * 2 <= 8 * BN * D, "the queries pass through the space of keys and values");
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 c = s.channels(), h = blockIdx.y, batch = blockIdx.z, length = s.length;
  // The tiles with the most keys first, so that the last blocks to finish are short.
  u32 q0 = (gridDim.x - 1 - blockIdx.x) * BM, warp_q0 = q0 + warp * 16 * MT;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *q = rows + h * s.head_size;
  const bf16 *k = rows + s.keys(h / s.per_kv_head), *v = k + s.to_values();
  u32 space = shared_address(tiles);

  u32 query[MT][D / 16][4];
  Tile<D> q_tile = {space};
  copy_tile<D, BM, THREADS>(q_tile, q + q0 * stride, stride, length - q0, s.head_size);
  commit();
  wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int x = 0; x < D / 16; x++) q_tile.left(query[m][x], (warp * MT + m) * 16, x * 16);
  __syncthreads();

  u32 keys = min(q0 + BM, length), steps = (keys + BN - 1) / BN;
  auto tile = [&](u32 step, u32 which) {
    return Tile<D>{space + (step % 2 * 2 + which) * BN * D * 2};
  };
  auto load = [&](u32 step) {
    u32 first = step * BN;
    copy_tile<D, BN, THREADS>(tile(step, 0), k + first * stride, stride, length - first,
                              s.head_size);
    copy_tile<D, BN, THREADS>(tile(step, 1), v + first * stride, stride, length - first,
                              s.head_size);
  };
  const float infinity = __int_as_float(0x7f800000);
  float scale = s.scale() * LOG2E;
  float o[MT][D / 8][4] = {}, most[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) most[m][0] = most[m][1] = -infinity;
  u32 warp_start = s.start(batch, warp_q0), start[MT][2];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) start[m][r] = s.start(batch, warp_q0 + m * 16 + g + r * 8);

  u32 first_step = s.start(batch, q0) / BN;
  load(first_step);
  commit();
  for (u32 step = first_step; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    commit();
    wait<1>();
    __syncthreads();
    u32 key0 = step * BN;
    if (key0 < warp_q0 + 16 * MT && (!S::PACKED || key0 + BN > warp_start)) {
      // Scores.
      float p[MT][BN / 8][4] = {};
      Tile<D> keys_tile = tile(step, 0), values_tile = tile(step, 1);
#pragma unroll
      for (int x = 0; x < D / 16; x++)
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
          u32 b[4];
          keys_tile.right_by_rows(b, n * 16, x * 16);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            multiply_bf16_tiles(p[m][2 * n], query[m][x], b[0], b[1]);
            multiply_bf16_tiles(p[m][2 * n + 1], query[m][x], b[2], b[3]);
          }
        }
      // A key after the query does not count.
      if (key0 + BN > warp_q0) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (key0 + n * 8 + t * 2 + i % 2 > warp_q0 + m * 16 + g + i / 2 * 8)
                p[m][n][i] = -infinity;
      }
      if (S::PACKED) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              if (key0 + n * 8 + t * 2 + i % 2 < start[m][i / 2]) p[m][n][i] = -infinity;
      }
      // Softmax so far: what was summed shrinks when a larger score comes.
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float larger = most[m][r];
#pragma unroll
          for (int n = 0; n < BN / 8; n++)
            larger = fmaxf(larger, fmaxf(p[m][n][2 * r], p[m][n][2 * r + 1]));
          larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 1));
          larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 2));
          // Where no key has been seen yet there is nothing to shrink, and no difference to take.
          float from = S::PACKED && larger == -infinity ? 0.0f : larger;
          float shrink = exp2_fast((most[m][r] - from) * scale), shift = from * scale, total = 0.0f;
          most[m][r] = larger;
#pragma unroll
          for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
              p[m][n][i] = exp2_fast(p[m][n][i] * scale - shift);
              total += p[m][n][i];
            }
          sum[m][r] = sum[m][r] * shrink + total;
#pragma unroll
          for (int x = 0; x < D / 8; x++) o[m][x][2 * r] *= shrink, o[m][x][2 * r + 1] *= shrink;
        }
      // Values.
#pragma unroll
      for (int n = 0; n < BN / 16; n++) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            a[m][i] = pack_bf16(p[m][2 * n + i / 2][i % 2 * 2], p[m][2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
          u32 b[4];
          values_tile.right_by_columns(b, n * 16, x * 16);
#pragma unroll
          for (int m = 0; m < MT; m++) {
            multiply_bf16_tiles(o[m][2 * x], a[m], b[0], b[1]);
            multiply_bf16_tiles(o[m][2 * x + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads();
  }

  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = sum[m][r];
      total += __shfl_xor_sync(FULL_WARP, total, 1);
      total += __shfl_xor_sync(FULL_WARP, total, 2);
      u32 row = warp_q0 + m * 16 + g + r * 8;
      if (row >= length) continue;
      float inverse = 1.0f / total;
      bf16 *to = out + ((size_t)batch * length + row) * c + h * s.head_size;
#pragma unroll
      for (int x = 0; x < D / 8; x++)
        if (x * 8 < s.head_size) {
          u32 two = pack_bf16(o[m][x][2 * r] * inverse, o[m][x][2 * r + 1] * inverse);
          *(u32 *)(to + x * 8 + t * 2) = two;
          largest = larger_of(largest, two);
        }
      if (t == 0)
        lse[((size_t)batch * s.heads + h) * length + row] =
            most[m][r] * scale / LOG2E + logf(total);
    }
  note_amax(amax, largest);
}

// The left operands of a warp's 16 rows of a tile: in registers where there is room for them, else
// read again each time.
template <int D, bool KEEP> struct LeftRows {
  Tile<D> tile;
  u32 row, a[KEEP ? D / 16 : 1][4];
  __device__ __forceinline__ LeftRows(Tile<D> tile, u32 row) : tile(tile), row(row) {
    if (KEEP) {
#pragma unroll
      for (int x = 0; x < D / 16; x++) tile.left(a[x], row, x * 16);
    }
  }
  // c (16, N) += rows times the first N rows of `other`, transposed.
  template <int N>
  __device__ __forceinline__ void multiply(float (&c)[N / 8][4], Tile<D> other) {
#pragma unroll
    for (int x = 0; x < D / 16; x++) {
      u32 *left = a[KEEP ? x : 0];
      if (!KEEP) tile.left(left, row, x * 16);
#pragma unroll
      for (int n = 0; n < N / 16; n++) {
        u32 b[4];
        other.right_by_rows(b, n * 16, x * 16);
        multiply_bf16_tiles(c[2 * n], left, b[0], b[1]);
        multiply_bf16_tiles(c[2 * n + 1], left, b[2], b[3]);
      }
    }
  }
};

// acc (16, D) += p (16, N), rounded to bf16, times the first N rows of `other`.
template <int D, int N>
__device__ __forceinline__ void multiply_into(float (&acc)[D / 8][4], const float (&p)[N / 8][4],
                                              Tile<D> other) {
#pragma unroll
  for (int n = 0; n < N / 16; n++) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = pack_bf16(p[2 * n + i / 2][i % 2 * 2], p[2 * n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int x = 0; x < D / 16; x++) {
      u32 b[4];
      other.right_by_columns(b, n * 16, x * 16);
      multiply_bf16_tiles(acc[2 * x], a, b[0], b[1]);
      multiply_bf16_tiles(acc[2 * x + 1], a, b[2], b[3]);
    }
  }
}

// Stores factor times a warp's 16 rows of accumulators.
template <int D>
__device__ __forceinline__ void store_rows(bf16 *to, size_t stride, u32 valid, u32 width,
                                           const float (&acc)[D / 8][4], float factor, u32 *amax) {
  float largest = 0.0f;
  u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (g + r * 8 >= valid) continue;
#pragma unroll
    for (int x = 0; x < D / 8; x++)
      if (x * 8 < width) {
        u32 two = pack_bf16(acc[x][2 * r] * factor, acc[x][2 * r + 1] * factor);
        *(u32 *)(to + (g + r * 8) * stride + x * 8 + t * 2) = two;
        largest = larger_of(largest, two);
      }
  }
  note_amax(amax, largest);
}

// dk and dv of dqkv (B, T, R). A warp owns 16 keys; the block goes through the queries BQ at a
// time. Scores are computed transposed, (keys, queries), which makes them left operands of dk and
// dv. Grid: (T / (16 WARPS) rounded up, kv heads, B); block: 32 WARPS; dynamic shared memory: 64
// WARPS D + 8 BQ D + 16 BQ bytes.
template <int D, int WARPS, int BQ, class S = Heads>
__global__ void __launch_bounds__(WARP *WARPS)
    flash_dkdv(bf16 *dqkv, u32 *amax, const bf16 *dout, const float *lse, const float *delta,
               const bf16 *qkv, S s) {
  begin();
  constexpr int BK = 16 * WARPS, THREADS = WARP * WARPS;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 c = s.channels(), batch = blockIdx.z, length = s.length, d = s.head_size;
  u32 k0 = blockIdx.x * BK, warp_k0 = k0 + warp * 16;
  u32 at_key = s.keys(blockIdx.y), to_values = s.to_values(), h = blockIdx.y * s.per_kv_head;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *k = rows + at_key, *v = k + to_values;
  // Of the head whose queries are loaded next, and their step.
  const bf16 *q = rows + h * d, *gradient = dout + (size_t)batch * length * c + h * d;
  size_t places = ((size_t)batch * s.heads + h) * length;
  u32 first_step = k0 / BQ, steps = (s.end(batch, k0 + BK - 1) + BQ - 1) / BQ, next = first_step;

  u32 space = shared_address(tiles);
  Tile<D> k_tile = {space}, v_tile = {space + BK * D * 2};
  u32 stages = space + 2 * BK * D * 2;
  float *numbers = (float *)(tiles + 2 * BK * D * 2 + 4 * BQ * D * 2);  // (2, 2, BQ): lse, delta
  // `turn` counts the steps of all heads.
  auto tile = [&](u32 turn, u32 which) {
    return Tile<D>{stages + (turn % 2 * 2 + which) * BQ * D * 2};
  };
  auto load = [&](u32 turn) {
    u32 first = next * BQ;
    copy_tile<D, BQ, THREADS>(tile(turn, 0), q + first * stride, stride, length - first, d);
    copy_tile<D, BQ, THREADS>(tile(turn, 1), gradient + (size_t)first * c, c, length - first, d);
    for (u32 i = threadIdx.x; i < BQ; i += THREADS) {
      // A query beyond the end has probabilities 2^-infinity.
      bool inside = first + i < length;
      float *to = numbers + turn % 2 * 2 * BQ + i;
      to[0] = inside ? lse[places + first + i] * LOG2E : __int_as_float(0x7f800000);
      to[BQ] = inside ? delta[places + first + i] : 0.0f;
    }
    if (++next == steps) next = first_step, q += d, gradient += d, places += length;
  };
  copy_tile<D, BK, THREADS>(k_tile, k + k0 * stride, stride, length - k0, d);
  copy_tile<D, BK, THREADS>(v_tile, v + k0 * stride, stride, length - k0, d);
  u32 warp_end = s.end(batch, warp_k0 + 15);
  u32 end[2] = {s.end(batch, warp_k0 + g), s.end(batch, warp_k0 + g + 8)};
  load(0);
  commit();
  wait<0>();
  __syncthreads();
  LeftRows<D, (D <= 64)> keys(k_tile, warp * 16), values(v_tile, warp * 16);
  float scale = s.scale(), dk[D / 8][4] = {}, dv[D / 8][4] = {};
  u32 turns = s.per_kv_head * (steps - first_step);
  for (u32 turn = 0, step = first_step; turn < turns; turn++) {
    if (turn + 1 < turns) load(turn + 1);
    commit();
    wait<1>();
    __syncthreads();
    u32 q0 = step * BQ;
    if (q0 + BQ > warp_k0 && (!S::PACKED || q0 < warp_end)) {
      const float *lse2 = numbers + turn % 2 * 2 * BQ, *mean = lse2 + BQ;
      float p[BQ / 8][4] = {}, ds[BQ / 8][4] = {};
      keys.template multiply<BQ>(p, tile(turn, 0));
#pragma unroll
      for (int n = 0; n < BQ / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 query = n * 8 + t * 2 + i % 2;
          p[n][i] = exp2_fast(p[n][i] * (scale * LOG2E) - lse2[query]);
          if (warp_k0 + g + i / 2 * 8 > q0 + query) p[n][i] = 0.0f;
          if (S::PACKED && q0 + query >= end[i / 2]) p[n][i] = 0.0f;
        }
      multiply_into<D, BQ>(dv, p, tile(turn, 1));
      values.template multiply<BQ>(ds, tile(turn, 1));
#pragma unroll
      for (int n = 0; n < BQ / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - mean[n * 8 + t * 2 + i % 2]);
      multiply_into<D, BQ>(dk, ds, tile(turn, 0));
    }
    __syncthreads();
    if (++step == steps) step = first_step;
  }
  if (warp_k0 >= length) return;
  bf16 *to = dqkv + ((size_t)batch * length + warp_k0) * stride + at_key;
  store_rows<D>(to, stride, length - warp_k0, d, dk, scale, amax);
  store_rows<D>(to + to_values, stride, length - warp_k0, d, dv, 1.0f, amax);
}

// dq of dqkv (B, T, R). A warp owns 16 queries; the block goes through the keys BN at a time.
// Grid: (T / (16 WARPS) rounded up, H, B); block: 32 WARPS; dynamic shared memory:
// 64 WARPS D + 8 BN D bytes.
template <int D, int WARPS, int BN, class S = Heads>
__global__ void __launch_bounds__(WARP *WARPS)
    flash_dq(bf16 *dqkv, u32 *amax, const bf16 *dout, const float *lse, const float *delta,
             const bf16 *qkv, S s) {
  begin();
  constexpr int BM = 16 * WARPS, THREADS = WARP * WARPS;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 c = s.channels(), h = blockIdx.y, batch = blockIdx.z, length = s.length, d = s.head_size;
  u32 q0 = (gridDim.x - 1 - blockIdx.x) * BM, warp_q0 = q0 + warp * 16;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *q = rows + h * d;
  const bf16 *k = rows + s.keys(h / s.per_kv_head), *v = k + s.to_values();
  const bf16 *gradient = dout + (size_t)batch * length * c + h * d;
  size_t places = ((size_t)batch * s.heads + h) * length;

  u32 space = shared_address(tiles);
  Tile<D> q_tile = {space}, g_tile = {space + BM * D * 2};
  u32 stages = space + 2 * BM * D * 2;
  auto tile = [&](u32 step, u32 which) {
    return Tile<D>{stages + (step % 2 * 2 + which) * BN * D * 2};
  };
  auto load = [&](u32 step) {
    u32 first = step * BN;
    copy_tile<D, BN, THREADS>(tile(step, 0), k + first * stride, stride, length - first, d);
    copy_tile<D, BN, THREADS>(tile(step, 1), v + first * stride, stride, length - first, d);
  };
  copy_tile<D, BM, THREADS>(q_tile, q + q0 * stride, stride, length - q0, d);
  copy_tile<D, BM, THREADS>(g_tile, gradient + (size_t)q0 * c, c, length - q0, d);
  u32 first_step = s.start(batch, q0) / BN, warp_start = s.start(batch, warp_q0), start[2];
  load(first_step);
  commit();
  wait<0>();
  __syncthreads();
  LeftRows<D, (D <= 64)> queries(q_tile, warp * 16), gradients(g_tile, warp * 16);
  float lse2[2], mean[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 row = warp_q0 + g + r * 8;
    lse2[r] = row < length ? lse[places + row] * LOG2E : __int_as_float(0x7f800000);
    mean[r] = row < length ? delta[places + row] : 0.0f;
    start[r] = s.start(batch, row);
  }
  u32 steps = (min(q0 + BM, length) + BN - 1) / BN;
  float scale = s.scale(), dq[D / 8][4] = {};
  for (u32 step = first_step; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    commit();
    wait<1>();
    __syncthreads();
    u32 key0 = step * BN;
    if (key0 < warp_q0 + 16 && (!S::PACKED || key0 + BN > warp_start)) {
      float p[BN / 8][4] = {}, ds[BN / 8][4] = {};
      queries.template multiply<BN>(p, tile(step, 0));
      gradients.template multiply<BN>(ds, tile(step, 1));
#pragma unroll
      for (int n = 0; n < BN / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float weight = exp2_fast(p[n][i] * (scale * LOG2E) - lse2[i / 2]);
          u32 key = key0 + n * 8 + t * 2 + i % 2;
          if (key > warp_q0 + g + i / 2 * 8 || S::PACKED && key < start[i / 2]) weight = 0.0f;
          ds[n][i] = weight * (ds[n][i] - mean[i / 2]);
        }
      multiply_into<D, BN>(dq, ds, tile(step, 0));
    }
    __syncthreads();
  }
  if (warp_q0 >= length) return;
  bf16 *to = dqkv + ((size_t)batch * length + warp_q0) * stride + h * d;
  store_rows<D>(to, stride, length - warp_q0, d, dq, scale, amax);
}
