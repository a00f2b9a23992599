// How gradients are normalized, parameter by parameter: optim/spam.rs.

// `Factors` there.
struct Factors {
  double gamma1, gamma2, gamma3, correction1, correction2, correction3, epsilon;
};

// largest (pieces) = the largest magnitudes of gradients in a piece, as bits. Grid: any; block: 256.
__global__ void largest_of_pieces(u32 *largest, const Entry *table, u32 entries, u64 pieces) {
  begin();
  __shared__ u32 scratch[WARP];
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    u32 bits = 0;
    for (u64 i = start + threadIdx.x; i < end; i += blockDim.x)
      bits = max(bits, __float_as_uint(gradient(e, i)) & 0x7fffffffu);
    bits = __reduce_max_sync(FULL_WARP, bits);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = bits;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (u32 w = 1; w < blockDim.x / WARP; w++) bits = max(bits, scratch[w]);
      largest[piece] = bits;
    }
    __syncthreads();
  }
}

// Limits of normals (entries), from the largest magnitudes of pieces and from what is kept
// (entries, 3), with which their statistics begin. Grid: entries; block: 32.
__global__ void find_limits(Normal *normals, const u32 *largest, const float *kept,
                            const Entry *table, Factors f) {
  begin();
  const Entry *e = table + blockIdx.x;
  u64 pieces = (e->len + PIECE - 1) / PIECE;
  u32 bits = 0;
  for (u64 i = threadIdx.x; i < pieces; i += WARP) bits = max(bits, largest[e->first_piece + i]);
  bits = __reduce_max_sync(FULL_WARP, bits);
  if (threadIdx.x != 0) return;
  Normal normal;
  for (int i = 0; i < 3; i++) normal.statistics[i] = kept[3 * blockIdx.x + i];
  normal.limit = __int_as_float(0x7f800000), normal.shrink = normal.scale = 1.0f;
  if (f.correction3 != 0.0) {
    double most = (double)__uint_as_float(bits);
    double mean = f.gamma3 * (double)normal.statistics[0] + (1.0 - f.gamma3) * most;
    double limit = mean / f.correction3;
    normal.statistics[0] = (float)mean;
    normal.limit = (float)limit;
    if (most > limit) normal.shrink = (float)(limit / most);
  }
  normals[blockIdx.x] = normal;
}

// partials (pieces) = sums of the squares of clipped gradients. Grid: any; block: 256.
__global__ void squares_of_clipped(double *partials, const Entry *table, u32 entries, u64 pieces,
                                   const Normal *normals) {
  begin();
  __shared__ double scratch[WARP];
  for (u64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Entry *e = find(table, entries, piece);
    Normal normal = normals[e - table];
    u64 start = (piece - e->first_piece) * PIECE, end = min(start + PIECE, e->len);
    double total = 0.0;
    for (u64 i = start + threadIdx.x; i < end; i += blockDim.x) {
      double g = (double)clip(gradient(e, i), normal);
      total += g * g;
    }
    total = block_sum_double(total, scratch);
    if (threadIdx.x == 0) partials[piece] = total;
  }
}

// Scales of normals (entries), from these sums. Grid: entries; block: 256.
__global__ void find_scales(Normal *normals, const double *partials, const Entry *table,
                            Factors f) {
  begin();
  __shared__ double scratch[WARP];
  double squares = sum_of_pieces(partials, table + blockIdx.x, scratch);
  if (threadIdx.x != 0) return;
  Normal &normal = normals[blockIdx.x];
  double norm = sqrt(squares), root = (double)normal.statistics[2];
  double mean = f.gamma1 * (double)normal.statistics[1] + (1.0 - f.gamma1) * norm;
  double square = f.gamma2 * (root * root) + (1.0 - f.gamma2) * squares;
  normal.statistics[1] = (float)mean, normal.statistics[2] = (float)sqrt(square);
  double length = mean / f.correction1 / (sqrt(square / f.correction2) + f.epsilon);
  normal.scale = norm == 0.0 ? 1.0f : (float)(length / norm);
}

// kept (entries, 3) = the statistics of normals, where an update is made. sums: of `sum_squares`.
// Grid: entries / 256, rounded up; block: 256.
__global__ void keep_statistics(float *kept, const Normal *normals, u32 entries,
                                const double *sums, Step s) {
  begin();
  u32 number = blockIdx.x * blockDim.x + threadIdx.x;
  float norm;
  if (number >= entries || !is_allowed(sums, s, norm)) return;
  for (int i = 0; i < 3; i++) kept[3 * number + i] = normals[number].statistics[i];
}
