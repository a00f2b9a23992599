// Weights and moments as updates load and store them: moments in f32, bf16, 8 bits with scales of
// groups, or E4M3 and fp16 with one of the tensor (optim/moments.rs), weights in f32 or in two
// halves (optim/master.rs). Behind random.cuh and optimize.cuh.

#define GROUP 32
#define THREADS 256

// What becomes of the first and the second moment.
struct Moments {
  // What is kept of them: the decay rates, or 0 where they start again.
  float kept[2];
  // In bf16 they are rounded stochastically where `drawn`, by bits whose rows are 8 elements each;
  // else to nearest. The draw's word 3 is the number of the parameter.
  u32 drawn[2];
  Draw draw;
};

// __fdiv_rn and __fsqrt_rn without what these do for numbers near the ends of the exponents: their
// own instructions for all others, but no branch, so that those of several numbers go on side by
// side. For numerators and quotients from 2^-100 to 2^100, and for numbers from 2^-101 on.
__device__ __forceinline__ float quick_quotient(float a, float b) {
  float inverse = reciprocal_of(b);
  inverse = __fmaf_rn(inverse, __fmaf_rn(-b, inverse, 1.0f), inverse);
  float quotient = __fmul_rn(a, inverse);
  return __fmaf_rn(inverse, __fmaf_rn(-b, quotient, a), quotient);
}

__device__ __forceinline__ float quick_root(float v) {
  float inverse = inverse_root_of(v), root = __fmul_rn(v, inverse);
  return __fmaf_rn(__fmaf_rn(-root, root, v), __fmul_rn(0.5f, inverse), root);
}

// What codes stand for, but for the scale.
//
// NOTE: looked up, because a code takes two divisions.
struct Meanings {
  float first[256], second[256];
};

__device__ __forceinline__ void fill(Meanings &meanings) {
  float y = __fdiv_rn((float)(signed char)threadIdx.x, 127.0f);
  meanings.first[threadIdx.x] = __fdiv_rn(y, __fsub_rn(2.0f, fabsf(y)));
  meanings.second[threadIdx.x] = __fdiv_rn((float)threadIdx.x, 255.0f);
  __syncthreads();
}

__device__ __forceinline__ float second_of(float root, float scale) {
  float r = __fmul_rn(root, scale);
  return __fmul_rn(r, r);
}

// What numbers of a group are multiplied by.
//
// NOTE: what is rare is a function of its own here and below, so that registers of what is not are
// not chosen for it.
__device__ __noinline__ float inverse_of_any(float scale) {
  return fminf(__fdiv_rn(1.0f, scale), __uint_as_float(0x7f7fffffu));
}
__device__ __forceinline__ float inverse(float scale) {
  if (scale >= 0x1p-100f && scale <= 0x1p100f) return quick_quotient(1.0f, scale);
  return inverse_of_any(scale);
}

// The nearest whole number, of two the even one, in the low bits: those of its sum with 1.5 * 2^23.
__device__ __forceinline__ u32 whole(float v) { return __float_as_uint(__fadd_rn(v, 12582912.0f)); }

// Codes in the low 8 bits, behind which there are others.
__device__ __forceinline__ u32 first_code(float m, float inverse) {
  // The code is that of 127 times the quotient of 2 n by 1 + |n|. Half a quotient times 254 rounds
  // as that does, and a quotient that is corrected once is near enough: for each n up to 1 the code
  // is the same, also where the reciprocal is two last places off.
  float n = __fmul_rn(m, inverse), divisor = __fadd_rn(1.0f, fabsf(n));
  float reciprocal = reciprocal_of(divisor), half = __fmul_rn(n, reciprocal);
  half = __fmaf_rn(reciprocal, __fmaf_rn(-divisor, half, n), half);
  return whole(__fmul_rn(254.0f, half));
}

__device__ __forceinline__ u32 second_code(float root, float inverse) {
  return whole(fmaxf(__fmul_rn(255.0f, __fmul_rn(root, inverse)), 1.0f));
}

// Floats whose scale is that of their tensor.
template <u32 ELEMENT> struct Float;
template <> struct Float<E4M3> {
  static const int mantissa = 3, lowest = -6, sign = 7;
  static const u32 largest = 0x43e00000u;  // 448
};
template <> struct Float<F16> {
  static const int mantissa = 10, lowest = -14, sign = 15;
  static const u32 largest = 0x477fe000u;  // 65504
};

// Rounds by adding to 1.5 * 2^23 last places, a number of which the sum's lowest bits then are.
template <u32 ELEMENT> __device__ __forceinline__ u32 to_float(float v, float inverse) {
  typedef Float<ELEMENT> Of;
  u32 bits = __float_as_uint(__fmul_rn(v, inverse));
  float magnitude = fminf(__uint_as_float(bits & 0x7fffffffu), __uint_as_float(Of::largest));
  int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, Of::lowest);
  u32 shift = (u32)(exponent - Of::mantissa + 23 + 127) << 23 | 1u << 22;
  u32 places = __float_as_uint(__fadd_rn(magnitude, __uint_as_float(shift))) - shift;
  return (((u32)(exponent - Of::lowest) << Of::mantissa) + places) | (bits >> 31) << Of::sign;
}

template <u32 ELEMENT> __device__ __forceinline__ float of_float(u32 code, float scale) {
  typedef Float<ELEMENT> Of;
  u32 negative = code >> Of::sign, bits = code & ((1u << Of::sign) - 1);
  float place = __uint_as_float((u32)(Of::lowest - Of::mantissa + 127) << 23);
  u32 small = __float_as_uint(__fmul_rn((float)bits, place));
  u32 normal = (bits << (23 - Of::mantissa)) + ((u32)(Of::lowest + 126) << 23);
  u32 magnitude = bits >> Of::mantissa ? normal : small;
  return __fmul_rn(__uint_as_float(magnitude | negative << 31), scale);
}

// The scale of a tensor whose largest magnitude has these bits; as it was where all are 0 or one is
// not finite.
template <u32 ELEMENT> __device__ __forceinline__ float tensor_scale(float before, u32 largest) {
  if (largest == 0 || largest >= 0x7f800000u) return before;
  u32 most = Float<ELEMENT>::largest;
  int above = (largest & 0x7fffffu) > (most & 0x7fffffu), of_most = (int)(most >> 23);
  int exponent = min(max((int)(largest >> 23) - of_most + above, -100), 254 - of_most);
  return __uint_as_float((u32)(exponent + 127) << 23);
}

// The scales of a tensor's moments where each has one: what is stored is multiplied by `loaded`,
// and what will be by `inverse` before.
struct Scales {
  float loaded[2], inverse[2];
};

// `before`: the scales of what is stored of each parameter, where those in the states are already
// those of what will be; else null.
__device__ __forceinline__ Scales scales_of(const Entry &e, const float2 *before, u32 number) {
  float first = *e.m_scales, second = e.v ? *e.v_scales : 0.0f;
  float2 loaded = before ? before[number] : make_float2(first, second);
  return {{loaded.x, loaded.y}, {inverse(first), inverse(second)}};
}

// Up to 4 numbers that lie side by side.
struct Four {
  float of[4];
};

// The same as they are stored, in BYTES each. What is not there is 0.
//
// NOTE: this is what loads leave until numbers are needed. Taken apart at once, a thread would wait
// for its memory right where it asked for it.
template <u32 BYTES> struct Words {
  u32 of[BYTES];

  __device__ __forceinline__ u32 code(u32 k) const {
    if constexpr (BYTES == 4) return of[k];
    else if constexpr (BYTES == 2) return of[k / 2] >> 16 * (k % 2) & 0xffff;
    else return of[0] >> 8 * k & 0xff;
  }
};

// Numbers from number i on; four in one access.
template <u32 BYTES, class Index>
__device__ __forceinline__ Words<BYTES> load_words(const void *from, Index i, u32 count) {
  Words<BYTES> out = {};
  const u8 *at = (const u8 *)from + (u64)i * BYTES;
  if (count == 4) {
    if constexpr (BYTES == 4) {
      uint4 raw = *(const uint4 *)at;
      out.of[0] = raw.x, out.of[1] = raw.y, out.of[2] = raw.z, out.of[3] = raw.w;
    } else if constexpr (BYTES == 2) {
      uint2 raw = *(const uint2 *)at;
      out.of[0] = raw.x, out.of[1] = raw.y;
    } else {
      out.of[0] = *(const u32 *)at;
    }
    return out;
  }
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    if (k >= count) break;
    if constexpr (BYTES == 4) out.of[k] = ((const u32 *)at)[k];
    else if constexpr (BYTES == 2) out.of[k / 2] |= (u32)((const u16 *)at)[k] << 16 * (k % 2);
    else out.of[0] |= (u32)at[k] << 8 * k;
  }
  return out;
}

// Stores numbers from number i on.
template <u32 BYTES, class Index>
__device__ __forceinline__ void store_numbers(void *to, Index i, u32 count,
                                              const Words<BYTES> &from) {
  u8 *at = (u8 *)to + (u64)i * BYTES;
  if (count == 4) {
    if constexpr (BYTES == 4) store_words(at, from.of[0], from.of[1], from.of[2], from.of[3]);
    else if constexpr (BYTES == 2) store_words(at, from.of[0], from.of[1]);
    else *(u32 *)at = from.of[0];
    return;
  }
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    if (k >= count) break;
    if constexpr (BYTES == 4) ((u32 *)at)[k] = from.code(k);
    else if constexpr (BYTES == 2) ((u16 *)at)[k] = (u16)from.code(k);
    else at[k] = (u8)from.code(k);
  }
}

// Words of four codes, in whose higher bits there may be others.
template <u32 BYTES> __device__ __forceinline__ Words<BYTES> pack(const u32 codes[4]) {
  if constexpr (BYTES == 4) {
    return {{codes[0], codes[1], codes[2], codes[3]}};
  } else {
    u32 low = __byte_perm(codes[0], codes[1], BYTES == 2 ? 0x5410 : 0x0040);
    u32 high = __byte_perm(codes[2], codes[3], BYTES == 2 ? 0x5410 : 0x0040);
    if constexpr (BYTES == 2) return {{low, high}};
    else return {{__byte_perm(low, high, 0x5410)}};
  }
}

// Numbers in bf16.
__device__ __forceinline__ Four load_bf16(const bf16 *from, u32 count) {
  Words<2> words = load_words<2>(from, 0u, count);
  Four out;
#pragma unroll
  for (u32 k = 0; k < 4; k++) out.of[k] = __uint_as_float(words.code(k) << 16);
  return out;
}
__device__ __forceinline__ void store_bf16(bf16 *to, u32 count, const Four &from) {
  u32 codes[4];
#pragma unroll
  for (u32 k = 0; k < 4; k++) codes[k] = from_f32<bf16>(from.of[k]).bits;
  store_numbers(to, 0u, count, pack<2>(codes));
}

// The largest of the 8 threads that hold a group.
__device__ __forceinline__ float group_max(const Four &v) {
  float most = fmaxf(fmaxf(fabsf(v.of[0]), fabsf(v.of[1])), fmaxf(fabsf(v.of[2]), fabsf(v.of[3])));
#pragma unroll
  for (int i = GROUP / 8; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, i));
  return most;
}

// Bytes of a number as it is stored.
__device__ __forceinline__ constexpr u32 size_of(u32 element) {
  return element == F32 ? 4 : element == BF16 || element == F16 ? 2 : 1;
}

// Up to 4 numbers as they are stored, and what scales them. Kernels fetch all that they need of an
// element before they make numbers of any of it, so that they wait for memory once, and not once
// for each array.
template <u32 ELEMENT> struct Fetched {
  Words<size_of(ELEMENT)> codes;
  float scale;
};

// Up to 4 numbers of a moment, the first or the second, from element i on; those that are not there
// are 0, as in all loads here, so that all that is made of them is 0. Of a tensor that has one
// scale it is `scale`.
template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ Fetched<ELEMENT> fetch_moments(const Entry &e, Index i, u32 count,
                                                          float scale) {
  const float *scales = SECOND ? e.v_scales : e.m_scales;
  if (ELEMENT == INT8) scale = count ? scales[i / GROUP] : 0.0f;
  return {load_words<size_of(ELEMENT)>(SECOND ? e.v : e.m, i, count), scale};
}

template <bool SECOND, u32 ELEMENT>
__device__ __forceinline__ Four decode(const Fetched<ELEMENT> &from, const Meanings &meanings) {
  Four out;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    u32 code = from.codes.code(k);
    if constexpr (ELEMENT == F32) out.of[k] = __uint_as_float(code);
    else if constexpr (ELEMENT == BF16) out.of[k] = __uint_as_float(code << 16);
    else if constexpr (ELEMENT == INT8)
      out.of[k] = SECOND ? second_of(meanings.second[code], from.scale)
                         : __fmul_rn(meanings.first[code], from.scale);
    else out.of[k] = of_float<ELEMENT>(code, from.scale);
  }
  return out;
}

template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ Four load_moments(const Entry &e, Index i, u32 count,
                                             const Meanings &meanings, float scale) {
  return decode<SECOND>(fetch_moments<ELEMENT, SECOND>(e, i, count, scale), meanings);
}

// Stores them; second moments in 8 bits are given as their roots. All threads of a warp call it,
// with the numbers that there are not as 0. i counts from element `start` of the parameter on. Of a
// tensor that has one scale `inverted` is its inverse.
template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ void store_moments(const Entry &e, u64 start, Index i, u32 count,
                                              const Four &values, const Moments &moments,
                                              u32 number, float inverted) {
  u32 codes[4];
  if constexpr (ELEMENT == F32) {
#pragma unroll
    for (u32 k = 0; k < 4; k++) codes[k] = __float_as_uint(values.of[k]);
  } else if constexpr (ELEMENT == BF16) {
    if (moments.drawn[SECOND]) {
      Draw draw = moments.draw;
      draw.word3 = number;
      uint4 words = philox(draw, (u32)((start + i) / 8), SECOND);
      bool upper = (start + i) % 8;
      u32 pairs[2] = {upper ? words.z : words.x, upper ? words.w : words.y};
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        u32 drawn = pairs[k / 2] >> (16 * (k % 2)) & 0xffff;
        codes[k] = (__float_as_uint(values.of[k]) + drawn) >> 16;
      }
    } else {
#pragma unroll
      for (u32 k = 0; k < 4; k++) codes[k] = from_f32<bf16>(values.of[k]).bits;
    }
  } else if constexpr (ELEMENT == INT8) {
    float scale = group_max(values);
    inverted = inverse(scale);
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      codes[k] = SECOND ? second_code(values.of[k], inverted) : first_code(values.of[k], inverted);
    if ((start + i) % GROUP == 0 && count) (SECOND ? e.v_scales : e.m_scales)[i / GROUP] = scale;
  } else {
#pragma unroll
    for (u32 k = 0; k < 4; k++) codes[k] = to_float<ELEMENT>(values.of[k], inverted);
  }
  const u32 BYTES = size_of(ELEMENT);
  store_numbers<BYTES>(SECOND ? e.v : e.m, i, count, pack<BYTES>(codes));
}

// Second moments as an entry has them.
template <class Index>
__device__ __forceinline__ Four load_second(const Entry &e, Index i, u32 count,
                                            const Meanings &meanings) {
  switch (e.element[1]) {
    case F16: return load_moments<F16, true>(e, i, count, meanings, *e.v_scales);
    case INT8: return load_moments<INT8, true>(e, i, count, meanings, 0.0f);
    case BF16: return load_moments<BF16, true>(e, i, count, meanings, 0.0f);
    default: return load_moments<F32, true>(e, i, count, meanings, 0.0f);
  }
}

// Calls `of(i, count)` for the elements of a piece, up to 4 of them a thread, in all threads of a
// block as often. Where none is missing count is a constant, so that loads follow each other
// without a branch between them.
template <class Index, class Of>
__device__ __forceinline__ void each_of_piece(Index start, Index end, Of of) {
  if ((end - start) % (4 * THREADS) == 0) {
    for (Index i = start + 4 * threadIdx.x; i < end; i += 4 * THREADS) of(i, 4u);
    return;
  }
  for (; start < end; start += 4 * THREADS) {
    Index i = start + 4 * threadIdx.x;
    of(i, i < end ? (u32)min(end - i, (Index)4) : 0);
  }
}

// An entry whose pointers are those of its element `start`, and of the scale of the group that
// holds it; what lies there is then found by numbers of 32 bits.
__device__ __forceinline__ Entry at_element(Entry e, u64 start) {
  e.param += start, e.copy += start;
  if (e.low) e.low += start;
  e.gradient = (const u8 *)e.gradient + start * (e.narrow ? 2 : 4);
  e.m = (u8 *)e.m + start * size_of(e.element[0]), e.v = (u8 *)e.v + start * size_of(e.element[1]);
  if (e.element[0] == INT8) e.m_scales += start / GROUP;
  if (e.element[1] == INT8) e.v_scales += start / GROUP;
  return e;
}

// Up to 4 gradients or weights as they are stored: numbers, or halves in pairs.
template <class Index>
__device__ __forceinline__ Words<4> fetch_gradients(const Entry &e, Index i, u32 count) {
  if (!e.narrow) return load_words<4>(e.gradient, i, count);
  Words<2> halves = load_words<2>(e.gradient, i, count);
  return {{halves.of[0], halves.of[1]}};
}

__device__ __forceinline__ Four decode_gradients(const Entry &e, const Words<4> &from) {
  Four g;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    u32 pair = from.of[k / 2];
    g.of[k] = __uint_as_float(e.narrow ? (k % 2 ? pair & 0xffff0000u : pair << 16) : from.of[k]);
  }
  return g;
}

template <class Index>
__device__ __forceinline__ Four load_gradients(const Entry &e, Index i, u32 count) {
  return decode_gradients(e, fetch_gradients(e, i, count));
}

// Whether weights are split: of all of them, or as the entry says.
enum Split : u32 { WHOLE, HALVES, EITHER };

template <u32 SPLIT> __device__ __forceinline__ bool splits(const Entry &e) {
  return SPLIT == EITHER ? e.low != nullptr : SPLIT == HALVES;
}

template <u32 SPLIT, class Index>
__device__ __forceinline__ Words<4> fetch_weights(const Entry &e, Index i, u32 count) {
  if (!splits<SPLIT>(e)) return load_words<4>(e.param, i, count);
  Words<2> copy = load_words<2>(e.copy, i, count), low = load_words<2>(e.low, i, count);
  return {{copy.of[0], copy.of[1], low.of[0], low.of[1]}};
}

template <u32 SPLIT>
__device__ __forceinline__ Four decode_weights(const Entry &e, const Words<4> &from) {
  Four p;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    u32 shift = 16 * (k % 2);
    bf16 copy = {(u16)(from.of[k / 2] >> shift)};
    u16 low = (u16)(from.of[2 + k / 2] >> shift);
    p.of[k] = splits<SPLIT>(e) ? join(copy, low) : __uint_as_float(from.of[k]);
  }
  return p;
}

template <class Index>
__device__ __forceinline__ Four load_weights(const Entry &e, Index i, u32 count) {
  return decode_weights<EITHER>(e, fetch_weights<EITHER>(e, i, count));
}

// `split` of optimize.cuh for four numbers: copies, and what these lack, in pairs.
__device__ __forceinline__ void split(const Four &p, Words<2> &copies, Words<2> &lows) {
#pragma unroll
  for (u32 k = 0; k < 2; k++) {
    u32 a = __float_as_uint(p.of[2 * k]), b = __float_as_uint(p.of[2 * k + 1]);
    copies.of[k] = __byte_perm(a + 0x8000, b + 0x8000, 0x7632);
    lows.of[k] = __byte_perm(a, b, 0x5410);
  }
  // Of a half that is 0x8000 the highest bit goes where 1 is taken from it. One in 16,384 threads
  // has one, or what looks like it for the half below.
  u32 middle = (lows.of[0] & ~(lows.of[0] - 0x10001)) | (lows.of[1] & ~(lows.of[1] - 0x10001));
  if (middle & 0x80008000)
#pragma unroll
    for (u32 k = 0; k < 2; k++)
      lows.of[k] += ((lows.of[k] & 0xffff) == 0x8000) + ((lows.of[k] >> 16 == 0x8000) << 16);
}

// The largest magnitude of weights that were stored: of split ones bits of copies, in the halves of
// a word, else of the numbers.
struct Largest {
  u32 bits = 0;

  __device__ __forceinline__ void see(float p) {
    bits = __float_as_uint(max_nan(__uint_as_float(bits), fabsf(p)));
  }
  __device__ __forceinline__ void see(const Words<2> &copies, u32 count) {
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
      u32 there = 2 * k >= count ? 0 : 2 * k + 1 == count ? 0x7fff : 0x7fff7fff;
      bits = max_halves(bits, copies.of[k] & there);
    }
  }
  __device__ __forceinline__ float magnitude(bool of_copies) const {
    return __uint_as_float(of_copies ? max(bits << 16, bits & 0xffff0000u) : bits);
  }
};

// Stores weights, with their copies.
template <u32 SPLIT, class Index>
__device__ __forceinline__ void store_weights(const Entry &e, Index i, u32 count, const Four &p,
                                              Largest &largest) {
  if (splits<SPLIT>(e)) {
    Words<2> copies, lows;
    split(p, copies, lows);
    store_numbers(e.low, i, count, lows);
    store_numbers(e.copy, i, count, copies);
    largest.see(copies, count);
    return;
  }
  u32 numbers[4], copies[4];
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    numbers[k] = __float_as_uint(p.of[k]), copies[k] = from_f32<bf16>(p.of[k]).bits;
    if (k < count) largest.see(p.of[k]);
  }
  store_numbers(e.param, i, count, pack<4>(numbers));
  store_numbers(e.copy, i, count, pack<2>(copies));
}
