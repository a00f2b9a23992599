// Operands of the backward GEMMs in MXFP4, byte for byte as src/mx defines them, and the FP8 forward's rounding.
//
// An operand is a set of vectors along the GEMM's reduction dimension. `rows` kernels take the source's
// rows as vectors and keep its layout; `columns` kernels take its columns and write the transpose. The
// depth (the vectors' length) is padded with zeros to a multiple of the group, or of 32 without a
// transform; rotated padding holds values, so it is rounded and written like the rest.
//
// A thread owns one block of 32 in registers: the butterfly's strides 1 to 16 are its own, 32 to 128 are
// shuffles between the threads of a group. Blocks are rounded in units of their scale without dividing
// by it: y = 0.75 |v| is compared and rounded against `unit` = 2^exponent, which gives the same bits as
// the definition's y / unit as long as the block's magnitude is ordinary; blocks near the ends of f32's
// range are moved by a power of two and back. Where 1/sqrt(g) is a power of two (g = 64, 256) it joins the
// factor 0.75.

#define BLOCK 32
#define OUT_VALUES 0
#define OUT_CODES 1
#define OUT_FP8 2

// Key and counter words of mx::Draw.
struct Draw {
  u32 key0, key1, word1, word2, word3;
};

// The transform: sign i of a group is bit i % 32 of word i / 32, a set bit being -1. Not read without one.
struct Transform {
  u32 signs[8];
  float scale; // the f32 nearest to 1/sqrt(group)
};

// 128 random bits: of the 8 elements (row, 8 column_group + 0..7), each 16.
__device__ __forceinline__ uint4 philox(const Draw &draw, u32 row, u32 column_group) {
  u32 c0 = row, c1 = draw.word1 | column_group, c2 = draw.word2, c3 = draw.word3;
  u32 k0 = draw.key0, k1 = draw.key1;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    u64 p0 = (u64)c0 * 0xd2511f53u, p1 = (u64)c2 * 0xcd9e8d57u;
    c0 = (u32)(p1 >> 32) ^ c1 ^ k0, c1 = (u32)p1;
    c2 = (u32)(p0 >> 32) ^ c3 ^ k1, c3 = (u32)p0;
    k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

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
__device__ __forceinline__ void load_block(const T *p, u32 count, bool aligned, u32 signs, float v[BLOCK]) {
  if (aligned && count >= BLOCK) return load_whole(p, signs, v);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) {
    float x = i < count ? to_f32(p[i]) : 0.0f;
    v[i] = __uint_as_float(__float_as_uint(x) ^ (signs << (31 - i) & 0x80000000u));
  }
}

// ---- The transform ------------------------------------------------------------------------------

// Butterfly over `blocks` threads whose lanes differ by multiples of `distance`; not normalized.
__device__ __forceinline__ void rotate(float v[BLOCK], u32 blocks, u32 distance) {
#pragma unroll
  for (int stride = 1; stride < BLOCK; stride *= 2)
#pragma unroll
    for (int i = 0; i < BLOCK; i++)
      if ((i & stride) == 0) {
        float a = v[i], b = v[i + stride];
        v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
      }
#pragma unroll 1
  for (u32 mask = distance; mask < distance * blocks; mask *= 2) {
    // The upper thread's values are theirs - mine: one exact product, one rounding.
    float sign = threadIdx.x & mask ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < BLOCK; i++) v[i] = __fmaf_rn(sign, v[i], __shfl_xor_sync(FULL_WARP, v[i], mask));
  }
}

// ---- Rounding -----------------------------------------------------------------------------------

// To the grid 0, 0.5, 1, 1.5, 2, 3, 4, 6 times `unit`, a power of two. `addend` is the random 16 bits at
// bit 6 and a one below them.
__device__ __forceinline__ float round_unbiased(float v, float factor, float unit, u32 addend) {
  float y = __fmul_rn(fabsf(v), factor), low; // low: 1 below the unit, else 0
  asm("set.lt.f32.f32 %0, %1, %2;" : "=f"(low) : "f"(y), "f"(unit));
  y = __fmaf_rn(low, unit, y);
  float q = __uint_as_float((__float_as_uint(y) + addend) & 0xffc00000u);
  q = __fmaf_rn(low, -unit, q);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(v) & 0x80000000u));
}
__device__ __forceinline__ float round_nearest(float v, float factor, float unit) {
  float y = __fmul_rn(fabsf(v), factor);
  // 1.5 * 2^22 times the binade of max(y, unit): its last place is the grid's step there.
  float magic = __uint_as_float((__float_as_uint(fmaxf(y, unit)) & 0xff800000u) + (22u << 23 | 0x00400000u));
  float q = fminf(__fsub_rn(__fadd_rn(y, magic), magic), 6.0f * unit);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(v) & 0x80000000u));
}

// Bits of the largest magnitude of a rotated block, which is normalized first where `norm` is not a power
// of two (and norm becomes 1).
__device__ __forceinline__ u32 block_magnitude(float v[BLOCK], float &norm) {
  if (__float_as_uint(norm) & 0x007fffffu) {
#pragma unroll
    for (int i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], norm);
    norm = 1.0f;
  }
  float tree[8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    tree[i] = max_nan(max_nan(fabsf(v[i]), fabsf(v[i + 8])), max_nan(fabsf(v[i + 16]), fabsf(v[i + 24])));
  float most = max_nan(max_nan(max_nan(tree[0], tree[1]), max_nan(tree[2], tree[3])),
                       max_nan(max_nan(tree[4], tree[5]), max_nan(tree[6], tree[7])));
  return __float_as_uint(__fmul_rn(most, norm)) & 0x7fffffffu;
}

// The scale byte of a block with this largest magnitude.
__device__ __forceinline__ u32 scale_byte(u32 magnitude) {
  u32 biased = magnitude >> 23;
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

// The same in units of a whole vector's scale, 2^(top - 133), for E4M3: `top` is at least the scale byte of every
// block of the vector. E4M3 holds a grid whose unit lies within 2^-8 .. 2^6, so a block more than 14 binades under `top`
// is rounded with a larger scale: a valid one, and without bias where the rounding is. `raised` tells.
template <bool UNBIASED>
__device__ __forceinline__ Scale scale_in_vector(float v[BLOCK], float norm, u32 magnitude, u32 top, bool &raised) {
  Scale scale;
  scale.byte = scale_byte(magnitude);
  raised = scale.byte + 14 < top && magnitude > 0;
  scale.unit = power(max(scale.byte + 14, top) - 14 + 133 - top);
  u32 to_units = 260 - top;
  if (extreme(top)) {
    move(v, top, norm);
    to_units = 260 - moved(top);
  }
  scale.factor = __fmul_rn(UNBIASED ? 0.75f * norm : norm, power(to_units));
  return scale;
}

// The scale of a vector, and `top` within what its exponent can hold. A NaN makes the whole vector NaN.
__device__ __forceinline__ float vector_scale(u32 &top) {
  float scale = top > 252 ? __uint_as_float(0x7fc00000u) : power(max(top, 16u) - 6);
  top = top > 252 ? 127 : max(top, 16u);
  return scale;
}

// Adds the number of threads of a warp that ask for it.
__device__ __forceinline__ void count_raised(u32 *counter, bool raised) {
  u32 lanes = __ballot_sync(FULL_WARP, raised);
  if (lanes && threadIdx.x % WARP == 0) atomicAdd(counter, __popc(lanes));
}

// Random bits of a thread that owns 32 columns of a row. addend(i): those of element i at bit 6, below them a one.
struct RowBits {
  const Draw &draw;
  u32 row, column_group, one;
  uint4 words;
  __device__ __forceinline__ RowBits(const Draw &draw, u32 row, u32 column)
      : draw(draw), row(row), column_group(column / 8) {
    // NOTE: a constant here costs a move for each element, since PRMT takes only one; the compiler does not know that
    // there are fewer than 2^31 rows.
    one = 0x8000 | row >> 31;
  }
  __device__ __forceinline__ u32 addend(int i) {
    if (i % 8 == 0) words = philox(draw, row, column_group + i / 8);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    // A multiplication, since the pipe of PRMT is the busier one.
    return (i % 2 ? __byte_perm(word, one, 0x3254) : word * 0x10000 + one) >> 10;
  }
};

// The same from shared memory.
struct SharedRowBits {
  const u8 *bits;
  u32 one;
  uint4 words;
  __device__ __forceinline__ SharedRowBits(const u8 *bits, u32 row) : bits(bits), one(0x8000 | row >> 31) {}
  __device__ __forceinline__ u32 addend(int i) {
    if (i % 8 == 0) words = *(const uint4 *)(bits + 2 * i);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    return (i % 2 ? __byte_perm(word, one, 0x3254) : word * 0x10000 + one) >> 10;
  }
};

// Those of a thread that owns 32 rows of a column: 16 bits each, `PITCH` bytes apart in shared memory.
template <u32 PITCH> struct ColumnBits {
  const u8 *bits;
  __device__ __forceinline__ ColumnBits(const u8 *bits) : bits(bits) {}
  __device__ __forceinline__ u32 addend(int i) { return *(const u16 *)(bits + i * PITCH) * 64u + 32u; }
};

// ---- Results ------------------------------------------------------------------------------------

// Bytes of a block in the result.
template <int OUT> constexpr u32 BYTES = OUT == OUT_VALUES ? 64 : OUT == OUT_FP8 ? 32 : 16;

// Two floats that are E4M3 numbers, as such, `low` in the low byte.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890
  u16 out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
  return out;
#else
  u32 out = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 v = __float_as_uint(i ? high : low), magnitude = v & 0x7fffffff;
    u32 byte = magnitude < 121u << 23 ? (u32)(512.0f * __uint_as_float(magnitude)) : (magnitude >> 20) - (120 << 3);
    out |= (byte & 0x7f | v >> 31 << 7) << 8 * i;
  }
  return out;
#endif
}

// Rounds a block and stores it at `to`: bf16 values; codes, two a byte; or E4M3 numbers.
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
    } else if (OUT == OUT_FP8) {
      u32 two = pack_e4m3(pair[0], pair[1]);
      words[i / 4 % 4] = i % 4 ? words[i / 4 % 4] | two << 16 : two;
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float q = __fmul_rn(fabsf(pair[j]), inverse);
        u32 code = q < 1.0f ? (u32)(2.0f * q) : (__float_as_uint(q) >> 22) - 252;
        code = scale.byte == 255 ? 0 : (code & 7 | __float_as_uint(pair[j]) >> 31 << 3) << 4 * ((i + j) % 8);
        words[i / 8] = (i + j) % 8 ? words[i / 8] | code : code;
      }
    }
    constexpr int EACH = OUT == OUT_VALUES ? 8 : OUT == OUT_FP8 ? 16 : 32; // elements in 16 bytes
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

// A thread block takes `each` whole rows, a thread one block of them.
struct Place {
  u32 local, row, column; // row of the thread block, of the source; first column
  bool inside;
};
__device__ __forceinline__ Place place_in_rows(u32 rows, u32 depth, u32 each) {
  // threadIdx.x / blocks: exact, as the quotient is no nearer to a whole number than 0.5 / blocks.
  u32 blocks = depth / BLOCK;
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"((float)blocks));
  Place place;
  place.local = (u32)(((float)threadIdx.x + 0.5f) * reciprocal);
  place.row = blockIdx.x * each + place.local;
  place.column = (threadIdx.x - place.local * blocks) * BLOCK;
  place.inside = place.local < each && place.row < rows;
  return place;
}

// Loads the block at a place and rotates it; `norm` is the factor that is still missing.
template <class T>
__device__ __forceinline__ void load_rotated(float v[BLOCK], float &norm, u32 *most, const T *source, const Place &place,
                                             u32 cols, u32 group, const Transform &transform) {
  u32 across = group > BLOCK ? group / BLOCK : 1;
  u32 signs = group ? transform.signs[place.column / BLOCK & (across - 1)] : 0;
  u32 count = place.inside && place.column < cols ? cols - place.column : 0;
  load_block(source + (size_t)place.row * cols + place.column, count, cols % 8 == 0, signs, v);
  if (most) {
    float one = 1.0f;
    u32 largest = __reduce_max_sync(FULL_WARP, block_magnitude(v, one));
    if (threadIdx.x % WARP == 0) atomicMax(most, largest);
  }
  if (group) rotate(v, across, 1);
  norm = group ? transform.scale : 1.0f;
}

template <class T, bool UNBIASED, int OUT>
__device__ __forceinline__ void quantize_rows(void *out, u8 *scales, const T *source, u32 rows, u32 cols, u32 depth,
                                              u32 group, u32 each, const Transform &transform, const Draw &draw) {
  Place place = place_in_rows(rows, depth, each);
  float v[BLOCK], norm;
  load_rotated(v, norm, nullptr, source, place, cols, group, transform);
  Scale scale = scale_block<UNBIASED>(v, norm);
  size_t block = ((size_t)place.row * depth + place.column) / BLOCK;
  round_block<UNBIASED, OUT>(v, scale, RowBits(draw, place.row, place.column), (u8 *)out + block * BYTES<OUT>,
                             place.inside);
  if (OUT == OUT_CODES && place.inside) scales[block] = scale.byte;
}

// For E4M3, whose scales need the largest of a row before anything is rounded. Where `most` is not null it becomes the
// largest magnitude of the source, in bits, if that is larger.
template <class T, bool UNBIASED>
__device__ __forceinline__ void quantize_rows_fp8(u8 *out, float *scales, u32 *raised, u32 *most, const T *source,
                                                  u32 rows, u32 cols, u32 depth, u32 group, u32 each,
                                                  const Transform &transform, const Draw &draw) {
  __shared__ u32 tops[64];
  if (threadIdx.x < WARP) tops[threadIdx.x] = tops[threadIdx.x + WARP] = 0;
  __syncthreads();
  Place place = place_in_rows(rows, depth, each);
  float v[BLOCK], norm;
  load_rotated(v, norm, most, source, place, cols, group, transform);
  u32 magnitude = block_magnitude(v, norm), byte = scale_byte(magnitude);

  u32 local = min(place.local, each); // threads without a row share a place of their own
  if (__shfl_sync(FULL_WARP, local, 0) == __shfl_sync(FULL_WARP, local, 31)) {
    byte = __reduce_max_sync(FULL_WARP, byte);
    if (threadIdx.x % WARP == 0) atomicMax(&tops[local], byte);
  } else {
    atomicMax(&tops[local], byte);
  }
  __syncthreads();
  u32 top = tops[local];
  float whole = vector_scale(top);
  if (place.inside && place.column == 0) scales[place.row] = whole;
  bool lifted;
  Scale scale = scale_in_vector<UNBIASED>(v, norm, magnitude, top, lifted);
  count_raised(raised, lifted && place.inside);
  round_block<UNBIASED, OUT_FP8>(v, scale, RowBits(draw, place.row, place.column),
                                 out + (size_t)place.row * depth + place.column, place.inside);
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

// Where the other form of the source goes that one reading serves too.
struct RowForm {
  void *out;
  float *scales;
  u32 depth, group;
};

// The scale byte that none of a vector of rotated magnitudes exceeds, which are at most sqrt(group) times `most`.
__device__ __forceinline__ u32 top_byte(u32 most, u32 group) {
  return scale_byte(most) + (group == 0 ? 0 : group <= 64 ? 3 : 4);
}

template <class T, bool UNBIASED, int OUT, bool BOTH>
__device__ __forceinline__ void quantize_columns(void *out, void *scales, u32 *raised, const u32 *most,
                                                 u32 most_stride, float *sums, const T *source, u32 rows, u32 cols,
                                                 u32 depth, u32 group, const Transform &transform, const Draw &draw,
                                                 const RowForm &other, const Transform &other_transform) {
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

  if (BOTH) {
    // A block: columns 32 `side` to 32 `side` + 31 of row `line` of the tile.
    u32 line = threadIdx.x / 2, side = threadIdx.x % 2, row = first_row + line, column = first_column + 32 * side;
    u32 signs = other.group ? other_transform.signs[other.group > BLOCK ? side : 0] : 0;
    // What was loaded has the sign of its row.
    if (group) signs ^= (int)(transform.signs[line / 32 & (1 << across) - 1] << (31 - line % 32)) >> 31;
    float v[BLOCK], norm = other.group ? other_transform.scale : 1.0f;
    load_whole((const T *)(data + line * Tile::PITCH + line / 32 * shift) + 32 * side, signs, v);
    if (other.group) rotate(v, other.group > BLOCK ? 2 : 1, 1);
    bool inside = row < rows && column < other.depth;
    Scale scale;
    if (OUT == OUT_FP8) {
      u32 top = top_byte(*most, other.group), magnitude = block_magnitude(v, norm);
      float whole = vector_scale(top);
      if (inside && column == 0) other.scales[row] = whole;
      bool lifted;
      scale = scale_in_vector<UNBIASED>(v, norm, magnitude, top, lifted);
      count_raised(raised, lifted && inside);
    } else {
      scale = scale_block<UNBIASED>(v, norm);
    }
    SharedRowBits drawn(bits + line * Tile::BITS_PITCH + line / 32 * bits_shift + 64 * side, row);
    round_block<UNBIASED, OUT>(
        v, scale, drawn, (u8 *)other.out + ((size_t)row * other.depth + column) * (BYTES<OUT> / BLOCK), inside);
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
  Scale scale;
  if (OUT == OUT_FP8) {
    u32 column = min(first_column + x, cols - 1), top = top_byte(most[(size_t)column * most_stride], group);
    float whole = vector_scale(top);
    if (blockIdx.y == 0 && part == 0) ((float *)scales)[column] = whole;
    bool lifted;
    u32 magnitude = block_magnitude(v, norm);
    scale = scale_in_vector<UNBIASED>(v, norm, magnitude, top, lifted);
    count_raised(raised, lifted && first_column + x < cols);
  } else {
    scale = scale_block<UNBIASED>(v, norm);
  }
  ColumnBits<Tile::BITS_PITCH> drawn(bits + part % 4 * (32 * Tile::BITS_PITCH + bits_shift) + place * 2);
  if (OUT == OUT_CODES) {
    u32 row = first_row + part * BLOCK;
    bool inside = row < depth && first_column + x < cols;
    size_t block = ((size_t)(first_column + x) * depth + row) / BLOCK;
    round_block<UNBIASED, OUT>(v, scale, drawn, (uint4 *)out + block, inside);
    if (inside) ((u8 *)scales)[block] = scale.byte;
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

// quantize_rows_{values,codes,fp8}_{bf16,f32}_{nearest,unbiased}: vectors are the rows of source (rows, cols); `depth`
// is cols padded. Overwrites out (rows, depth): bf16 values, or E4M3 of which scales (rows) times it is the value, or codes
// (rows, depth / 2) and scales (rows, depth / 32). fp8 adds the number of raised blocks to *raised; most may be null.
// Grid: rows / each, rounded up; block: each * depth / 32, rounded up to whole warps, at most 1,024.
// `each` is at most 63; best are the fewest rows that make whole warps, some 96 to 192 threads (H200: 384 cost 17%). rows < 2^31.
//
// quantize_columns_...: vectors are the columns; `depth` is rows padded. Overwrites out (cols, depth) and scales,
// likewise. Where `sums` is not null, overwrites sums (grid y, cols) with the column sums of each tile's rows.
// fp8: most[column * most_stride] is the largest magnitude of a column of the source, in bits; stride 0: of all.
// Grid: cols / C rounded up, depth / R rounded up; block: 256 for bf16, 128 for f32; no dynamic shared memory.
// R = 128 and C = 64 for bf16, 32 for f32; with a group of 256, R = 256 and C = 32 and 16.
#define SHAPE u32 rows, u32 cols, u32 depth, u32 group
#define RANDOM const __grid_constant__ Transform transform, const __grid_constant__ Draw draw
#define ROWS(T, NAME, MODE, UNBIASED)                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_values_##NAME##_##MODE(                       \
      bf16 *out, const T *source, SHAPE, u32 each, RANDOM) {                                                        \
    quantize_rows<T, UNBIASED, OUT_VALUES>(out, nullptr, source, rows, cols, depth, group, each, transform, draw);  \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_codes_##NAME##_##MODE(                        \
      u8 *codes, u8 *scales, const T *source, SHAPE, u32 each, RANDOM) {                                            \
    quantize_rows<T, UNBIASED, OUT_CODES>(codes, scales, source, rows, cols, depth, group, each, transform, draw);  \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(1024, 1) quantize_rows_fp8_##NAME##_##MODE(                          \
      u8 *out, float *scales, u32 *raised, u32 *most, const T *source, SHAPE, u32 each, RANDOM) {                   \
    quantize_rows_fp8<T, UNBIASED>(out, scales, raised, most, source, rows, cols, depth, group, each, transform,    \
                                   draw);                                                                           \
  }
#define COLUMNS(T, NAME, MODE, UNBIASED)                                                                            \
  extern "C" __global__ void __launch_bounds__(Tile<T>::THREADS, 1024 / Tile<T>::THREADS)                           \
      quantize_columns_values_##NAME##_##MODE(bf16 *out, float *sums, const T *source, SHAPE, RANDOM) {             \
    quantize_columns<T, UNBIASED, OUT_VALUES, false>(out, nullptr, nullptr, nullptr, 0, sums, source, rows, cols,   \
                                                     depth, group, transform, draw, RowForm(), transform);          \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(Tile<T>::THREADS) quantize_columns_codes_##NAME##_##MODE(            \
      u8 *codes, u8 *scales, float *sums, const T *source, SHAPE, RANDOM) {                 \
    quantize_columns<T, UNBIASED, OUT_CODES, false>(codes, scales, nullptr, nullptr, 0, sums, source, rows, cols,   \
                                                    depth, group, transform, draw, RowForm(), transform);           \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(Tile<T>::THREADS, 1024 / Tile<T>::THREADS)                           \
      quantize_columns_fp8_##NAME##_##MODE(u8 *out, float *scales, u32 *raised, const u32 *most, u32 most_stride,   \
                                           float *sums, const T *source, SHAPE, RANDOM) {   \
    quantize_columns<T, UNBIASED, OUT_FP8, false>(out, scales, raised, most, most_stride, sums, source, rows, cols, \
                                                  depth, group, transform, draw, RowForm(), transform);             \
  }
#define BOTH(T, NAME)              \
  ROWS(T, NAME, nearest, false)    \
  ROWS(T, NAME, unbiased, true)    \
  COLUMNS(T, NAME, nearest, false) \
  COLUMNS(T, NAME, unbiased, true)
BOTH(bf16, bf16)
BOTH(float, f32)

// quantize_both_{values,fp8}_bf16_{nearest,unbiased}: both forms of source (rows, cols) with one reading and one drawing
// of random bits. Overwrites by_rows (rows, rows_depth) and by_columns (cols, depth), as the kernels above with `draw` for
// both; rows_group is at most 64, group at most 128. fp8: E4M3 with scales for either; *most is the largest magnitude of
// the source, in bits, for either. Grid, block and `sums` as those of quantize_columns.
#define BOTH_FORMS(MODE, UNBIASED)                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 4) quantize_both_values_bf16_##MODE(                            \
      bf16 *by_rows, bf16 *by_columns, float *sums, const bf16 *source, u32 rows, u32 cols, u32 rows_depth,         \
      u32 depth, u32 rows_group, u32 group, const __grid_constant__ Transform rows_transform, RANDOM) {             \
    RowForm other = {by_rows, nullptr, rows_depth, rows_group};                                                     \
    quantize_columns<bf16, UNBIASED, OUT_VALUES, true>(by_columns, nullptr, nullptr, nullptr, 0, sums, source,      \
                                                       rows, cols, depth, group, transform, draw, other,            \
                                                       rows_transform);                                             \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 4) quantize_both_fp8_bf16_##MODE(                               \
      u8 *by_rows, u8 *by_columns, float *row_scales, float *column_scales, u32 *raised, const u32 *most,           \
      float *sums, const bf16 *source, u32 rows, u32 cols, u32 rows_depth, u32 depth, u32 rows_group, u32 group,    \
      const __grid_constant__ Transform rows_transform, RANDOM) {                                                   \
    RowForm other = {by_rows, row_scales, rows_depth, rows_group};                                                  \
    quantize_columns<bf16, UNBIASED, OUT_FP8, true>(by_columns, column_scales, raised, most, 0, sums, source, rows, \
                                                    cols, depth, group, transform, draw, other, rows_transform);    \
  }
BOTH_FORMS(nearest, false)
BOTH_FORMS(unbiased, true)
