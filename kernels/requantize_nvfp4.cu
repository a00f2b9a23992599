// What the forward pass makes of a tensor in NVFP4, and operands of backward products from that.

// Of a tensor, and what a product down its columns makes of that. `Arguments` of kept.rs.
struct Keeping {
  Values forward, backward;
};

// Stores a tile of numbers, dense and in the order of its source.
template <class Data>
__device__ __forceinline__ void store_tile(const u8 *tile, const Keeping &q, u32 first_vector,
                                           u32 first) {
  u32 rows = q.forward.vectors, columns = q.forward.length;
  bf16 *out = (bf16 *)q.forward.out;
  if (first + CHUNK <= rows && first_vector + VECTORS <= columns && columns % 8 == 0) {
#pragma unroll
    for (u32 j = 0; j < VECTORS / 8; j++) {
      u32 i = threadIdx.x + j * THREADS, line = i / (VECTORS / 8), eight = i % (VECTORS / 8);
      *(uint4 *)(out + (size_t)(first + line) * columns + first_vector + 8 * eight) =
          *(const uint4 *)(tile + Data::at(line) + 16 * eight);
    }
  } else {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < CHUNK * VECTORS; i += THREADS) {
      u32 row = first + i / VECTORS, column = first_vector + i % VECTORS;
      if (row < rows && column < columns)
        out[(size_t)row * columns + column] =
            ((const bf16 *)(tile + Data::at(i / VECTORS)))[i % VECTORS];
    }
  }
}

// The forward pass's numbers, which bf16 holds, and their tensor's scale; and where `backward.amax`
// is not null, the largest magnitude of what the product rounds, as find_nvfp4_amax does. Blocks
// are not squares. Launch as find_nvfp4_amax of `backward`.
template <class T>
__global__ void __launch_bounds__(THREADS, 4) keep_nvfp4(const __grid_constant__ Keeping q) {
  begin();
  using Source = Lines<sizeof(T), 16>;
  using Numbers = Lines<2, 16>;
  __shared__ __align__(16) u8 tile[Source::BYTES];
  __shared__ Tensor of_all;
  if (threadIdx.x == THREADS - 1) of_all = tensor_scale(q.forward);
  u32 first_vector = blockIdx.x * VECTORS, first = blockIdx.y * CHUNK;
  load_tile<T, false, Source>(tile, q.backward, first_vector, first);
  __syncthreads();
  float v[BLOCK], scales[2];
  // A thread has a line, two blocks of the forward pass.
#pragma unroll
  for (u32 i = 0; i < BLOCK; i += 8)
    load8((const T *)(tile + Source::at(threadIdx.x)) + i, v + i);
  if (sizeof(T) > 2) __syncthreads();
  Place place = place_of_thread<true>();
  Tensor tensor = of_all;
  choose_scales(q.forward, nullptr, place, v, tensor, scales);
  Unused bits;
  round_in_tensor<false>(v, scales, tensor.decode, bits);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i += 8)
    store8((bf16 *)(tile + Numbers::at(threadIdx.x)) + i, v + i);
  __syncthreads();
  store_tile<Numbers>(tile, q, first_vector, first);
  write_scale(q.forward, tensor);
  if (!q.backward.amax) return;
  u32 known = *(volatile u32 *)q.backward.amax;
  read_column<bf16, Numbers>(tile, place, v);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], tensor.decode);
  if (q.backward.group) {
    flip(v, q.backward, place.part);
    rotate_within(v, q.backward.group);
  }
  note_rotated<Lanes<true>::STEP>(q.backward, v, known);
}

// Where all scales are those of 128 elements or less nobody has to know the tensor first: a thread
// block of 512 threads has 128 lines of 128 numbers, whole blocks of both.
#define SIDE 128
#define SIDE_THREADS 512

// The lines in shared memory as f32: 16 bytes follow each 32 numbers, and each 32 lines are
// shifted, so that threads that have 32 numbers of a line, or of a column, do not meet in a bank.
struct Side {
  static constexpr u32 QUARTER = BLOCK * 4 + 16, PITCH = SIDE / BLOCK * QUARTER;
  static __device__ __forceinline__ u32 at(u32 line, u32 column) {
    return line * PITCH + line / BLOCK * 32 + column / BLOCK * QUARTER + column % BLOCK * 4;
  }
};

// Random bits of (128, 128) in shared memory, 16 each, as draw_transposed leaves those of less.
struct SideBits {
  static constexpr u32 PITCH = SIDE * 2;
  const u8 *column;
  static __device__ __forceinline__ u32 at(u32 line) { return line * PITCH + line / BLOCK * 16; }
  static __device__ __forceinline__ void draw(const Values &q, u32 first_vector, u32 first) {
#pragma unroll
    for (u32 j = 0; j < SIDE * SIDE / 8 / SIDE_THREADS; j++) {
      u32 i = threadIdx.x + j * SIDE_THREADS, line = i / (SIDE / 8), eight = i % (SIDE / 8);
      *(uint4 *)(shared + at(line) + 16 * eight) =
          philox(q.elements, first + line, first_vector / 8 + eight);
    }
  }
  __device__ __forceinline__ u32 addend(u32 i) const {
    return *(const u16 *)(column + i * PITCH) << 8 | 0x80;
  }
};

// The numbers of `backward` from what the forward pass makes of its source, all of it in registers.
// Grid: (vectors / 128, depth / 128), rounded up; block: 512; dynamic shared memory: Side's and its
// shifts.
template <class T, Rounding ROUNDING>
__global__ void __launch_bounds__(SIDE_THREADS, 2)
    requantize_nvfp4(const __grid_constant__ Keeping q) {
  begin();
  u32 first_vector = blockIdx.x * SIDE, first = blockIdx.y * SIDE;
  const Values &made = q.backward;
  float v[BLOCK];
  {
    u32 line = threadIdx.x / 4, k = first + line, place = threadIdx.x % 4 * BLOCK;
    load_part((const T *)made.source, made.length, made.vectors, k, first_vector + place, v);
    Unused none;
    round_within<false, 1>(v, q.forward.outer == POWER_OF_128, none);
#pragma unroll
    for (u32 i = 0; i < BLOCK; i += 8) store8((float *)(shared + Side::at(line, place)) + i, v + i);
  }
  __syncthreads();
  constexpr u32 STEP = 8;
  u32 lane = threadIdx.x % WARP, part = lane / STEP;
  u32 local = threadIdx.x / WARP * STEP + lane % STEP;
  const u8 *column = shared + Side::at(BLOCK * part, local);
#pragma unroll
  for (u32 i = 0; i < BLOCK; i++) v[i] = *(const float *)(column + i * Side::PITCH);
  if (made.group) {
    flip(v, made, part);
    rotate_within(v, made.group);
    end_rotation<STEP>(v, made);
  }
  if (ROUNDING == UNBIASED) {
    __syncthreads();
    SideBits::draw(made, first_vector, first);
    __syncthreads();
  }
  SideBits bits{shared + SideBits::at(BLOCK * part) + 2 * local};
  round_within<ROUNDING == UNBIASED, STEP>(v, made.outer == POWER_OF_128, bits);
  write_scale(made, tensor_scale(made));
  u32 vector = first_vector + local, k = first + BLOCK * part;
  if (vector >= made.vectors) return;
  size_t at = (size_t)vector * made.depth + k;
  if (made.wide) store_block((float *)made.out + at, v, k, made.depth);
  else store_block((bf16 *)made.out + at, v, k, made.depth);
}
