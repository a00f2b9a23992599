// Token and position embeddings.

// out (B T, C) = row `token` of wte plus, unless wpe is null, its row `position`, which is counted
// from `starts` (B T), where a row's document begins, unless that is null. Grid: rows; block: 128.
template <class T>
__global__ void embedding_forward(T *out, const u32 *tokens, const T *wte, const T *wpe,
                                  const u32 *starts, u32 length, u32 channels) {
  begin();
  u32 row = blockIdx.x, place = row % length - (starts ? starts[row] : 0);
  const T *token = wte + (size_t)tokens[row] * channels;
  const T *position = wpe + (size_t)place * channels;
  out += (size_t)row * channels;
  if (channels % 8 == 0) {
    for (u32 i = threadIdx.x * 8; i < channels; i += blockDim.x * 8) {
      float a[8], b[8];
      load8(token + i, a);
      if (wpe) {
        load8(position + i, b);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] += b[j];
      }
      store8(out + i, a);
    }
  } else {
    for (u32 i = threadIdx.x; i < channels; i += blockDim.x)
      out[i] = wpe ? from_f32<T>(to_f32(token[i]) + to_f32(position[i])) : token[i];
  }
}

// Adds to row `token` of dwte (V, C) the rows of dout (rows, C) where the token stands.
//
// `order` holds the row numbers sorted by token; the run of a token is order[starts[r]] up to where
// the next begins; *runs of them. A block owns a run. Its threads are as many groups as fit, each
// as wide as the row (8 columns a thread); a group takes every so-manieth row of the run, and the
// sums of the groups are added in order. Grid: most runs there can be; block: 256; dynamic shared
// memory: 8 KB.
template <class T>
__global__ void embedding_backward_tokens(float *dwte, const T *dout, const u32 *tokens,
                                          const u32 *order, const u32 *starts, const u32 *runs,
                                          u32 rows, u32 channels) {
  begin();
  extern __shared__ float sums[];  // (256, 8)
  u32 run = blockIdx.x;
  if (run >= *runs) return;
  u32 first = starts[run], last = run + 1 < *runs ? starts[run + 1] : rows;
  float *to = dwte + (size_t)tokens[order[first]] * channels;
  if (channels % 8 != 0) {
    for (u32 column = threadIdx.x; column < channels; column += blockDim.x) {
      float sum = 0.0f;
      for (u32 i = first; i < last; i++) sum += to_f32(dout[(size_t)order[i] * channels + column]);
      to[column] += sum;
    }
    return;
  }
  u32 wide = min(channels / 8, blockDim.x), groups = blockDim.x / wide;
  u32 group = threadIdx.x / wide, thread = threadIdx.x % wide;
  for (u32 start = 0; start < channels; start += wide * 8) {
    u32 column = start + thread * 8;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (group < groups && column < channels) {
#pragma unroll 4
      for (u32 i = first + group; i < last; i += groups) {
        float v[8];
        load8(dout + (size_t)order[i] * channels + column, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += v[j];
      }
    }
    if (groups > 1 && last - first > 1) {
      store8(sums + threadIdx.x * 8, sum);
      __syncthreads();
      if (group == 0)
        for (u32 other = 1; other < groups; other++) {
          float v[8];
          load8(sums + (other * wide + thread) * 8, v);
#pragma unroll
          for (int j = 0; j < 8; j++) sum[j] += v[j];
        }
      __syncthreads();
    }
    if (group == 0 && column < channels) {
      float v[8];
      load8(to + column, v);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] += sum[j];
      store8(to + column, v);
    }
  }
}

// Adds to dwpe (length, C) the sums of dout (batch, length, C) over the batch.
// Grid: length C / 256, rounded up; block: 256.
template <class T>
__global__ void embedding_backward_positions(float *dwpe, const T *dout, u32 batch, u32 length,
                                             u32 channels) {
  begin();
  size_t stride = (size_t)length * channels;
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= stride) return;
  float sum = 0.0f;
#pragma unroll 8
  for (u32 b = 0; b < batch; b++) sum += to_f32(dout[b * stride + i]);
  dwpe[i] += sum;
}

// The same where positions are counted within documents, of which `ends` (batch, length) says at
// each position where its document ends: to a position goes the sum over all that have it, in their
// order. Launch as above.
template <class T>
__global__ void embedding_backward_documents(float *dwpe, const T *dout, const u32 *ends, u32 batch,
                                             u32 length, u32 channels) {
  begin();
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (size_t)length * channels) return;
  u32 position = i / channels, channel = i % channels;
  float sum = 0.0f;
  for (u32 b = 0; b < batch; b++) {
    const T *of_sequence = dout + (size_t)b * length * channels + channel;
    for (u32 start = 0, end; start < length; start = end) {
      end = ends[b * length + start];
      if (start + position < end) sum += to_f32(of_sequence[(size_t)(start + position) * channels]);
    }
  }
  dwpe[i] += sum;
}
