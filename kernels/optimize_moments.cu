// AdamW with moments or gradients that are stored in less than f32 (optim/moments.rs,
// optim/gradients.rs), or on gradients that are normalized (optim/spam.rs), and StableAdamW with
// such moments or gradients.
//
// Every operation is rounded by itself, none fused, and the scale of a group does not depend on the
// order, so that the processor stores the same bytes. Pieces begin where groups begin.

// The update of a piece: `update_all` of optimize.cu, without fused operations.
template <u32 ELEMENT>
__device__ __forceinline__ void update_piece(const Entry *e, u32 number, u64 start, u64 end,
                                             float lr, float size, float scale, u32 *trial,
                                             const Step &s, const Normal *normal,
                                             const Moments &moments, const Meanings &meanings) {
  float keep = e->decays ? __fsub_rn(1.0f, __fmul_rn(lr, s.weight_decay)) : 1.0f;
  float rest1 = __fsub_rn(1.0f, s.beta1), rest2 = __fsub_rn(1.0f, s.beta2);
  float largest = 0.0f, largest_m = 0.0f, largest_v = 0.0f;
  each_of_piece(start, end, [&](u64 i, u32 count) {
    Four<float> g = load_gradients(e, i, count), p = load_weights(e, i, count);
    Four<float> m = load_moments<ELEMENT, false>(e, i, count, meanings);
    Four<float> v = load_moments<ELEMENT, true>(e, i, count, meanings);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      float gradient = __fmul_rn(normal ? clip(g.of[k], *normal) : g.of[k], scale);
      m.of[k] = __fadd_rn(__fmul_rn(moments.kept[0], m.of[k]), __fmul_rn(rest1, gradient));
      v.of[k] = __fadd_rn(__fmul_rn(moments.kept[1], v.of[k]),
                          __fmul_rn(rest2, __fmul_rn(gradient, gradient)));
      float divisor = __fadd_rn(__fmul_rn(__fsqrt_rn(v.of[k]), s.root), s.epsilon);
      p.of[k] = __fsub_rn(__fmul_rn(p.of[k], keep), __fmul_rn(size, __fdiv_rn(m.of[k], divisor)));
      // What there is not is 0, of which a rate that is infinite makes NaN.
      if (trial && k < count) {
        largest = max_nan(largest, fabsf(p.of[k]));
        largest_m = max_nan(largest_m, fabsf(m.of[k]));
        largest_v = max_nan(largest_v, fabsf(v.of[k]));
      }
    }
    if (trial) return;
    store_weights(e, i, count, p);
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      if (k < count) largest = max_nan(largest, fabsf(p.of[k]));
    store_moments<ELEMENT, false>(e, i, count, m, moments, number);
    store_moments<ELEMENT, true>(e, i, count, v, moments, number);
  });
  u32 *of_one = trial + 3 * number;
  note_amax(trial ? of_one : e->amax, largest);
  if (trial) note_amax(of_one + 1, largest_m), note_amax(of_one + 2, largest_v);
}

// One update of every parameter, as `adamw` and `stable_adamw`, whose arguments these are; of
// gradients that are normalized where `normals` (entries) are not null. Grid: any; block: 256.
__global__ void update_stored(const Entry *table, u32 entries, u64 pieces, const double *sums,
                              const float2 *rates, const Normal *normals, u32 *trial, Step s,
                              Moments moments) {
  begin();
  __shared__ Meanings meanings;
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  fill(meanings);
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    if (!e->v) continue;
    u32 number = (u32)(e - table);
    float lr = rates ? rates[number].x : s.lr, size = rates ? rates[number].y : s.size;
    const Normal *normal = normals ? normals + number : nullptr;
    float scale = __fmul_rn(normal ? normal->scale : 1.0f, clipping(norm, s));
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
#define UPDATE(element) \
  update_piece<element>(e, number, start, end, lr, size, scale, trial, s, normal, moments, meanings)
    if (e->element == INT8) UPDATE(INT8);
    else if (e->element == BF16) UPDATE(BF16);
    else UPDATE(F32);
#undef UPDATE
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
      Four<float> g = load_gradients(e, i, count);
      Four<float> v = e->element == INT8   ? load_moments<INT8, true>(e, i, count, meanings)
                      : e->element == BF16 ? load_moments<BF16, true>(e, i, count, meanings)
                                           : load_moments<F32, true>(e, i, count, meanings);
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        float gradient = __fmul_rn(g.of[k], scale);
        float u = __fadd_rn(__fmul_rn(s.beta2, v.of[k]),
                            __fmul_rn(rest2, __fmul_rn(gradient, gradient)));
        float ratio = __fdiv_rn(gradient, fmaxf(__fmul_rn(__fsqrt_rn(u), s.root), s.epsilon));
        if (k < count) total += (double)ratio * ratio;
      }
    });
    total = block_sum_double(total, scratch);
    if (threadIdx.x == 0) partials[piece] = total;
  }
}
