// What an update is about to do to each parameter, before it is made.

// Squares of a gradient as it was computed, and of its ratios to second moments: g^2 / max(u,
// epsilon^2), where g is what moments take in and u the corrected second moment after that.
struct Watched {
  double squares, ratios;
};

// partials (entries, gridDim.x) = sums over every gridDim.x-th piece of a parameter; ratios are 0
// where it has no second moment. sums, normals: as of `update_stored`. Grid: any, entries; block:
// 256.
__global__ void watch_update(Watched *partials, const Entry *table, const double *sums,
                             const Normal *normals, Step s, Moments moments) {
  begin();
  __shared__ double scratch[WARP];
  __shared__ Meanings meanings;
  fill(meanings);
  const Entry *e = table + blockIdx.y;
  const Normal *normal = normals ? normals + blockIdx.y : nullptr;
  float scale = __fmul_rn(normal ? normal->scale : 1.0f, clipping((float)sqrt(sums[1]), s));
  float rest2 = __fsub_rn(1.0f, s.beta2);
  Watched total = {0.0, 0.0};
  for (u64 start = (u64)blockIdx.x * PIECE; start < e->len; start += (u64)gridDim.x * PIECE) {
    each_of_piece(start, min(start + PIECE, e->len), [&](u64 i, u32 count) {
      Four g = load_gradients(*e, i, count), v = {};
      if (e->v) v = load_second(*e, i, count, meanings);
#pragma unroll
      for (u32 k = 0; k < 4; k++) {
        total.squares += (double)g.of[k] * g.of[k];
        float gradient = __fmul_rn(normal ? clip(g.of[k], *normal) : g.of[k], scale);
        float u = __fadd_rn(__fmul_rn(moments.kept[1], v.of[k]),
                            __fmul_rn(rest2, __fmul_rn(gradient, gradient)));
        float ratio = __fdiv_rn(gradient, fmaxf(__fmul_rn(__fsqrt_rn(u), s.root), s.epsilon));
        if (k < count && e->v) total.ratios += (double)ratio * ratio;
      }
    });
  }
  total.squares = block_sum_double(total.squares, scratch);
  total.ratios = block_sum_double(total.ratios, scratch);
  if (threadIdx.x == 0) partials[(u64)blockIdx.y * gridDim.x + blockIdx.x] = total;
}
