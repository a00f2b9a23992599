// MXFP4 operands whose blocks keep scales of their own: as the definition's own bytes, which the
// tensor cores of some Blackwell chips multiply; as MXFP8, E4M3 numbers with those scales, which
// cuBLASLt multiplies on all of them; and as bf16 values, for chips without FP8 products and for
// sizes that theirs do not take.
//
// A tile kernel makes the form down the columns, transposed, of a tile in shared memory, and for
// dy, which both products need, from the same tile and the same random bits the form along the
// rows.

// Makes ready for rounding in units of the block's own scale.
__device__ __forceinline__ Scale scale_block(float v[BLOCK], float norm, float range) {
  Scale scale;
  scale.byte = scale_byte(block_amax(v, norm));
  scale.unit = power(scale.byte);
  if (extreme(scale.byte)) {
    move(v, scale.byte, norm);
    scale.unit = power(moved(scale.byte));
  }
  scale.factor = range * norm;
  return scale;
}

// ---- Results ------------------------------------------------------------------------------------

// Bytes of a block in the result.
template <Format OUT> constexpr u32 BYTES = OUT == VALUES ? 64 : OUT == MXFP8 ? 32 : 16;

// Where the scale of a vector's block lies among those of MXFP8, of `blocks` a vector: in tiles of
// 128 vectors and 4 blocks, which follow each other along the vectors. What a tile has beyond the
// matrix must be zero, and is written so.
// ref: cuBLAS documentation, "1D Block Scaling Factors Layout".
__device__ __forceinline__ size_t tiled(u32 vector, u32 block, u32 blocks) {
  size_t tile = (size_t)(vector / 128) * ((blocks + 3) / 4) + block / 4;
  return tile * 512 + vector % 32 * 16 + vector % 128 / 32 * 4 + block % 4;
}

// Rounds a block and stores it at `to`: bf16 values, or codes, two a byte, or E4M3 numbers.
//
// All values are bf16 numbers: two mantissa bits, from 0.5 * 2^-127 (bf16's subnormals go down to
// 2^-133) to 6 * 2^125. They are NaN where the scale is, and so are E4M3 numbers, whatever becomes
// of the scale.
template <bool UNBIASED, Format OUT, class Bits>
__device__ __forceinline__ void round_block(float v[BLOCK], const Scale &scale, Bits bits, void *to,
                                            bool inside) {
  float inverse = power(254 - (__float_as_uint(scale.unit) >> 23));
  // NOTE: stores come as soon as 16 bytes are there; with all of them at the end the compiler keeps
  // all values to the end and spills.
  u32 words[4];
#pragma unroll
  for (int i = 0; i < BLOCK; i += 2) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
      pair[j] = UNBIASED ? round_unbiased(v[i + j], scale.factor, scale.unit, bits.addend(i + j))
                         : round_nearest(v[i + j], scale.factor, scale.unit);
    if (OUT == VALUES) {
      words[i / 2 % 4] = pack_bf16(pair[0], pair[1]);
    } else if (OUT == MXFP8) {
      u32 two = scale.byte == 255
                    ? 0x7f7f
                    : pack_fp8<E4M3>(__fmul_rn(pair[0], inverse), __fmul_rn(pair[1], inverse));
      words[i / 4 % 4] = i % 4 ? words[i / 4 % 4] | two << 16 : two;
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float q = __fmul_rn(fabsf(pair[j]), inverse);
        u32 code = q < 1.0f ? (u32)(2.0f * q) : (__float_as_uint(q) >> 22) - 252;
        code = scale.byte == 255
                   ? 0
                   : (code & 7 | __float_as_uint(pair[j]) >> 31 << 3) << 4 * ((i + j) % 8);
        words[i / 8] = (i + j) % 8 ? words[i / 8] | code : code;
      }
    }
    constexpr int EACH = BLOCK * 16 / BYTES<OUT>; // elements in 16 bytes
    if (i % EACH == EACH - 2) {
      if (OUT == VALUES && extreme(scale.byte)) {
        float back = __uint_as_float(
            scale.byte == 255 ? 0x7fc00000u : (scale.byte < 64 ? 127u - 126 : 127u + 100) << 23);
#pragma unroll
        for (int j = 0; j < 4; j++)
          words[j] =
              pack_bf16(__fmul_rn(low_f32(words[j]), back), __fmul_rn(high_f32(words[j]), back));
      }
      if (inside) ((uint4 *)to)[i / EACH] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// ---- Kernels along rows -------------------------------------------------------------------------

// The form along rows, to by_rows and, where blocks have them, row_scales; of MXFP8 in tiles, as
// many as cover the matrix. Grid: rows / each, rounded up, for MXFP8 of the rows rounded up to 128;
// block: each * rows_depth / 32, rounded up to whole warps, at most 1,024. `each` is at most 63;
// best are the fewest rows that make whole warps, some 96 to 192 threads (H200: 384 cost 17%). rows
// < 2^31.
template <class T, Format OUT, bool UNBIASED>
__global__ void __launch_bounds__(1024, 1) quantize_rows(const __grid_constant__ Quantize q) {
  begin();
  const Draw &draw = q.draws.draw;
  u8 *scales = (u8 *)q.row_scales;
  Place place = place_in_rows(q.rows, q.rows_depth, q.each);
  float v[BLOCK], norm;
  load_rotated(v, norm, (const T *)q.source, place, q.cols, q.group, q.draws.by_rows);
  Scale scale = scale_block(v, norm, q.range);
  size_t block = ((size_t)place.row * q.rows_depth + place.column) / BLOCK;
  round_block<UNBIASED, OUT>(v, scale, RowBits(draw, place.row, place.column),
                             q.by_rows + block * BYTES<OUT>, place.inside);
  if (OUT == CODES && place.inside) scales[block] = scale.byte;
  if (OUT == MXFP8 && place.local < q.each && place.row < (q.rows + 127) / 128 * 128) {
    u32 blocks = q.rows_depth / BLOCK, i = place.column / BLOCK;
    scales[tiled(place.row, i, blocks)] = scale.byte;
    if (i == blocks - 1)
      while (++i % 4) scales[tiled(place.row, i, blocks)] = 0;
  }
}

// ---- Kernels along columns, and along both ------------------------------------------------------

// A thread block takes a tile of 128 rows and 128 bytes of columns (64 of bf16, 32 of f32), for
// groups of 256 one of 256 rows and half the columns, which lies in shared memory as two halves
// side by side. Loading is by pieces of 8 columns: who loads a piece draws its random bits, both go
// to shared memory. Then a thread takes 32 rows of one column. The result goes through shared
// memory again, to be written in whole lines. With BOTH, for which groups have at most 64, the same
// thread first takes 32 columns of one row, whose result goes straight out.
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
      raw[i] = (2 * i < count ? p[2 * i].bits : 0u) |
               (2 * i + 1 < count ? p[2 * i + 1].bits : 0u) << 16;
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

template <class T, Format OUT, bool UNBIASED, bool BOTH>
__device__ __forceinline__ void quantize_tile(const Quantize &q) {
  const Transform &rows_transform = q.draws.by_rows, &transform = q.draws.by_columns;
  const Draw &draw = q.draws.draw;
  const T *source = (const T *)q.source;
  u8 *row_scales = (u8 *)q.row_scales, *scales = (u8 *)q.column_scales;
  float *sums = q.sums;
  u32 rows = q.rows, cols = q.cols, rows_depth = q.rows_depth, depth = q.depth, group = q.group;
  using Tile = ::Tile<T>;
  constexpr u32 COLUMNS = Tile::COLUMNS, PIECES = Tile::PIECES, THREADS = Tile::THREADS,
                ITEMS = 8 * sizeof(T) / 4;
  __shared__ __align__(16) u8 data[Tile::BYTES];
  __shared__ __align__(16) u8 bits[UNBIASED ? Tile::BITS_BYTES : 16];
  __shared__ float warp_sums[THREADS / WARP][COLUMNS];
  // A byte for each block: (columns, parts).
  __shared__ u32 scale_words[OUT == MXFP8 ? THREADS / 4 : 1];

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
      store_bits(bits + line * Tile::BITS_PITCH + i * bits_shift + piece * 16,
                 philox(draw, first_row + half * 128 + line, column / 8));
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
      to[j / 4] = make_uint4(raw[i][j] ^ flip, raw[i][j + 1] ^ flip, raw[i][j + 2] ^ flip,
                             raw[i][j + 3] ^ flip);
  }
  __syncthreads();

  if (sums && threadIdx.x < 1u << columns && first_column + threadIdx.x < cols) {
    float sum = 0;
    for (u32 h = 0; h <= halves; h++)
#pragma unroll
      for (u32 i = 0; i < THREADS / WARP; i++) sum += warp_sums[i][threadIdx.x + (h << columns)];
    sums[(size_t)blockIdx.y * cols + first_column + threadIdx.x] = sum;
  }

  float v[BLOCK];
  if (BOTH) {
    // A block along a row: columns 32 `side` to 32 `side` + 31 of a line, from which the signs of
    // its own transform are taken off again.
    u32 line = threadIdx.x / 2, side = threadIdx.x % 2, i = line / 32;
    u32 row = first_row + line, column = first_column + side * BLOCK;
    u32 flip = group ? 0u - (transform.signs[i & (1 << across) - 1] >> line % 32 & 1) : 0;
    u32 signs = group ? rows_transform.signs[side & (1 << across) - 1] ^ flip : 0;
    load_whole((const T *)(data + line * Tile::PITCH + i * shift) + side * BLOCK, signs, v);
    if (group) rotate(v, 1u << across, 1);
    float norm = group ? rows_transform.scale : 1.0f;
    Scale scale = scale_block(v, norm, q.range);
    bool inside = row < rows && column < rows_depth;
    size_t block = ((size_t)row * rows_depth + column) / BLOCK;
    SharedRowBits drawn(bits + line * Tile::BITS_PITCH + i * bits_shift + side * BLOCK * 2, draw);
    round_block<UNBIASED, OUT>(v, scale, drawn, q.by_rows + block * BYTES<OUT>, inside);
    if (OUT == MXFP8) row_scales[tiled(row, column / BLOCK, rows_depth / BLOCK)] = scale.byte;
    else if (inside) row_scales[block] = scale.byte;
  }

  // A block down the columns: 32 rows from 32 `part`, of column `x` of the tile.
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sets = columns - width;
  u32 x = ((warp & ((1 << sets) - 1)) << width) + (lane & ((1 << width) - 1));
  u32 part = (warp >> sets << across) + (lane >> width), place = x + (part / 4 << columns);
  const u8 *from = data + part % 4 * (32 * Tile::PITCH + shift) + place * sizeof(T);
#pragma unroll
  for (int i = 0; i < BLOCK; i++) v[i] = to_f32(*(const T *)(from + i * Tile::PITCH));
  // What was read makes room for the result; a column of the tile is 2^length bytes of it.
  constexpr u32 SIZE = BYTES<OUT> / BLOCK;
  u32 length = (SIZE == 2 ? 8 : 7) + halves, pitch = (1u << length) + 16;
  if (OUT != CODES) __syncthreads();
  if (group) rotate(v, 1u << across, 1u << width);
  float norm = group ? transform.scale : 1.0f;
  Scale scale = scale_block(v, norm, q.range);
  SharedColumnBits<Tile::BITS_PITCH> drawn(bits + part % 4 * (32 * Tile::BITS_PITCH + bits_shift),
                                           place, draw);
  if (OUT == CODES) {
    u32 row = first_row + part * BLOCK;
    bool inside = row < depth && first_column + x < cols;
    size_t block = ((size_t)(first_column + x) * depth + row) / BLOCK;
    round_block<UNBIASED, OUT>(v, scale, drawn, (uint4 *)q.by_columns + block, inside);
    if (inside) scales[block] = scale.byte;
    return;
  }
  round_block<UNBIASED, OUT>(v, scale, drawn, data + x * pitch + part * BYTES<OUT>, true);
  if (OUT == MXFP8) ((u8 *)scale_words)[x * (4 << halves) + part] = scale.byte;
  __syncthreads();
  if (OUT == MXFP8 && threadIdx.x < THREADS / 4) {
    u32 vector = first_column + (threadIdx.x >> halves),
        block = first_row / BLOCK + 4 * (threadIdx.x & halves);
    *(u32 *)(scales + tiled(vector, block, depth / BLOCK)) = scale_words[threadIdx.x];
  }
  u32 at = threadIdx.x * 16, y = at >> length, byte = at & ((1 << length) - 1),
      step = THREADS * 16 >> length;
  if (first_row * SIZE + byte >= depth * SIZE) return;
  u8 *to = q.by_columns + ((size_t)(first_column + y) * depth + first_row) * SIZE + byte;
  const u8 *written = data + y * pitch + byte;
#pragma unroll
  for (u32 i = 0; i < BYTES<OUT> / 16; i++)
    if (first_column + y + i * step < cols)
      *(uint4 *)(to + (size_t)i * (step * SIZE) * depth) =
          *(const uint4 *)(written + i * step * pitch);
}

// The form down columns, to by_columns and column_scales as above, and column sums of each tile's
// rows to sums. Grid: cols / C rounded up, depth / R rounded up; for MXFP8 of the columns rounded
// up to 128. Block: 256 for bf16, 128 for f32; no dynamic shared memory. R = 128 and C = 64 for
// bf16, 32 for f32; with a group of 256, R = 256 and C = 32 and 16.
template <class T, Format OUT, bool UNBIASED>
__global__ void __launch_bounds__(Tile<T>::THREADS, 1024 / Tile<T>::THREADS)
    quantize_columns(const __grid_constant__ Quantize q) {
  begin();
  quantize_tile<T, OUT, UNBIASED, false>(q);
}

// Both forms with one reading and one drawing of random bits, for groups of at most 64, with codes
// or as MXFP8. Launch as quantize_columns, for codes with a grid that covers rows_depth.
template <Format OUT, bool UNBIASED>
__global__ void __launch_bounds__(Tile<bf16>::THREADS, 1024 / Tile<bf16>::THREADS)
    quantize_both(const __grid_constant__ Quantize q) {
  begin();
  quantize_tile<bf16, OUT, UNBIASED, true>(q);
}
