// Numbers in NVFP4, in registers: elements of E2M1, an E4M3 scale for every 16 of them, and one of
// the tensor or of 128 elements above it.
//
// A thread has 32 elements of a vector, two blocks. Eight threads of a warp have the 256 of a
// vector's chunk, STEP lanes apart, four vectors a warp: a source along the reduction is read by
// those who need it, of one that is stored transposed a tile lies in shared memory.
// requantize_nvfp4 has four threads for 128, eight lanes apart.
//
// NOTE: what is rotated is bound by instructions, of which an H100 does some 20 T a second here, by
// the ones for integers, bits and comparisons most, which are half as fast.

// How many lanes apart the threads of a vector are.
template <bool TRANSPOSED> struct Lanes {
  static constexpr u32 STEP = TRANSPOSED ? 4 : 1;
};

// Where a thread's elements are: which 32 of the chunk, and which vector of the thread block.
struct Place {
  u32 part, local;
};
template <bool TRANSPOSED> __device__ __forceinline__ Place place_of_thread() {
  u32 lane = threadIdx.x % WARP, first = threadIdx.x / WARP * 4;
  return TRANSPOSED ? Place{lane / 4, first + lane % 4} : Place{lane % 8, first + lane / 8};
}

// ---- Gathering ----------------------------------------------------------------------------------

// The transform's signs of 32 elements of a chunk, bit by bit. Those of 16 are there twice.
__device__ __forceinline__ u32 signs_of(const Values &q, u32 part) {
  return q.transform.signs[q.group > BLOCK ? part & (q.group / BLOCK - 1) : 0];
}
// That of element k of these in all bits.
__device__ __forceinline__ u32 sign_of(u32 signs, u32 k) {
  return (u32)((int)(signs << (31 - k % BLOCK)) >> 31);
}

// 256 lines of 32 numbers in shared memory, each 32 of them shifted, so that threads that read down
// columns 32 lines apart do so from different banks. `GAP` bytes follow a line: 16 where threads
// read a line each.
template <u32 SIZE, u32 GAP = 0> struct Lines {
  static constexpr u32 PITCH = VECTORS * SIZE + GAP, BYTES = CHUNK * PITCH + CHUNK / BLOCK * 16;
  static __device__ __forceinline__ u32 at(u32 line) { return line * PITCH + line / BLOCK * 16; }
};

// A chunk of 32 vectors of a source that is stored transposed, zeros for what lies outside; with
// the transform's signs where FLIPPED.
template <class T, bool FLIPPED, class Data = Lines<sizeof(T)>>
__device__ __forceinline__ void load_tile(u8 *tile, const Values &q, u32 first_vector, u32 first) {
  constexpr u32 EACH = 16 / sizeof(T), PIECES = VECTORS / EACH, STEP = THREADS / PIECES;
  const T *source = (const T *)q.source;
  if (first + CHUNK <= q.length && first_vector + VECTORS <= q.vectors && q.vectors % 8 == 0) {
    u32 line = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const T *from = source + (size_t)(first + line) * q.vectors + first_vector + piece * EACH;
    uint4 raw[PIECES];
#pragma unroll
    for (u32 j = 0; j < PIECES; j++)
      raw[j] = *(const uint4 *)(from + (size_t)(j * STEP) * q.vectors);
    if (FLIPPED && q.group) {
#pragma unroll
      for (u32 j = 0; j < PIECES; j++) {
        u32 signs = signs_of(q, line / BLOCK + j * STEP / BLOCK);
        u32 flip = sign_of(signs, line) & (sizeof(T) == 2 ? 0x80008000u : 0x80000000u);
        raw[j].x ^= flip, raw[j].y ^= flip, raw[j].z ^= flip, raw[j].w ^= flip;
      }
    }
    u8 *to = tile + Data::at(line) + piece * 16;
#pragma unroll
    for (u32 j = 0; j < PIECES; j++) *(uint4 *)(to + Data::at(j * STEP)) = raw[j];
  } else {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < CHUNK * VECTORS; i += THREADS) {
      u32 k = first + i / VECTORS, vector = first_vector + i % VECTORS;
      float number = 0.0f;
      if (k < q.length && vector < q.vectors)
        number = to_f32(source[(size_t)k * q.vectors + vector]);
      if (FLIPPED && q.group) {
        u32 line = i / VECTORS, flip = sign_of(signs_of(q, line / BLOCK), line) & 0x80000000u;
        number = __uint_as_float(__float_as_uint(number) ^ flip);
      }
      ((T *)(tile + Data::at(i / VECTORS)))[i % VECTORS] = from_f32<T>(number);
    }
  }
}

// A thread's elements of a tile.
template <class T, class Data = Lines<sizeof(T)>>
__device__ __forceinline__ void read_column(const u8 *tile, const Place &place, float v[BLOCK]) {
  const u8 *column = tile + Data::at(BLOCK * place.part) + place.local * sizeof(T);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) v[i] = to_f32(*(const T *)(column + i * Data::PITCH));
}

// The signs of a thread's elements, and their place in the group.
__device__ __forceinline__ void flip(float v[BLOCK], const Values &q, u32 part) {
  u32 signs = signs_of(q, part);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++)
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (signs << (31 - i) & 0x80000000u));
}

// The butterfly of the groups of 16 to 256 elements, not normalized: within a thread's 32. NOTE: a
// question before every stride would cost a move for every sum.
__device__ __forceinline__ void rotate_within(float v[BLOCK], u32 group) {
#pragma unroll
  for (u32 stride = 1; stride < BLOCK; stride *= 2)
    if (stride < SIXTEEN || group > SIXTEEN)
#pragma unroll
      for (u32 i = 0; i < BLOCK; i++)
        if ((i & stride) == 0) {
          float a = v[i], b = v[i + stride];
          v[i] = __fadd_rn(a, b), v[i + stride] = __fsub_rn(a, b);
        }
}

// Then between the threads of a group, STEP lanes apart.
template <u32 STEP> __device__ __forceinline__ void rotate_across(float v[BLOCK], u32 group) {
#pragma unroll 1
  for (u32 mask = 1; mask < group / BLOCK; mask *= 2) {
    // The upper thread's values are theirs - mine: one exact product, one rounding.
    float sign = threadIdx.x & STEP * mask ? -1.0f : 1.0f;
#pragma unroll
    for (u32 i = 0; i < BLOCK; i++)
      v[i] = __fmaf_rn(sign, v[i], __shfl_xor_sync(FULL_WARP, v[i], STEP * mask));
  }
}

// 32 elements of a row from a column on, zeros for what lies outside of (rows, columns).
template <class T>
__device__ __forceinline__ void load_part(const T *source, u32 rows, u32 columns, u32 row,
                                          u32 column, float v[BLOCK]) {
  const T *from = source + (size_t)row * columns + column;
  if (row < rows && column + BLOCK <= columns && columns % 8 == 0) {
#pragma unroll
    for (u32 i = 0; i < BLOCK; i += 8) load8(from + i, v + i);
  } else {
#pragma unroll
    for (u32 i = 0; i < BLOCK; i++)
      v[i] = row < rows && column + i < columns ? to_f32(from[i]) : 0.0f;
  }
}

// A thread's elements, rotated among themselves. `tile`: shared memory for a chunk of a transposed
// source.
template <class T, bool TRANSPOSED>
__device__ __forceinline__ void gather(const Values &q, u8 *tile, const Place &place,
                                       float v[BLOCK]) {
  u32 first_vector = blockIdx.x * VECTORS, first = blockIdx.y * CHUNK;
  if (TRANSPOSED) {
    load_tile<T, true>(tile, q, first_vector, first);
    __syncthreads();
    read_column<T>(tile, place, v);
  } else {
    load_part((const T *)q.source, q.vectors, q.length, first_vector + place.local,
              first + BLOCK * place.part, v);
  }
  if (q.of_source) {
    float scale = *q.of_source;
#pragma unroll
    for (u32 i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], scale);
  }
  if (!q.group) return;
  if (!TRANSPOSED) flip(v, q, place.part);
  rotate_within(v, q.group);
}

// What is missing then.
template <u32 STEP> __device__ __forceinline__ void end_rotation(float v[BLOCK], const Values &q) {
  if (!q.group) return;
  rotate_across<STEP>(v, q.group);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], q.transform.scale);
}

// The largest magnitude of 16.
__device__ __forceinline__ u32 amax_of_block(const float v[SIXTEEN]) {
  float most[4];
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    most[i] =
        max_nan(max_nan(fabsf(v[i]), fabsf(v[i + 4])), max_nan(fabsf(v[i + 8]), fabsf(v[i + 12])));
  float amax = max_nan(max_nan(most[0], most[1]), max_nan(most[2], most[3]));
  return __float_as_uint(amax) & 0x7fffffffu;
}

// Notes the largest magnitude of what threads have rotated among themselves, once all of it is and
// normalized: the rounded product of the largest is the largest of them. `known`: what had been
// noted when the thread began.
//
// A sum of rounded sums is at most that of the largest magnitudes, rounded likewise. So where these
// come to no more than is known, threads need not exchange anything. Of normal numbers in groups of
// 128 they come to 4.6 standard deviations, and the largest of a tensor is some 6.
template <u32 STEP>
__device__ __forceinline__ void note_rotated(const Values &q, float v[BLOCK], u32 known) {
  float amax = __uint_as_float(max(amax_of_block(v), amax_of_block(v + SIXTEEN)));
  float scale = q.group ? q.transform.scale : 1.0f;
  if (q.group > BLOCK) {
    for (u32 mask = 1; mask < q.group / BLOCK; mask *= 2)
      amax = __fadd_rn(amax, __shfl_xor_sync(FULL_WARP, amax, STEP * mask));
    u32 bound = __float_as_uint(__fmul_rn(amax, scale)) & 0x7fffffffu;
    if (__reduce_max_sync(FULL_WARP, bound) <= known) return;
    rotate_across<STEP>(v, q.group);
    amax = __uint_as_float(max(amax_of_block(v), amax_of_block(v + SIXTEEN)));
  }
  note_amax(q.amax, __fmul_rn(amax, scale));
}

// ---- Random bits --------------------------------------------------------------------------------

// Those of a source that is stored transposed, 16 for each of (256, 32), to shared memory: one call
// of the generator gives those of eight vectors.
__device__ __forceinline__ void draw_transposed(u8 *bits, const Values &q) {
  u32 first_vector = blockIdx.x * VECTORS, first = blockIdx.y * CHUNK;
#pragma unroll
  for (u32 j = 0; j < CHUNK * VECTORS / 8 / THREADS; j++) {
    u32 i = threadIdx.x + j * THREADS, line = i / (VECTORS / 8), eight = i % (VECTORS / 8);
    *(uint4 *)(bits + Lines<2>::at(line) + 16 * eight) =
        philox(q.elements, first + line, first_vector / 8 + eight);
  }
}

// Those of the scales of blocks of (32, 256): a call gives those of 128 elements.
struct ScaleBits {
  uint4 words[VECTORS][2];
  // Of a thread's two blocks.
  __device__ __forceinline__ u32 of(const Place &place) const {
    return ((const u32 *)words[place.local])[place.part];
  }
};
__device__ __forceinline__ void draw_for_scales(ScaleBits &bits, const Values &q) {
  u32 local = threadIdx.x / 2, half = threadIdx.x % 2;
  if (local < VECTORS)
    bits.words[local][half] =
        philox(q.of_scales, blockIdx.x * VECTORS + local, 2 * blockIdx.y + half);
}

// Of a thread's 32 elements, which are asked for in order. addend(i): the 16 of element i from bit
// 8 on, and a one below them.
template <bool TRANSPOSED> struct Bits {
  const Values &q;
  const u8 *column; // in shared memory
  u32 vector, k;
  uint4 words;
  __device__ __forceinline__ Bits(const Values &q, const u8 *bits, const Place &place)
      : q(q), column(bits + Lines<2>::at(BLOCK * place.part) + 2 * place.local),
        vector(blockIdx.x * VECTORS + place.local), k(blockIdx.y * CHUNK + BLOCK * place.part) {}
  __device__ __forceinline__ u32 addend(u32 i) {
    if (TRANSPOSED) return *(const u16 *)(column + i * Lines<2>::PITCH) << 8 | 0x80;
    if (i % 8 == 0) words = philox(q.elements, vector, (k + i) / 8);
    u32 word = i % 8 < 2 ? words.x : i % 8 < 4 ? words.y : i % 8 < 6 ? words.z : words.w;
    return __byte_perm(word, q.elements.half, i % 2 ? 0x5324 : 0x5104);
  }
};

// None, for rounding to nearest.
struct Unused {
  __device__ __forceinline__ u32 addend(u32) { return 0; }
};

// ---- Elements -----------------------------------------------------------------------------------

// A magnitude whose sign bit is clear, with the sign of v: one instruction, where any other
// magnitude takes two.
__device__ __forceinline__ float signed_as(float v, float magnitude) {
  return __uint_as_float(__float_as_uint(magnitude) | (__float_as_uint(v) & 0x80000000u));
}

// The magnitude nearest to y, 0 <= y <= 6, ties to even: adding and subtracting 1.5 * 2^22 times
// the binade of max(y, 1) rounds to the grid's steps there. That product is exact, so a fused sum
// rounds as a plain one does, without an integer instruction, which are half as fast.
__device__ __forceinline__ float nearest_of(float y) {
  float binade = __uint_as_float(__float_as_uint(fmaxf(y, 1.0f)) & 0xff800000u);
  float magic = 1.5f * (1 << 22);
  return __fmaf_rn(-binade, magic, __fmaf_rn(binade, magic, y));
}

// One of both neighbours of y. From 1 on the grid keeps one bit of f32's mantissa; below it is that
// of y + 1. `addend`: see Bits.
__device__ __forceinline__ float stochastic_of(float y, u32 addend) {
  float low = one_if_less(y, 1.0f);
  y = __fadd_rn(y, low);
  return __fsub_rn(__uint_as_float((__float_as_uint(y) + (addend >> 2)) & 0xffc00000u), low);
}

// Quotients v / unit, rounded as a division is. NOTE: a division is some ten instructions, and a
// case of its own at both ends of the range.
struct Quotient {
  float unit, inverse;
  bool ordinary;
  // `inverse`: 1 / unit.
  __device__ __forceinline__ Quotient(float unit, float inverse) : unit(unit), inverse(inverse) {
    ordinary = is_ordinary(unit) && (__float_as_uint(unit) & 0x7fffffu) != 0x7fffffu;
  }
  __device__ __forceinline__ Quotient(float unit) : Quotient(unit, __fdiv_rn(1.0f, unit)) {}
  // Beyond 2^60 remainders could vanish. Of a quotient as small as that no element is left.
  static __device__ __forceinline__ bool is_ordinary(float v) {
    return (__float_as_uint(v) >> 23) - 67 < 120;
  }
  // Of an ordinary unit.
  __device__ __forceinline__ float of(float v) const {
    float quotient = __fmul_rn(v, inverse);
    return __fmaf_rn(__fmaf_rn(-quotient, unit, v), inverse, quotient);
  }
};

// A block by its scale. NOTE: quotients of zeros have lost their sign.
__device__ __forceinline__ void divide(float out[SIXTEEN], const float v[SIXTEEN], float scale) {
  Quotient quotient(scale);
  if (quotient.ordinary) {
#pragma unroll
    for (u32 i = 0; i < SIXTEEN; i++) out[i] = quotient.of(v[i]);
  } else {
#pragma unroll
    for (u32 i = 0; i < SIXTEEN; i++) out[i] = __fdiv_rn(v[i], scale);
  }
}

// ---- Scales -------------------------------------------------------------------------------------

// Of a block rounded to nearest with a scale, in units of the tensor's.
__device__ __forceinline__ float squared_error(const float v[SIXTEEN], float scale, float tensor) {
  float encode = encoding(scale, tensor), sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < SIXTEEN; i++) {
    // Of magnitudes, as a square has no sign.
    float x = fabsf(__fmul_rn(v[i], encode)), rounded = nearest_of(element_of(x));
    float error = __fmul_rn(__fsub_rn(rounded, x), scale);
    sum = __fadd_rn(sum, __fmul_rn(error, error));
  }
  return sum;
}

// The E4M3 neighbour of v >= 0 above it as often as it is near.
__device__ __forceinline__ float stochastic_e4m3(float v, u32 bits) {
  if (!is_finite(v)) return not_a_number();
  v = fminf(v, 448.0f);
  int exponent = max((int)(__float_as_uint(v) >> 23) - 127, -6);
  float steps = __fmul_rn(v, __uint_as_float((u32)(3 - exponent + 127) << 23));
  float whole = floorf(steps);
  float position = __fmul_rn(__fadd_rn((float)bits, 0.5f), 1.0f / 65536.0f);
  float up = position < __fsub_rn(steps, whole) ? 1.0f : 0.0f;
  return __fmul_rn(__fadd_rn(whole, up), __uint_as_float((u32)(exponent - 3 + 127) << 23));
}

// What the threads of squares of 16 by 16 tell each other, by vector and block.
struct Squares {
  u32 amaxes[VECTORS][CHUNK / SIXTEEN];
  float errors[2][VECTORS][CHUNK / SIXTEEN];
};

// The largest magnitudes of a thread's two squares, of its own blocks. All threads come here.
__device__ __forceinline__ void share_amaxes(Squares &all, const Place &place, u32 amaxes[2]) {
#pragma unroll
  for (u32 b = 0; b < 2; b++) all.amaxes[place.local][2 * place.part + b] = amaxes[b];
  __syncthreads();
#pragma unroll
  for (u32 b = 0; b < 2; b++)
    for (u32 row = 0; row < SIXTEEN; row++)
      amaxes[b] = max(amaxes[b], all.amaxes[(place.local & ~15u) + row][2 * place.part + b]);
}

// Whether the wide scale leaves the smaller error in a thread's squares, given its own blocks'.
// Sums go from row to row. All threads come here.
__device__ __forceinline__ void share_errors(Squares &all, const Place &place, u32 vectors,
                                             const float errors[2][2], bool wide[2]) {
#pragma unroll
  for (u32 b = 0; b < 2; b++)
#pragma unroll
    for (u32 i = 0; i < 2; i++) all.errors[i][place.local][2 * place.part + b] = errors[b][i];
  __syncthreads();
  u32 first = place.local & ~15u, end = min(first + SIXTEEN, vectors - blockIdx.x * VECTORS);
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    double sums[2] = {0.0, 0.0};
    for (u32 row = first; row < end; row++)
#pragma unroll
      for (u32 i = 0; i < 2; i++) sums[i] += all.errors[i][row][2 * place.part + b];
    wide[b] = sums[1] < sums[0];
  }
}

// The scales of two blocks below the tensor's, by the rules that need no more than their largest
// magnitudes; of four over six the full one, and `wide`, of which these are 4.
__device__ __forceinline__ void scales_of(const Values &q, const u32 amaxes[2], Tensor tensor,
                                          float scales[2], float wide[2]) {
  constexpr float HEADROOM_INVERSE = 1.0f / WITH_HEADROOM, SIXTH = 1.0f / 6.0f;
  float limit = q.rule == HEADROOM ? HEADROOM_INVERSE : SIXTH;
  float inverse = __fmul_rn(tensor.encode, limit);
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float scale = __fmul_rn(__uint_as_float(amaxes[b]), inverse);
    scales[b] = round_to_e4m3(scale > 448.0f ? 448.0f : scale);
    wide[b] = round_to_e4m3(fminf(__fmul_rn(scale, 1.5f), 448.0f));
  }
}

// The scales of a thread's two blocks, which are rounded to nearest. All threads come here; `all`
// is null where nothing is square.
__device__ __forceinline__ void choose_scales(const Values &q, Squares *all, const Place &place,
                                              const float v[BLOCK], Tensor tensor,
                                              float scales[2]) {
  u32 amaxes[2] = {amax_of_block(v), amax_of_block(v + SIXTEEN)};
  if (all && q.square) share_amaxes(*all, place, amaxes);
  float errors[2][2], wide[2];
  bool takes_wide[2];
  scales_of(q, amaxes, tensor, scales, wide);
  if (q.rule != FOUR_OVER_SIX) return;
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    errors[b][0] = squared_error(v + SIXTEEN * b, scales[b], tensor.decode);
    errors[b][1] = squared_error(v + SIXTEEN * b, wide[b], tensor.decode);
    takes_wide[b] = errors[b][1] < errors[b][0];
  }
  if (all && q.square) share_errors(*all, place, q.vectors, errors, takes_wide);
#pragma unroll
  for (u32 b = 0; b < 2; b++) scales[b] = takes_wide[b] ? wide[b] : scales[b];
}

// ---- Rounding -----------------------------------------------------------------------------------

// Two blocks with scales below the tensor's.
template <bool STOCHASTIC, class Bits>
__device__ __forceinline__ void round_in_tensor(float v[BLOCK], const float scales[2],
                                                float tensor, Bits &bits) {
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float encode = encoding(scales[b], tensor);
#pragma unroll
    for (u32 i = SIXTEEN * b; i < SIXTEEN * (b + 1); i++) {
      float y = element_of(__fmul_rn(v[i], encode));
      float magnitude = STOCHASTIC ? stochastic_of(y, bits.addend(i)) : nearest_of(y);
      v[i] = __fmul_rn(signed_as(v[i], magnitude), scales[b]);
    }
  }
}

// Two blocks within 128 elements, which four threads have.
template <bool STOCHASTIC, u32 STEP, class Bits>
__device__ __forceinline__ void round_within(float v[BLOCK], bool power, Bits &bits) {
  u32 amaxes[2] = {amax_of_block(v), amax_of_block(v + SIXTEEN)}, amax = max(amaxes[0], amaxes[1]);
#pragma unroll
  for (u32 mask = 1; mask < 4; mask *= 2)
    amax = max(amax, __shfl_xor_sync(FULL_WARP, amax, STEP * mask));
  float outer = outer_scale(amax, power);
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float of = __fdiv_rn(__fdiv_rn(__uint_as_float(amaxes[b]), outer), 6.0f);
    float scale = round_to_e4m3(fminf(of, 448.0f));
    // E4M3's smallest number.
    if (scale == 0.0f) scale = 1.0f / 512.0f;
    scale = __fmul_rn(scale, outer);
    float quotients[SIXTEEN];
    divide(quotients, v + SIXTEEN * b, scale);
#pragma unroll
    for (u32 i = 0; i < SIXTEEN; i++) {
      u32 at = SIXTEEN * b + i;
      float y = element_of(quotients[i]);
      float magnitude = STOCHASTIC ? stochastic_of(y, bits.addend(at)) : nearest_of(y);
      v[at] = __fmul_rn(signed_as(v[at], magnitude), scale);
    }
  }
}

// The quotient of a block's largest magnitude by EDEN's limit and the tensor's scale, each rounded
// as a division is.
__device__ __forceinline__ float eden_quotient(float amax, Tensor tensor) {
  constexpr float INVERSE = 1.0f / EDEN_MAX;
  Quotient limit(EDEN_MAX, INVERSE), scale(tensor.decode, tensor.encode);
  if (!scale.ordinary || !Quotient::is_ordinary(amax))
    return __fdiv_rn(__fdiv_rn(amax, EDEN_MAX), tensor.decode);
  return scale.of(limit.of(amax));
}

// MS-EDEN of two blocks; `bits`: the 16 of each.
__device__ __forceinline__ void round_eden(float v[BLOCK], Tensor of, u32 bits) {
  float tensor = of.decode;
#pragma unroll
  for (u32 b = 0; b < 2; b++) {
    float *block = v + SIXTEEN * b, amax = __uint_as_float(amax_of_block(block));
    float scale = round_to_e4m3(eden_quotient(amax, of));
    if (scale == 0.0f) scale = 1.0f;
    float encode = encoding(scale, tensor), squares = 0.0f, products = 0.0f;
#pragma unroll
    for (u32 i = 0; i < SIXTEEN; i++) {
      float r = __fmul_rn(block[i], encode);
      float rounded = signed_as(block[i], nearest_of(element_of(r)));
      squares = __fadd_rn(squares, __fmul_rn(r, r));
      products = __fadd_rn(products, __fmul_rn(r, rounded));
      block[i] = rounded;
    }
    float correction = products == 0.0f ? 1.0f : __fdiv_rn(squares, products);
    scale = stochastic_e4m3(__fmul_rn(scale, correction), b ? bits >> 16 : bits & 0xffff);
#pragma unroll
    for (u32 i = 0; i < SIXTEEN; i++) block[i] = __fmul_rn(block[i], scale);
  }
}

// Stores a thread's numbers, in f32 or bf16, of vectors `depth` long.
template <class N>
__device__ __forceinline__ void store_block(N *out, const float v[BLOCK], u32 k, u32 depth) {
  if (k + BLOCK <= depth && depth % 8 == 0) {
#pragma unroll
    for (u32 i = 0; i < BLOCK; i += 8) store8(out + i, v + i);
  } else {
#pragma unroll
    for (u32 i = 0; i < BLOCK; i++)
      if (k + i < depth) out[i] = from_f32<N>(v[i]);
  }
}
