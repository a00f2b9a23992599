// Channels merged by their hashes, as src/formats/haste.rs defines it, bit for bit. Sums are f64,
// in the definition's order.

// `Merge` of backend/cuda/merge.rs: B sequences of T tokens, C channels, hashes of L bits.
struct Merge {
  void *x;                  // (B T, C), in place
  signed char *projections; // (L, T)
  u64 *hashes;              // (B, C)
  u32 *next;                // (B, C): the next channel of the bucket, C behind the last, and FIRST
  float *buckets;           // (B): how many there are
  u32 batch, tokens, channels, bits;
  Draw draw;
};

// Of `next`: the channel is the first of its bucket.
#define FIRST 0x80000000u

// An entry is 1 for so many of 2^16 draws, and -1 for as many.
#define SIXTH 10923u

// A thread draws 8 entries. Grid: L T / 8 / 256, each quotient rounded up; block: 256.
__global__ void draw_projections(const __grid_constant__ Merge m) {
  begin();
  u32 groups = (m.tokens + 7) / 8, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m.bits * groups) return;
  u32 number = i / groups, first = i % groups * 8;
  uint4 all = philox(m.draw, number, i % groups);
  u32 words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
  for (u32 j = 0; j < 8; j++) {
    u32 bits = words[j / 2] >> 16 * (j % 2) & 0xffffu;
    if (first + j < m.tokens)
      m.projections[(size_t)number * m.tokens + first + j] =
          bits < SIXTH ? 1 : bits < 2 * SIXTH ? -1 : 0;
  }
}

// Projections that go over a channel together: as many sums as registers hold.
#define AT_ONCE 16u

// A thread hashes a channel of a sequence; entries are the same for all threads of a warp. Grid:
// B C / 256, rounded up; block: 256.
template <class T> __global__ void hash_channels(const __grid_constant__ Merge m) {
  begin();
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)m.batch * m.channels) return;
  const T *x = (const T *)m.x + i / m.channels * m.tokens * m.channels + i % m.channels;
  double sum = 0.0;
  for (u32 t = 0; t < m.tokens; t++) sum += (double)to_f32(x[(size_t)t * m.channels]);
  u64 hash = 0;
  for (u32 first = 0; first < m.bits; first += AT_ONCE) {
    double dots[AT_ONCE] = {};
    int entries[AT_ONCE] = {};
    for (u32 t = 0; t < m.tokens; t++) {
      double v = (double)to_f32(x[(size_t)t * m.channels]);
#pragma unroll
      for (u32 j = 0; j < AT_ONCE; j++) {
        if (first + j >= m.bits) continue;
        int entry = m.projections[(size_t)(first + j) * m.tokens + t];
        if (entry > 0) dots[j] += v;
        if (entry < 0) dots[j] -= v;
        entries[j] += entry;
      }
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++)
      hash |= (u64)((double)m.tokens * dots[j] > (double)entries[j] * sum) << (first + j);
  }
  m.hashes[i] = hash;
}

// Links the channels of each bucket in ascending order. A thread block takes a sequence. Grid: B;
// block: 256.
__global__ void link_channels(const __grid_constant__ Merge m) {
  begin();
  __shared__ float scratch[WARP];
  const u64 *hashes = m.hashes + (size_t)blockIdx.x * m.channels;
  u32 *next = m.next + (size_t)blockIdx.x * m.channels;
  float buckets = 0.0f;
  for (u32 c = threadIdx.x; c < m.channels; c += blockDim.x) {
    u64 hash = hashes[c];
    u32 before = 0, after = c + 1;
    while (hashes[before] != hash) before++;
    while (after < m.channels && hashes[after] != hash) after++;
    bool is_first = before == c;
    next[c] = after | (is_first ? FIRST : 0);
    buckets += is_first ? 1.0f : 0.0f;
  }
  // Whole numbers, whose sum is exact.
  buckets = block_sum(buckets, scratch);
  if (threadIdx.x == 0) m.buckets[blockIdx.x] = buckets;
}

// Every number of a row becomes the mean of its bucket. The thread of a bucket's first channel goes
// along the bucket. Grid: B T; block: 256.
template <class T> __global__ void average_channels(const __grid_constant__ Merge m) {
  begin();
  const u32 *next = m.next + (size_t)(blockIdx.x / m.tokens) * m.channels;
  T *row = (T *)m.x + (size_t)blockIdx.x * m.channels;
  for (u32 c = threadIdx.x; c < m.channels; c += blockDim.x) {
    u32 second = next[c] & ~FIRST;
    // One alone stays as it is.
    if (!(next[c] & FIRST) || second == m.channels) continue;
    double sum = (double)to_f32(row[c]), count = 1.0;
    for (u32 i = second; i < m.channels; i = next[i] & ~FIRST)
      sum += (double)to_f32(row[i]), count += 1.0;
    T mean = from_f32<T>((float)(sum / count));
    for (u32 i = c; i < m.channels; i = next[i] & ~FIRST) row[i] = mean;
  }
}
