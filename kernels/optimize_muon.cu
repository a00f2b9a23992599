// Muon's update of a matrix (optim/muon.rs): momentum, what its orthogonalization does element by
// element between products, and weights. Matrices go one after the other, so kernels are told which
// one it is.
//
// Every operation is rounded by itself, none fused, so that momentum is stored as the processor
// stores it, to the byte.

// As in optim/muon.rs.
#define EPSILON 1e-7f
#define LARGEST 2.0f
#define SMALLEST 8.8817841970012523e-16f
#define BF16_MAX 3.3895313892515355e38f

// In bf16, and 0 where it is too small.
__device__ __forceinline__ bf16 rounded(float v) {
  bf16 out = from_f32<bf16>(v);
  if (fabsf(to_f32(out)) < SMALLEST) out.bits = 0;
  return out;
}

// The momentum of a piece.
template <u32 ELEMENT>
__device__ __forceinline__ double momentum_piece(bf16 *x, const Entry *e, u32 number, u64 start,
                                                 u64 end, float scale, u32 *trial,
                                                 const Moments &moments, const Meanings &meanings,
                                                 const float2 *before) {
  Scales scales = {};
  if (ELEMENT == E4M3) scales = scales_of(*e, before, number);
  float beta = moments.kept[0], rest = __fsub_rn(1.0f, beta), largest = 0.0f;
  double squares = 0.0;
  each_of_piece(start, end, [&](u64 i, u32 count) {
    Four g = load_gradients(*e, i, count);
    Four m = load_moments<ELEMENT, false>(*e, i, count, meanings, scales.loaded[0]);
    Four u;
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      float gradient = __fmul_rn(rest, __fmul_rn(g.of[k], scale));
      m.of[k] = __fadd_rn(__fmul_rn(beta, m.of[k]), gradient);
      float next = __fadd_rn(__fmul_rn(beta, m.of[k]), gradient);
      u.of[k] = to_f32(from_f32<bf16>(fminf(fmaxf(next, -BF16_MAX), BF16_MAX)));
      squares += (double)u.of[k] * u.of[k];
      if (trial) largest = max_nan(largest, fabsf(m.of[k]));
    }
    store_bf16(x + i, count, u);
    if (trial) return;
    store_moments<ELEMENT, false>(*e, 0, i, count, m, moments, number, scales.inverse[0]);
  });
  if (trial) note_amax(trial + 3 * number + 1, largest);
  return squares;
}

// x (len) = u of the matrix of this number in the table; partials (pieces) = sums of its squares.
// Its momentum is stored, or with `trial` (entries, 3) the bits of its largest magnitude instead,
// which `choose_scales` takes where there is one scale of it; then `before` (entries) are what that
// leaves, else null. Nothing where there will be no update. sums: as in optimize.cu. Grid: any;
// block: 256.
__global__ void update_momentum(bf16 *x, double *partials, const Entry *table, u32 number,
                                const double *sums, u32 *trial, Step s, Moments moments,
                                const float2 *before) {
  begin();
  __shared__ double scratch[WARP];
  __shared__ Meanings meanings;
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  fill(meanings);
  const Entry *e = table + number;
  float scale = clipping(norm, s);
  for (u64 piece = blockIdx.x; piece * PIECE < e->len; piece += gridDim.x) {
    u64 start = piece * PIECE, end = min(start + PIECE, e->len);
    double squares;
#define MOMENTUM(element) \
  squares = \
      momentum_piece<element>(x, e, number, start, end, scale, trial, moments, meanings, before)
    if (e->element[0] == INT8) MOMENTUM(INT8);
    else if (e->element[0] == BF16) MOMENTUM(BF16);
    else if (e->element[0] == E4M3) MOMENTUM(E4M3);
    else MOMENTUM(F32);
#undef MOMENTUM
    squares = block_sum_double(squares, scratch);
    if (threadIdx.x == 0) partials[piece] = squares;
  }
}

// x (len) = itself over its norm, from these sums. Grid: any; block: 256.
__global__ void normalize_momentum(bf16 *x, const double *partials, u64 len) {
  begin();
  __shared__ double scratch[WARP];
  double total = 0.0;
  for (u64 i = threadIdx.x; i * PIECE < len; i += blockDim.x) total += partials[i];
  float divisor = __fadd_rn((float)sqrt(block_sum_double(total, scratch)), EPSILON);
  for (u64 i = 4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x); i < len;
       i += 4 * (u64)gridDim.x * blockDim.x) {
    u32 count = (u32)min(len - i, (u64)4);
    Four v = load_bf16(x + i, count);
#pragma unroll
    for (u32 k = 0; k < 4; k++) v.of[k] = to_f32(rounded(__fdiv_rn(v.of[k], divisor)));
    store_bf16(x + i, count, v);
  }
}

// product (len) = of_x x (len) + of_product product. Grid: any; block: 256.
__global__ void add_multiples(bf16 *product, const bf16 *x, float of_x, float of_product, u64 len) {
  begin();
  for (u64 i = 4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x); i < len;
       i += 4 * (u64)gridDim.x * blockDim.x) {
    u32 count = (u32)min(len - i, (u64)4);
    Four v = load_bf16(product + i, count), other = load_bf16(x + i, count);
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      v.of[k] = to_f32(
          rounded(__fadd_rn(__fmul_rn(of_x, other.of[k]), __fmul_rn(of_product, v.of[k]))));
    store_bf16(product + i, count, v);
  }
}

// The weights of the matrix of this number move along x (len), or with `trial` the bits of the
// largest magnitude that would come of it are noted. Nothing where there is no update. Grid: any;
// block: 256.
__global__ void move_matrix(const Entry *table, u32 number, const bf16 *x, const double *sums,
                            u32 *trial, Step s, float keep, float size) {
  begin();
  float norm;
  if (!is_allowed(sums, s, norm)) return;
  const Entry *e = table + number;
  Largest largest;
  for (u64 i = 4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x); i < e->len;
       i += 4 * (u64)gridDim.x * blockDim.x) {
    u32 count = (u32)min(e->len - i, (u64)4);
    Four p = load_weights(*e, i, count);
    Four along = load_bf16(x + i, count);
#pragma unroll
    for (u32 k = 0; k < 4; k++) {
      float v = along.of[k];
      v = isnan(v) ? 0.0f : fminf(fmaxf(v, -LARGEST), LARGEST);
      p.of[k] = __fsub_rn(__fmul_rn(p.of[k], keep), __fmul_rn(size, v));
      // What trials note are the weights before they are split.
      if (trial && k < count) largest.see(p.of[k]);
    }
    if (!trial) store_weights<EITHER>(*e, i, count, p, largest);
  }
  note_amax(trial ? trial + 3 * number : e->amax,
            largest.magnitude(!trial && splits<EITHER>(*e)));
}
