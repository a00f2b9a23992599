// Rows that a warp goes over: 8 columns at a time, as memory has them.

// Calls f(column, count) for this lane's share of a row: groups of 8 columns, the last shorter, or
// where rows are not aligned, single columns.
template <class F>
__device__ __forceinline__ void each_group(u32 lane, u32 channels, F f) {
  if (channels % 8 == 0) {
    for (u32 i = lane * 8; i < channels; i += WARP * 8) f(i, 8u);
  } else {
    for (u32 i = lane; i < channels; i += WARP) f(i, 1u);
  }
}

template <class T>
__device__ __forceinline__ void load_group(const T *p, u32 count, float v[8]) {
  if (count == 8) {
    load8(p, v);
  } else {
    v[0] = to_f32(p[0]);
#pragma unroll
    for (int j = 1; j < 8; j++) v[j] = 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_group(T *p, u32 count, const float v[8]) {
  if (count == 8) {
    store8(p, v);
  } else {
    p[0] = from_f32<T>(v[0]);
  }
}
