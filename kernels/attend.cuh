// What files of attention in training begin with. `amax`, in every kernel that stores tensors, is
// told the largest magnitude stored (note_amax).

__device__ __forceinline__ u32 shared_address(const void *p) {
  return (u32)__cvta_generic_to_shared(p);
}

// Starts copying 16 bytes to an address in shared memory, zeros where not `inside`.
__device__ __forceinline__ void copy_piece(u32 to, const bf16 *from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0));
}

// The largest of a magnitude and those of two bf16 numbers.
__device__ __forceinline__ float larger_of(float largest, u32 two) {
  return max_nan(largest, max_nan(fabsf(low_f32(two)), fabsf(high_f32(two))));
}
