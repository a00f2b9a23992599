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
  // A sequence is one document: of a position the first of its document, and the first behind it.
  static constexpr bool PACKED = false;
  __device__ __forceinline__ u32 start(u32 batch, u32 position) const { return 0; }
  __device__ __forceinline__ u32 end(u32 batch, u32 position) const { return length; }
};

// `PackedHeads` of the host: sequences that are packed with documents, which do not see each other.
// It is a type, so that the kernels of whole sequences are compiled as if there were no documents.
struct PackedHeads : Heads {
  const u32 *bounds;  // (2, B, T): starts, then ends; both ascend along a sequence
  u32 rows;           // B T
  static constexpr bool PACKED = true;
  // Positions beyond the end are of the last document.
  __device__ __forceinline__ u32 start(u32 batch, u32 position) const {
    return bounds[batch * length + min(position, length - 1)];
  }
  __device__ __forceinline__ u32 end(u32 batch, u32 position) const {
    return bounds[rows + batch * length + min(position, length - 1)];
  }
};

#define LOG2E 1.4426950408889634f
