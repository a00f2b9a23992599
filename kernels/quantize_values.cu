// Operands in all formats, and what is done behind products. Exact and plain: a warp gathers and
// rotates four of the vectors, lanes along them; then a thread has 32 elements of one vector in
// shared memory, in order, for sums are part of the definition. NVFP4 and int8 have kernels of
// their own (quantize_nvfp4.cu, requantize_nvfp4.cu, int8.cu), which do not round by means, note
// scales of blocks or sum.

// Odd, so that threads beside each other meet different banks along either dimension.
#define PITCH (CHUNK + 1)

// ---- Gathering ----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ float element(const Values &q, u32 vector, u32 k) {
  if (vector >= q.vectors || k >= q.length) return 0.0f;
  size_t at = q.transposed ? (size_t)k * q.vectors + vector : (size_t)vector * q.length + k;
  return to_f32(((const T *)q.source)[at]);
}

// The butterfly of the groups of 256 elements, of which a lane has those 32 apart.
__device__ __forceinline__ void rotate(float v[8], const Transform &transform, u32 group) {
  u32 lane = threadIdx.x % WARP;
#pragma unroll
  for (u32 i = 0; i < 8; i++) {
    u32 index = (lane + 32 * i) & (group - 1);
    u32 sign = transform.signs[index / 32] >> (index % 32) << 31;
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ sign);
  }
#pragma unroll
  for (u32 mask = 1; mask < WARP; mask *= 2)
    if (mask < group)
#pragma unroll
      for (u32 i = 0; i < 8; i++) {
        float other = __shfl_xor_sync(FULL_WARP, v[i], mask);
        v[i] = lane & mask ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other);
      }
#pragma unroll
  for (u32 stride = 1; stride < 8; stride *= 2)
    if (32 * stride < group)
#pragma unroll
      for (u32 i = 0; i < 8; i++)
        if ((i & stride) == 0) {
          float a = v[i], b = v[i + stride];
          v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
        }
#pragma unroll
  for (u32 i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], transform.scale);
}

// 256 elements from `first` on of the warp's four vectors, rotated: lane i has elements i, i + 32
// and so on.
template <class T>
__device__ __forceinline__ void gather(const Values &q, float tile[VECTORS][PITCH],
                                       u32 first_vector, u32 first, float v[4][8]) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (q.transposed) {
    for (u32 k = warp; k < CHUNK; k += THREADS / WARP)
      tile[lane][k] = element<T>(q, first_vector + lane, first + k);
    __syncthreads();
  }
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 vector = 4 * warp + j;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 k = lane + 32 * i;
      v[j][i] = q.transposed ? tile[vector][k] : element<T>(q, first_vector + vector, first + k);
    }
    if (q.group) rotate(v[j], q.transform, q.group);
  }
}

// Makes the words at `amax` the bits of the largest magnitudes, where they were 0 before. A NaN is
// larger than everything. Grid: (vectors / 32, depth / 256), rounded up; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS) find_value_amax(const __grid_constant__ Values q) {
  begin();
  __shared__ float tile[VECTORS][PITCH];
  u32 warp = threadIdx.x / WARP, first_vector = blockIdx.x * VECTORS;
  float v[4][8];
  gather<T>(q, tile, first_vector, blockIdx.y * CHUNK, v);
  u32 all = 0;
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 most = 0, vector = first_vector + 4 * warp + j;
#pragma unroll
    for (u32 i = 0; i < 8; i++) most = max(most, __float_as_uint(v[j][i]) & 0x7fffffffu);
    if (q.by_vector && vector < q.vectors) note_amax(q.amax + vector, __uint_as_float(most));
    all = max(all, most);
  }
  if (!q.by_vector) note_amax(q.amax, __uint_as_float(all));
}

// ---- Random bits --------------------------------------------------------------------------------

// Those of a source that is stored transposed go to shared memory, 16 for each of (256, 32): one
// call of the generator gives those of eight vectors.
__device__ __forceinline__ void draw_transposed(const Values &q, u32 first_vector, u32 first) {
  for (u32 i = threadIdx.x; i < CHUNK * VECTORS / 8; i += THREADS)
    ((uint4 *)shared)[i] =
        philox(q.elements, first + i / (VECTORS / 8), first_vector / 8 + i % (VECTORS / 8));
}

// Of a thread's 32 elements, which are asked for in order, from k on in the vector.
struct Bits {
  const Values &q;
  u32 vector, k;
  uint4 words;
  __device__ __forceinline__ Bits(const Values &q, u32 vector, u32 k)
      : q(q), vector(vector), k(k) {}
  __device__ __forceinline__ u32 of(u32 i) {
    if (q.transposed) return ((const u16 *)shared)[((k + i) % CHUNK) * VECTORS + vector % VECTORS];
    if (i % 8 == 0) words = philox(q.elements, vector, (k + i) / 8);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    return i % 2 ? word >> 16 : word & 0xffff;
  }
};

// Notes what the elements of a block, of so many, are multiplied by.
__device__ __forceinline__ void note_block_scale(const Values &q, u32 vector, u32 block,
                                                 u32 length, float scale) {
  u32 blocks = q.depth / length;
  if (q.block_scales && vector < q.vectors && block < blocks)
    q.block_scales[(size_t)vector * blocks + block] = scale;
}

// ---- Blocks of 32 -------------------------------------------------------------------------------

__device__ __forceinline__ void round_powers(const Values &q, float *block, u32 vector, u32 k,
                                             u32 rows) {
  u32 amax = amax_of(block, BLOCK);
  bool deviation = q.rule == QUEST || q.rule == QUEST_FLOOR;
  if (q.square) amax = __reduce_max_sync(FULL_WARP, amax);
  u32 byte;
  if (!deviation) {
    byte = power_byte(q.rule, amax);
  } else if (!q.square) {
    byte = deviation_byte(q.rule == QUEST, block, 1, PITCH, amax);
  } else {
    // The sum of a square is one after the other, too.
    bool first = threadIdx.x % WARP == 0;
    byte = first ? deviation_byte(q.rule == QUEST, block, rows, PITCH, amax) : 0;
    byte = __reduce_max_sync(FULL_WARP, byte);
  }
  float scale = decode_e8m0(byte);
  note_block_scale(q, vector, k / BLOCK, BLOCK, scale);
  if (byte == 255) {
    for (u32 i = 0; i < BLOCK; i++) block[i] = scale;
    return;
  }
  float factor = __fmul_rn(q.range, decode_e8m0(254 - byte));
  Bits bits(q, vector, k);
#pragma unroll 8
  for (u32 i = 0; i < BLOCK; i++) {
    float v = block[i], y = __fmul_rn(fabsf(v), factor);
    float magnitude = q.rounding == UNBIASED ? stochastic_e2m1(y, bits.of(i)) : nearest_e2m1(y);
    if (q.rounding == BY_MEAN)
      magnitude = by_mean_e2m1(__fmul_rn(v, factor), __fmul_rn(mean_of(q, vector, k + i), factor));
    block[i] = with_sign(__fmul_rn(magnitude, scale), v);
  }
}

// ---- Blocks of 16 -------------------------------------------------------------------------------

// Of a block rounded to nearest with a scale, in units of the tensor's.
__device__ __forceinline__ float squared_error(const float *block, float scale, float tensor) {
  float encode = encoding(scale, tensor), sum = 0.0f;
  for (u32 i = 0; i < SIXTEEN; i++) {
    float x = __fmul_rn(block[i], encode);
    float rounded = with_sign(nearest_e2m1(element_of(x)), block[i]);
    float error = __fmul_rn(__fsub_rn(rounded, x), scale);
    sum = __fadd_rn(sum, __fmul_rn(error, error));
  }
  return sum;
}

// Errors of a warp's blocks with the full scale and the wide one.
typedef float Errors[2][THREADS / WARP][WARP];

// The scale of a block, or of a square of `rows` of them, with this amax. All threads come here at
// once.
__device__ __forceinline__ float nvfp4_scale(const Values &q, const float *block, u32 bits,
                                             Tensor tensor, u32 rows, Errors errors) {
  float amax = __uint_as_float(bits);
  float inverse = q.rule == HEADROOM ? __fdiv_rn(1.0f, WITH_HEADROOM) : __fdiv_rn(1.0f, 6.0f);
  float scale = __fmul_rn(amax, __fmul_rn(tensor.encode, inverse));
  float full = round_to_e4m3(scale > 448.0f ? 448.0f : scale);
  if (q.rule != FOUR_OVER_SIX) return full;
  float wide = round_to_e4m3(fminf(__fmul_rn(scale, 1.5f), 448.0f));
  float of_full = squared_error(block, full, tensor.decode),
        of_wide = squared_error(block, wide, tensor.decode);
  if (!q.square) return of_wide < of_full ? wide : full;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = lane & ~15u;
  errors[0][warp][lane] = of_full, errors[1][warp][lane] = of_wide;
  __syncthreads();
  double sums[2] = {0.0, 0.0};
  for (u32 row = first; row < min(first + SIXTEEN, rows); row++)
    sums[0] += errors[0][warp][row], sums[1] += errors[1][warp][row];
  __syncthreads();
  return sums[1] < sums[0] ? wide : full;
}

// Two blocks, to nearest or by means.
__device__ __forceinline__ void round_two_levels(const Values &q, float *block, u32 vector, u32 k,
                                                 u32 rows, Tensor tensor, Errors errors) {
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float outer = 1.0f;
  if (q.outer != OF_TENSOR) {
    u32 *amaxes = (u32 *)errors[0];
    amaxes[warp * WARP + lane] = amax_of(block, BLOCK);
    __syncthreads();
    u32 amax = 0;
    for (u32 i = 0; i < 4; i++) amax = max(amax, amaxes[(warp / 4 * 4 + i) * WARP + lane]);
    outer = outer_scale(amax, q.outer == POWER_OF_128);
  }
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float *sixteen = block + SIXTEEN * b;
    u32 amax = amax_of(sixteen, SIXTEEN);
    if (q.square)
#pragma unroll
      for (u32 mask = 1; mask < SIXTEEN; mask *= 2)
        amax = max(amax, __shfl_xor_sync(FULL_WARP, amax, mask));
    float scale, encode = 1.0f;
    if (q.outer == OF_TENSOR) {
      scale = nvfp4_scale(q, sixteen, amax, tensor, rows, errors);
      encode = encoding(scale, tensor.decode);
    } else {
      float of = __fdiv_rn(__fdiv_rn(__uint_as_float(amax), outer), 6.0f);
      scale = round_to_e4m3(fminf(of, 448.0f));
      // E4M3's smallest number.
      if (scale == 0.0f) scale = 1.0f / 512.0f;
      scale = __fmul_rn(scale, outer);
    }
    note_block_scale(q, vector, k / SIXTEEN + b, SIXTEEN,
                     q.outer == OF_TENSOR ? __fmul_rn(scale, tensor.decode) : scale);
#pragma unroll 8
    for (u32 i = 0; i < SIXTEEN; i++) {
      float v = sixteen[i];
      float y = element_of(q.outer == OF_TENSOR ? __fmul_rn(v, encode) : __fdiv_rn(v, scale));
      float magnitude = nearest_e2m1(y);
      if (q.rounding == BY_MEAN) {
        float mean = mean_of(q, vector, k + SIXTEEN * b + i);
        bool whole = q.outer == OF_TENSOR;
        magnitude = by_mean_e2m1(whole ? __fmul_rn(v, encode) : __fdiv_rn(v, scale),
                                 whole ? __fmul_rn(mean, encode) : __fdiv_rn(mean, scale));
      }
      sixteen[i] = __fmul_rn(with_sign(magnitude, v), scale);
    }
  }
}

// ---- Rounding -----------------------------------------------------------------------------------

// A thread's 32 elements, from k on in their vector; `rows`: vectors of the thread block.
__device__ __forceinline__ void round_block(const Values &q, float *block, u32 vector, u32 k,
                                            u32 rows, Tensor tensor, Errors errors) {
  switch (q.kind) {
  case NEAREST:
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_mantissa(block[i], q.mantissa);
    break;
  case CUT:
    for (u32 i = 0; i < BLOCK; i++) block[i] = cut_mantissa(block[i], q.mantissa);
    break;
  case E4M3:
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_to_e4m3(__fmul_rn(block[i], tensor.encode));
    break;
  case E5M2:
    for (u32 i = 0; i < BLOCK; i++)
      block[i] = nearest_fp8(__fmul_rn(block[i], tensor.encode), 2, -14, 57344.0f);
    break;
  case INT8: {
    if (vector >= q.vectors) break;
    float amax = q.by_vector ? __uint_as_float(q.amax[vector]) : tensor.encode;
    for (u32 i = 0; i < BLOCK; i++) block[i] = round_to_int8(block[i], amax);
    break;
  }
  case E2M1: {
    if (vector >= q.vectors) break;
    float unit = unit_of_vector(q, q.amax[vector]), value = q.rule == AMAX ? 1.0f : unit;
    for (u32 i = 0; i < BLOCK; i++) {
      float v = block[i], inside = v;
      if (q.bounds) {
        float low = q.bounds[2 * vector], high = q.bounds[2 * vector + 1];
        inside = v < low ? low : v > high ? high : v;
      }
      float magnitude = __fmul_rn(nearest_e2m1(fabsf(__fdiv_rn(inside, unit))), value);
      float number = with_sign(magnitude, inside);
      // What clamping took is in bf16.
      if (q.bounds) number = __fadd_rn(number, round_mantissa(__fsub_rn(v, inside), 7));
      block[i] = is_nan(unit) ? unit : number;
    }
    break;
  }
  case POWERS: round_powers(q, block, vector, k, rows); break;
  case TWO_LEVELS: round_two_levels(q, block, vector, k, rows, tensor, errors); break;
  }
}

// The numbers of an operand to `out`, the scales of its vectors and of the tensor, and what the
// product is multiplied by. Grid: (vectors / 32, depth / 256), rounded up; block: 256. Rounding
// without bias of a transposed source takes 16 KiB of dynamic shared memory.
template <class T>
__global__ void __launch_bounds__(THREADS) round_values(const __grid_constant__ Values q) {
  begin();
  __shared__ float tile[VECTORS][PITCH];
  __shared__ Errors errors;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first_vector = blockIdx.x * VECTORS, first = blockIdx.y * CHUNK;
  float v[4][8];
  gather<T>(q, tile, first_vector, first, v);
  if (q.rounding == UNBIASED && q.transposed) draw_transposed(q, first_vector, first);
  // Nobody else reads the warp's vectors.
#pragma unroll
  for (u32 j = 0; j < 4; j++)
#pragma unroll
    for (u32 i = 0; i < 8; i++) tile[4 * warp + j][lane + 32 * i] = v[j][i];
  __syncthreads();
  Tensor tensor = tensor_scale(q);
  u32 vector = first_vector + lane, rows = min(q.vectors - first_vector, (u32)VECTORS);
  round_block(q, &tile[lane][BLOCK * warp], vector, first + BLOCK * warp, rows, tensor, errors);
  if (q.vector_scales && blockIdx.y == 0 && warp == 0 && vector < q.vectors)
    q.vector_scales[vector] = vector_scale(q, vector);
  write_scale(q, tensor);
  __syncthreads();
  u32 depth = q.dequantized && !q.group ? q.length : q.depth;
  double products = 0.0, squares = 0.0;
#pragma unroll
  for (u32 j = 0; j < 4; j++) {
    u32 local = 4 * warp + j, vector = first_vector + local;
    if (vector >= q.vectors) break;
    float scale = q.dequantized ? __fmul_rn(tensor.decode, vector_scale(q, vector)) : 1.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 k = first + lane + 32 * i;
      if (k >= depth) continue;
      float number = tile[local][lane + 32 * i];
      if (q.sums) {
        products += (double)v[j][i] * number;
        squares += (double)v[j][i] * v[j][i];
      }
      size_t at = (size_t)vector * depth + k;
      if (q.dequantized) ((float *)q.out)[at] = __fmul_rn(number, scale);
      else if (q.wide) ((float *)q.out)[at] = number;
      else ((bf16 *)q.out)[at] = from_f32<bf16>(number);
    }
  }
  if (q.sums) {
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
      products += __shfl_xor_sync(FULL_WARP, products, mask);
      squares += __shfl_xor_sync(FULL_WARP, squares, mask);
    }
    u32 chunks = (q.depth + CHUNK - 1) / CHUNK;
    size_t at = ((size_t)blockIdx.x * chunks + blockIdx.y) * (THREADS / WARP) + warp;
    if (lane == 0) q.sums[2 * at] = products, q.sums[2 * at + 1] = squares;
  }
}

// ---- Behind the product -------------------------------------------------------------------------

// `Scaling` of values.rs.
struct Scaling {
  void *out;                         // (rows, columns)
  const void *c;                     // likewise, f32 or integers
  const float *factor;               // of integers: what they are multiplied by first
  const float *of_rows, *of_columns; // null for 1
  const void *bias;                  // (columns) of the type of `out`; may be null
  u32 rows, columns;
};

// Integers, to the nearest f32.
__device__ __forceinline__ float to_f32(int v) { return (float)v; }
__device__ __forceinline__ void load8(const int *p, float v[8]) {
#pragma unroll
  for (u32 i = 0; i < 8; i += 4) {
    uint4 raw = *(const uint4 *)(p + i);
    v[i] = to_f32((int)raw.x), v[i + 1] = to_f32((int)raw.y);
    v[i + 2] = to_f32((int)raw.z), v[i + 3] = to_f32((int)raw.w);
  }
}

// `COUNT` numbers, one or eight; `others` where there are none.
template <u32 COUNT, class T>
__device__ __forceinline__ void load(const T *from, float v[COUNT], float others = 0.0f) {
#pragma unroll
  for (u32 i = 0; i < COUNT; i++) v[i] = others;
  if (!from) return;
  if constexpr (COUNT == 8) load8(from, v);
  else v[0] = to_f32(*from);
}

// As many of a row, from `column` on.
template <class T, bool INTEGERS, u32 COUNT>
__device__ __forceinline__ void scale_columns(const Scaling &q, float of_row, u32 column) {
  size_t at = (size_t)blockIdx.x * q.columns + column;
  const T *bias = (const T *)q.bias;
  float v[COUNT], scales[COUNT], added[COUNT];
  if constexpr (INTEGERS) {
    load<COUNT>((const int *)q.c + at, v);
    float factor = *q.factor;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) v[i] = __fmul_rn(v[i], factor);
  } else {
    load<COUNT>((const float *)q.c + at, v);
  }
  load<COUNT>(q.of_columns ? q.of_columns + column : nullptr, scales, 1.0f);
  load<COUNT>(bias ? bias + column : nullptr, added);
#pragma unroll
  for (u32 i = 0; i < COUNT; i++)
    v[i] = __fadd_rn(__fmul_rn(v[i], __fmul_rn(of_row, scales[i])), added[i]);
  T *out = (T *)q.out + at;
  if constexpr (COUNT == 8) store8(out, v);
  else *out = from_f32<T>(v[0]);
}

// out = c times scales of its rows and of its columns, plus a bias. Grid: rows; block: at most 256.
template <class T, bool INTEGERS>
__global__ void __launch_bounds__(THREADS) scale_result(const __grid_constant__ Scaling q) {
  begin();
  float of_row = q.of_rows ? q.of_rows[blockIdx.x] : 1.0f;
  if (q.columns % 8 == 0) {
    for (u32 i = 8 * threadIdx.x; i < q.columns; i += 8 * blockDim.x)
      scale_columns<T, INTEGERS, 8>(q, of_row, i);
  } else {
    for (u32 i = threadIdx.x; i < q.columns; i += blockDim.x)
      scale_columns<T, INTEGERS, 1>(q, of_row, i);
  }
}
