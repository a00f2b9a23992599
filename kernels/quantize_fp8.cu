// MXFP4 operands as FP8 numbers, without a transform or with one of any group; groups of 64 have
// kernels of their own (quantize_fp8_groups.cu).

// ---- Tiles of any group -------------------------------------------------------------------------

// A tile has 128 rows and 64 columns; for groups of 256, 256 rows and 32 columns, which lie in
// shared memory as two halves side by side. A thread takes a block of 32.
//
// KEPT: the source is what a forward pass made its own form from, with which the columns begin.
template <class T, Format FORMAT, Kept KEPT, bool UNBIASED, bool ROWS_TOO>
__device__ __forceinline__ void quantize_tile(const Quantize &q) {
  const Transform &rows_transform = q.draws.by_rows, &transform = q.draws.by_columns;
  const Draw &draw = q.draws.draw;
  const Stored<T> source = {(const T *)q.source, q.amax};
  float *sums = q.sums, range = q.range;
  u32 rows = q.rows, cols = q.cols, rows_depth = q.rows_depth, depth = q.depth, group = q.group;
  constexpr u32 LINES = 128, PARTS = LINES / BLOCK;
  using Data = Lines<sizeof(T), LINES, sizeof(T) == 4 ? 32 : 16>;
  using Bits = Lines<2, LINES, 16>;
  u8 *data = shared, *bits = data + Data::BYTES;
  u32 *row_signs = (u32 *)(bits + Bits::BYTES);    // (256): sign bits
  float *row_factors = (float *)(row_signs + 256); // (256): +1 and -1
  u32 *column_signs =
      (u32 *)(row_factors +
              256); // (2, SIGNS), so that threads read both halves from different banks
  constexpr u32 SIGNS = BLOCK + 4;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  // Blocks of a group, as a power of two; columns of a tile, and of those that a warp takes.
  u32 across = group > BLOCK ? __ffs(group) - 6 : 0, halves = across == 3 ? 1 : 0,
      columns = 6 - halves;
  u32 width = halves ? 2 : 3, all_rows = LINES << halves;
  u32 first_row = blockIdx.y * all_rows, first_column = blockIdx.x << columns;

  // Loading: piece `piece`, of 8 columns, of every 32nd line from `line` on.
  u32 piece = threadIdx.x % 8, half = halves ? piece / 4 : 0, line = threadIdx.x / 8;
  u32 row = first_row + half * LINES + line, column = first_column + piece * 8 - (half << columns);
  u8 *piece_bits = bits + line * Bits::PITCH + piece * 16;
  bool whole_tile =
      first_row + all_rows <= rows && first_column + (1 << columns) <= cols && cols % 8 == 0;
  load_pieces<4, 32, Data>(data + line * Data::PITCH + piece * 8 * sizeof(T), source, row, column,
                           rows, cols, whole_tile);
  float kept_scale = 1.0f, kept_inverse = 1.0f;
  Whole whole = whole_of_stored<FORMAT, KEPT>(q, *source.amax, group, kept_scale, kept_inverse);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
    *(float *)q.column_scales = whole.factor;
  if (threadIdx.x < all_rows) {
    u32 word = group ? transform.signs[threadIdx.x / 32 & (1 << across) - 1] : 0;
    u32 sign = word << (31 - threadIdx.x % 32) & 0x80000000u;
    row_signs[threadIdx.x] = sign, row_factors[threadIdx.x] = __uint_as_float(0x3f800000u | sign);
  }
  if (ROWS_TOO && threadIdx.x < 64) {
    u32 word = group ? rows_transform.signs[group > BLOCK ? threadIdx.x / 32 : 0] : 0;
    column_signs[threadIdx.x / 32 * SIGNS + threadIdx.x % 32] =
        word << (31 - threadIdx.x % 32) & 0x80000000u;
  }
  // NOTE: who loads a piece draws its bits meanwhile.
  if (UNBIASED)
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      store_bits(piece_bits + Bits::at(32 * i), philox(draw, row + i * 32, column / 8));
  wait_for_all_copies();
  __syncthreads();
  if (KEPT == AS_MXFP4) {
    // A tile's lines are two blocks each, of one half or both.
    keep_as_mxfp4((T *)(data + Data::at(threadIdx.x / 2)) + BLOCK * (threadIdx.x % 2), q);
    __syncthreads();
  }

  float v[BLOCK];
  u32 clamped = 0;
  if (ROWS_TOO) {
    // A block along a row: columns 32 `side` to 32 `side` + 31 of a line.
    u32 line = threadIdx.x / 2, side = threadIdx.x % 2, row = first_row + line,
        column = first_column + 32 * side;
#pragma unroll
    for (int i = 0; i < BLOCK; i += 8)
      load_along(data + Data::at(line) + 64 * side + 2 * i, column_signs + SIGNS * side + i, draw,
                 v + i);
    if (group) rotate(v, group > BLOCK ? 2 : 1, 1);
    bool inside = row < rows && column < rows_depth;
    u8 *to = q.by_rows + (size_t)row * rows_depth + column;
    SharedRowBits addends(bits + Bits::at(line) + 64 * side, draw);
    clamped += round_rotated<UNBIASED, FORMAT>(to, v, group ? rows_transform.scale : 1.0f, range,
                                               whole, addends, inside, source);
  }

  // A block down the columns: 32 rows from 32 `part`, of column `x` of the tile.
  u32 x = (warp << width) + (lane & ((1 << width) - 1)), part = lane >> width,
      place = x + (part / PARTS << columns);
  const u8 *from = data + Data::at(part % PARTS * BLOCK) + place * sizeof(T);
#pragma unroll
  for (int i = 0; i < BLOCK; i += 4)
    load_down<KEPT, Data::PITCH, T>(from + i * Data::PITCH, row_signs + part * BLOCK + i,
                                    kept_scale, kept_inverse, draw, v + i);
  if (sums) {
    float total = sum_without_signs(v, row_factors + part * BLOCK);
    for (u32 mask = 1u << width; mask < WARP; mask *= 2)
      total += __shfl_xor_sync(FULL_WARP, total, mask);
    if (part == 0 && first_column + x < cols)
      sums[(size_t)blockIdx.y * cols + first_column + x] = total;
  }
  if (group) rotate(v, 1u << across, 1u << width);
  u32 first = first_row + part * BLOCK;
  bool inside = first < depth && first_column + x < cols;
  u8 *to = q.by_columns + (size_t)(first_column + x) * depth + first;
  SharedColumnBits<Bits::PITCH> addends(bits + Bits::at(part % PARTS * BLOCK), place, draw);
  clamped += round_rotated<UNBIASED, FORMAT>(to, v, group ? transform.scale : 1.0f, range, whole,
                                             addends, inside, source);
  add_clamped(q.clamped, clamped);
}

// ---- Kernels ------------------------------------------------------------------------------------

// GROUP is 0 in their names: any.
//
// The form along rows, to by_rows and *row_scales. Launch as quantize_rows.
template <u32 GROUP, class T, Format FORMAT, bool UNBIASED>
__global__ void __launch_bounds__(1024, 1) quantize_fp8_rows(const __grid_constant__ Quantize q) {
  begin();
  const Draw &draw = q.draws.draw;
  Place place = place_in_rows(q.rows, q.rows_depth, q.each);
  float v[BLOCK], norm;
  const Stored<T> source = {(const T *)q.source, q.amax};
  load_rotated(v, norm, source.numbers, place, q.cols, q.group, q.draws.by_rows);
  Whole whole = whole_scale<FORMAT>(*q.amax, q.group, q.rounds_up);
  if (blockIdx.x == 0 && threadIdx.x == 0) *(float *)q.row_scales = whole.factor;
  u8 *to = q.by_rows + (size_t)place.row * q.rows_depth + place.column;
  RowBits addends(draw, place.row, place.column);
  add_clamped(q.clamped, round_rotated<UNBIASED, FORMAT>(to, v, norm, q.range, whole, addends,
                                                         place.inside, source));
}

// The form down columns, to by_columns, *column_scales and where it is not null sums (of what was
// kept, where KEPT). Grid: cols / 64, depth / 128, rounded up; with a group of 256, cols / 32,
// depth / 256. Block: 256. Dynamic shared memory: `tiles` of the host. NOTE: blocks that
// take more tiles, one after the other, were slower (2 to 8 tiles: 0 to 14%), as were results that
// went through shared memory to be written in whole lines (5%).
template <u32 GROUP, class T, Format FORMAT, Kept KEPT, bool UNBIASED>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 3 : 4)
    quantize_fp8_columns(const __grid_constant__ Quantize q) {
  begin();
  quantize_tile<T, FORMAT, KEPT, UNBIASED, false>(q);
}

// Both forms with one reading and one drawing of random bits, for groups of at most 64. Launch as
// quantize_fp8_columns, with a grid that covers rows_depth.
template <u32 GROUP, bool UNBIASED>
__global__ void __launch_bounds__(256, 4) quantize_fp8_both(const __grid_constant__ Quantize q) {
  begin();
  quantize_tile<bf16, E5M2, AS_STORED, UNBIASED, true>(q);
}
