// What ranks and lanes of a step do with gradients.

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// gradients = others + gradients, each of `vectors` times four numbers. Grid: any; block: any.
__global__ void join_gradients(float4 *gradients, const float4 *others, u64 vectors) {
  begin();
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors;
       i += (u64)gridDim.x * blockDim.x)
    gradients[i] = add(others[i], gradients[i]);
}

// The parts of a sum: that of rank `mine`, and those of the others in their order.
struct Parts {
  const float4 *own, *others;
  u64 stride;
  u32 mine;

  __device__ __forceinline__ float4 of(u32 rank, u64 i) const {
    return rank == mine ? own[i] : others[(rank - (rank > mine)) * stride + i];
  }
};

// The largest power of two below n, from 2 on.
constexpr u32 left_of(u32 n) {
  u32 left = 1;
  while (2 * left < n) left *= 2;
  return left;
}

// The sum of COUNT parts from FIRST on, in the order of comm/tree.rs.
template <u32 FIRST, u32 COUNT>
__device__ __forceinline__ float4 tree(const Parts &parts, u64 i) {
  if constexpr (COUNT == 1) {
    return parts.of(FIRST, i);
  } else {
    constexpr u32 LEFT = left_of(COUNT);
    return add(tree<FIRST, LEFT>(parts, i), tree<FIRST + LEFT, COUNT - LEFT>(parts, i));
  }
}

// The same of any number, at most 4,096: as parts that come one by one are joined there.
__device__ __forceinline__ float4 tree_of(u32 count, const Parts &parts, u64 i) {
  float4 kept[12], sum = parts.of(0, i);
  u32 in_use = 0;
  for (u32 done = 1; done < count; done++) {
    kept[in_use++] = sum;
    sum = parts.of(done, i);
    // Those that are whole, or at the end all.
    u32 joined = done + 1 == count ? in_use : __ffs(done + 1) - 1;
    while (joined--) sum = add(kept[--in_use], sum);
  }
  return sum;
}

// own (vectors, 4) = the sum of the parts of COUNT ranks, or with 0 of `count`: of itself, which is
// that of rank `mine`, and of others (ranks - 1, stride, 4). Grid: any; block: any.
template <u32 COUNT>
__global__ void sum_parts(float4 *own, const float4 *others, u64 stride, u32 mine, u32 count,
                          u64 vectors) {
  begin();
  Parts parts = {own, others, stride, mine};
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors;
       i += (u64)gridDim.x * blockDim.x) {
    if constexpr (COUNT == 0) own[i] = tree_of(count, parts, i);
    else own[i] = tree<0, COUNT>(parts, i);
  }
}

// Where a slice of the gradients begins in the memory of each rank.
#define MOST_PEERS 8
struct Peers {
  float4 *of[MOST_PEERS];
};

// The sum of COUNT numbers from FIRST on, in the order of the tree.
template <u32 FIRST, u32 COUNT> __device__ __forceinline__ float4 tree(const float4 *numbers) {
  if constexpr (COUNT == 1) {
    return numbers[FIRST];
  } else {
    constexpr u32 LEFT = left_of(COUNT);
    return add(tree<FIRST, LEFT>(numbers), tree<FIRST + LEFT, COUNT - LEFT>(numbers));
  }
}

// Whose memory a sum is written to.
#define ALL_PEERS 0xffffffffu

// The slice (vectors, 4) of each of COUNT ranks, or of rank `only` alone, becomes the sum of all of
// them: one kernel reads and writes the memory of all GPUs. A thread has several vectors on their
// way, since that is far. Grid: any; block: any.
template <u32 COUNT> __global__ void sum_peers(Peers peers, u64 vectors, u32 only) {
  begin();
  constexpr u32 AT_ONCE = COUNT <= 2 ? 4 : COUNT <= 4 ? 2 : 1;
  u64 threads = (u64)gridDim.x * blockDim.x;
  for (u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x; first < vectors;
       first += AT_ONCE * threads) {
    float4 parts[AT_ONCE][COUNT];
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++)
#pragma unroll
      for (u32 rank = 0; rank < COUNT; rank++) {
        u64 i = first + k * threads;
        if (i < vectors) parts[k][rank] = peers.of[rank][i];
      }
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
      u64 i = first + k * threads;
      if (i >= vectors) break;
      float4 sum = tree<0, COUNT>(parts[k]);
#pragma unroll
      for (u32 rank = 0; rank < COUNT; rank++)
        if (only == ALL_PEERS || only == rank) peers.of[rank][i] = sum;
    }
  }
}
