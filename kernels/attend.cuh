// What all files of attention begin with. `amax`, in every kernel that stores tensors, is told the
// largest magnitude stored (note_amax).

// `Heads` of the host.
struct Heads {
  u32 length, heads, head_size;
  float score_factor;
  __device__ __forceinline__ u32 channels() const { return heads * head_size; }
  // What scores are multiplied by: 1 / sqrt(head size) in GPT-2, where the factor is 1 and changes
  // no bit.
  __device__ __forceinline__ float scale() const {
    return __fmul_rn(rsqrtf((float)head_size), score_factor);
  }
};

#define LOG2E 1.4426950408889634f

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
