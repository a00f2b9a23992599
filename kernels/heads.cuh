// The heads of attention, as all of its files know them.
//
// A row of qkv has all heads of q, then those of k, then those of v. Of q there are `per_kv_head`
// times as many, which share those of k and v in groups that lie together.

// `Heads` of the host.
struct Heads {
  u32 length, heads, kv_heads, per_kv_head, head_size;
  float score_factor;
  __device__ __forceinline__ u32 channels() const { return heads * head_size; }
  // Of a row of qkv.
  __device__ __forceinline__ u32 qkv_channels() const {
    return (heads + 2 * kv_heads) * head_size;
  }
  // Where in a row of qkv the keys of a kv head begin, and how much further on its values.
  __device__ __forceinline__ u32 keys(u32 kv_head) const { return (heads + kv_head) * head_size; }
  __device__ __forceinline__ u32 to_values() const { return kv_heads * head_size; }
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
