// MXFP4 operands of the backward GEMMs, byte for byte as src/formats defines them: what the files
// quantize_*.cu begin with.
//
// An operand is a set of vectors along the GEMM's reduction dimension. `rows` kernels take the
// source's rows as vectors and keep its layout; `columns` kernels take its columns and write the
// transpose. The depth (the vectors' length) is padded with zeros to a multiple of the group, or of
// 32 without a transform; rotated padding holds values, so it is rounded and written like the rest.
//
// A thread owns one block of 32 in registers: the butterfly's strides 1 to 16 are its own, 32 to
// 128 are shuffles between the threads of a group. Blocks are rounded in units of their scale
// without dividing by it: y = range |v| is compared and rounded against `unit` = 2^exponent, which
// gives the same bits as the definition's y / unit as long as the block's magnitude is ordinary;
// blocks near the ends of f32's range are moved by a power of two and back. Where 1/sqrt(g) is a
// power of two (g = 64, 256) it joins the range.

#define BLOCK 32

// What an element becomes.
enum Format {
  VALUES, // bf16, exactly
  CODES,  // the definition's own, two a byte, with the scales of blocks
  MXFP8,  // E4M3 with the scales of blocks, in cuBLASLt's tiles
  E4M3,   // FP8 with one factor a tensor
  E5M2,
};

// A quantization of GELU's gradient, whose largest magnitude is not known: that of a sample, the
// highest scale byte that does not fit what was made of it (0 where all fit), and how many blocks
// were clamped.
struct Attempt {
  u32 amax, above, clamped;
};

// What kernels that quantize are given; a kernel reads what its comment names. `Arguments` of
// backend/cuda/quantize/mod.rs. Read it where it lies, in constant memory: never copied.
struct Quantize {
  const void *source; // (rows, cols)
  u8 *by_rows;        // the form along rows (rows, rows_depth)
  u8 *by_columns;     // the form down columns, transposed (cols, depth)
  void *row_scales;   // of blocks, or FP8's factor: times it, the form gives the values
  void *column_scales;
  float *sums;     // column sums of every tile's rows (grid y, cols); may be null
  const u32 *amax; // bits of the source's
  u32 *clamped;    // counts blocks whose scale was clamped to the lowest that fits
  const bf16 *pre; // (rows, cols): the source is the gradient of gelu(pre)
  Attempt *attempt;
  u32 rows, cols, rows_depth, depth; // depths: of vectors, padded
  u32 group; // of the transform, 0 without one
  u32 each;  // rows of a thread block along rows
  Draws draws;
  float range; // of E2M1's: 1 or 3/4, and without bias nothing may saturate
  // What is added to the bits of an amax before its exponent becomes a scale: by how much the rule
  // of the scale rounds up.
  u32 rounds_up;
  // Of what the forward pass made of the source, where that is what is quantized.
  float forward_range;
  u32 forward_rounds_up;
};

// ---- Loading a block along a row, signs applied -------------------------------------------------

// Bits of even index to the low half, odd ones to the high half.
__device__ __forceinline__ u32 unshuffle(u32 x) {
  u32 t = (x ^ x >> 1) & 0x22222222u;
  x ^= t ^ t << 1;
  t = (x ^ x >> 2) & 0x0c0c0c0cu;
  x ^= t ^ t << 2;
  t = (x ^ x >> 4) & 0x00f000f0u;
  x ^= t ^ t << 4;
  t = (x ^ x >> 8) & 0x0000ff00u;
  return x ^ t ^ t << 8;
}

// 32 aligned elements, in global or shared memory.
__device__ __forceinline__ void load_whole(const bf16 *p, u32 signs, float v[BLOCK]) {
  u32 raw[BLOCK / 2];
#pragma unroll
  for (int i = 0; i < 4; i++) *(uint4 *)&raw[4 * i] = *(const uint4 *)(p + 8 * i);
  signs = unshuffle(signs);
#pragma unroll
  for (int i = 0; i < BLOCK / 2; i++) {
    u32 pair = raw[i] ^ (signs << (15 - i) & 0x80008000u);
    v[2 * i] = low_f32(pair), v[2 * i + 1] = high_f32(pair);
  }
}
__device__ __forceinline__ void load_whole(const float *p, u32 signs, float v[BLOCK]) {
#pragma unroll
  for (int i = 0; i < 8; i++) *(float4 *)&v[4 * i] = *(const float4 *)(p + 4 * i);
#pragma unroll
  for (int i = 0; i < BLOCK; i++)
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (signs << (31 - i) & 0x80000000u));
}

// `count` elements at p, zeros after them; vectors where `aligned`.
template <class T>
__device__ __forceinline__ void load_block(const T *p, u32 count, bool aligned, u32 signs,
                                           float v[BLOCK]) {
  if (aligned && count >= BLOCK) return load_whole(p, signs, v);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) {
    float x = i < count ? to_f32(p[i]) : 0.0f;
    v[i] = __uint_as_float(__float_as_uint(x) ^ (signs << (31 - i) & 0x80000000u));
  }
}

// ---- The transform ------------------------------------------------------------------------------

// The butterfly's stride within a thread.
__device__ __forceinline__ void add_and_subtract(float v[BLOCK], int stride) {
#pragma unroll
  for (int i = 0; i < BLOCK; i++)
    if ((i & stride) == 0) {
      float a = v[i], b = v[i + stride];
      v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
    }
}

// Its stride between threads whose lanes differ by `mask`.
__device__ __forceinline__ void exchange(float v[BLOCK], u32 mask) {
  // The upper thread's values are theirs - mine: one exact product, one rounding.
  float sign = threadIdx.x & mask ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < BLOCK; i++)
    v[i] = __fmaf_rn(sign, v[i], __shfl_xor_sync(FULL_WARP, v[i], mask));
}

// Butterfly over `blocks` threads whose lanes differ by multiples of `distance`; not normalized.
__device__ __forceinline__ void rotate(float v[BLOCK], u32 blocks, u32 distance) {
#pragma unroll
  for (int stride = 1; stride < BLOCK; stride *= 2) add_and_subtract(v, stride);
#pragma unroll 1
  for (u32 mask = distance; mask < distance * blocks; mask *= 2) exchange(v, mask);
}

// ---- Rounding -----------------------------------------------------------------------------------

// To the grid 0, 0.5, 1, 1.5, 2, 3, 4, 6 times `unit`, a power of two. `addend`: see RowBits.
__device__ __forceinline__ float round_unbiased(float v, float factor, float unit, u32 addend) {
  float y = __fmul_rn(fabsf(v), factor), low = one_if_less(y, unit);
  y = __fmaf_rn(low, unit, y);
  float q = __uint_as_float((__float_as_uint(y) + (addend >> 2)) & 0xffc00000u);
  q = __fmaf_rn(low, -unit, q);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(v) & 0x80000000u));
}
__device__ __forceinline__ float round_nearest(float v, float factor, float unit) {
  float y = __fmul_rn(fabsf(v), factor);
  // 1.5 * 2^22 times the binade of max(y, unit): its last place is the grid's step there.
  float magic =
      __uint_as_float((__float_as_uint(fmaxf(y, unit)) & 0xff800000u) + (22u << 23 | 0x00400000u));
  float q = fminf(__fsub_rn(__fadd_rn(y, magic), magic), 6.0f * unit);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(v) & 0x80000000u));
}

// Two numbers to FP8, `low` in the low byte.
template <Format FORMAT> __device__ __forceinline__ u32 pack_fp8(float low, float high) {
  return FORMAT == E5M2 ? pack_e5m2(low, high) : pack_e4m3(low, high);
}

// Bits of the largest magnitude of a rotated block, which is normalized first where `norm` is not a
// power of two (and norm becomes 1).
__device__ __forceinline__ u32 block_amax(float v[BLOCK], float &norm) {
  if (__float_as_uint(norm) & 0x007fffffu) {
#pragma unroll
    for (int i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], norm);
    norm = 1.0f;
  }
  float tree[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    tree[i] =
        max_nan(max_nan(fabsf(v[i]), fabsf(v[i + 8])), max_nan(fabsf(v[i + 16]), fabsf(v[i + 24])));
  float amax = max_nan(max_nan(max_nan(tree[0], tree[1]), max_nan(tree[2], tree[3])),
                       max_nan(max_nan(tree[4], tree[5]), max_nan(tree[6], tree[7])));
  return __float_as_uint(__fmul_rn(amax, norm)) & 0x7fffffffu;
}

// The scale byte of a block with this largest magnitude.
__device__ __forceinline__ u32 scale_byte(u32 amax) {
  u32 biased = amax >> 23;
  return biased == 255 ? 255 : biased < 2 ? 0 : biased - 2;
}

__device__ __forceinline__ float power(u32 biased) { return __uint_as_float(biased << 23); }

// What a block is rounded with: results are those in units of 2^127 / `unit`.
struct Scale {
  u32 byte;
  float factor, unit;
};

// A scale byte outside these needs the block moved: by 2^126 below, by 2^-100 above.
__device__ __forceinline__ bool extreme(u32 byte) { return byte - 64 > 136; }
__device__ __forceinline__ void move(float v[BLOCK], u32 byte, float &norm) {
  float by = power(byte < 64 ? 127 + 126 : 127 - 100);
#pragma unroll
  for (int i = 0; i < BLOCK; i++) v[i] = __fmul_rn(__fmul_rn(v[i], norm), by);
  norm = 1.0f;
}
__device__ __forceinline__ u32 moved(u32 byte) { return byte < 64 ? byte + 126 : byte - 100; }

// Random bits of a thread that owns 32 columns of a row. addend(i): the 16 of element i from bit 8
// on, and a one below them.
struct RowBits {
  const Draw &draw;
  u32 row, column_group;
  uint4 words;
  __device__ __forceinline__ RowBits(const Draw &draw, u32 row, u32 column)
      : draw(draw), row(row), column_group(column / 8) {}
  __device__ __forceinline__ u32 addend(int i) {
    if (i % 8 == 0) words = philox(draw, row, column_group + i / 8);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    return __byte_perm(word, draw.half, i % 2 ? 0x5324 : 0x5104);
  }
};

// Random bits in shared memory, 16 for each element of a line, as Philox leaves them in registers,
// which are pairs of a product's low and high half: in each eight those of the elements 2, 3, 0, 1,
// 6, 7, 4 and 5.
__device__ __forceinline__ void store_bits(u8 *to, uint4 words) {
  *(uint4 *)to = make_uint4(words.y, words.x, words.w, words.z);
}

// Of a block along a row, whose first element's eight begins at `bits`.
struct SharedRowBits {
  const u8 *bits;
  const Draw &draw;
  uint4 words;
  __device__ __forceinline__ SharedRowBits(const u8 *bits, const Draw &draw)
      : bits(bits), draw(draw) {}
  __device__ __forceinline__ u32 addend(int i) {
    if (i % 8 == 0) words = *(const uint4 *)(bits + 2 * i);
    u32 word = i % 8 < 2 ? words.y : i % 8 < 4 ? words.x : i % 8 < 6 ? words.w : words.z;
    return __byte_perm(word, draw.half, i % 2 ? 0x5324 : 0x5104);
  }
};

// Of one down column `place` of lines from `line` on, `PITCH` bytes apart.
template <u32 PITCH> struct SharedColumnBits {
  const u8 *bits;
  const Draw &draw;
  __device__ __forceinline__ SharedColumnBits(const u8 *line, u32 place, const Draw &draw)
      : bits(line + 2 * (place ^ 2)), draw(draw) {}
  __device__ __forceinline__ u32 addend(int i) {
    return *(const u16 *)(bits + i * PITCH) * draw.shift8 + draw.half;
  }
};

// ---- Places along rows  -------------------------------------------------------------------------

// A thread block takes `each` whole rows, a thread one block of them.
struct Place {
  u32 local, row, column; // row of the thread block, of the source; first column
  bool inside;
};
__device__ __forceinline__ Place place_in_rows(u32 rows, u32 depth, u32 each) {
  // threadIdx.x / blocks: exact, as the quotient is no nearer to a whole number than 0.5 / blocks.
  u32 blocks = depth / BLOCK;
  Place place;
  place.local = (u32)(((float)threadIdx.x + 0.5f) * reciprocal_of((float)blocks));
  place.row = blockIdx.x * each + place.local;
  place.column = (threadIdx.x - place.local * blocks) * BLOCK;
  place.inside = place.local < each && place.row < rows;
  return place;
}

// Loads the block at a place and rotates it; `norm` is the factor that is still missing.
template <class T>
__device__ __forceinline__ void load_rotated(float v[BLOCK], float &norm, const T *source,
                                             const Place &place, u32 cols, u32 group,
                                             const Transform &transform) {
  u32 across = group > BLOCK ? group / BLOCK : 1;
  u32 signs = group ? transform.signs[place.column / BLOCK & (across - 1)] : 0;
  u32 count = place.inside && place.column < cols ? cols - place.column : 0;
  load_block(source + (size_t)place.row * cols + place.column, count, cols % 8 == 0, signs, v);
  if (group) rotate(v, across, 1);
  norm = group ? transform.scale : 1.0f;
}
