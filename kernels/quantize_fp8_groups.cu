// MXFP4 operands as FP8 numbers with transforms of 64, the usual ones; and both forms of the
// gradient behind GELU or SwiGLU.

// ---- Tiles of groups of 64 ----------------------------------------------------------------------

// A tile has 64 rows and 64 columns, a thread block 128 threads, of which two beside each other
// take a row and then a column, each a block of 32.
//
// NOTE: on an H100 both forms keep the issue slots 79% busy and the pipe to shared and global
// memory 70%, so that both count. Of the latter's time a store takes as much as the lines that
// eight threads beside each other write to: four here, eight if the two threads of a column were
// half a warp apart. A thread that took a whole group would need no exchange, and 15% fewer
// instructions, but with its 128 registers only half as many warps run at once: 179 us for (16384,
// 4096), where this takes 119.

// What a tile kernel makes.
#define ALONG_ROWS 1
#define DOWN_COLUMNS 2
#define BOTH (ALONG_ROWS | DOWN_COLUMNS)

// Rotates, rounds and stores a block, whose group's other one has the thread beside. Whether its
// scale was clamped.
template <bool UNBIASED, Format FORMAT, class Bits, class Source>
__device__ __forceinline__ bool quantize_block(u8 *to, float v[BLOCK], float range,
                                               const Whole &whole, const Bits &bits, bool inside,
                                               const Source &source) {
#pragma unroll
  for (int stride = 1; stride < BLOCK; stride *= 2) add_and_subtract(v, stride);
  exchange(v, 1);
  return round_rotated<UNBIASED, FORMAT>(to, v, 0.125f, range, whole, bits, inside, source);
}

// The gradient behind an activation, rounded to bf16, which lies nowhere: in an attempt, or `AGAIN`
// after one that failed. ACTIVATION says what it is made of.
template <class ACTIVATION, bool AGAIN> struct Behind : ACTIVATION {
  using Number = bf16;
  static constexpr bool IS_MADE = true;
  Attempt *attempt;
  __device__ __forceinline__ Whole whole() const {
    return AGAIN ? whole_up_to<E5M2>(attempt->above) : whole_scale<E5M2>(attempt->amax, 64);
  }
  // Notes a block that does not fit, as one that is not finite never does. Then what else was made
  // is of no use.
  __device__ __forceinline__ void note(u32 amax, u32 top) const {
    u32 byte = max(amax >> 23, 2u) - 2;
    if (!AGAIN && byte > top && byte > *(volatile u32 *)&attempt->above)
      atomicMax(&attempt->above, byte);
  }
};

// d gelu'(pre), both (rows, cols).
struct Gelu {
  const bf16 *d, *pre;
  // What 8 numbers side by side are made of.
  struct Piece {
    uint4 d, pre;
    static __device__ __forceinline__ u32 two(u32 d, u32 pre) {
      return pack_bf16(__fmul_rn(low_f32(d), gelu_derivative(low_f32(pre))),
                       __fmul_rn(high_f32(d), gelu_derivative(high_f32(pre))));
    }
    __device__ __forceinline__ uint4 make() const {
      return make_uint4(two(d.x, pre.x), two(d.y, pre.y), two(d.z, pre.z), two(d.w, pre.w));
    }
  };
  // Whether whole pieces lie side by side in rows of `cols`, a multiple of 8.
  static __device__ __forceinline__ bool has_pieces(u32) { return true; }
  __device__ __forceinline__ Piece piece(u32 row, u32 column, u32 cols) const {
    size_t at = (size_t)row * cols + column;
    return {*(const uint4 *)(d + at), *(const uint4 *)(pre + at)};
  }
  __device__ __forceinline__ bf16 at(u32 row, u32 column, u32 cols) const {
    size_t at = (size_t)row * cols + column;
    return {(u16)Piece::two(d[at].bits, pre[at].bits)};
  }
};

// The gradient of pre = [gate | up] (rows, cols), d (rows, cols / 2) being that of silu(gate) up.
struct SwiGlu {
  const bf16 *d, *pre;
  struct Piece {
    uint4 d, gate, up;
    bool of_gate;
    static __device__ __forceinline__ u32 two_of_gate(u32 d, u32 gate, u32 up) {
      return pack_bf16(swiglu_of_gate(low_f32(d), low_f32(gate), low_f32(up)),
                       swiglu_of_gate(high_f32(d), high_f32(gate), high_f32(up)));
    }
    static __device__ __forceinline__ u32 two_of_up(u32 d, u32 gate) {
      return pack_bf16(swiglu_of_up(low_f32(d), low_f32(gate)),
                       swiglu_of_up(high_f32(d), high_f32(gate)));
    }
    __device__ __forceinline__ uint4 make() const {
      if (of_gate)
        return make_uint4(two_of_gate(d.x, gate.x, up.x), two_of_gate(d.y, gate.y, up.y),
                          two_of_gate(d.z, gate.z, up.z), two_of_gate(d.w, gate.w, up.w));
      return make_uint4(two_of_up(d.x, gate.x), two_of_up(d.y, gate.y), two_of_up(d.z, gate.z),
                        two_of_up(d.w, gate.w));
    }
  };
  static __device__ __forceinline__ bool has_pieces(u32 cols) { return cols % 16 == 0; }
  __device__ __forceinline__ Piece piece(u32 row, u32 column, u32 cols) const {
    u32 m = cols / 2;
    bool of_gate = column < m;
    if (!of_gate) column -= m;
    const bf16 *gate = pre + (size_t)row * cols + column;
    Piece piece = {*(const uint4 *)(d + (size_t)row * m + column), *(const uint4 *)gate};
    piece.up = of_gate ? *(const uint4 *)(gate + m) : make_uint4(0, 0, 0, 0);
    piece.of_gate = of_gate;
    return piece;
  }
  __device__ __forceinline__ bf16 at(u32 row, u32 column, u32 cols) const {
    u32 m = cols / 2;
    bool of_gate = column < m;
    if (!of_gate) column -= m;
    const bf16 *gate = pre + (size_t)row * cols + column;
    u32 of = d[(size_t)row * m + column].bits;
    return {(u16)(of_gate ? Piece::two_of_gate(of, gate->bits, gate[m].bits)
                          : Piece::two_of_up(of, gate->bits))};
  }
};

// FORMS: of those above. KEPT: columns begin with what an FP8 forward pass kept of the source, if
// not with itself.
// `sums`, where it is not null, gets a line of column sums for every line of tiles.
template <u32 GROUP, Format FORMAT, int FORMS, Kept KEPT, bool UNBIASED, class Source>
__device__ __forceinline__ void quantize_groups(const Quantize &q, const Source &source, u32 tile_x,
                                                u32 tile_y, float *whole_factor, u32 *counter) {
  static_assert(GROUP == 64, "two threads share a group");
  const Transform &rows_transform = q.draws.by_rows, &transform = q.draws.by_columns;
  const Draw &draw = q.draws.draw;
  float *sums = q.sums, range = q.range;
  u32 rows = q.rows, cols = q.cols, rows_depth = q.rows_depth, depth = q.depth;
  using T = typename Source::Number;
  using Data = Lines<sizeof(T), GROUP, 64>;
  using Bits = Lines<2, GROUP, 64>;
  u8 *data = shared, *bits = data + Data::BYTES;
  constexpr u32 SIGNS = BLOCK + 4; // so that threads read both halves of 64 from different banks
  u32 *row_signs = (u32 *)(bits + Bits::BYTES);          // (2, SIGNS): sign bits
  float *row_factors = (float *)(row_signs + 2 * SIGNS); // (2, SIGNS): +1 and -1
  u32 *column_signs = (u32 *)(row_factors + 2 * SIGNS);  // (2, SIGNS)
  u32 first_row = tile_y * GROUP, first_column = tile_x * GROUP;

  // Loading: piece `piece`, of 8 columns, of every 16th line from `line` on.
  u32 piece = threadIdx.x % 8, line = threadIdx.x / 8, row = first_row + line,
      column = first_column + piece * 8;
  u8 *piece_data = data + line * Data::PITCH + piece * 8 * sizeof(T);
  bool whole_tile = first_row + GROUP <= rows && first_column + GROUP <= cols && cols % 8 == 0;
  typename Source::Piece pieces[4];
  bool in_registers = Source::IS_MADE && whole_tile && Source::has_pieces(cols);
  if constexpr (Source::IS_MADE) {
    if (in_registers)
#pragma unroll
      for (u32 i = 0; i < 4; i++) pieces[i] = source.piece(row + 16 * i, column, cols);
  }
  if (!in_registers)
    load_pieces<4, 16, Data>(piece_data, source, row, column, rows, cols, whole_tile);
  Whole whole;
  float kept_scale = 1.0f, kept_inverse = 1.0f;
  if constexpr (Source::IS_MADE) whole = source.whole();
  else whole = whole_of_stored<FORMAT, KEPT>(q, *source.amax, GROUP, kept_scale, kept_inverse);
  if (tile_x == 0 && tile_y == 0 && threadIdx.x == 0) *whole_factor = whole.factor;
  if (threadIdx.x < GROUP) {
    u32 half = threadIdx.x / 32, up = 31 - threadIdx.x % 32,
        place = half * SIGNS + threadIdx.x % 32;
    if (FORMS & DOWN_COLUMNS) {
      u32 sign = transform.signs[half] << up & 0x80000000u;
      row_signs[place] = sign, row_factors[place] = __uint_as_float(0x3f800000u | sign);
    }
    if (FORMS & ALONG_ROWS) column_signs[place] = rows_transform.signs[half] << up & 0x80000000u;
  }
  // Every thread draws the random bits of its block along the row while numbers arrive. NOTE: four
  // counters of one row have more of Philox' first rounds in common than four of one column. Along
  // rows alone nobody else needs them; but kept in registers they would be drawn only when they are
  // needed, one after the other (10% slower).
  u32 own_line = threadIdx.x / 2, side = threadIdx.x % 2;
  u8 *own_bits = bits + Bits::at(own_line) + 64 * side;
  if (UNBIASED)
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      store_bits(own_bits + 16 * i,
                 philox(draw, first_row + own_line, first_column / 8 + 4 * side + i));
  if constexpr (Source::IS_MADE) {
    if (in_registers)
#pragma unroll
      for (u32 i = 0; i < 4; i++) *(uint4 *)(piece_data + Data::at(16 * i)) = pieces[i].make();
  } else {
    wait_for_all_copies();
  }
  __syncthreads();

  float v[BLOCK];
  u32 clamped = 0;
  if constexpr (FORMS & ALONG_ROWS) {
    u32 row = first_row + own_line, column = first_column + BLOCK * side;
#pragma unroll
    for (int i = 0; i < BLOCK; i += 8)
      load_along(data + Data::at(own_line) + 2 * BLOCK * side + 2 * i,
                 column_signs + SIGNS * side + i, draw, v + i);
    bool inside = row < rows && column < rows_depth;
    u8 *to = q.by_rows + (size_t)row * rows_depth + column;
    SharedRowBits addends(own_bits, draw);
    clamped += quantize_block<UNBIASED, FORMAT>(to, v, range, whole, addends, inside, source);
  }
  if constexpr (FORMS & DOWN_COLUMNS) {
    u32 x = threadIdx.x / 2, part = threadIdx.x % 2, column = first_column + x;
    const u8 *from = data + Data::at(part * BLOCK) + x * sizeof(T);
#pragma unroll
    for (int i = 0; i < BLOCK; i += 4)
      load_down<KEPT, Data::PITCH, T>(from + i * Data::PITCH, row_signs + part * SIGNS + i,
                                      kept_scale, kept_inverse, draw, v + i);
    if (sums) {
      float sum = sum_without_signs(v, row_factors + part * SIGNS);
      sum += __shfl_xor_sync(FULL_WARP, sum, 1);
      if (part == 0 && column < cols) sums[(size_t)tile_y * cols + column] = sum;
    }
    u32 row = first_row + part * BLOCK;
    bool inside = row < depth && column < cols;
    u8 *to = q.by_columns + (size_t)column * depth + row;
    SharedColumnBits<Bits::PITCH> addends(bits + Bits::at(part * BLOCK), x, draw);
    clamped += quantize_block<UNBIASED, FORMAT>(to, v, range, whole, addends, inside, source);
  }
  add_clamped(counter, clamped);
}

// ---- Kernels ------------------------------------------------------------------------------------

// GROUP is 64 in their names. Grid: what covers source and results, in columns / 64 and rows / 64,
// rounded up. Block: 128. Dynamic shared memory: `tiles` of the host.

template <u32 GROUP, class T, Format FORMAT, bool UNBIASED>
__global__ void __launch_bounds__(128, 8) quantize_fp8_rows(const __grid_constant__ Quantize q) {
  begin();
  const Stored<T> source = {(const T *)q.source, q.amax};
  quantize_groups<GROUP, FORMAT, ALONG_ROWS, AS_STORED, UNBIASED>(
      q, source, blockIdx.x, blockIdx.y, (float *)q.row_scales, q.clamped);
}

template <u32 GROUP, class T, Format FORMAT, Kept KEPT, bool UNBIASED>
__global__ void __launch_bounds__(128, sizeof(T) == 4 ? 6 : 8)
    quantize_fp8_columns(const __grid_constant__ Quantize q) {
  begin();
  const Stored<T> source = {(const T *)q.source, q.amax};
  quantize_groups<GROUP, FORMAT, DOWN_COLUMNS, KEPT, UNBIASED>(q, source, blockIdx.x, blockIdx.y,
                                                               (float *)q.column_scales, q.clamped);
}

template <u32 GROUP, bool UNBIASED>
__global__ void __launch_bounds__(128, 8) quantize_fp8_both(const __grid_constant__ Quantize q) {
  begin();
  const Stored<bf16> source = {(const bf16 *)q.source, q.amax};
  quantize_groups<GROUP, E5M2, BOTH, AS_STORED, UNBIASED>(
      q, source, blockIdx.x, blockIdx.y, (float *)q.column_scales, q.clamped);
}

// Both forms of the gradient behind an activation of pre, d being the source, made in the tiles
// alone. That saves writing and reading it, but its largest magnitude is not known then: *attempt,
// zeroed, gets that of a sample (sample_gelu_gradient, sample_swiglu_gradient), and where a rotated
// block does not fit what that leaves room for, 8 times it, AGAIN does all once more, with the
// scale that the highest block asks for. It is launched in any case, with a grid of any x and y 1;
// where there is nothing to do, it only adds to *clamped.
template <u32 GROUP, class ACTIVATION, bool AGAIN, bool UNBIASED>
__global__ void __launch_bounds__(128, AGAIN ? 4 : 8)
    quantize_fp8_behind(const __grid_constant__ Quantize q) {
  begin();
  const Behind<ACTIVATION, AGAIN> source = {{(const bf16 *)q.source, q.pre}, q.attempt};
  float *factor = (float *)q.column_scales;
  if constexpr (!AGAIN) {
    quantize_groups<GROUP, E5M2, BOTH, AS_STORED, UNBIASED>(q, source, blockIdx.x, blockIdx.y,
                                                            factor, &q.attempt->clamped);
  } else {
    if (q.attempt->above == 0) {
      if (blockIdx.x == 0 && threadIdx.x == 0) *q.clamped += q.attempt->clamped;
      return;
    }
    u32 x = blockIdx.x, y = 0, across = (q.rows_depth + GROUP - 1) / GROUP,
        down = (q.depth + GROUP - 1) / GROUP;
    for (;; x += gridDim.x) {
      while (x >= across) x -= across, y++;
      if (y >= down) return;
      quantize_groups<GROUP, E5M2, BOTH, AS_STORED, UNBIASED>(q, source, x, y, factor, q.clamped);
      __syncthreads();
    }
  }
}
