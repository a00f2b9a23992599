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
__device__ __forceinline__ float inverse(float scale) {
  if (scale >= 0x1p-100f && scale <= 0x1p100f) return quick_quotient(1.0f, scale);
  return fminf(__fdiv_rn(1.0f, scale), __uint_as_float(0x7f7fffffu));
}

// The nearest whole number, of two the even one, in the low bits: those of its sum with 1.5 * 2^23.
__device__ __forceinline__ u32 whole(float v) { return __float_as_uint(__fadd_rn(v, 12582912.0f)); }

// Codes in the low 8 bits, behind which there are others.
__device__ __forceinline__ u32 first_code(float m, float inverse) {
  float n = __fmul_rn(m, inverse);
  // n is at most 1, and where it is too small for a quick quotient the code is 0 in any case.
  float y = quick_quotient(__fmul_rn(2.0f, n), __fadd_rn(1.0f, fabsf(n)));
  return whole(__fmul_rn(127.0f, y));
}

__device__ __forceinline__ u32 second_code(float root, float inverse) {
  return whole(fmaxf(__fmul_rn(255.0f, __fmul_rn(root, inverse)), 1.0f));
}

// Floats whose scale is that of their tensor.
template <u32 ELEMENT> struct Float;
template <> struct Float<E4M3> {
  typedef u8 Code;
  static const int mantissa = 3, lowest = -6, sign = 7;
  static const u32 largest = 0x43e00000u;  // 448
};
template <> struct Float<F16> {
  typedef u16 Code;
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

// Up to 4 neighbours, all of them in one access.
template <class T> struct alignas(4 * sizeof(T)) Four {
  T of[4];
};

template <class T> __device__ __forceinline__ Four<T> load4(const T *from, u32 count) {
  if (count == 4) return *(const Four<T> *)from;
  Four<T> out;
#pragma unroll
  for (u32 k = 0; k < 4; k++) out.of[k] = k < count ? from[k] : T{};
  return out;
}

// The low bytes of four words.
__device__ __forceinline__ u32 pack_bytes(u32 a, u32 b, u32 c, u32 d) {
  return __byte_perm(__byte_perm(a, b, 0x40), __byte_perm(c, d, 0x40), 0x5410);
}

__device__ __forceinline__ u32 bits_of(float v) { return __float_as_uint(v); }
__device__ __forceinline__ u32 bits_of(bf16 v) { return v.bits; }
__device__ __forceinline__ u32 bits_of(u16 v) { return v; }
__device__ __forceinline__ u32 bits_of(u8 v) { return v; }

template <class T> __device__ __forceinline__ void store4(T *to, u32 count, const Four<T> &from) {
  if (count == 4) {
    u32 bits[4];
#pragma unroll
    for (u32 k = 0; k < 4; k++) bits[k] = bits_of(from.of[k]);
    if constexpr (sizeof(T) == 4) store_words(to, bits[0], bits[1], bits[2], bits[3]);
    else if constexpr (sizeof(T) == 2)
      store_words(to, bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    else *(u32 *)to = pack_bytes(bits[0], bits[1], bits[2], bits[3]);
    return;
  }
#pragma unroll
  for (u32 k = 0; k < 4; k++)
    if (k < count) to[k] = from.of[k];
}

// The largest of the 8 threads that hold a group.
__device__ __forceinline__ float group_max(const Four<float> &v) {
  float most = fmaxf(fmaxf(fabsf(v.of[0]), fabsf(v.of[1])), fmaxf(fabsf(v.of[2]), fabsf(v.of[3])));
#pragma unroll
  for (int i = GROUP / 8; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, i));
  return most;
}

// What a number is stored as.
template <u32 ELEMENT> struct Stored {
  typedef typename Float<ELEMENT>::Code Code;
};
template <> struct Stored<F32> {
  typedef float Code;
};
template <> struct Stored<BF16> {
  typedef bf16 Code;
};
template <> struct Stored<INT8> {
  typedef u8 Code;
};

// Up to 4 numbers as they are stored, and what scales them. Kernels fetch all that they need of an
// element before they make numbers of any of it, so that they wait for memory once, and not once
// for each array.
template <u32 ELEMENT> struct Fetched {
  Four<typename Stored<ELEMENT>::Code> codes;
  float scale;
};

// Up to 4 numbers of a moment, the first or the second, from element i on; those that are not there
// are 0, as in all loads here, so that all that is made of them is 0. Of a tensor that has one
// scale it is `scale`.
template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ Fetched<ELEMENT> fetch_moments(const Entry &e, Index i, u32 count,
                                                          float scale) {
  typedef typename Stored<ELEMENT>::Code Code;
  const float *scales = SECOND ? e.v_scales : e.m_scales;
  if (ELEMENT == INT8) scale = count ? scales[i / GROUP] : 0.0f;
  return {load4((const Code *)(SECOND ? e.v : e.m) + i, count), scale};
}

template <bool SECOND, u32 ELEMENT>
__device__ __forceinline__ Four<float> decode(const Fetched<ELEMENT> &from,
                                              const Meanings &meanings) {
  Four<float> out;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    auto code = from.codes.of[k];
    if constexpr (ELEMENT == F32) out.of[k] = code;
    else if constexpr (ELEMENT == BF16) out.of[k] = to_f32(code);
    else if constexpr (ELEMENT == INT8)
      out.of[k] = SECOND ? second_of(meanings.second[code], from.scale)
                         : __fmul_rn(meanings.first[code], from.scale);
    else out.of[k] = of_float<ELEMENT>(code, from.scale);
  }
  return out;
}

template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ Four<float> load_moments(const Entry &e, Index i, u32 count,
                                                    const Meanings &meanings, float scale) {
  return decode<SECOND>(fetch_moments<ELEMENT, SECOND>(e, i, count, scale), meanings);
}

// Stores them; second moments in 8 bits are given as their roots. All threads of a warp call it,
// with the numbers that there are not as 0. i counts from element `start` of the parameter on. Of a
// tensor that has one scale `inverted` is its inverse.
template <u32 ELEMENT, bool SECOND, class Index>
__device__ __forceinline__ void store_moments(const Entry &e, u64 start, Index i, u32 count,
                                              const Four<float> &values, const Moments &moments,
                                              u32 number, float inverted) {
  void *to = SECOND ? e.v : e.m;
  if (ELEMENT == F32) store4((float *)to + i, count, values);
  if (ELEMENT == BF16) {
    Four<bf16> stored;
    if (moments.drawn[SECOND]) {
      Draw draw = moments.draw;
      draw.word3 = number;
      uint4 words = philox(draw, (u32)((start + i) / 8), SECOND);
      u32 pairs[2] = {i % 8 ? words.z : words.x, i % 8 ? words.w : words.y};
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        u32 drawn = pairs[k / 2] >> (16 * (k % 2)) & 0xffff;
        stored.of[k].bits = (u16)((__float_as_uint(values.of[k]) + drawn) >> 16);
      }
    } else {
#pragma unroll
      for (u32 k = 0; k < 4; k++) stored.of[k] = from_f32<bf16>(values.of[k]);
    }
    store4((bf16 *)to + i, count, stored);
  }
  if (ELEMENT == INT8) {
    float scale = group_max(values);
    inverted = inverse(scale);
    u32 codes[4];
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      codes[k] = SECOND ? second_code(values.of[k], inverted) : first_code(values.of[k], inverted);
    if (count == 4) {
      ((u32 *)to)[i / 4] = pack_bytes(codes[0], codes[1], codes[2], codes[3]);
    } else {
#pragma unroll
      for (u32 k = 0; k < 4; k++)
        if (k < count) ((u8 *)to)[i + k] = (u8)codes[k];
    }
    if (i % GROUP == 0 && count) (SECOND ? e.v_scales : e.m_scales)[i / GROUP] = scale;
  }
  if constexpr (ELEMENT == E4M3 || ELEMENT == F16) {
    typedef typename Float<ELEMENT>::Code Code;
    Four<Code> codes;
#pragma unroll
    for (u32 k = 0; k < 4; k++) codes.of[k] = (Code)to_float<ELEMENT>(values.of[k], inverted);
    store4((Code *)to + i, count, codes);
  }
}

// Second moments as an entry has them.
template <class Index>
__device__ __forceinline__ Four<float> load_second(const Entry &e, Index i, u32 count,
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

// Bytes of a number as it is stored.
__device__ __forceinline__ u64 size_of(u32 element) {
  return element == F32 ? 4 : element == BF16 || element == F16 ? 2 : 1;
}

// An entry whose pointers are those of its element `start`, a whole number of groups; what lies
// there is then found by numbers of 32 bits.
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
typedef Four<u32> Words;

template <class Index>
__device__ __forceinline__ Words load_words(const void *from, Index i, u32 count) {
  return load4((const u32 *)from + i, count);
}

template <class Index>
__device__ __forceinline__ uint2 load_halves(const void *from, Index i, u32 count) {
  Four<u16> halves = load4((const u16 *)from + i, count);
  return make_uint2(halves.of[0] | (u32)halves.of[1] << 16, halves.of[2] | (u32)halves.of[3] << 16);
}

template <class Index>
__device__ __forceinline__ Words fetch_gradients(const Entry &e, Index i, u32 count) {
  if (!e.narrow) return load_words(e.gradient, i, count);
  uint2 halves = load_halves(e.gradient, i, count);
  return {{halves.x, halves.y}};
}

__device__ __forceinline__ Four<float> decode_gradients(const Entry &e, const Words &from) {
  Four<float> g;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    u32 pair = from.of[k / 2];
    g.of[k] = __uint_as_float(e.narrow ? (k % 2 ? pair & 0xffff0000u : pair << 16) : from.of[k]);
  }
  return g;
}

template <class Index>
__device__ __forceinline__ Four<float> load_gradients(const Entry &e, Index i, u32 count) {
  return decode_gradients(e, fetch_gradients(e, i, count));
}

// Whether weights are split: of all of them, or as the entry says.
enum Split : u32 { WHOLE, HALVES, EITHER };

template <u32 SPLIT> __device__ __forceinline__ bool splits(const Entry &e) {
  return SPLIT == EITHER ? e.low != nullptr : SPLIT == HALVES;
}

template <u32 SPLIT, class Index>
__device__ __forceinline__ Words fetch_weights(const Entry &e, Index i, u32 count) {
  if (!splits<SPLIT>(e)) return load_words(e.param, i, count);
  uint2 copy = load_halves(e.copy, i, count), low = load_halves(e.low, i, count);
  return {{copy.x, copy.y, low.x, low.y}};
}

template <u32 SPLIT>
__device__ __forceinline__ Four<float> decode_weights(const Entry &e, const Words &from) {
  Four<float> p;
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
__device__ __forceinline__ Four<float> load_weights(const Entry &e, Index i, u32 count) {
  return decode_weights<EITHER>(e, fetch_weights<EITHER>(e, i, count));
}

// Stores them, with their copies, and makes of p what operands are made from.
template <u32 SPLIT, class Index>
__device__ __forceinline__ void store_weights(const Entry &e, Index i, u32 count, Four<float> &p) {
  Four<bf16> copy;
  if (splits<SPLIT>(e)) {
    Four<u16> low;
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      split(p.of[k], copy.of[k], low.of[k]);
      p.of[k] = to_f32(copy.of[k]);
    }
    store4(e.low + i, count, low);
  } else {
#pragma unroll
    for (u32 k = 0; k < 4; k++) copy.of[k] = from_f32<bf16>(p.of[k]);
    store4(e.param + i, count, p);
  }
  store4(e.copy + i, count, copy);
}
