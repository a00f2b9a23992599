// AdamW with moments or gradients that are stored in less than f32 (optim/moments.rs,
// optim/gradients.rs), or on gradients that are normalized (optim/spam.rs), and StableAdamW with
// such moments or gradients.
//
// Every operation is rounded by itself, none fused, and the scale of a group does not depend on the
// order, so that the processor stores the same bytes. Pieces begin where groups begin.
//
// Where a tensor has one scale, the largest of its moments are found first, by `largest_moments`;
// `choose_scales` makes scales of them, and keeps those before, which `update_stored` loads by.

// A moment that takes in a number.
__device__ __forceinline__ float mean(float kept, float moment, float rest, float number) {
  return __fadd_rn(__fmul_rn(kept, moment), __fmul_rn(rest, number));
}

// What an update divides: root = sqrt(v), ratio = m / (root * factor + epsilon).
__device__ __noinline__ float2 divide_any(float m, float v, float factor, float epsilon) {
  float root = __fsqrt_rn(v);
  return make_float2(root, __fdiv_rn(m, __fadd_rn(__fmul_rn(root, factor), epsilon)));
}

// Quick ones are those of the definition where v is at least 2^-101, which `large` says, and the
// ratio and what divides, which is at least epsilon, 2^-40 in their magnitudes. Whatever is too
// large for them makes a ratio of 0 or NaN.
__device__ __forceinline__ void divide(const Four &m, const Four &v, bool large, const Step &s,
                                       Four &root, Four &ratio) {
  float least = 0x1p-40f;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    root.of[k] = quick_root(v.of[k]);
    float divisor = __fadd_rn(__fmul_rn(root.of[k], s.root), s.epsilon);
    ratio.of[k] = quick_quotient(m.of[k], divisor);
    least = min_nan(least, fabsf(ratio.of[k]));
  }
  if (least == 0x1p-40f && large && s.epsilon >= 0x1p-40f) return;
#pragma unroll
  for (u32 k = 0; k < 4; k++) {
    float2 both = divide_any(m.of[k], v.of[k], s.root, s.epsilon);
    root.of[k] = both.x, ratio.of[k] = both.y;
  }
}

// What the update of up to 4 elements reads.
template <u32 FIRST, u32 SECOND> struct Elements {
  Words<4> gradients, weights;
  Fetched<FIRST> first;
  Fetched<SECOND> second;
};

// Elements of a turn of a block.
#define TURN (4 * THREADS)

// Blocks of updates that a multiprocessor runs at once, as the host knows. NOTE: on an H200 8 bits,
// split, with gradients in bf16, took 285 us by 2, 262 by 3 and 241 by 4, each block with one run;
// other forms are alike.
#define UPDATE_BLOCKS 4

// The update of `len` elements of a parameter from `start` on, where the entry's pointers lead, or
// its trial: `update_all` of optimize.cu, without fused operations.
template <bool TRIAL, u32 FIRST, u32 SECOND, u32 SPLIT>
__device__ __forceinline__ void update_elements(const Entry &e, u32 number, u64 start, u32 len,
                                                float lr, float size, float scale, u32 *trial,
                                                const Step &s, const Normal *normal,
                                                const Moments &moments, const Meanings &meanings,
                                                const float2 *before) {
  Scales scales = {};
  if (FIRST == E4M3) scales = scales_of(e, before, number);
  float keep = e.decays ? __fsub_rn(1.0f, __fmul_rn(lr, s.weight_decay)) : 1.0f;
  float rest1 = __fsub_rn(1.0f, s.beta1), rest2 = __fsub_rn(1.0f, s.beta2);
  Largest largest;
  float largest_m = 0.0f, largest_v = 0.0f;
  auto fetch = [&](const Entry &of, u32 i, u32 count) -> Elements<FIRST, SECOND> {
    return {fetch_gradients(of, i, count), fetch_weights<SPLIT>(of, i, count),
            fetch_moments<FIRST, false>(of, i, count, scales.loaded[0]),
            fetch_moments<SECOND, true>(of, i, count, scales.loaded[1])};
  };
  // Of an entry whose pointers are those of element `first`.
  auto update = [&](const Entry &of, u64 first, u32 i, u32 count,
                    const Elements<FIRST, SECOND> &from) {
    Four g = decode_gradients(of, from.gradients), p = decode_weights<SPLIT>(of, from.weights);
    Four m = decode<false>(from.first, meanings), v = decode<true>(from.second, meanings);
    if (normal)
#pragma unroll
      for (u32 k = 0; k < 4; k++) g.of[k] = clip(g.of[k], *normal);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      float gradient = __fmul_rn(g.of[k], scale);
      m.of[k] = mean(moments.kept[0], m.of[k], rest1, gradient);
      v.of[k] = mean(moments.kept[1], v.of[k], rest2, __fmul_rn(gradient, gradient));
    }
    bool large;
    if (SECOND == INT8) {
      // Codes are 1 at least, so that roots are a 255th of the scale at least. Behind the end a
      // root is NaN, and is found again.
      large = from.second.scale >= 0x1p-40f && moments.kept[1] >= 0.5f;
    } else {
      float least = 0x1p-101f;
#pragma unroll
      for (u32 k = 0; k < 4; k++) least = fminf(least, v.of[k]);
      large = least == 0x1p-101f;
    }
    Four root, ratio;
    divide(m, v, large, s, root, ratio);
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      p.of[k] = __fsub_rn(__fmul_rn(p.of[k], keep), __fmul_rn(size, ratio.of[k]));
    if (!TRIAL) {
      store_weights<SPLIT>(of, i, count, p, largest);
      store_moments<FIRST, false>(of, first, i, count, m, moments, number, scales.inverse[0]);
      store_moments<SECOND, true>(of, first, i, count, SECOND == INT8 ? root : v, moments, number,
                                  scales.inverse[1]);
      return;
    }
    // What there is not is 0, of which a rate that is infinite makes NaN.
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      if (k >= count) break;
      largest.see(p.of[k]);
      largest_m = max_nan(largest_m, fabsf(m.of[k])),
      largest_v = max_nan(largest_v, fabsf(v.of[k]));
    }
  };
  u32 turns = len / TURN;
  if (turns) {
    // While a turn is computed, the next one is on its way.
    Entry mine = at_element(e, 4 * threadIdx.x);
    u64 from = start + 4 * threadIdx.x;
    Elements<FIRST, SECOND> next = fetch(mine, 0, 4);
#pragma unroll 1
    do {
      Elements<FIRST, SECOND> now = next;
      if (--turns) next = fetch(mine, TURN, 4);
      update(mine, from, 0, 4, now);
      mine = at_element(mine, TURN), from += TURN;
    } while (turns);
  }
  if (u32 rest = len % TURN) {
    u32 i = len - rest + 4 * threadIdx.x, count = i < len ? min(len - i, 4u) : 0;
    update(e, start, i, count, fetch(e, i, count));
  }
  u32 *of_one = trial + 3 * number;
  note_amax(TRIAL ? of_one : e.amax, largest.magnitude(!TRIAL && splits<SPLIT>(e)));
  if (TRIAL) note_amax(of_one + 1, largest_m), note_amax(of_one + 2, largest_v);
}

// What the moments of matrices are stored as decides which forms there are besides: vectors' are in
// f32, tables' may be in bf16.
constexpr u32 ANY = 5;
constexpr bool has(u32 of_matrices, u32 element) {
  return of_matrices == ANY || of_matrices == element || element == F32 ||
         (of_matrices == INT8 && element == BF16);
}

// One update of every parameter, as `adamw` and `stable_adamw`, whose arguments these are; of
// gradients that are normalized where `normals` (entries) are not null. before (entries): of
// `choose_scales`, or null where scales of tensors are those of what is stored. Those of ANY form
// are trials. A block takes `run` pieces that lie side by side, and goes on gridDim.x runs further.
// Grid: as many as run at once; block: 256.
//
// NOTE: the longer a run is, the less a block waits for entries, and for the first elements of
// each.
template <u32 OF_MATRICES, u32 SPLIT>
__global__ void __launch_bounds__(THREADS, UPDATE_BLOCKS)
    update_stored(const Entry *table, u32 entries, u64 start, u64 pieces, u64 run,
                  const double *sums, const float2 *rates, const Normal *normals, u32 *trial,
                  Step s, Moments moments, const float2 *before) {
  begin();
  __shared__ Meanings meanings;
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  fill(meanings);
  for (u64 first = start + blockIdx.x * run; first < pieces; first += gridDim.x * run) {
    u64 last = min(first + run, pieces);
    for (u64 piece = first, next; piece < last; piece = next) {
      const Entry *at = find(table, entries, piece);
      u32 number = (u32)(at - table);
      next = number + 1 < entries ? min(last, at[1].first_piece) : last;
      if (!at->v) continue;
      float lr = rates ? rates[number].x : s.lr, size = rates ? rates[number].y : s.size;
      const Normal *normal = normals ? normals + number : nullptr;
      float scale = __fmul_rn(normal ? normal->scale : 1.0f, clipping(norm, s));
      u64 element = (piece - at->first_piece) * PIECE;
      u32 len = (u32)min(at->len - element, (next - piece) * PIECE);
      // A copy, because stores could change what pointers lead to, as far as the compiler knows.
      const Entry e = at_element(*at, element);
#define UPDATE(first, second) \
  if constexpr (has(OF_MATRICES, first)) \
    if (e.element[0] == first) \
      update_elements<OF_MATRICES == ANY, first, second, SPLIT>( \
          e, number, element, len, lr, size, scale, trial, s, normal, moments, meanings, before);
      UPDATE(INT8, INT8)
      UPDATE(BF16, BF16)
      UPDATE(E4M3, F16)
      UPDATE(F32, F32)
#undef UPDATE
    }
  }
}

// largest (entries, 3), zeros before: its second and third numbers become the bits of the largest
// magnitudes that `update_stored`, whose arguments these are, will leave of the moments of tensors
// that have one scale. Grid: any; block: 256.
__global__ void largest_moments(u32 *largest, const Entry *table, u32 entries, u64 pieces,
                                const double *sums, const Normal *normals, Step s,
                                Moments moments) {
  begin();
  __shared__ Meanings meanings;
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  float rest1 = __fsub_rn(1.0f, s.beta1), rest2 = __fsub_rn(1.0f, s.beta2);
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    if (e->element[0] != E4M3 || !e->v) continue;
    u32 number = (u32)(e - table);
    const Normal *normal = normals ? normals + number : nullptr;
    float scale = __fmul_rn(normal ? normal->scale : 1.0f, clipping(norm, s));
    Scales scales = scales_of(*e, nullptr, number);
    float largest_m = 0.0f, largest_v = 0.0f;
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    each_of_piece(start, end, [&](u64 i, u32 count) {
      Four g = load_gradients(*e, i, count);
      Four m = load_moments<E4M3, false>(*e, i, count, meanings, scales.loaded[0]);
      Four v = load_moments<F16, true>(*e, i, count, meanings, scales.loaded[1]);
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        float gradient = __fmul_rn(normal ? clip(g.of[k], *normal) : g.of[k], scale);
        float square = __fmul_rn(gradient, gradient);
        largest_m = max_nan(largest_m, fabsf(mean(moments.kept[0], m.of[k], rest1, gradient)));
        largest_v = max_nan(largest_v, fabsf(mean(moments.kept[1], v.of[k], rest2, square)));
      }
    });
    note_amax(largest + 3 * number + 1, largest_m);
    note_amax(largest + 3 * number + 2, largest_v);
  }
}

// Of `count` parameters from `first` on whose moments have one scale: before (entries) = these,
// which become those of moments up to `largest` (entries, 3), of `largest_moments`. Nothing where
// there is no update. Grid: 1; block: 256.
__global__ void choose_scales(float2 *before, const u32 *largest, const Entry *table, u32 first,
                              u32 count, const double *sums, Step s) {
  begin();
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  for (u32 number = first + threadIdx.x; number < first + count; number += blockDim.x) {
    const Entry *e = table + number;
    if (e->element[0] != E4M3) continue;
    const u32 *of_one = largest + 3 * number;
    float2 stored = make_float2(*e->m_scales, e->v ? *e->v_scales : 0.0f);
    before[number] = stored;
    *e->m_scales = tensor_scale<E4M3>(stored.x, of_one[1]);
    if (e->v) *e->v_scales = tensor_scale<F16>(stored.y, of_one[2]);
  }
}

// As `square_ratios` of optimize.cu. Grid: any; block: 256.
__global__ void square_stored_ratios(double *partials, const Entry *table, u32 entries, u64 pieces,
                                     const double *sums, Step s) {
  begin();
  __shared__ double scratch[WARP];
  __shared__ Meanings meanings;
  fill(meanings);
  float scale = clipping((float)sqrt(sums[1]), s), rest2 = __fsub_rn(1.0f, s.beta2);
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    double total = 0.0;
    each_of_piece(start, end, [&](u64 i, u32 count) {
      Four g = load_gradients(*e, i, count);
      Four v = load_second(*e, i, count, meanings);
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        float gradient = __fmul_rn(g.of[k], scale);
        float u = mean(s.beta2, v.of[k], rest2, __fmul_rn(gradient, gradient));
        float ratio = __fdiv_rn(gradient, fmaxf(__fmul_rn(__fsqrt_rn(u), s.root), s.epsilon));
        if (k < count) total += (double)ratio * ratio;
      }
    });
    total = block_sum_double(total, scratch);
    if (threadIdx.x == 0) partials[piece] = total;
  }
}
