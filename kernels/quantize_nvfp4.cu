// Operands in NVFP4, from tensors or from what the forward pass made of them.

// Makes the word at `amax` the bits of the largest magnitude, where it was 0 before. A NaN is above
// everything. Grid: (vectors / 32, depth / 256), rounded up; block: 256.
template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 4)
    find_nvfp4_amax(const __grid_constant__ Values q) {
  begin();
  __shared__ __align__(16) u8 tile[TRANSPOSED ? Lines<sizeof(T)>::BYTES : 16];
  u32 known = *(volatile u32 *)q.amax;
  float v[BLOCK];
  gather<T, TRANSPOSED>(q, tile, place_of_thread<TRANSPOSED>(), v);
  note_rotated<Lanes<TRANSPOSED>::STEP>(q, v, known);
}

// The numbers of an operand to `out`, the scale of the tensor, and what the product is multiplied
// by. Launch as find_nvfp4_amax. NOTE: four thread blocks a multiprocessor spill some numbers; even
// so transposed sources are 7% faster than with three, those along the reduction 2% slower (H100,
// baedfc1).
template <class T, bool TRANSPOSED, Rounding ROUNDING>
__global__ void __launch_bounds__(THREADS, TRANSPOSED || ROUNDING == EDEN ? 4 : 3)
    round_nvfp4(const __grid_constant__ Values q) {
  begin();
  constexpr bool STOCHASTIC = ROUNDING == UNBIASED;
  constexpr u32 SIZE = sizeof(T) == 2 ? 2 : 4;
  // What is the same for many threads goes through shared memory where they wait in any case.
  constexpr bool WAITS = TRANSPOSED || ROUNDING == EDEN;
  // First a tile of the source, then random bits.
  __shared__ __align__(16) u8 tile[TRANSPOSED ? Lines<SIZE>::BYTES : 16];
  __shared__ Squares squares;
  __shared__ Tensor of_all;
  __shared__ ScaleBits scale_bits;
  if (WAITS && threadIdx.x == THREADS - 1) of_all = tensor_scale(q);
  if (ROUNDING == EDEN) draw_for_scales(scale_bits, q);
  Place place = place_of_thread<TRANSPOSED>();
  float v[BLOCK];
  gather<T, TRANSPOSED>(q, tile, place, v);
  if (WAITS && !TRANSPOSED) __syncthreads();
  end_rotation<Lanes<TRANSPOSED>::STEP>(v, q);
  if (STOCHASTIC && TRANSPOSED) {
    __syncthreads();
    draw_transposed(tile, q);
    __syncthreads();
  }
  Tensor tensor = WAITS ? of_all : tensor_scale(q);
  u32 vector = blockIdx.x * VECTORS + place.local, k = blockIdx.y * CHUNK + BLOCK * place.part;
  Bits<TRANSPOSED> bits(q, tile, place);
  if (ROUNDING == EDEN) {
    round_eden(v, tensor, scale_bits.of(place));
  } else if (q.outer == OF_TENSOR) {
    float scales[2], wide[2];
    if (STOCHASTIC) {
      u32 amaxes[2] = {amax_of_block(v), amax_of_block(v + SIXTEEN)};
      scales_of(q, amaxes, tensor, scales, wide);
    } else {
      choose_scales(q, &squares, place, v, tensor, scales);
    }
    round_in_tensor<STOCHASTIC>(v, scales, tensor.decode, bits);
  } else {
    round_within<STOCHASTIC, Lanes<TRANSPOSED>::STEP>(v, q.outer == POWER_OF_128, bits);
  }
  write_scale(q, tensor);
  if (vector >= q.vectors) return;
  u32 depth = q.dequantized && !q.group ? q.length : q.depth;
  size_t at = (size_t)vector * depth + k;
  if (q.dequantized) {
#pragma unroll
    for (u32 i = 0; i < BLOCK; i++) v[i] = __fmul_rn(v[i], tensor.decode);
  }
  if (q.dequantized || q.wide) store_block((float *)q.out + at, v, k, depth);
  else store_block((bf16 *)q.out + at, v, k, depth);
}
