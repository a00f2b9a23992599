// FP8 E4M3 with current scaling: one power-of-two scale a tensor. As bytes, and as the numbers that
// they stand for, which bf16 holds exactly.

// *amax = the largest bits of |v| over v (len), where *amax was 0 before. A NaN is larger than
// everything. Integer maxima do not depend on the order. Grid: any; block: 256.
template <class T>
__global__ void find_amax(u32 *amax, const T *v, u64 len) {
  begin();
  u32 largest = 0;
  for (u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < len;
       i += (u64)gridDim.x * blockDim.x * 8) {
    if (i + 8 <= len) {
      float x[8];
      load8(v + i, x);
#pragma unroll
      for (int j = 0; j < 8; j++) largest = max(largest, __float_as_uint(x[j]) & 0x7fffffff);
    } else {
      for (u64 k = i; k < len; k++)
        largest = max(largest, __float_as_uint(to_f32(v[k])) & 0x7fffffff);
    }
  }
  largest = __reduce_max_sync(FULL_WARP, largest);
  if (threadIdx.x % WARP == 0) atomicMax(amax, largest);
}

// out (len) = v (len) as E4M3 holds it with the scale that *amax asks for, and *kept_amax the bits
// of the largest magnitude of that: rounding keeps the order. Grid: len / (8 block), rounded up;
// block: 256.
template <class T>
__global__ void round_to_fp8(bf16 *out, u32 *kept_amax, const T *v, const u32 *amax, u64 len) {
  begin();
  float scale = e4m3_scale(*amax), inverse = 1.0f / scale;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *kept_amax =
        __float_as_uint(round_to_e4m3(__uint_as_float(*amax) * inverse) * scale) & 0x7fffffffu;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i + 8 <= len) {
    float x[8];
    load8(v + i, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = round_to_e4m3(x[j] * inverse) * scale;
    store8(out + i, x);
  } else {
    for (; i < len; i++) out[i] = from_f32<bf16>(round_to_e4m3(to_f32(v[i]) * inverse) * scale);
  }
}

// Two numbers times `inverse` to FP8 bytes, E5M2 or E4M3, `low` in the low one.
template <bool E5M2>
__device__ __forceinline__ u32 pack_scaled(float low, float high, float inverse) {
  low *= inverse, high *= inverse;
  return E5M2 ? pack_e5m2(low, high) : pack_e4m3(low, high);
}

// The scale that *amax asks for.
template <bool E5M2> __device__ __forceinline__ float scale_of(const u32 *amax) {
  return fp8_scale(*amax, E5M2 ? 15 : 8);
}

// Eight numbers times `inverse` to FP8 bytes.
template <bool E5M2>
__device__ __forceinline__ uint2 pack_eight(const float v[8], float inverse) {
  return make_uint2(pack_scaled<E5M2>(v[0], v[1], inverse) |
                        pack_scaled<E5M2>(v[2], v[3], inverse) << 16,
                    pack_scaled<E5M2>(v[4], v[5], inverse) |
                        pack_scaled<E5M2>(v[6], v[7], inverse) << 16);
}

// out (len) = v (len) / *scale to FP8 bytes, and *scale, the one that *amax asks for: the same
// numbers as above. From compute capability 8.9 on. Grid: len / (16 block), rounded up; block: 256.
template <class T, bool E5M2>
__global__ void convert_to_fp8(u8 *out, float *scale_out, const T *v, const u32 *amax, u64 len) {
  begin();
  float scale = scale_of<E5M2>(amax), inverse = 1.0f / scale;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 16;
  if (i == 0) *scale_out = scale;
  if (i + 16 <= len) {
    float x[16];
    load8(v + i, x), load8(v + i + 8, x + 8);
    uint2 low = pack_eight<E5M2>(x, inverse), high = pack_eight<E5M2>(x + 8, inverse);
    *(uint4 *)(out + i) = make_uint4(low.x, low.y, high.x, high.y);
  } else {
    for (; i < len; i++) out[i] = (u8)pack_scaled<E5M2>(to_f32(v[i]), 0.0f, inverse);
  }
}

// ---- Tiles --------------------------------------------------------------------------------------

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

// columns_out (cols, rows) = v (rows, cols) as FP8 bytes, transposed, which products that reduce
// over rows read; and where ROWS_TOO, from the same reading, rows_out (rows, cols) and, unless it is
// null, a line of `sums` (grid y, cols), the column sums of the tile's rows, for the bias gradient.
// Both dimensions are multiples of 16.
//
// NOTE: what counts is how much is on its way at once: a thread asks for all of its 64 numbers
// before it needs the first.
template <class T, bool E5M2, bool ROWS_TOO>
__device__ __forceinline__ void tile_to_fp8(u8 *rows_out, u8 *columns_out, float *scale_out,
                                            float *sums, const T *v, const u32 *amax, u32 rows,
                                            u32 cols) {
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
  float scale = scale_of<E5M2>(amax), inverse = 1.0f / scale, sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (blockIdx.x == 0 && blockIdx.y == 0 && t == 0) *scale_out = scale;
  uint2 bytes[8];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    float values[8];
    x[r].values(values);
    bytes[r] = pack_eight<E5M2>(values, inverse);
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

// Both kernels: from compute capability 8.9 on. Grid: cols / 128, rows / 128, rounded up; block:
// 256.

// out (cols, rows) = the transposed bytes.
template <class T, bool E5M2>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 2 : 3)
    turn_to_fp8(u8 *out, float *scale_out, const T *v, const u32 *amax, u32 rows, u32 cols) {
  begin();
  tile_to_fp8<T, E5M2, false>(nullptr, out, scale_out, nullptr, v, amax, rows, cols);
}

// Both forms, and sums if there is room for them.
template <class T, bool E5M2>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 2 : 3)
    convert_both_to_fp8(u8 *rows_out, u8 *columns_out, float *scale_out, float *sums, const T *v,
                        const u32 *amax, u32 rows, u32 cols) {
  begin();
  tile_to_fp8<T, E5M2, true>(rows_out, columns_out, scale_out, sums, v, amax, rows, cols);
}
