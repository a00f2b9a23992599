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

// The E4M3 value nearest to v, ties to even, saturated. NaN stays NaN.
__device__ __forceinline__ float round_to_e4m3(float v) {
  float magnitude = fminf(fabsf(v), 448.0f);
  // Below 2^-6 the grid is even, with steps of 2^-9; above, steps are 2^-3 of the binade. Adding
  // and subtracting 1.5 * 2^23 steps rounds to a whole number of them.
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, -6);
  float magic = __uint_as_float((u32)(exponent - 3 + 23 + 127) << 23) * 1.5f;
  float rounded = __fsub_rn(__fadd_rn(magnitude, magic), magic);
  return isnan(v) ? v : copysignf(rounded, v);
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

// out (len) = v (len) / *scale to FP8 bytes, and *scale, the one that *amax asks for: the same
// numbers as above. From compute capability 8.9 on. Grid: len / (8 block), rounded up; block: 256.
template <class T, bool E5M2>
__global__ void convert_to_fp8(u8 *out, float *scale_out, const T *v, const u32 *amax, u64 len) {
  begin();
  float scale = scale_of<E5M2>(amax), inverse = 1.0f / scale;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i == 0) *scale_out = scale;
  auto pair = [&](float low, float high) { return pack_scaled<E5M2>(low, high, inverse); };
  if (i + 8 <= len) {
    float x[8];
    load8(v + i, x);
    *(uint2 *)(out + i) = make_uint2(pair(x[0], x[1]) | pair(x[2], x[3]) << 16,
                                     pair(x[4], x[5]) | pair(x[6], x[7]) << 16);
  } else {
    for (; i < len; i++) out[i] = (u8)pair(to_f32(v[i]), 0.0f);
  }
}

// out (cols, rows) = the same of v (rows, cols), transposed, which products that reduce over rows
// read. Both dimensions are multiples of 16. Grid: cols / 64, rows / 128, rounded up; block: 256.
template <class T, bool E5M2>
__global__ void __launch_bounds__(256) turn_to_fp8(u8 *out, float *scale_out, const T *v,
                                                   const u32 *amax, u32 rows, u32 cols) {
  begin();
  // Words of four rows, a line for every column. NOTE: a pitch of 33 words, so that the threads
  // that write four rows of eight columns each meet in a bank two by two.
  __shared__ u32 tile[64][33];
  float scale = scale_of<E5M2>(amax), inverse = 1.0f / scale;
  u32 t = threadIdx.x, row = blockIdx.y * 128, column = blockIdx.x * 64;
  if (blockIdx.x == 0 && blockIdx.y == 0 && t == 0) *scale_out = scale;
  u32 first = row + t / 8 * 4, from = column + t % 8 * 8;
  if (first < rows && from < cols) {
    float x[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++) load8(v + (size_t)(first + r) * cols + from, x[r]);
#pragma unroll
    for (int c = 0; c < 8; c++)
      tile[t % 8 * 8 + c][t / 8] = pack_scaled<E5M2>(x[0][c], x[1][c], inverse) |
                                   pack_scaled<E5M2>(x[2][c], x[3][c], inverse) << 16;
  }
  __syncthreads();
#pragma unroll
  for (u32 i = t; i < 64 * 8; i += 256) {
    u32 line = i / 8, part = i % 8;
    if (column + line < cols && row + 16 * part < rows) {
      const u32 *words = &tile[line][4 * part];
      *(uint4 *)(out + (size_t)(column + line) * rows + row + 16 * part) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}
