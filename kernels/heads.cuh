// The heads of attention, as all of its files know them.

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
