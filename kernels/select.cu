// Positions that blocks keep, and their rows out of the residual stream and back.
//
// A selection has a word for each position of a sequence: its number among the kept ones, which
// ascend, or DROPPED. So a row of the stream knows by itself where it belongs.

#define DROPPED 0xffffffffu

// `Selecting` of backend/cuda/select.rs.
struct Selecting {
  u32 *numbers;  // (B, T) of the first block; those of the next lie `stride` words behind
  u32 stride, batch, length, kept;
  Draw draw;  // of the first block
};

// Which positions have the smallest keys, as src/formats/subset.rs defines it. A thread block takes
// a sequence of one block, a thread a stretch of it, whose keys it keeps in place of the numbers.
// Grid: B, blocks; block: 256.
__global__ void select_positions(const __grid_constant__ Selecting s) {
  begin();
  __shared__ float scratch[WARP];
  __shared__ u64 counts[256];
  u32 *numbers = s.numbers + (size_t)blockIdx.y * s.stride + (size_t)blockIdx.x * s.length;
  // A call of the generator makes four keys.
  u32 each = (s.length + 4 * blockDim.x - 1) / (4 * blockDim.x) * 4;
  u32 first = min(threadIdx.x * each, s.length), end = min(first + each, s.length);
  Draw draw = s.draw;
  draw.word3 += blockIdx.y << 6;
  for (u32 i = first; i < end; i += 4) {
    uint4 four = philox(draw, i / 4, blockIdx.x);
    u32 keys[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (u32 j = 0; j < 4; j++)
      if (i + j < end) numbers[i + j] = keys[j];
  }
  auto below = [&](u32 bound) {
    u32 count = 0;
    for (u32 i = first; i < end; i++) count += numbers[i] < bound ? 1 : 0;
    return count;
  };
  // The largest number that fewer keys are below than are kept: the last key that is. Counts are
  // whole numbers of at most 2^24, whose sums are exact.
  u32 last = 0;
  for (int bit = 31; bit >= 0; bit--) {
    u32 larger = last | 1u << bit;
    if (block_sum((float)below(larger), scratch) < (float)s.kept) last = larger;
  }
  u32 smaller = below(last), equal = 0;
  for (u32 i = first; i < end; i++) equal += numbers[i] == last ? 1 : 0;
  u32 left = s.kept - (u32)block_sum((float)smaller, scratch);

  // Of both the sum over all threads up to this one, then over those before it.
  u64 own = (u64)smaller << 32 | equal;
  counts[threadIdx.x] = own;
  for (u32 by = 1; by < blockDim.x; by *= 2) {
    __syncthreads();
    u64 before = threadIdx.x >= by ? counts[threadIdx.x - by] : 0;
    __syncthreads();
    counts[threadIdx.x] += before;
  }
  u64 before = counts[threadIdx.x] - own;
  // Of keys that equal the last, the first are kept.
  u32 taken = min((u32)before, left), number = (u32)(before >> 32) + taken;
  left -= taken;
  for (u32 i = first; i < end; i++) {
    u32 key = numbers[i];
    bool is_last = key == last && left > 0;
    if (is_last) left--;
    numbers[i] = key < last || is_last ? number++ : DROPPED;
  }
}

// `Rows` of backend/cuda/select.rs.
template <class T> struct Rows {
  T *out;
  u32 *amax;           // is told the largest magnitude gathered
  const u32 *numbers;  // (B, T)
  const T *base, *x, *y;
  u32 rows, length, kept, channels;

  // Where the kept row of a number begins, in a sequence of which `row` is one.
  __device__ __forceinline__ size_t kept_at(u32 row, u32 number) const {
    return ((size_t)(row / length) * kept + number) * channels;
  }
};

// A warp takes a row of all B T, where that is kept. The grid of each kernel: rows / 8, rounded up;
// block: 256.

// out (B r, C) = the kept rows of x (B T, C).
template <class T> __global__ void gather_rows(const __grid_constant__ Rows<T> r) {
  begin();
  u32 lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (row >= r.rows) return;
  u32 number = r.numbers[row];
  if (number == DROPPED) return;
  const T *x = r.x + (size_t)row * r.channels;
  T *out = r.out + r.kept_at(row, number);
  float largest = 0.0f;
  each_group(lane, r.channels, [&](u32 i, u32 count) {
    float v[8];
    load_group(x + i, count, v);
#pragma unroll
    for (int j = 0; j < 8; j++) largest = max_nan(largest, fabsf(v[j]));
    store_group(out + i, count, v);
  });
  note_amax(r.amax, largest);
}

// The kept rows of out (B T, C) = x (B r, C).
template <class T> __global__ void scatter_rows(const __grid_constant__ Rows<T> r) {
  begin();
  u32 lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (row >= r.rows) return;
  u32 number = r.numbers[row];
  if (number == DROPPED) return;
  const T *x = r.x + r.kept_at(row, number);
  T *out = r.out + (size_t)row * r.channels;
  each_group(lane, r.channels, [&](u32 i, u32 count) {
    float v[8];
    load_group(x + i, count, v);
    store_group(out + i, count, v);
  });
}

// out (B T, C) = x + y (B r, C) in kept rows, rounded to T, and base (B T, C) in others.
template <class T> __global__ void scatter_sum(const __grid_constant__ Rows<T> r) {
  begin();
  u32 lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  if (row >= r.rows) return;
  u32 number = r.numbers[row];
  size_t at = (size_t)row * r.channels;
  bool is_kept = number != DROPPED;
  const T *x = is_kept ? r.x + r.kept_at(row, number) : r.base + at;
  const T *y = r.y + r.kept_at(row, is_kept ? number : 0);
  each_group(lane, r.channels, [&](u32 i, u32 count) {
    float v[8], u[8];
    load_group(x + i, count, v);
    if (is_kept) {
      load_group(y + i, count, u);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] += u[j];
    }
    store_group(r.out + at + i, count, v);
  });
}
