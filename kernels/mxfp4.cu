// MXFP4 operands: random Hadamard transform, block scale, rounding, in one pass over the source.
//
// A thread owns one block of 32 elements along the reduction dimension, in registers. The butterfly's
// strides below 32 stay inside the thread, the others are shuffles between the neighbouring lanes that
// hold a group. Codes and scales are byte for byte those of the scalar definition: the same f32
// operations in the same order, so multiplications and additions are written with intrinsics that the
// compiler does not fuse.

// Key and counter words of Philox4x32-10 (Salmon et al. 2011) but for row and column.
struct Draw {
  u32 key0, key1, word1, word2, word3;
};

// What the transform needs: sign i of a group is bit i % 32 of word i / 32, a set bit being -1.
struct Transform {
  u32 signs[8];
  float scale;  // the f32 nearest to 1 / sqrt(group)
};

#define BLOCK_LEN 32

// 128 bits for (row, column / 8) of the source as it is stored.
__device__ __forceinline__ uint4 philox(const Draw &draw, u32 row, u32 column_group) {
  u32 c0 = row, c1 = draw.word1 | column_group, c2 = draw.word2, c3 = draw.word3;
  u32 k0 = draw.key0, k1 = draw.key1;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u32 h0 = __umulhi(c0, 0xd2511f53u), l0 = c0 * 0xd2511f53u;
    u32 h1 = __umulhi(c2, 0xcd9e8d57u), l1 = c2 * 0xcd9e8d57u;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Rotates the group of GROUP elements of which this lane holds part `part`.
template <int GROUP>
__device__ __forceinline__ void rotate(float v[BLOCK_LEN], const Transform &transform, u32 part) {
  u32 signs = transform.signs[0];
#pragma unroll
  for (int p = 1; p < GROUP / BLOCK_LEN; p++)
    if (part == p) signs = transform.signs[p];
#pragma unroll
  for (int i = 0; i < BLOCK_LEN; i++)
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (signs >> i << 31));
#pragma unroll
  for (int stride = 1; stride < BLOCK_LEN; stride *= 2)
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i++)
      if ((i & stride) == 0) {
        float a = v[i], b = v[i + stride];
        v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
      }
#pragma unroll
  for (int lanes = 1; lanes < GROUP / BLOCK_LEN; lanes *= 2)
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i++) {
      float other = __shfl_xor_sync(FULL_WARP, v[i], lanes);
      v[i] = part & lanes ? __fsub_rn(other, v[i]) : __fadd_rn(v[i], other);
    }
#pragma unroll
  for (int i = 0; i < BLOCK_LEN; i++) v[i] = __fmul_rn(v[i], transform.scale);
}

// The value of the codes 0 to 7.
__device__ __forceinline__ float e2m1(u32 code) {
  float value = __uint_as_float((126 + (code >> 1)) << 23 | (code & 1) << 22);
  return code < 2 ? 0.5f * code : value;
}

// Code of the value nearest to y >= 0, ties to the even code.
__device__ __forceinline__ u32 nearest(float y) {
  return (y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) +
         (y > 5.0f);
}

// Code of 0 <= y <= 6, rounded up with the probability of its place between its neighbours, to 2^-16.
// Below 1 the grid is even, which adding 1 turns into the case above 1, where the code is the f32's
// exponent and first mantissa bit.
__device__ __forceinline__ u32 stochastic(float y, u32 bits) {
  bool small = y < 1.0f;
  float u = small ? __fadd_rn(y, 1.0f) : y;
  return ((__float_as_uint(u) + (bits << 6 | 32)) >> 22) - (small ? 254 : 252);
}

// What a thread does with its block once it has it: bf16 values, or packed codes and a scale byte.
struct Values {
  bf16 *out;
  __device__ __forceinline__ void store(size_t block, u32 scale, const u32 codes[BLOCK_LEN]) const {
    // 2^(scale - 127) times an element is a bf16 number, a subnormal one below 2^-126. The scale of a
    // block with NaN or infinity is NaN.
    float factor = __uint_as_float(scale == 255 ? 0x7fc00000u : scale == 0 ? 1u << 22 : scale << 23);
    float v[8];
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i += 8) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float magnitude = e2m1(codes[i + j] & 7) * factor;
        v[j] = codes[i + j] & 8 ? -magnitude : magnitude;
      }
      store8(out + block * BLOCK_LEN + i, v);
    }
  }
};

struct Codes {
  u8 *codes, *scales;
  __device__ __forceinline__ void store(size_t block, u32 scale, const u32 c[BLOCK_LEN]) const {
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i++) words[i / 8] |= c[i] << (4 * (i % 8));
    *(uint4 *)(codes + block * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    scales[block] = (u8)scale;
  }
};

// Quantizes a block. `bits(i)` gives the 16 random bits of element i.
template <bool UNBIASED, class Bits>
__device__ __forceinline__ u32 quantize_block(const float v[BLOCK_LEN], u32 codes[BLOCK_LEN],
                                              Bits bits) {
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < BLOCK_LEN; i++) most = max(most, __float_as_uint(v[i]) & 0x7fffffff);
  u32 biased = most >> 23, scale = biased == 255 ? 255 : biased < 2 ? 0 : biased - 2;
  // 2^-exponent, exact; times 3/4 for unbiased rounding, exact too.
  float inverse = __uint_as_float((254 - min(scale, 254u)) << 23) * (UNBIASED ? 0.75f : 1.0f);
#pragma unroll
  for (int i = 0; i < BLOCK_LEN; i++) {
    float y = __fmul_rn(fabsf(v[i]), inverse);
    u32 magnitude = UNBIASED ? stochastic(y, bits(i)) : nearest(y);
    codes[i] = scale == 255 ? 0 : magnitude | __float_as_uint(v[i]) >> 31 << 3;
  }
  return scale;
}

// 16 bits of 128: those of column j of 8.
__device__ __forceinline__ u32 half_word(uint4 words, int j) {
  u32 word = j / 2 == 0 ? words.x : j / 2 == 1 ? words.y : j / 2 == 2 ? words.z : words.w;
  return word >> (16 * (j % 2)) & 0xffff;
}

// Vectors are the rows of source (rows, cols); result (rows, depth), depth being cols padded to whole
// groups. Thread n of all has block n of the result.
template <class T, int GROUP, bool UNBIASED, class Out>
__device__ void quantize_rows(Out out, const T *source, u32 rows, u32 cols, u32 depth,
                              const Transform &transform, const Draw &draw) {
  u64 block = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u32 blocks = depth / BLOCK_LEN;
  u32 row = block / blocks, first = block % blocks * BLOCK_LEN;
  float v[BLOCK_LEN];
  const T *from = source + (size_t)row * cols;
  if (cols % 8 == 0) {
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i += 8) {
      if (row < rows && first + i < cols) {
        load8(from + first + i, v + i);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) v[i + j] = 0.0f;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < BLOCK_LEN; i++)
      v[i] = row < rows && first + i < cols ? to_f32(from[first + i]) : 0.0f;
  }
  if (GROUP > 0) rotate<GROUP>(v, transform, block % (max(GROUP, BLOCK_LEN) / BLOCK_LEN));
  if (row >= rows) return;
  uint4 words[4];
  if (UNBIASED) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = philox(draw, row, first / 8 + i);
  }
  u32 codes[BLOCK_LEN];
  u32 scale = quantize_block<UNBIASED>(
      v, codes, [&](int i) { return half_word(words[i / 8], i % 8); });
  out.store(block, scale, codes);
}

// Vectors are the columns of source (rows, cols); result (cols, depth), depth being rows padded to
// whole groups. A warp has one group of W = 32 / (GROUP / 32) neighbouring columns: lane = column x
// (GROUP / 32) + part. Its random bits are drawn once for each 8 columns of a row, shared through
// shared memory.
// Grid: (cols / W / 8 rounded up, groups); block: 256, eight warps side by side.
template <class T, int GROUP, bool UNBIASED, class Out>
__device__ void quantize_columns(Out out, const T *source, u32 rows, u32 cols, u32 depth,
                                 const Transform &transform, const Draw &draw) {
  constexpr int LEN = GROUP > 0 ? GROUP : BLOCK_LEN;  // rows of a group
  constexpr int PARTS = LEN / BLOCK_LEN, W = WARP / PARTS;
  constexpr int CALLS = W >= 8 ? W / 8 : 1;  // for one row
  __shared__ uint4 bits[8][LEN * CALLS];
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 part = lane % PARTS, x = lane / PARTS;
  u32 first_column = (blockIdx.x * 8 + warp) * W, column = first_column + x;
  u32 first_row = blockIdx.y * LEN;
  float v[BLOCK_LEN];
#pragma unroll
  for (int i = 0; i < BLOCK_LEN; i++) {
    u32 row = first_row + part * BLOCK_LEN + i;
    v[i] = row < rows && column < cols ? to_f32(source[(size_t)row * cols + column]) : 0.0f;
  }
  if (UNBIASED) {
    for (int i = lane; i < LEN * CALLS; i += WARP)
      bits[warp][i] = philox(draw, first_row + i / CALLS, first_column / 8 + i % CALLS);
    __syncwarp();
  }
  if (GROUP > 0) rotate<GROUP>(v, transform, part);
  if (column >= cols) return;
  const u16 *halves = (const u16 *)bits[warp];
  u32 codes[BLOCK_LEN];
  u32 scale = quantize_block<UNBIASED>(v, codes, [&](int i) {
    // The offset of the column in its group of 8, with W = 4 too.
    return (u32)halves[((part * BLOCK_LEN + i) * CALLS + x / 8) * 8 + (column % 8)];
  });
  out.store((size_t)column * (depth / BLOCK_LEN) + first_row / BLOCK_LEN + part, scale, codes);
}

// quantize_{rows,columns}_{what}_{source type}_g{group, 0 for no transform}_{nearest,unbiased}.
// Rows: grid: rows depth / 32 / 256, rounded up; block: 256. Columns: see above.
#define QUANTIZE_TO(FORM, WHAT, OUT, ARGUMENTS, NAME, T, GROUP, MODE, UNBIASED)                      \
  extern "C" __global__ void __launch_bounds__(256)                                                  \
      quantize_##FORM##_##WHAT##_##NAME##_g##GROUP##_##MODE(                                         \
          OUT out, const T *source, u32 rows, u32 cols, u32 depth, Transform transform, Draw draw) { \
    quantize_##FORM<T, GROUP, UNBIASED>(out, source, rows, cols, depth, transform, draw);            \
  }
#define QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, GROUP)                \
  QUANTIZE_TO(FORM, WHAT, OUT, _, NAME, T, GROUP, nearest, false)      \
  QUANTIZE_TO(FORM, WHAT, OUT, _, NAME, T, GROUP, unbiased, true)
#define QUANTIZE_GROUPS(FORM, WHAT, OUT, NAME, T) \
  QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, 0)     \
  QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, 32)    \
  QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, 64)    \
  QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, 128)   \
  QUANTIZE_MODES(FORM, WHAT, OUT, NAME, T, 256)
#define QUANTIZE(WHAT, OUT)                               \
  QUANTIZE_GROUPS(rows, WHAT, OUT, bf16, bf16)            \
  QUANTIZE_GROUPS(rows, WHAT, OUT, f32, float)            \
  QUANTIZE_GROUPS(columns, WHAT, OUT, bf16, bf16)         \
  QUANTIZE_GROUPS(columns, WHAT, OUT, f32, float)
QUANTIZE(values, Values)
QUANTIZE(codes, Codes)
