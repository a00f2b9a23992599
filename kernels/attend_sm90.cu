// Causal softmax attention for Hopper: the kernels of attend_sm80.cu on warpgroup products
// (wgmma), which read tiles from shared memory while the threads go on with the softmax of another
// tile.
//
// bf16 operands, f32 scores, sums and accumulators. As in attend_sm80.cu, the backward pass has
// one kernel for dk and dv and one for dq, so that no sum depends on the order in which blocks end.
// A warpgroup owns 64 rows of what its block owns; the block goes through the other side BN rows at
// a time, which arrive in three stages: at step s the block waits once, for stage s, and then asks
// for stage s + 1, into which nobody can still be looking, since every product of step s - 2 has
// ended by then.
//
// The right operand of every product lies in shared memory, with the reduction along its rows or
// down its columns; the left one too, or it is what a softmax left in registers: the sums of one
// product are, pair by pair, laid out as the left operand of the next.
//
// Tiles are D wide, in panels of 64 columns (128 bytes); columns beyond the head are zeros. Chunk c
// of 16 bytes of a panel's row lies at c ^ (row % 8), the swizzle that wgmma calls 128B.
//
// Rows of qkv are R channels wide (heads.cuh). A block of keys goes through the queries of all
// heads that share them, one head after the other, without a pause in what is loaded: stages go by
// turns, which are the steps of all heads.
//
// S is Heads or PackedHeads: documents as in attend_sm80.cu, tiles left out for a warpgroup.

#define WARPGROUP 128
#define STAGES 3

// ---- Tiles ------------------------------------------------------------------------------------

// ROWS rows of D bf16 numbers in shared memory, by their address there, a multiple of 1,024.
template <int D, int ROWS> struct Tile {
  static constexpr u32 PANEL = ROWS * 128, BYTES = D / 64 * PANEL;
  u32 base;
  __device__ __forceinline__ u32 at(u32 row, u32 column) const {
    return base + column / 64 * PANEL + row * 128 + ((column % 64 / 8 ^ (row & 7)) * 16);
  }
  // As an operand with the reduction along the rows, from row `row` on and column `column`, a
  // multiple of 16: groups of 8 rows are 1,024 bytes apart.
  __device__ __forceinline__ u64 along_rows(u32 row, u32 column) const {
    u32 address = base + column / 64 * PANEL + row * 128 + column % 64 * 2;
    return address >> 4 & 0x3fff | (u64)(1024 >> 4) << 32 | 1ull << 62;
  }
  // As a right operand with the reduction down the columns, from row `row` on, all D columns.
  __device__ __forceinline__ u64 down_columns(u32 row) const {
    return base + row * 128 >> 4 & 0x3fff | (u64)(PANEL >> 4) << 16 | (u64)(1024 >> 4) << 32 |
           1ull << 62;
  }
};

// Starts copying ROWS rows of `width` columns, `stride` elements apart, to a tile. Rows from
// `valid` on and columns from `width` on become zeros.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(Tile<D, ROWS> to, const bf16 *from, size_t stride,
                                          u32 valid, u32 width) {
  constexpr u32 CHUNKS = D / 8, AT_ONCE = THREADS / CHUNKS;
  static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0, "the swizzle of a thread's rows is one");
  u32 row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8, address = to.at(row, column);
  const bf16 *source = from + row * stride + column;
#pragma unroll
  for (u32 i = 0; i < ROWS / AT_ONCE; i++) {
    bool inside = row + i * AT_ONCE < valid && column < width;
    copy_piece(address + i * AT_ONCE * 128, inside ? source + i * AT_ONCE * stride : from, inside);
  }
}
// Starts copying N floats, zeros from `valid` on.
template <int N> __device__ __forceinline__ void copy_floats(u32 to, const float *from, u32 valid) {
  if (threadIdx.x >= N) return;
  bool inside = threadIdx.x < valid;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + threadIdx.x * 4),
               "l"(inside ? from + threadIdx.x : from), "r"(inside ? 4 : 0));
}
// Waits for all copies of the block, and shows them to wgmma.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;");
  asm volatile("fence.proxy.async.shared::cta;");
  __syncthreads();
}

// ---- Products -----------------------------------------------------------------------------------

// Sums (64, N) of a warpgroup. A thread's share, with w its warp, g = lane / 4 and t = lane % 4: of
// rows 16 w + g and + 8 (i / 2), columns 8 n + 2 t and + 1 (i % 2), as s[n][i].
template <int N> struct Sums {
  float s[N / 8][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
  }
  // What products write becomes visible to the compiler here, and not earlier.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("" : "+f"(s[n][i])::"memory");
  }
};

// Whether keys after a query, and those of other documents, are left out in a step. It is a type,
// so that the steps without that are compiled without a branch for it, which would make the
// compiler serialize all products.
template <bool VALUE> struct Diagonal {
  static constexpr bool value = VALUE;
};

// What all threads of a warp agree on; the compiler does not serialize products under such
// conditions.
__device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(FULL_WARP, x, 0); }
// The same of what a sequence's documents say, which is constant where it has none.
template <class S> __device__ __forceinline__ u32 uniform_of(u32 x) {
  return S::PACKED ? uniform(x) : x;
}

// Orders products after what threads wrote to their registers.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most PENDING groups of products are under way.
template <int PENDING> __device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define S4(n) "+f"(c.s[n][0]), "+f"(c.s[n][1]), "+f"(c.s[n][2]), "+f"(c.s[n][3])
#define S32(n) S4(n), S4(n + 1), S4(n + 2), S4(n + 3), S4(n + 4), S4(n + 5), S4(n + 6), S4(n + 7)
#define R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 \
  R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
      "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c (64, N) = or += a (64, 16) b (16, N), both along their rows in shared memory.
__device__ __forceinline__ void wgmma(Sums<64> &c, u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32
               "}, %32, %33, p, 1, 1, 0, 0;}"
               : S32(0)
               : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(Sums<128> &c, u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64
               "}, %64, %65, p, 1, 1, 0, 0;}"
               : S32(0), S32(8)
               : "l"(a), "l"(b), "r"(add));
}
// The same += with a in registers and b down its columns.
__device__ __forceinline__ void wgmma(Sums<64> &c, const u32 a[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32
               "}, {%32, %33, %34, %35}, %36, "
               "1, 1, 1, 1;"
               : S32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma(Sums<128> &c, const u32 a[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64
               "}, {%64, %65, %66, %67}, %68, "
               "1, 1, 1, 1;"
               : S32(0), S32(8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c (64, N) = rows from `row` on of a times the rows of b, transposed.
template <int D, int N, int ROWS>
__device__ __forceinline__ void multiply_rows(Sums<N> &c, Tile<D, ROWS> a, u32 row, Tile<D, N> b) {
#pragma unroll
  for (int x = 0; x < D; x += 16) wgmma(c, a.along_rows(row, x), b.along_rows(0, x), x > 0);
}
// c (64, D) += a (64, N), packed, times b (N, D).
template <int D, int N>
__device__ __forceinline__ void multiply_packed(Sums<D> &c, const u32 (&a)[N / 16][4],
                                                Tile<D, N> b) {
#pragma unroll
  for (int k = 0; k < N / 16; k++) wgmma(c, a[k], b.down_columns(k * 16));
}

// What came of sums (64, N), rounded to bf16, as left operands.
template <int N>
__device__ __forceinline__ void pack(u32 (&to)[N / 16][4], const float (&c)[N / 8][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      to[k][i] = pack_bf16(c[2 * k + i / 2][i % 2 * 2], c[2 * k + i / 2][i % 2 * 2 + 1]);
}

// Stores factor[i / 2] times a warp's 16 rows of sums, of which `valid` and `width` columns are
// inside, through 16 rows of a tile that no product reads any more, in pieces of 16 bytes.
template <int D, int ROWS>
__device__ __forceinline__ void store_rows(bf16 *to, size_t stride, u32 valid, u32 width,
                                           const Sums<D> &c, const float factor[2],
                                           Tile<D, ROWS> through, u32 row, u32 *amax) {
  u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 two = pack_bf16(c.s[n][2 * r] * factor[r], c.s[n][2 * r + 1] * factor[r]);
      u32 address = through.at(row + g + 8 * r, n * 8) + t * 4;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(two) : "memory");
      if (g + 8 * r < valid) largest = larger_of(largest, two);
    }
  __syncwarp();
  constexpr u32 CHUNKS = D / 8;
#pragma unroll
  for (u32 i = lane; i < 16 * CHUNKS; i += WARP) {
    u32 y = i / CHUNKS, x = i % CHUNKS * 8;
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(through.at(row + y, x)));
    if (y < valid && x < width) *(uint4 *)(to + y * stride + x) = piece;
  }
  note_amax(amax, largest);
}

// Waits for the threads of one's own warpgroup.
__device__ __forceinline__ void warpgroup_sync(u32 group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(WARPGROUP) : "memory");
}

__device__ __forceinline__ u32 rows_left(u32 length, u32 first) {
  return length > first ? length - first : 0;
}

extern __shared__ __align__(1024) u8 tiles[];

// Kernels: GROUPS warpgroups, steps of BN keys, AT_ONCE blocks of a multiprocessor.
//
// NOTE: measured on an H100, B T = 16 x 1024, 16 heads of 64: forward 117 us (cuDNN 129), dkdv 209
// and dq 157 (cuDNN 462 for both, in no fixed order); 8 x 1024, 16 heads of 128: 123 (103), 181 and
// 133 (392). Steps of 128 keys lose in the forward pass (32 x 1024, 12 heads of 64: 234 us for 167;
// heads of 128: 133 for 123); in dq they gain nothing.

// ---- Forward ------------------------------------------------------------------------------------

// out (B, T, C) and lse (B, H, T), the natural logarithm of the sum of exponentials, from qkv
// (B, T, R). A warpgroup owns 64 queries. The scores of a step are computed while the step before
// it is multiplied with its values.
// Grid: (T / (64 GROUPS) rounded up, H, B); block: 128 GROUPS; dynamic shared memory:
// 128 GROUPS D + 12 BN D bytes and 1,024 to align them.
template <int D, int GROUPS, int BN, int AT_ONCE, class S = Heads>
__global__ void __launch_bounds__(WARPGROUP *GROUPS, AT_ONCE)
    wgmma_forward(bf16 *out, float *lse, u32 *amax, const bf16 *qkv, S s) {
  begin();
  constexpr int BM = 64 * GROUPS, THREADS = WARPGROUP * GROUPS;
  u32 lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP), group = warp / 4;
  u32 g = lane / 4, t = lane % 4, c = s.channels(), h = blockIdx.y, batch = blockIdx.z,
      length = s.length;
  // The tiles with the most keys first, so that the last blocks to finish are short.
  u32 q0 = (gridDim.x - 1 - blockIdx.x) * BM, group_q0 = q0 + group * 64;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *q = rows + h * s.head_size;
  const bf16 *k = rows + s.keys(h / s.per_kv_head), *v = k + s.to_values();
  u32 space = shared_address(tiles) + 1023 & ~1023u;
  Tile<D, BM> q_tile = {space};
  auto tile = [&](u32 step, u32 which) {
    return Tile<D, BN>{space + q_tile.BYTES + (step % STAGES * 2 + which) * Tile<D, BN>::BYTES};
  };
  auto load = [&](u32 step) {
    u32 first = step * BN;
    copy_tile<D, BN, THREADS>(tile(step, 0), k + first * stride, stride, length - first,
                              s.head_size);
    copy_tile<D, BN, THREADS>(tile(step, 1), v + first * stride, stride, length - first,
                              s.head_size);
  };
  const float infinity = __int_as_float(0x7f800000);
  float scale = s.scale() * LOG2E, most[2] = {-infinity, -infinity}, sum[2] = {};
  u32 steps = (min(q0 + BM, length) + BN - 1) / BN;
  // Steps of this warpgroup; the others only help to load.
  u32 own = min(steps, (group_q0 + 64 + BN - 1) / BN);
  // The first step of the block, and of the warpgroup; from `apart` on all keys of a step are of
  // the document of every query.
  u32 first_step = uniform_of<S>(s.start(batch, q0) / BN),
      from = uniform_of<S>(s.start(batch, group_q0) / BN);
  u32 apart = uniform_of<S>((s.start(batch, group_q0 + 63) + BN - 1) / BN);
  u32 own_query = group_q0 + warp % 4 * 16 + g;
  u32 start[2] = {s.start(batch, own_query), s.start(batch, own_query + 8)};
  Sums<D> o;
  Sums<BN> p;
  float weights[BN / 8][4], shrink[2];
  u32 packed[BN / 16][4];
  o.clear();

  // Softmax so far: what was summed shrinks when a larger score comes.
  auto softmax = [&](u32 step, auto diagonal) {
    u32 key0 = step * BN, query = group_q0 + warp % 4 * 16 + g;
#pragma unroll
    for (int n = 0; n < BN / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        // A key after the query does not count, nor one of another document.
        u32 key = key0 + n * 8 + t * 2 + i % 2;
        bool later = diagonal.value && key > query + i / 2 * 8;
        bool apart = S::PACKED && diagonal.value && key < start[i / 2];
        weights[n][i] = later || apart ? -infinity : p.s[n][i];
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float larger = most[r];
#pragma unroll
      for (int n = 0; n < BN / 8; n++)
        larger = fmaxf(larger, fmaxf(weights[n][2 * r], weights[n][2 * r + 1]));
      larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(FULL_WARP, larger, 2));
      // Where no key has been seen yet there is nothing to shrink, and no difference to take.
      float base = S::PACKED && larger == -infinity ? 0.0f : larger;
      shrink[r] = exp2_fast((most[r] - base) * scale);
      most[r] = larger;
      float shift = base * scale, total = 0.0f;
#pragma unroll
      for (int n = 0; n < BN / 8; n++)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; i++) {
          weights[n][i] = exp2_fast(weights[n][i] * scale - shift);
          total += weights[n][i];
        }
      sum[r] = sum[r] * shrink[r] + total;
    }
  };

  auto next = [&](u32 step) {
    wait_for_copies();
    if (step + 1 < steps) load(step + 1);
  };
  copy_tile<D, BM, THREADS>(q_tile, q + q0 * stride, stride, length - q0, s.head_size);
  load(first_step);
  auto first = [&](u32 step, auto diagonal) {
    next(step);
    fence();
    multiply_rows<D, BN, BM>(p, q_tile, group * 64, tile(step, 0));
    commit();
    wait<0>();
    p.settle();
    softmax(step, diagonal);
    pack<BN>(packed, weights);
  };
  auto another = [&](u32 step, auto diagonal) {
    next(step);
    fence();
    multiply_rows<D, BN, BM>(p, q_tile, group * 64, tile(step, 0));
    commit();
    multiply_packed<D, BN>(o, packed, tile(step - 1, 1));
    commit();
    wait<1>();
    p.settle();
    softmax(step, diagonal);
    wait<0>();
    o.settle();
#pragma unroll
    for (int x = 0; x < D / 8; x++)
#pragma unroll
      for (int i = 0; i < 4; i++) o.s[x][i] *= shrink[i / 2];
    pack<BN>(packed, weights);
  };
  // Of the steps, only the last holds keys after a query, and the first ones those of documents
  // before a query's.
  if constexpr (S::PACKED) {
    for (u32 step = first_step; step < from; step++) next(step);
    first(from, Diagonal<true>());
    u32 step = from + 1;
    for (; step + 1 < own && step < apart; step++) another(step, Diagonal<true>());
    for (; step + 1 < own; step++) another(step, Diagonal<false>());
    if (step < own) another(step, Diagonal<true>());
  } else if (own > 1) {
    first(0, Diagonal<false>());
    for (u32 step = 1; step + 1 < own; step++) another(step, Diagonal<false>());
    another(own - 1, Diagonal<true>());
  } else {
    first(0, Diagonal<true>());
  }
  for (u32 step = own; step < steps; step++) next(step);
  fence();
  multiply_packed<D, BN>(o, packed, tile(own - 1, 1));
  commit();
  wait<0>();
  o.settle();

  // All products of the warpgroup have ended, so its queries make room for its results.
  warpgroup_sync(group);
  u32 row0 = group_q0 + warp % 4 * 16, valid = rows_left(length, row0);
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = sum[r];
    total += __shfl_xor_sync(FULL_WARP, total, 1);
    total += __shfl_xor_sync(FULL_WARP, total, 2);
    inverse[r] = 1.0f / total;
    if (t == 0 && g + r * 8 < valid)
      lse[((size_t)batch * s.heads + h) * length + row0 + g + r * 8] =
          most[r] * scale / LOG2E + logf(total);
  }
  bf16 *to = out + ((size_t)batch * length + row0) * c + h * s.head_size;
  store_rows<D, BM>(to, c, valid, s.head_size, o, inverse, q_tile, warp * 16, amax);
}

// ---- Backward -----------------------------------------------------------------------------------

// dk and dv of dqkv (B, T, R). A warpgroup owns 64 keys; the block goes through the queries 64 at
// a time. Scores are computed transposed, (keys, queries), which makes them left operands of dk and
// dv. Grid: (T / (64 GROUPS) rounded up, kv heads, B); block: 128 GROUPS; dynamic shared memory:
// 256 GROUPS D + 768 D + 1,536 bytes and 1,024 to align them.
template <int D, int GROUPS, class S = Heads>
__global__ void __launch_bounds__(WARPGROUP *GROUPS, 1)
    wgmma_dkdv(bf16 *dqkv, u32 *amax, const bf16 *dout, const float *lse, const float *delta,
               const bf16 *qkv, S s) {
  begin();
  constexpr int BK = 64 * GROUPS, BQ = 64, THREADS = WARPGROUP * GROUPS;
  u32 lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP), group = warp / 4;
  u32 g = lane / 4, t = lane % 4;
  u32 c = s.channels(), batch = blockIdx.z, length = s.length, d = s.head_size;
  u32 k0 = blockIdx.x * BK, group_k0 = k0 + group * 64;
  u32 at_key = s.keys(blockIdx.y), to_values = s.to_values(), h = blockIdx.y * s.per_kv_head;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *k = rows + at_key, *v = k + to_values;
  // Of the head whose queries are loaded next, and their step.
  const bf16 *q = rows + h * d, *gradient = dout + (size_t)batch * length * c + h * d;
  size_t places = ((size_t)batch * s.heads + h) * length;
  u32 first_step = k0 / BQ, steps = uniform_of<S>((s.end(batch, k0 + BK - 1) + BQ - 1) / BQ);
  u32 loaded = first_step;

  u32 space = shared_address(tiles) + 1023 & ~1023u;
  Tile<D, BK> k_tile = {space}, v_tile = {space + k_tile.BYTES};
  u32 stages = space + 2 * k_tile.BYTES, numbers = stages + STAGES * 2 * Tile<D, BQ>::BYTES;
  auto tile = [&](u32 turn, u32 which) {
    return Tile<D, BQ>{stages + (turn % STAGES * 2 + which) * Tile<D, BQ>::BYTES};
  };
  // lse and delta of a turn's queries.
  auto number = [&](u32 turn, u32 which) { return numbers + (turn % STAGES * 2 + which) * BQ * 4; };
  auto load = [&](u32 turn) {
    u32 first = loaded * BQ;
    copy_tile<D, BQ, THREADS>(tile(turn, 0), q + first * stride, stride, length - first, d);
    copy_tile<D, BQ, THREADS>(tile(turn, 1), gradient + (size_t)first * c, c, length - first, d);
    copy_floats<BQ>(number(turn, 0), lse + places + first, length - first);
    copy_floats<BQ>(number(turn, 1), delta + places + first, length - first);
    if (++loaded == steps) loaded = first_step, q += d, gradient += d, places += length;
  };
  copy_tile<D, BK, THREADS>(k_tile, k + k0 * stride, stride, length - k0, d);
  copy_tile<D, BK, THREADS>(v_tile, v + k0 * stride, stride, length - k0, d);
  load(0);

  float scale = s.scale();
  Sums<D> dk, dv;
  dk.clear(), dv.clear();
  Sums<BQ> p, ds;
  float weights[BQ / 8][4], products[BQ / 8][4];
  u32 packed[BQ / 16][4], packed_ds[BQ / 16][4];
  u32 turn = 0, turns = s.per_kv_head * (steps - first_step);
  auto next = [&]() {
    wait_for_copies();
    if (turn + 1 < turns) load(turn + 1);
  };
  auto body = [&](u32 step, auto diagonal) {
    next();
    u32 q0 = step * BQ;
    fence();
    multiply_rows<D, BQ, BK>(p, k_tile, group * 64, tile(turn, 0));
    commit();
    multiply_rows<D, BQ, BK>(ds, v_tile, group * 64, tile(turn, 1));
    commit();
    wait<1>();
    p.settle();
    // Zeros stand for queries beyond the end: their dout is zero, and so is all that comes of it.
    u32 key = group_k0 + warp % 4 * 16 + g;
    u32 end[2] = {s.end(batch, key), s.end(batch, key + 8)};
#pragma unroll
    for (int n = 0; n < BQ / 8; n++) {
      float2 log_sum;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(log_sum.x), "=f"(log_sum.y)
                   : "r"(number(turn, 0) + (n * 8 + t * 2) * 4));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float shift = (i % 2 ? log_sum.y : log_sum.x) * LOG2E;
        weights[n][i] = exp2_fast(p.s[n][i] * (scale * LOG2E) - shift);
        u32 query = q0 + n * 8 + t * 2 + i % 2;
        if (diagonal.value && key + i / 2 * 8 > query) weights[n][i] = 0.0f;
        if (S::PACKED && diagonal.value && query >= end[i / 2]) weights[n][i] = 0.0f;
      }
    }
    pack<BQ>(packed, weights);
    wait<0>();
    ds.settle();
#pragma unroll
    for (int n = 0; n < BQ / 8; n++) {
      float2 mean;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(mean.x), "=f"(mean.y)
                   : "r"(number(turn, 1) + (n * 8 + t * 2) * 4));
#pragma unroll
      for (int i = 0; i < 4; i++)
        products[n][i] = weights[n][i] * (ds.s[n][i] - (i % 2 ? mean.y : mean.x));
    }
    pack<BQ>(packed_ds, products);
    // NOTE: to start the product with dout before this arithmetic would make the compiler serialize
    // all products, since the registers below are those of sums of the next step.
    fence();
    multiply_packed<D, BQ>(dv, packed, tile(turn, 1));
    multiply_packed<D, BQ>(dk, packed_ds, tile(turn, 0));
    commit();
    turn++;
  };
  // Queries before the warpgroup's keys do not see them.
  u32 own = min(group_k0 / BQ, steps);
  if (own == steps) {
    // All of its keys lie beyond the end.
    for (; turn < turns; turn++) next();
    return;
  }
  while (turn < turns) {
    for (u32 step = first_step; step < own; step++) next(), turn++;
    body(own, Diagonal<true>());
    u32 step = own + 1;
    if constexpr (S::PACKED) {
      // Up to `apart` all queries of a step are of the document of every key, and from `ends` on
      // none.
      u32 apart = uniform_of<S>(s.end(batch, group_k0) / BQ);
      u32 ends = min(steps, uniform_of<S>((s.end(batch, group_k0 + 63) + BQ - 1) / BQ));
      for (; step < ends && step < apart; step++) body(step, Diagonal<false>());
      for (; step < ends; step++) body(step, Diagonal<true>());
    } else {
      for (; step < steps; step++) body(step, Diagonal<false>());
    }
    // What is loaded from here on may lie where these products have read.
    wait<0>();
    dk.settle(), dv.settle();
    for (; step < steps; step++) next(), turn++;
  }
  // The keys and values of the warpgroup make room for the results.
  warpgroup_sync(group);
  u32 row0 = group_k0 + warp % 4 * 16, valid = rows_left(length, row0);
  bf16 *to = dqkv + ((size_t)batch * length + row0) * stride + at_key;
  float by_scale[2] = {scale, scale}, one[2] = {1.0f, 1.0f};
  store_rows<D, BK>(to, stride, valid, d, dk, by_scale, k_tile, warp * 16, amax);
  store_rows<D, BK>(to + to_values, stride, valid, d, dv, one, v_tile, warp * 16, amax);
}

// dq of dqkv (B, T, R). A warpgroup owns 64 queries; the block goes through the keys BN at a
// time. Grid: (T / (64 GROUPS) rounded up, H, B); block: 128 GROUPS; dynamic shared memory: 256
// GROUPS D + 12 BN D bytes and 1,024 to align them.
template <int D, int GROUPS, int BN, class S = Heads>
__global__ void __launch_bounds__(WARPGROUP *GROUPS, 1)
    wgmma_dq(bf16 *dqkv, u32 *amax, const bf16 *dout, const float *lse, const float *delta,
             const bf16 *qkv, S s) {
  begin();
  constexpr int BM = 64 * GROUPS, THREADS = WARPGROUP * GROUPS;
  u32 lane = threadIdx.x % WARP, warp = uniform(threadIdx.x / WARP), group = warp / 4;
  u32 g = lane / 4, t = lane % 4;
  u32 c = s.channels(), h = blockIdx.y, batch = blockIdx.z, length = s.length, d = s.head_size;
  u32 q0 = (gridDim.x - 1 - blockIdx.x) * BM, group_q0 = q0 + group * 64;
  size_t stride = s.qkv_channels();
  const bf16 *rows = qkv + (size_t)batch * length * stride, *q = rows + h * d;
  const bf16 *k = rows + s.keys(h / s.per_kv_head), *v = k + s.to_values();
  const bf16 *gradient = dout + (size_t)batch * length * c + h * d;
  size_t places = ((size_t)batch * s.heads + h) * length;

  u32 space = shared_address(tiles) + 1023 & ~1023u;
  Tile<D, BM> q_tile = {space}, g_tile = {space + q_tile.BYTES};
  u32 stages = space + 2 * q_tile.BYTES;
  auto tile = [&](u32 step, u32 which) {
    return Tile<D, BN>{stages + (step % STAGES * 2 + which) * Tile<D, BN>::BYTES};
  };
  auto load = [&](u32 step) {
    u32 first = step * BN;
    copy_tile<D, BN, THREADS>(tile(step, 0), k + first * stride, stride, length - first, d);
    copy_tile<D, BN, THREADS>(tile(step, 1), v + first * stride, stride, length - first, d);
  };
  copy_tile<D, BM, THREADS>(q_tile, q + q0 * stride, stride, length - q0, d);
  copy_tile<D, BM, THREADS>(g_tile, gradient + (size_t)q0 * c, c, length - q0, d);
  // As in the forward pass.
  u32 first_step = uniform_of<S>(s.start(batch, q0) / BN);
  load(first_step);

  u32 query = group_q0 + warp % 4 * 16 + g;
  u32 start[2] = {s.start(batch, query), s.start(batch, query + 8)};
  float lse2[2], mean[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    bool inside = query + r * 8 < length;
    lse2[r] = inside ? lse[places + query + r * 8] * LOG2E : 0.0f;
    mean[r] = inside ? delta[places + query + r * 8] : 0.0f;
  }
  u32 steps = (min(q0 + BM, length) + BN - 1) / BN;
  float scale = s.scale();
  Sums<D> dq;
  dq.clear();
  Sums<BN> p, ds;
  float weights[BN / 8][4], products[BN / 8][4];
  u32 packed[BN / 16][4];
  auto next = [&](u32 step) {
    wait_for_copies();
    if (step + 1 < steps) load(step + 1);
  };
  u32 own = min(steps, (group_q0 + 64 + BN - 1) / BN);
  auto body = [&](u32 step, auto diagonal) {
    next(step);
    u32 key0 = step * BN;
    fence();
    multiply_rows<D, BN, BM>(p, q_tile, group * 64, tile(step, 0));
    commit();
    multiply_rows<D, BN, BM>(ds, g_tile, group * 64, tile(step, 1));
    commit();
    wait<1>();
    p.settle();
#pragma unroll
    for (int n = 0; n < BN / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        weights[n][i] = exp2_fast(p.s[n][i] * (scale * LOG2E) - lse2[i / 2]);
        u32 key = key0 + n * 8 + t * 2 + i % 2;
        if (diagonal.value && key > query + i / 2 * 8) weights[n][i] = 0.0f;
        if (S::PACKED && diagonal.value && key < start[i / 2]) weights[n][i] = 0.0f;
      }
    wait<0>();
    ds.settle();
#pragma unroll
    for (int n = 0; n < BN / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) products[n][i] = weights[n][i] * (ds.s[n][i] - mean[i / 2]);
    pack<BN>(packed, products);
    fence();
    multiply_packed<D, BN>(dq, packed, tile(step, 0));
    commit();
  };
  if constexpr (S::PACKED) {
    u32 from = uniform_of<S>(s.start(batch, group_q0) / BN);
    u32 apart = uniform_of<S>((s.start(batch, group_q0 + 63) + BN - 1) / BN), step = from;
    for (u32 before = first_step; before < from; before++) next(before);
    for (; step + 1 < own && step < apart; step++) body(step, Diagonal<true>());
    for (; step + 1 < own; step++) body(step, Diagonal<false>());
  } else {
    for (u32 step = 0; step + 1 < own; step++) body(step, Diagonal<false>());
  }
  body(own - 1, Diagonal<true>());
  for (u32 step = own; step < steps; step++) next(step);
  wait<0>();
  dq.settle();
  warpgroup_sync(group);
  u32 row0 = group_q0 + warp % 4 * 16, valid = rows_left(length, row0);
  bf16 *to = dqkv + ((size_t)batch * length + row0) * stride + h * d;
  float by_scale[2] = {scale, scale};
  store_rows<D, BM>(to, stride, valid, d, dq, by_scale, q_tile, warp * 16, amax);
}
