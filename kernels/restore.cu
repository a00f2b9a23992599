// Behind products in the basis of a rotated forward pass, bit for bit as src/formats/restore.rs has
// it: nothing passes where the forward pass cut a number off, and the transform turns the rest
// back.

#define THREADS 256
#define WARPS (THREADS / WARP)

// `Restore` of backend/cuda/quantize/values.rs.
struct Restore {
  void *out;          // (rows, columns)
  const float *c;     // (rows, 32 * groups)
  const void *tensor; // (rows, columns), of the type of `out`: what `out` is the gradient of
  u32 rows, columns, groups;
  u32 clips, nearest; // whether numbers were cut off, and how the scale was rounded
  u32 accumulate;
  float scale; // of the transform
};

// The butterfly of the warp's 32 elements.
__device__ __forceinline__ float turn(float v, float scale) {
  u32 lane = threadIdx.x % WARP;
#pragma unroll
  for (u32 mask = 1; mask < WARP; mask *= 2) {
    float other = __shfl_xor_sync(FULL_WARP, v, mask);
    v = lane & mask ? __fsub_rn(other, v) : __fadd_rn(v, other);
  }
  return __fmul_rn(v, scale);
}

// Whether a number of a block with this scale byte was cut off.
__device__ __forceinline__ bool is_cut_off(float x, u32 byte) {
  return byte != 255 && __fmul_rn(fabsf(x), __uint_as_float((254 - byte) << 23)) >= 6.0f;
}

// A warp takes 32 groups, which follow each other: all lanes load and turn one at a time, then each
// has one whose scale it computes. Grid: rows * groups / 256, rounded up; block: 256.
template <class T>
__global__ void __launch_bounds__(THREADS) restore(const __grid_constant__ Restore q) {
  begin();
  __shared__ float tile[WARPS][WARP][WARP + 1];
  __shared__ u32 bytes[WARPS][WARP];
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  size_t first = ((size_t)blockIdx.x * WARPS + warp) * WARP, all = (size_t)q.rows * q.groups;
  if (q.clips) {
    for (u32 i = 0; i < WARP; i++) {
      size_t group = first + i, row = group / q.groups;
      u32 column = (u32)(group % q.groups) * WARP + lane;
      bool inside = group < all && column < q.columns;
      float x = inside ? to_f32(((const T *)q.tensor)[row * q.columns + column]) : 0.0f;
      tile[warp][i][lane] = turn(x, q.scale);
    }
    __syncthreads();
    const float *block = tile[warp][lane];
    bytes[warp][lane] = deviation_byte(q.nearest, block, 1, 0, amax_of(block, WARP));
    __syncthreads();
  }
  for (u32 i = 0; i < WARP; i++) {
    size_t group = first + i, row = group / q.groups;
    float g = group < all ? q.c[group * WARP + lane] : 0.0f;
    if (q.clips && is_cut_off(tile[warp][i][lane], bytes[warp][i])) g = 0.0f;
    g = turn(g, q.scale);
    u32 column = (u32)(group % q.groups) * WARP + lane;
    if (group >= all || column >= q.columns) continue;
    T *out = (T *)q.out + row * q.columns + column;
    *out = from_f32<T>(q.accumulate ? __fadd_rn(to_f32(*out), g) : g);
  }
}
