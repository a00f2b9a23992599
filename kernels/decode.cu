// Linear layers on a few rows, which come one after the other where a text is written.
//
// y (rows, outputs) = x (rows, inputs) W^T + bias, W of shape (outputs, inputs) in bf16 or MXFP4.
// What this takes is reading W, once for all rows. A warp multiplies 16 outputs with 8 rows of x at
// a time on tensor cores, straight from memory: the order in which a product counts its elements is
// free as long as both operands have the same one, so a thread takes elements that lie side by
// side, 16 bytes of W and of x, where the instruction would have four pieces of 4.
//
// An element of y is summed in an order that its inputs alone decide: chunks of them go around to
// the eight warps of a block, each sums its own from first to last, and the warps' sums are added
// in their order. So a row has the same bits alone, among others, and in a long text that comes at
// once, of which in MXFP4 another kernel takes many rows and keeps to that order.

// The warps of a block, among which inputs are divided.
#define WARPS 8
// Chunks of many rows that are on their way to shared memory.
#define STAGES 4

// `FewRows` of the host.
struct FewRows {
  void *y, *activated;
  const void *x, *w, *scales, *bias;
  u32 rows, inputs, outputs, form;  // the form of GELU: 1 for the tanh one, 2 for the exact one
};

// A thread's share of a chunk of 16 outputs: elements of outputs g and g + 8 in bf16, as words of
// two, of which each product takes the next two words.
struct OfBf16 {
  // Elements of an output that a thread has at a time, and those of a chunk.
  static const u32 EACH = 8, CHUNK = 4 * EACH;
  uint4 raw[2];

  __device__ __forceinline__ void load(const FewRows &p, u32 output, u32 first, u32 half) {
    const bf16 *w = (const bf16 *)p.w;
    bool inside = output < p.outputs && first < p.inputs;
    raw[half] =
        inside ? *(const uint4 *)(w + (size_t)output * p.inputs + first) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void words(u32 half, u32 to[EACH / 2]) const {
    to[0] = raw[half].x, to[1] = raw[half].y, to[2] = raw[half].z, to[3] = raw[half].w;
  }
};

// Four codes of E2M1, the first in the lowest bits, as bf16 numbers.
__device__ __forceinline__ void decode_codes(u32 codes, u32 &first, u32 &second) {
  // NOTE: the bytes of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 in bf16, picked by the codes themselves.
  u32 magnitudes = codes & 0x7777u;
  u32 high = pick_bytes(0x404040403f3f3f00ull, magnitudes),
      low = pick_bytes(0xc0804000c0800000ull, magnitudes);
  first = __byte_perm(low, high, 0x5140) | (codes << 12 & 0x8000u) | (codes << 24 & 0x80000000u);
  second = __byte_perm(low, high, 0x7362) | (codes << 4 & 0x8000u) | (codes << 16 & 0x80000000u);
}

// The same in MXFP4: codes, the first in the lower half of a byte, in lines of whole chunks, and a
// byte of the scale for every 32. An element in bf16 is exact.
struct OfMxfp4 {
  static const u32 EACH = 16, CHUNK = 4 * EACH;
  uint2 raw[2];
  u32 scale[2];  // twice, in bf16

  __device__ __forceinline__ void load(const FewRows &p, u32 output, u32 first, u32 half) {
    raw[half] = make_uint2(0, 0), scale[half] = 0;
    if (output < p.outputs && first < p.inputs) {
      // Lines are as long as whole chunks.
      size_t at = (size_t)output * ((p.inputs + CHUNK - 1) / CHUNK * CHUNK) + first;
      raw[half] = *(const uint2 *)((const u8 *)p.w + at / 2);
      scale[half] = scale_of(((const u8 *)p.scales)[at / 32]);
    }
  }
  // 2^-127 has no exponent of its own; 255 is infinity, which makes NaN of the zeros beside it.
  static __device__ __forceinline__ u32 scale_of(u32 byte) {
    return (byte ? byte << 7 : 0x40u) * 0x10001u;
  }
  __device__ __forceinline__ void words(u32 half, u32 to[EACH / 2]) const {
    u32 both[2] = {raw[half].x, raw[half].y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      decode_codes(both[i / 2] >> i % 2 * 16, to[2 * i], to[2 * i + 1]);
      to[2 * i] = multiply_bf16(to[2 * i], scale[half]);
      to[2 * i + 1] = multiply_bf16(to[2 * i + 1], scale[half]);
    }
  }

  // The share of one of `lines`, which lie in shared memory behind each other.
  __device__ __forceinline__ void load(const u8 *lines, const u16 *scales, u32 line, u32 t,
                                       u32 half) {
    raw[half] = *(const uint2 *)(lines + line * 32 + 8 * t);
    scale[half] = scale_of(scales[line] >> t / 2 * 8 & 255);
  }
};

__device__ __forceinline__ void put(float *to, float v) { *to = v; }
__device__ __forceinline__ void put(bf16 *to, float v) { *to = from_f32<bf16>(v); }

// y at (row, output) from its sum, and what GELU makes of it.
template <class T>
__device__ __forceinline__ void finish(const FewRows &p, u32 row, u32 output, float sum) {
  if (p.bias) sum = __fadd_rn(sum, to_f32(((const T *)p.bias)[output]));
  size_t at = (size_t)row * p.outputs + output;
  T y = from_f32<T>(sum);
  ((T *)p.y)[at] = y;
  if (p.form) {
    float v = to_f32(y);
    ((T *)p.activated)[at] = from_f32<T>(p.form == 1 ? gelu(v) : exact_gelu(v));
  }
}

// y for 16 OUTPUTS outputs and 8 ROWS rows a block, in bf16 or, of logits, in f32. Inputs are a
// multiple of 8. A warp asks for AHEAD chunks before it needs the first. Grid: outputs, rows, by
// those of a block, rounded up; block: 32 WARPS; dynamic shared memory: WARPS times 8 ROWS lines of
// 16 OUTPUTS + 4 floats.
template <class W, class T, int OUTPUTS, int ROWS, int AHEAD>
__global__ void __launch_bounds__(32 * WARPS) few_rows(FewRows p) {
  begin();
  const int PITCH = 16 * OUTPUTS + 4;  // so that the threads that store meet in no bank
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 output = blockIdx.x * 16 * OUTPUTS, row = blockIdx.y * 8 * ROWS;
  const bf16 *x = (const bf16 *)p.x;
  float sums[OUTPUTS][ROWS][4] = {};
  for (u32 chunk = warp * W::CHUNK; chunk < p.inputs; chunk += AHEAD * WARPS * W::CHUNK) {
    W w[AHEAD][OUTPUTS];
    u32 of_x[AHEAD][ROWS][W::EACH / 2];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      u32 first = chunk + a * WARPS * W::CHUNK + t * W::EACH;
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          w[a][o].load(p, output + 16 * o + 8 * half + g, first, half);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < W::EACH / 8; i++) {
          u32 at = first + 8 * i, number = row + 8 * r + g;
          bool inside = number < p.rows && at < p.inputs;
          uint4 raw = inside ? *(const uint4 *)(x + (size_t)number * p.inputs + at)
                             : make_uint4(0, 0, 0, 0);
          of_x[a][r][4 * i] = raw.x, of_x[a][r][4 * i + 1] = raw.y;
          of_x[a][r][4 * i + 2] = raw.z, of_x[a][r][4 * i + 3] = raw.w;
        }
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      if (chunk + a * WARPS * W::CHUNK >= p.inputs) break;
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++) {
        u32 words[2][W::EACH / 2];
        w[a][o].words(0, words[0]), w[a][o].words(1, words[1]);
#pragma unroll
        for (int i = 0; i < W::EACH / 2; i += 2) {
          u32 of_w[4] = {words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]};
#pragma unroll
          for (int r = 0; r < ROWS; r++)
            multiply_bf16_tiles(sums[o][r], of_w, of_x[a][r][i], of_x[a][r][i + 1]);
        }
      }
    }
  }
  float *of_warps = (float *)shared;
#pragma unroll
  for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        of_warps[(warp * 8 * ROWS + 8 * r + 2 * t + i % 2) * PITCH + 16 * o + g + i / 2 * 8] =
            sums[o][r][i];
  __syncthreads();
  for (u32 i = threadIdx.x; i < 16 * OUTPUTS * 8 * ROWS; i += 32 * WARPS) {
    u32 o = i % (16 * OUTPUTS), r = i / (16 * OUTPUTS);
    if (output + o >= p.outputs || row + r >= p.rows) continue;
    float sum = of_warps[r * PITCH + o];
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum = __fadd_rn(sum, of_warps[(w * 8 * ROWS + r) * PITCH + o]);
    finish<T>(p, row + r, output + o, sum);
  }
}

// Pieces of 16 bytes of a chunk: of an output, and of a row of x.
#define OF_W 2
#define OF_X 8

// What a block of many rows has in shared memory for a chunk.
template <int OUTPUTS, int ROWS> struct Stage {
  u8 w[OUTPUTS * OF_W * 16];
  u8 x[ROWS * OF_X * 16];
  u16 scales[OUTPUTS];
};

// Where a piece of a row of x lies, so that threads that read it, two pieces beside each other,
// meet in no bank.
__device__ __forceinline__ u32 place_of_x(u32 row, u32 piece) {
  return (row * OF_X + (piece ^ (row & 1))) * 16;
}

// What a thread copies of a chunk of W and x to shared memory. What does not change from chunk to
// chunk is found once: a chunk is few products, beside which addresses are much to compute.
template <int OUTPUTS, int ROWS, int THREADS> struct Copies {
  // Lines between a thread's pieces, and how many pieces it has.
  static const u32 APART_W = THREADS / OF_W, APART_X = THREADS / OF_X;
  static const u32 COUNT_W = OUTPUTS / APART_W, COUNT_X = ROWS / APART_X;
  const u8 *w, *x;
  const u16 *scales;  // of one output, or null
  // Lines from its first on that there are; chunks that have its piece of a row.
  u32 lines_w, lines_x, chunks_x;

  __device__ __forceinline__ Copies(const FewRows &p, u32 output, u32 row, u32 chunks) {
    u32 line_w = threadIdx.x / OF_W, line_x = threadIdx.x / OF_X, piece_x = threadIdx.x % OF_X;
    w = (const u8 *)p.w + ((size_t)(output + line_w) * chunks * OF_W + threadIdx.x % OF_W) * 16;
    x = (const u8 *)p.x + (size_t)(row + line_x) * p.inputs * 2 + 16 * piece_x;
    lines_w = p.outputs > output + line_w ? p.outputs - output - line_w : 0;
    lines_x = p.rows > row + line_x ? p.rows - row - line_x : 0;
    chunks_x = (p.inputs + OfMxfp4::CHUNK - 1 - 8 * piece_x) / OfMxfp4::CHUNK;
    bool has_scales = threadIdx.x < OUTPUTS && output + threadIdx.x < p.outputs;
    size_t of_scales = (size_t)(output + threadIdx.x) * chunks;
    scales = has_scales ? (const u16 *)p.scales + of_scales : nullptr;
  }

  // Starts copying a chunk of so many; returns both scales of one output.
  __device__ __forceinline__ u32 start(const FewRows &p, Stage<OUTPUTS, ROWS> &to, u32 chunk,
                                       u32 chunks) const {
    const u8 *from = w + (size_t)chunk * (OF_W * 16);
    u8 *place = to.w + threadIdx.x * 16;
#pragma unroll
    for (u32 i = 0; i < COUNT_W; i++, from += (size_t)APART_W * chunks * (OF_W * 16))
      copy16(place + i * THREADS * 16, from, i * APART_W < lines_w);
    from = x + (size_t)chunk * (OF_X * 16);
    place = to.x + place_of_x(threadIdx.x / OF_X, threadIdx.x % OF_X);
#pragma unroll
    for (u32 i = 0; i < COUNT_X; i++, from += (size_t)APART_X * p.inputs * 2)
      copy16(place + i * THREADS * 16, from, i * APART_X < lines_x && chunk < chunks_x);
    return scales ? scales[chunk] : 0;
  }
};

// A walk through chunks in the order in which `few_rows` sums them: those of its first warp, then
// those of the next.
struct Walk {
  u32 warp, chunk, count;

  __device__ __forceinline__ bool goes_on() const { return chunk < count; }
  __device__ __forceinline__ void next() {
    if (chunk + WARPS < count) chunk += WARPS;
    else if (++warp < WARPS) chunk = warp;
    else chunk = count;
  }
};

// `few_rows` for many rows and weights in MXFP4, to the bit: a block has all inputs of its outputs
// and rows, W and x by way of shared memory, and sums them as the eight warps there do, one after
// the other. A warp takes 16 M outputs and 8 N rows, of a block's ACROSS such pieces of outputs and
// DOWN of rows. Grid: outputs, rows, by those of a block, rounded up; block: 32 ACROSS DOWN;
// dynamic shared memory: STAGES stages, or as many lines of outputs and 4 floats as the block has
// rows.
//
// NOTE: on an H200 the four products of 999 rows of a layer with 2,048 channels took 458 us by this
// and 668 by `few_rows`, which decodes W again for every 64 rows (2026-11-30). With W in bf16 there
// is nothing to decode: the best of five tilings took 563 and 584 us, 136 and 122 with 768
// channels.
template <int M, int N, int ACROSS, int DOWN>
__global__ void __launch_bounds__(32 * ACROSS * DOWN) many_rows(FewRows p) {
  begin();
  const int OUTPUTS = 16 * M * ACROSS, ROWS = 8 * N * DOWN, PITCH = OUTPUTS + 4;
  const int THREADS = 32 * ACROSS * DOWN;
  const u32 CHUNK = OfMxfp4::CHUNK, EACH = OfMxfp4::EACH;
  typedef Stage<OUTPUTS, ROWS> Chunk;
  Chunk *stages = (Chunk *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 output = blockIdx.x * OUTPUTS, row = blockIdx.y * ROWS;
  u32 of_outputs = warp % ACROSS * 16 * M, of_rows = warp / ACROSS * 8 * N;
  u32 count = (p.inputs + CHUNK - 1) / CHUNK, scales = 0;
  const Copies<OUTPUTS, ROWS, THREADS> copies(p, output, row, count);
  Walk ahead = {0, 0, count};
  // All but one stage are on their way before the first is looked at. Scales come through a
  // register, and are put down a chunk later.
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (ahead.goes_on()) {
      scales = copies.start(p, stages[s], ahead.chunk, count);
      if (threadIdx.x < OUTPUTS) stages[s].scales[threadIdx.x] = scales;
      ahead.next();
    }
    end_copies();
  }
  u32 number = 0, waiting = STAGES;
  // -0 is what added changes nothing, also not a sum that is -0.
  float totals[M][N][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) totals[m][n][i] = -0.0f;
#pragma unroll 1
  for (u32 of_warp = 0; of_warp < WARPS; of_warp++) {
    float sums[M][N][4] = {};
#pragma unroll 1
    for (u32 at = of_warp; at < count; at += WARPS, number++) {
      wait_for_groups<STAGES - 2>();
      __syncthreads();
      if (waiting < STAGES && threadIdx.x < OUTPUTS) stages[waiting].scales[threadIdx.x] = scales;
      waiting = STAGES;
      if (ahead.goes_on()) {
        waiting = (number + STAGES - 1) % STAGES;
        scales = copies.start(p, stages[waiting], ahead.chunk, count);
        ahead.next();
      }
      end_copies();
      const Chunk &chunk = stages[number % STAGES];
      u32 of_x[N][EACH / 2];
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < EACH / 8; i++) {
          u32 first = place_of_x(of_rows + g, t * (EACH / 8) + i);
          uint4 raw = *(const uint4 *)(chunk.x + first + n * 8 * OF_X * 16);
          of_x[n][4 * i] = raw.x, of_x[n][4 * i + 1] = raw.y;
          of_x[n][4 * i + 2] = raw.z, of_x[n][4 * i + 3] = raw.w;
        }
#pragma unroll
      for (int m = 0; m < M; m++) {
        OfMxfp4 w;
        u32 words[2][EACH / 2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          w.load(chunk.w, chunk.scales, of_outputs + 16 * m + 8 * half + g, t, half);
          w.words(half, words[half]);
        }
#pragma unroll
        for (int i = 0; i < EACH / 2; i += 2) {
          u32 of_w[4] = {words[0][i], words[1][i], words[0][i + 1], words[1][i + 1]};
#pragma unroll
          for (int n = 0; n < N; n++)
            multiply_bf16_tiles(sums[m][n], of_w, of_x[n][i], of_x[n][i + 1]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) totals[m][n][i] = __fadd_rn(totals[m][n][i], sums[m][n][i]);
  }
  wait_for_groups<0>();
  __syncthreads();
  float *lines = (float *)shared;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        lines[(of_rows + 8 * n + 2 * t + i % 2) * PITCH + of_outputs + 16 * m + g + i / 2 * 8] =
            totals[m][n][i];
  __syncthreads();
  for (u32 i = threadIdx.x; i < OUTPUTS * ROWS; i += THREADS) {
    u32 o = i % OUTPUTS, r = i / OUTPUTS;
    if (output + o >= p.outputs || row + r >= p.rows) continue;
    finish<bf16>(p, row + r, output + o, lines[r * PITCH + o]);
  }
}

// The same in plain arithmetic, of f32 numbers and of bf16 ones of any number of inputs: a warp
// takes an output and 8 rows, a thread every 32nd input. Grid: outputs / WARPS, rows / 8, rounded
// up; block: 32 WARPS.
template <class X, class T> __global__ void few_rows_plain(FewRows p) {
  begin();
  u32 lane = threadIdx.x % WARP, output = blockIdx.x * WARPS + threadIdx.x / WARP;
  if (output >= p.outputs) return;
  u32 row = blockIdx.y * 8, rows = min(p.rows - row, 8u);
  const X *w = (const X *)p.w + (size_t)output * p.inputs;
  const X *x = (const X *)p.x + (size_t)row * p.inputs;
  float sums[8] = {};
#pragma unroll 4
  for (u32 i = lane; i < p.inputs; i += WARP) {
    float of_w = to_f32(w[i]);
#pragma unroll
    for (int r = 0; r < 8; r++)
      if (r < rows) sums[r] = __fmaf_rn(of_w, to_f32(x[(size_t)r * p.inputs + i]), sums[r]);
  }
#pragma unroll
  for (int r = 0; r < 8; r++) {
    float sum = warp_sum(sums[r]);
    if (lane == 0 && r < rows) finish<T>(p, row + r, output, sum);
  }
}

// out (rows, C) = the embeddings of tokens, of which the first stands at position *starts, or each
// at one of its own, as `embedding_forward` makes them. Grid: rows; block: 128.
template <class T>
__global__ void embed_rows(T *out, const u32 *tokens, const u32 *starts, const T *wte, const T *wpe,
                           u32 channels, u32 of_each) {
  begin();
  u32 at = of_each ? starts[blockIdx.x] : *starts + blockIdx.x;
  const T *token = wte + (size_t)tokens[blockIdx.x] * channels;
  const T *position = wpe + (size_t)at * channels;
  for (u32 i = threadIdx.x; i < channels; i += blockDim.x)
    out[(size_t)blockIdx.x * channels + i] =
        from_f32<T>(__fadd_rn(to_f32(token[i]), to_f32(position[i])));
}

// `PackMxfp4` of the host.
struct PackMxfp4 {
  u8 *codes, *scales;
  const void *w;
  u32 inputs, outputs;
};

// W (outputs, inputs) in MXFP4, as OfMxfp4 reads it: quantize_closest of src/formats, the better of
// two scales by the sum of squared errors. Elements beyond the inputs are zeros. Grid: blocks of 32
// elements of all lines / 128, rounded up; block: 128.
template <class T> __global__ void pack_mxfp4(PackMxfp4 p) {
  begin();
  u32 chunks = (p.inputs + OfMxfp4::CHUNK - 1) / OfMxfp4::CHUNK, blocks = chunks * 2;
  size_t number = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  u32 output = (u32)(number / blocks), first = (u32)(number % blocks) * 32;
  if (output >= p.outputs) return;
  const T *w = (const T *)p.w + (size_t)output * p.inputs;
  float v[32];
  u32 amax = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    v[i] = first + i < p.inputs ? to_f32(w[first + i]) : 0.0f;
    amax = max(amax, __float_as_uint(v[i]) & 0x7fffffffu);
  }
  u32 best = power_byte(FLOOR, amax), words[4] = {};
  double least = 0.0;
  for (u32 byte = best; best != 255 && byte < 255 && byte < power_byte(FLOOR, amax) + 2; byte++) {
    // Of 2^(127 - byte) and 2^(byte - 127), the one below f32's ordinary range has no exponent.
    float inverse = byte < 254 ? __uint_as_float((254 - byte) << 23) : __uint_as_float(0x00400000u);
    float scale = byte ? __uint_as_float(byte << 23) : __uint_as_float(0x00400000u);
    double error = 0.0;
    u32 codes[4] = {};
#pragma unroll
    for (int i = 0; i < 32; i++) {
      u32 code = nearest_code(__fmul_rn(fabsf(v[i]), inverse));
      double value = __dmul_rn((double)decode(code), (double)scale);
      double off = __dsub_rn((double)fabsf(v[i]), value);
      error = __dadd_rn(error, __dmul_rn(off, off));
      codes[i / 8] |= (code | (__float_as_uint(v[i]) >> 31) << 3) << i % 8 * 4;
    }
    if (byte == power_byte(FLOOR, amax) || error < least) {
      best = byte, least = error;
      for (int i = 0; i < 4; i++) words[i] = codes[i];
    }
  }
  p.scales[number] = (u8)best;
  store_words(p.codes + number * 16, words[0], words[1], words[2], words[3]);
}
