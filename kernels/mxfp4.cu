// MXFP4 operands as bf16 values, for chips without FP8 products, and as the definition's own bytes, for tests.

#define OUT_VALUES 0
#define OUT_CODES 1

// Makes ready for rounding in units of the block's own scale.
template <bool UNBIASED> __device__ __forceinline__ Scale scale_block(float v[BLOCK], float norm) {
  Scale scale;
  scale.byte = scale_byte(block_magnitude(v, norm));
  scale.unit = power(scale.byte);
  if (extreme(scale.byte)) {
    move(v, scale.byte, norm);
    scale.unit = power(moved(scale.byte));
  }
  scale.factor = UNBIASED ? 0.75f * norm : norm;
  return scale;
}

// Those of a thread that owns 32 rows of a column: 16 bits each, `PITCH` bytes apart in shared memory.
template <u32 PITCH> struct ColumnBits {
  const u8 *bits;
  __device__ __forceinline__ ColumnBits(const u8 *bits) : bits(bits) {}
  __device__ __forceinline__ u32 addend(int i) { return *(const u16 *)(bits + i * PITCH) * 256u + 128u; }
};

// ---- Results ------------------------------------------------------------------------------------

// Bytes of a block in the result.
template <int OUT> constexpr u32 BYTES = OUT == OUT_VALUES ? 64 : 16;

// Rounds a block and stores it at `to`: bf16 values, or codes, two a byte.
//
// All values are bf16 numbers: two mantissa bits, from 0.5 * 2^-127 (bf16's subnormals go down to 2^-133) to
// 6 * 2^125. They are NaN where the scale is.
template <bool UNBIASED, int OUT, class Bits>
__device__ __forceinline__ void round_block(float v[BLOCK], const Scale &scale, Bits bits, void *to, bool inside) {
  float inverse = power(254 - (__float_as_uint(scale.unit) >> 23));
  // NOTE: stores come as soon as 16 bytes are there; with all of them at the end the compiler keeps all values to the
  // end and spills.
  u32 words[4];
#pragma unroll
  for (int i = 0; i < BLOCK; i += 2) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
      pair[j] = UNBIASED ? round_unbiased(v[i + j], scale.factor, scale.unit, bits.addend(i + j))
                         : round_nearest(v[i + j], scale.factor, scale.unit);
    if (OUT == OUT_VALUES) {
      words[i / 2 % 4] = pack_bf16(pair[0], pair[1]);
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float q = __fmul_rn(fabsf(pair[j]), inverse);
        u32 code = q < 1.0f ? (u32)(2.0f * q) : (__float_as_uint(q) >> 22) - 252;
        code = scale.byte == 255 ? 0 : (code & 7 | __float_as_uint(pair[j]) >> 31 << 3) << 4 * ((i + j) % 8);
        words[i / 8] = (i + j) % 8 ? words[i / 8] | code : code;
      }
    }
    constexpr int EACH = OUT == OUT_VALUES ? 8 : 32; // elements in 16 bytes
    if (i % EACH == EACH - 2) {
      if (OUT == OUT_VALUES && extreme(scale.byte)) {
        float back = __uint_as_float(scale.byte == 255 ? 0x7fc00000u : (scale.byte < 64 ? 127u - 126 : 127u + 100) << 23);
#pragma unroll
        for (int j = 0; j < 4; j++)
          words[j] = pack_bf16(__fmul_rn(low_f32(words[j]), back), __fmul_rn(high_f32(words[j]), back));
      }
      if (inside) ((uint4 *)to)[i / EACH] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// ---- Kernels along rows -------------------------------------------------------------------------

template <class T, bool UNBIASED, int OUT>
__device__ __forceinline__ void quantize_rows(void *out, u8 *scales, const T *source, u32 rows, u32 cols, u32 depth,
                                              u32 group, u32 each, const Transform &transform, const Draw &draw) {
  Place place = place_in_rows(rows, depth, each);
  float v[BLOCK], norm;
  load_rotated(v, norm, source, place, cols, group, transform);
  Scale scale = scale_block<UNBIASED>(v, norm);
  size_t block = ((size_t)place.row * depth + place.column) / BLOCK;
  round_block<UNBIASED, OUT>(v, scale, RowBits(draw, place.row, place.column), (u8 *)out + block * BYTES<OUT>,
                             place.inside);
  if (OUT == OUT_CODES && place.inside) scales[block] = scale.byte;
}

// ---- Kernels along columns ----------------------------------------------------------------------

// A thread block takes a tile of 128 rows and 128 bytes of columns (64 of bf16, 32 of f32), for groups of 256 one
// of 256 rows and half the columns, which lies in shared memory as two halves side by side. Loading is by
// pieces of 8 columns: who loads a piece draws its random bits, both go to shared memory. Then a thread takes 32 rows
// of one column. The result goes through shared memory again, to be written in whole lines.
template <class T> struct Tile {
  static constexpr u32 COLUMNS = 128 / sizeof(T), PIECES = COLUMNS / 8, THREADS = 4 * COLUMNS;
  static constexpr u32 PITCH = 128 + 16, BITS_PITCH = 2 * COLUMNS + 16;
  // Each 32 rows are shifted, so that the threads of a group read from different banks.
  static constexpr u32 BYTES = 128 * PITCH + 3 * 128, BITS_BYTES = 128 * BITS_PITCH + 3 * 64;
};

__device__ __forceinline__ void load_piece(const bf16 *p, u32 count, bool aligned, u32 raw[4]) {
  if (aligned && count >= 8) {
    *(uint4 *)raw = *(const uint4 *)p;
  } else {
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      raw[i] = (2 * i < count ? p[2 * i].bits : 0u) | (2 * i + 1 < count ? p[2 * i + 1].bits : 0u) << 16;
  }
}
__device__ __forceinline__ void load_piece(const float *p, u32 count, bool aligned, u32 raw[8]) {
  if (aligned && count >= 8) {
    *(uint4 *)raw = *(const uint4 *)p, *(uint4 *)(raw + 4) = *(const uint4 *)(p + 4);
  } else {
#pragma unroll
    for (u32 i = 0; i < 8; i++) raw[i] = i < count ? __float_as_uint(p[i]) : 0u;
  }
}
__device__ __forceinline__ void add_piece(float sum[8], const u32 raw[4], bf16) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] += i % 2 ? high_f32(raw[i / 2]) : low_f32(raw[i / 2]);
}
__device__ __forceinline__ void add_piece(float sum[8], const u32 raw[8], float) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum[i] += __uint_as_float(raw[i]);
}

template <class T, bool UNBIASED, int OUT>
__device__ __forceinline__ void quantize_columns(void *out, u8 *scales, float *sums, const T *source, u32 rows,
                                                 u32 cols, u32 depth, u32 group, const Transform &transform,
                                                 const Draw &draw) {
  using Tile = ::Tile<T>;
  constexpr u32 COLUMNS = Tile::COLUMNS, PIECES = Tile::PIECES, THREADS = Tile::THREADS, ITEMS = 8 * sizeof(T) / 4;
  __shared__ __align__(16) u8 data[Tile::BYTES];
  __shared__ __align__(16) u8 bits[UNBIASED ? Tile::BITS_BYTES : 16];
  __shared__ float warp_sums[THREADS / WARP][COLUMNS];

  // Threads of a group, columns of a warp and of the tile, as powers of two.
  u32 across = group > BLOCK ? __ffs(group) - 6 : 0, width = 5 - across;
  u32 halves = across == 3 ? 1 : 0, columns = (COLUMNS == 64 ? 6 : 5) - halves;
  u32 first_row = blockIdx.y * 128 << halves, first_column = blockIdx.x << columns;
  u32 shift = max(16u, (u32)sizeof(T) << width), bits_shift = max(16u, 2u << width);

  // Loading: piece `piece` of the shared rows threadIdx.x / PIECES + 0, 32, 64, 96.
  u32 piece = threadIdx.x % PIECES, half = halves ? piece / (PIECES / 2) : 0;
  u32 column = first_column + piece * 8 - (half << columns);
  u32 count = column < cols ? cols - column : 0;
  u32 raw[4][ITEMS];
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    u32 row = first_row + half * 128 + i * 32 + threadIdx.x / PIECES;
    load_piece(source + (size_t)row * cols + column, row < rows ? count : 0, cols % 8 == 0, raw[i]);
  }
  if (UNBIASED) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      u32 line = i * 32 + threadIdx.x / PIECES;
      *(uint4 *)(bits + line * Tile::BITS_PITCH + i * bits_shift + piece * 16) =
          philox(draw, first_row + half * 128 + line, column / 8);
    }
  }
  if (sums) {
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (u32 i = 0; i < 4; i++) add_piece(sum, raw[i], T());
#pragma unroll
    for (u32 mask = PIECES; mask < WARP; mask *= 2)
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], mask);
    if (threadIdx.x % WARP < PIECES)
#pragma unroll
      for (int i = 0; i < 8; i++) warp_sums[threadIdx.x / WARP][piece * 8 + i] = sum[i];
  }
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    u32 line = i * 32 + threadIdx.x / PIECES;
    u32 word = half * 4 + i & (1 << across) - 1;
    int sign = group ? (int)(transform.signs[word] << (31 - threadIdx.x / PIECES)) : 0;
    u32 flip = sign >> 31 & (sizeof(T) == 2 ? 0x80008000u : 0x80000000u);
    uint4 *to = (uint4 *)(data + line * Tile::PITCH + i * shift + piece * 8 * sizeof(T));
#pragma unroll
    for (u32 j = 0; j < ITEMS; j += 4)
      to[j / 4] = make_uint4(raw[i][j] ^ flip, raw[i][j + 1] ^ flip, raw[i][j + 2] ^ flip, raw[i][j + 3] ^ flip);
  }
  __syncthreads();

  if (sums && threadIdx.x < 1u << columns && first_column + threadIdx.x < cols) {
    float sum = 0;
    for (u32 h = 0; h <= halves; h++)
#pragma unroll
      for (u32 i = 0; i < THREADS / WARP; i++) sum += warp_sums[i][threadIdx.x + (h << columns)];
    sums[(size_t)blockIdx.y * cols + first_column + threadIdx.x] = sum;
  }

  // A block: 32 rows from 32 `part`, of column `x` of the tile.
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sets = columns - width;
  u32 x = ((warp & ((1 << sets) - 1)) << width) + (lane & ((1 << width) - 1));
  u32 part = (warp >> sets << across) + (lane >> width), place = x + (part / 4 << columns);
  const u8 *from = data + part % 4 * (32 * Tile::PITCH + shift) + place * sizeof(T);
  float v[BLOCK];
#pragma unroll
  for (int i = 0; i < BLOCK; i++) v[i] = to_f32(*(const T *)(from + i * Tile::PITCH));
  // What was read makes room for the result; a column of the tile is 2^length bytes of it.
  constexpr u32 SIZE = BYTES<OUT> / BLOCK;
  u32 length = (SIZE == 2 ? 8 : 7) + halves, pitch = (1u << length) + 16;
  if (OUT != OUT_CODES) __syncthreads();
  if (group) rotate(v, 1u << across, 1u << width);
  float norm = group ? transform.scale : 1.0f;
  Scale scale = scale_block<UNBIASED>(v, norm);
  ColumnBits<Tile::BITS_PITCH> drawn(bits + part % 4 * (32 * Tile::BITS_PITCH + bits_shift) + place * 2);
  if (OUT == OUT_CODES) {
    u32 row = first_row + part * BLOCK;
    bool inside = row < depth && first_column + x < cols;
    size_t block = ((size_t)(first_column + x) * depth + row) / BLOCK;
    round_block<UNBIASED, OUT>(v, scale, drawn, (uint4 *)out + block, inside);
    if (inside) scales[block] = scale.byte;
    return;
  }
  round_block<UNBIASED, OUT>(v, scale, drawn, data + x * pitch + part * BYTES<OUT>, true);
  __syncthreads();
  u32 at = threadIdx.x * 16, y = at >> length, byte = at & ((1 << length) - 1), step = THREADS * 16 >> length;
  if (first_row * SIZE + byte >= depth * SIZE) return;
  u8 *to = (u8 *)out + ((size_t)(first_column + y) * depth + first_row) * SIZE + byte;
  const u8 *written = data + y * pitch + byte;
#pragma unroll
  for (u32 i = 0; i < BYTES<OUT> / 16; i++)
    if (first_column + y + i * step < cols)
      *(uint4 *)(to + (size_t)i * (step * SIZE) * depth) = *(const uint4 *)(written + i * step * pitch);
}

// ---- Names --------------------------------------------------------------------------------------

// quantize_rows_{values,codes}_{bf16,f32}_{nearest,unbiased}: vectors are the rows of source (rows, cols); `depth`
// is cols padded. Overwrites out (rows, depth): bf16 values; or codes (rows, depth / 2) and scales (rows, depth / 32).
// Grid: rows / each, rounded up; block: each * depth / 32, rounded up to whole warps, at most 1,024.
// `each` is at most 63; best are the fewest rows that make whole warps, some 96 to 192 threads (H200: 384 cost 17%). rows < 2^31.
//
// quantize_columns_...: vectors are the columns; `depth` is rows padded. Overwrites out (cols, depth) and scales,
// likewise. Where `sums` is not null, overwrites sums (grid y, cols) with the column sums of each tile's rows.
// Grid: cols / C rounded up, depth / R rounded up; block: 256 for bf16, 128 for f32; no dynamic shared memory.
// R = 128 and C = 64 for bf16, 32 for f32; with a group of 256, R = 256 and C = 32 and 16.
#define SHAPE u32 rows, u32 cols, u32 depth, u32 group
#define RANDOM const __grid_constant__ Transform transform, const __grid_constant__ Draw draw
#define ROWS(T, NAME, MODE, UNBIASED)                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_values_##NAME##_##MODE(                       \
      bf16 *out, const T *source, SHAPE, u32 each, RANDOM) { begin();                                                        \
    quantize_rows<T, UNBIASED, OUT_VALUES>(out, nullptr, source, rows, cols, depth, group, each, transform, draw);  \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_codes_##NAME##_##MODE(                        \
      u8 *codes, u8 *scales, const T *source, SHAPE, u32 each, RANDOM) { begin();                                            \
    quantize_rows<T, UNBIASED, OUT_CODES>(codes, scales, source, rows, cols, depth, group, each, transform, draw);  \
  }
#define COLUMNS(T, NAME, MODE, UNBIASED)                                                                            \
  extern "C" __global__ void __launch_bounds__(Tile<T>::THREADS, 1024 / Tile<T>::THREADS)                           \
      quantize_columns_values_##NAME##_##MODE(bf16 *out, float *sums, const T *source, SHAPE, RANDOM) { begin();             \
    quantize_columns<T, UNBIASED, OUT_VALUES>(out, nullptr, sums, source, rows, cols, depth, group, transform,      \
                                              draw);                                                                \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(Tile<T>::THREADS) quantize_columns_codes_##NAME##_##MODE(            \
      u8 *codes, u8 *scales, float *sums, const T *source, SHAPE, RANDOM) { begin();                                         \
    quantize_columns<T, UNBIASED, OUT_CODES>(codes, scales, sums, source, rows, cols, depth, group, transform,      \
                                             draw);                                                                 \
  }
#define BOTH(T, NAME)              \
  ROWS(T, NAME, nearest, false)    \
  ROWS(T, NAME, unbiased, true)    \
  COLUMNS(T, NAME, nearest, false) \
  COLUMNS(T, NAME, unbiased, true)
BOTH(bf16, bf16)
BOTH(float, f32)
