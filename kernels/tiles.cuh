// Tensors to bytes with one scale, transposed: tiles through shared memory.

// Rows and columns of a tile, of which a thread has 8 by 8.
#define TILE 128

// Eight numbers as they lie in memory, zeros where there are none.
template <class T> struct Eight {
  uint4 raw[sizeof(T) / 2];
  __device__ __forceinline__ void load(const T *from) {
#pragma unroll
    for (int i = 0; i < sizeof(T) / 2; i++)
      raw[i] = from ? ((const uint4 *)from)[i] : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void values(float v[8]) const { load8((const T *)raw, v); }
};

// Four rows of four bytes to four columns.
__device__ __forceinline__ void transpose_bytes(u32 words[4]) {
  u32 low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    low[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x5140);
    high[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7362);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    words[i] = __byte_perm(low[0], low[1], i ? 0x7632 : 0x5410);
    words[2 + i] = __byte_perm(high[0], high[1], i ? 0x7632 : 0x5410);
  }
}

// columns_out (cols, rows) = v (rows, cols) as bytes, transposed, which products that reduce over
// rows read; and where ROWS_TOO, from the same reading, rows_out (rows, cols) and, unless it is
// null, a line of `sums` (grid y, cols), the column sums of the tile's rows, for the bias gradient.
// Both dimensions are multiples of 16. BYTES is made from the bits of the amax, and its `pack`
// makes bytes of eight numbers. Grid: cols / 128, rows / 128, rounded up; block: 256.
//
// NOTE: what counts is how much is on its way at once: a thread asks for all of its 64 numbers
// before it needs the first.
template <class T, class BYTES, bool ROWS_TOO>
__device__ __forceinline__ void turn_tile(u8 *rows_out, u8 *columns_out, float *sums, const T *v,
                                          const u32 *amax, u32 rows, u32 cols) {
  // Words of four rows, a line for every column. NOTE: a pitch of 33 words, so that the threads
  // that write rows of eight columns each meet in a bank no more than four by four.
  __shared__ u32 tile[TILE][TILE / 4 + 1];
  __shared__ float of_warps[ROWS_TOO ? 8 : 1][ROWS_TOO ? TILE : 1];
  u32 t = threadIdx.x, place = t % 16 * 8, line = t / 16 * 8;
  u32 row = blockIdx.y * TILE + line, column = blockIdx.x * TILE + place;
  bool inside = row < rows && column < cols;
  Eight<T> x[8];
#pragma unroll
  for (int r = 0; r < 8; r++) x[r].load(inside ? v + (size_t)(row + r) * cols + column : nullptr);
  BYTES of(*amax);
  float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  uint2 bytes[8];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    float values[8];
    x[r].values(values);
    bytes[r] = of.pack(values);
    if (ROWS_TOO) {
      if (inside) *(uint2 *)(rows_out + (size_t)(row + r) * cols + column) = bytes[r];
#pragma unroll
      for (int c = 0; c < 8; c++) sum[c] += values[c];
    }
  }
#pragma unroll
  for (int r = 0; r < 8; r += 4)
#pragma unroll
    for (int c = 0; c < 8; c += 4) {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = c ? bytes[r + i].y : bytes[r + i].x;
      transpose_bytes(words);
#pragma unroll
      for (int i = 0; i < 4; i++) tile[place + c + i][(line + r) / 4] = words[i];
    }
  if (ROWS_TOO && sums)
#pragma unroll
    for (int c = 0; c < 8; c++) {
      // A warp has 16 rows.
      sum[c] += __shfl_xor_sync(FULL_WARP, sum[c], 16);
      if (t % WARP < 16) of_warps[t / WARP][place + c] = sum[c];
    }
  __syncthreads();
#pragma unroll
  for (u32 i = t; i < TILE * TILE / 16; i += 256) {
    u32 local = i / 8, part = i % 8, column = blockIdx.x * TILE + local,
        row = blockIdx.y * TILE + 16 * part;
    if (column < cols && row < rows) {
      const u32 *words = &tile[local][4 * part];
      *(uint4 *)(columns_out + (size_t)column * rows + row) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  column = blockIdx.x * TILE + t;
  if (ROWS_TOO && sums && t < TILE && column < cols) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < 8; warp++) sum += of_warps[warp][t];
    sums[(size_t)blockIdx.y * cols + column] = sum;
  }
}
