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
// once, of which another kernel takes many rows and keeps to that order.

// The warps of a block, among which inputs are divided.
#define WARPS 8
// Stages that many rows have in shared memory, of which all but one are on their way.
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
  u32 scale[2];  // its byte

  __device__ __forceinline__ void load(const FewRows &p, u32 output, u32 first, u32 half) {
    raw[half] = make_uint2(0, 0), scale[half] = 0;
    if (output < p.outputs && first < p.inputs) {
      // Lines are as long as whole chunks.
      size_t at = (size_t)output * ((p.inputs + CHUNK - 1) / CHUNK * CHUNK) + first;
      raw[half] = *(const uint2 *)((const u8 *)p.w + at / 2);
      scale[half] = ((const u8 *)p.scales)[at / 32];
    }
  }
  // Twice, in bf16. 2^-127 has no exponent of its own; 255 is infinity, which makes NaN of the
  // zeros beside it. NOTE: not as it is loaded, where every load would be waited for.
  static __device__ __forceinline__ u32 scale_of(u32 byte) {
    return (byte ? byte << 7 : 0x40u) * 0x10001u;
  }
  __device__ __forceinline__ void words(u32 half, u32 to[EACH / 2]) const {
    u32 both[2] = {raw[half].x, raw[half].y}, factor = scale_of(scale[half]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      decode_codes(both[i / 2] >> i % 2 * 16, to[2 * i], to[2 * i + 1]);
      to[2 * i] = multiply_bf16(to[2 * i], factor);
      to[2 * i + 1] = multiply_bf16(to[2 * i + 1], factor);
    }
  }
};

__device__ __forceinline__ float gelu_of(const FewRows &p, float v) {
  return p.form == 1 ? gelu(v) : exact_gelu(v);
}

// y at (row, output) from its sum, and what GELU makes of it; `bias` is read where there is one.
template <class T>
__device__ __forceinline__ void finish(const FewRows &p, u32 row, u32 output, float sum,
                                       float bias) {
  if (p.bias) sum = __fadd_rn(sum, bias);
  size_t at = (size_t)row * p.outputs + output;
  T y = from_f32<T>(sum);
  ((T *)p.y)[at] = y;
  if (p.form) ((T *)p.activated)[at] = from_f32<T>(gelu_of(p, to_f32(y)));
}
template <class T> __device__ __forceinline__ float bias_of(const FewRows &p, u32 output) {
  return p.bias ? to_f32(((const T *)p.bias)[output]) : 0.0f;
}

// y for 16 OUTPUTS outputs and 8 ROWS rows a block, in bf16 or, of logits, in f32. Inputs are a
// multiple of 8. A warp asks for AHEAD chunks before it needs the first, and for those that come
// first while the kernel that makes x still runs: none that may run then writes W or the bias
// (`begin` in ptx.cuh). Grid: outputs, rows, by those of a block, rounded up; block: 32 WARPS;
// dynamic shared memory: WARPS times 8 ROWS lines of 16 OUTPUTS + 4 floats.
//
// NOTE: on an H200 a token of a model as GPT-2 with 124M parameters took 336 us without that and
// with 4 chunks ahead, 268 with it and with up to 12; in MXFP4 369 and 262 (2026-11-30). To go on
// asking for a chunk wherever one was used took 273 and 277.
template <class W, class T, int OUTPUTS, int ROWS, int AHEAD>
__global__ void __launch_bounds__(32 * WARPS) few_rows(FewRows p) {
  const int PITCH = 16 * OUTPUTS + 4;  // so that the threads that store meet in no bank
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 output = blockIdx.x * 16 * OUTPUTS, row = blockIdx.y * 8 * ROWS;
  W w[AHEAD][OUTPUTS];
  auto load = [&](int a, u32 chunk) {
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        w[a][o].load(p, output + 16 * o + 8 * half + g, chunk + a * WARPS * W::CHUNK + t * W::EACH,
                     half);
  };
#pragma unroll
  for (int a = 0; a < AHEAD; a++) load(a, warp * W::CHUNK);
  // A thread finishes elements of one output.
  u32 of_thread = output + threadIdx.x % (16 * OUTPUTS);
  float bias = of_thread < p.outputs ? bias_of<T>(p, of_thread) : 0.0f;
  begin();
  const bf16 *x = (const bf16 *)p.x;
  float sums[OUTPUTS][ROWS][4] = {};
  for (u32 chunk = warp * W::CHUNK; chunk < p.inputs; chunk += AHEAD * WARPS * W::CHUNK) {
    if (chunk != warp * W::CHUNK)
#pragma unroll
      for (int a = 0; a < AHEAD; a++) load(a, chunk);
    u32 of_x[AHEAD][ROWS][W::EACH / 2];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      u32 first = chunk + a * WARPS * W::CHUNK + t * W::EACH;
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
    finish<T>(p, row + r, output + o, sum, bias);
  }
}

// A matrix (outputs, inputs) of p.w laid out at p.y in the order in which tensor cores take their
// left operand: of 16 lines and the 16 inputs of an instruction 16 bytes of each thread, behind
// those of the thread before. Such pieces go by lines, then chunks, then instructions; what is
// beyond lines and inputs is zeros. Grid: chunks of all pieces of 16 lines / WARPS, rounded up;
// block: 32 WARPS.
template <class W> __global__ void __launch_bounds__(32 * WARPS) lay_out(FewRows p) {
  begin();
  const int STEPS = W::CHUNK / 16;
  u32 lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  u32 chunks = (p.inputs + W::CHUNK - 1) / W::CHUNK;
  u32 number = blockIdx.x * WARPS + threadIdx.x / WARP;
  u32 line = number / chunks * 16 + g, first = number % chunks * W::CHUNK + t * W::EACH;
  if (line - g >= p.outputs) return;
  W w;
  w.load(p, line, first, 0), w.load(p, line + 8, first, 1);
  u32 words[2][W::EACH / 2];
  w.words(0, words[0]), w.words(1, words[1]);
  u8 *to = (u8 *)p.y + ((size_t)number * STEPS * WARP + lane) * 16;
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    store_words(to + s * WARP * 16, words[0][2 * s], words[1][2 * s], words[0][2 * s + 1],
                words[1][2 * s + 1]);
}

// A walk through chunks in the order in which `few_rows` sums them: those of its first warp, then
// those of the next.
struct Walk {
  u32 warp, chunk, count;

  __device__ __forceinline__ bool goes_on() const { return chunk < count; }
  // Whether it is at a warp's last.
  __device__ __forceinline__ bool ends() const { return chunk + WARPS >= count; }
  __device__ __forceinline__ void next() {
    chunk += WARPS;
    if (chunk >= count && ++warp < WARPS) chunk = warp;
  }
};

// What a block of many rows has in shared memory for a barrier: 64 inputs, which are one chunk of
// four instructions or two of two, of the left operand, as it is laid out, and of the right one.
template <int LEFT, int RIGHT, int STEPS> struct Stage {
  static const int CHUNKS = 4 / STEPS;
  u8 left[CHUNKS][LEFT * STEPS * 32];
  u8 right[CHUNKS][RIGHT * STEPS * 32];
};

// Where a piece of 16 bytes of the right operand's line lies in a chunk, so that threads that read
// theirs meet in no bank.
template <int STEPS> __device__ __forceinline__ u32 place_of(u32 line, u32 piece) {
  return (line * STEPS * 2 + (STEPS == 4 ? piece ^ (line & 1) : piece)) * 16;
}

// What a thread copies of a chunk of both operands to shared memory. What does not change from
// chunk to chunk is found once: a chunk is few products, beside which addresses are much to
// compute.
template <int LEFT, int RIGHT, int STEPS, int THREADS> struct Copies {
  // Pieces of a chunk of 16 left lines, and of a right one.
  static const u32 OF_LEFT = STEPS * WARP, OF_RIGHT = STEPS * 2;
  // Those between a thread's pieces, and how many it has.
  static const u32 APART_LEFT = THREADS / OF_LEFT, APART_RIGHT = THREADS / OF_RIGHT;
  static const u32 COUNT_LEFT = LEFT / 16 / APART_LEFT, COUNT_RIGHT = RIGHT / APART_RIGHT;
  const u8 *left, *right;
  // Lines from its first on that there are; chunks that have its piece of a right one.
  u32 left_lines, right_lines, right_chunks, chunks, right_pitch;

  // `first` and `lines`: of the block, and of all, on either side.
  __device__ __forceinline__ Copies(const FewRows &p, const void *left, const void *right,
                                    const u32 first[2], const u32 lines[2], u32 chunks)
      : chunks(chunks), right_pitch(p.inputs * 2) {
    u32 of_left = first[0] / 16 + threadIdx.x / OF_LEFT, end = (lines[0] + 15) / 16;
    u32 of_right = first[1] + threadIdx.x / OF_RIGHT, piece = threadIdx.x % OF_RIGHT;
    this->left =
        (const u8 *)left + ((size_t)of_left * chunks * OF_LEFT + threadIdx.x % OF_LEFT) * 16;
    this->right = (const u8 *)right + (size_t)of_right * p.inputs * 2 + 16 * piece;
    left_lines = end > of_left ? end - of_left : 0;
    right_lines = lines[1] > of_right ? lines[1] - of_right : 0;
    right_chunks = (p.inputs + 16 * STEPS - 1 - 8 * piece) / (16 * STEPS);
  }

  __device__ __forceinline__ void start(u8 *to_left, u8 *to_right, u32 chunk) const {
    const u8 *from = left + (size_t)chunk * (OF_LEFT * 16);
    u8 *to = to_left + threadIdx.x * 16;
#pragma unroll
    for (u32 i = 0; i < COUNT_LEFT; i++, from += (size_t)APART_LEFT * chunks * (OF_LEFT * 16))
      copy16(to + i * THREADS * 16, from, i * APART_LEFT < left_lines);
    from = right + (size_t)chunk * (OF_RIGHT * 16);
    to = to_right + place_of<STEPS>(threadIdx.x / OF_RIGHT, threadIdx.x % OF_RIGHT);
#pragma unroll
    for (u32 i = 0; i < COUNT_RIGHT; i++, from += (size_t)APART_RIGHT * right_pitch)
      copy16(to + i * THREADS * 16, from, i * APART_RIGHT < right_lines && chunk < right_chunks);
  }
};

// `few_rows` in bf16 for many rows, to the bit: a block has all inputs of its outputs and rows,
// both operands by way of shared memory, and sums them as the eight warps there do, one after the
// other. The left operand is laid out: W of MXFP4, which that way is decoded once, and beside W in
// bf16, which then may lie as it does, x (OF_X). Outputs are a multiple of 8. A chunk is STEPS
// instructions long. A warp takes 16 M left lines and 8 N right ones, of a block's ACROSS such
// pieces of left lines and DOWN of right ones. Grid: outputs, rows, by those of a block, rounded
// up; block: 32 ACROSS DOWN; dynamic shared memory: STAGES stages, or as many lines of outputs and
// 4 floats as the block has rows.
//
// NOTE: on an H200 the four products of 999 rows of a layer with 2,048 channels took 366 us by this
// and what lays out, and 662 by `few_rows`; in MXFP4, 389 and 779 (2026-11-30). An instruction's
// operands come from shared memory while those before are multiplied, which took it from 557 to
// 469; finishing 8 outputs at a time, not one, and laying out x, not W, did the rest.
template <bool OF_X, int STEPS, int M, int N, int ACROSS, int DOWN>
__global__ void __launch_bounds__(32 * ACROSS * DOWN) many_rows(FewRows p) {
  begin();
  const int LEFT = 16 * M * ACROSS, RIGHT = 8 * N * DOWN, THREADS = 32 * ACROSS * DOWN;
  const int OUTPUTS = OF_X ? RIGHT : LEFT, ROWS = OF_X ? LEFT : RIGHT, PITCH = OUTPUTS + 4;
  typedef Stage<LEFT, RIGHT, STEPS> Chunks;
  Chunks *stages = (Chunks *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
  u32 output = blockIdx.x * OUTPUTS, row = blockIdx.y * ROWS;
  u32 of_left = warp % ACROSS * 16 * M, of_right = warp / ACROSS * 8 * N;
  u32 count = (p.inputs + 16 * STEPS - 1) / (16 * STEPS);
  u32 first[2] = {OF_X ? row : output, OF_X ? output : row};
  u32 lines[2] = {OF_X ? p.rows : p.outputs, OF_X ? p.outputs : p.rows};
  const Copies<LEFT, RIGHT, STEPS, THREADS> copies(p, OF_X ? p.x : p.w, OF_X ? p.w : p.x, first,
                                                   lines, count);
  Walk ahead = {0, 0, count}, now = ahead;
  auto copy = [&](Chunks &to) {
#pragma unroll
    for (int c = 0; c < Chunks::CHUNKS; c++) {
      if (!ahead.goes_on()) break;
      copies.start(to.left[c], to.right[c], ahead.chunk);
      ahead.next();
    }
    end_copies();
  };
  // All but one stage are on their way before the first is looked at.
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) copy(stages[s]);
  // -0 is what added changes nothing, also not a sum that is -0.
  float totals[M][N][4], sums[M][N][4] = {};
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) totals[m][n][i] = -0.0f;
  auto end_warp = [&]() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          totals[m][n][i] = __fadd_rn(totals[m][n][i], sums[m][n][i]);
          sums[m][n][i] = 0.0f;
        }
  };
  // Operands of half of a stage, two instructions, while those of the other half come from shared
  // memory.
  struct {
    uint4 left[2][M], right[N];
  } halves[2];
  u32 stage = 0;
  auto load = [&](int half) {
    const Chunks &chunks = stages[stage];
    const int c = 2 * half / STEPS, step = 2 * half % STEPS;
#pragma unroll
    for (int n = 0; n < N; n++) {
      u32 place = place_of<STEPS>(of_right + g, t * (STEPS / 2) + step / 2);
      halves[half].right[n] = *(const uint4 *)(chunks.right[c] + n * 8 * STEPS * 32 + place);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int m = 0; m < M; m++) {
        u32 piece = ((of_left / 16 + m) * STEPS + step + i) * WARP + lane;
        halves[half].left[i][m] = *(const uint4 *)(chunks.left[c] + piece * 16);
      }
  };
  auto multiply = [&](int half) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int m = 0; m < M; m++) {
        uint4 raw = halves[half].left[i][m];
        u32 left[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int n = 0; n < N; n++) {
          uint4 right = halves[half].right[n];
          multiply_bf16_tiles(sums[m][n], left, i ? right.z : right.x, i ? right.w : right.y);
        }
      }
    if (STEPS == 4 && half == 0) return;
    if (now.ends()) end_warp();
    now.next();
  };
  wait_for_groups<STAGES - 2>();
  __syncthreads();
  load(0);
  while (true) {
    // Over the stage before, which all warps have taken to registers.
    copy(stages[stage ? stage - 1 : STAGES - 1]);
    load(1);
    multiply(0);
    if (!now.goes_on()) break;
    wait_for_groups<STAGES - 2>();
    __syncthreads();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    load(0);
    multiply(1);
    if (!now.goes_on()) break;
  }
  // Warps there that have no chunk.
  if (count < WARPS) end_warp();
  wait_for_groups<0>();
  __syncthreads();
  float *of_rows = (float *)shared;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        u32 left = of_left + 16 * m + g + i / 2 * 8, right = of_right + 8 * n + 2 * t + i % 2;
        of_rows[(OF_X ? left : right) * PITCH + (OF_X ? right : left)] = totals[m][n][i];
      }
  __syncthreads();
  // A thread finishes 8 outputs at a time, the same of several rows.
  const u32 OUTPUTS_8 = OUTPUTS / 8;
  u32 o = threadIdx.x % OUTPUTS_8 * 8, r = threadIdx.x / OUTPUTS_8;
  if (output + o >= p.outputs) return;
  float bias[8] = {};
  if (p.bias) load8((const bf16 *)p.bias + output + o, bias);
#pragma unroll 2
  for (; r < ROWS && row + r < p.rows; r += THREADS / OUTPUTS_8) {
    float y[8];
    load8(of_rows + r * PITCH + o, y);
    size_t at = (size_t)(row + r) * p.outputs + output + o;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (p.bias) y[i] = __fadd_rn(y[i], bias[i]);
    store8((bf16 *)p.y + at, y);
    if (!p.form) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = gelu_of(p, to_f32(from_f32<bf16>(y[i])));
    store8((bf16 *)p.activated + at, y);
  }
}

// The same in f32, of inputs that are a multiple of 4: a warp takes OUTPUTS outputs and ROWS rows,
// a thread four inputs of every 128, one after the other; then threads are added. So an element of
// y is summed in an order that its inputs alone decide here, too. Warps of a block take 8 / DOWN
// pieces of outputs and DOWN of rows. Grid: outputs, rows, by those of a block, rounded up; block:
// 32 WARPS.
template <int OUTPUTS, int ROWS, int DOWN, int AHEAD>
__global__ void __launch_bounds__(32 * WARPS) few_rows_f32(FewRows p) {
  const u32 CHUNK = 4 * WARP, ACROSS = WARPS / DOWN;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 output = (blockIdx.x * ACROSS + warp % ACROSS) * OUTPUTS;
  u32 row = (blockIdx.y * DOWN + warp / ACROSS) * ROWS;
  // Zeros beyond the matrix (lines, inputs).
  auto load = [&](const void *of, u32 line, u32 lines, u32 first) {
    bool inside = line < lines && first < p.inputs;
    return inside ? *(const float4 *)((const float *)of + (size_t)line * p.inputs + first)
                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  float4 w[AHEAD][OUTPUTS];
  auto load_w = [&](u32 chunk) {
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++)
        w[a][o] = load(p.w, output + o, p.outputs, chunk + a * CHUNK + 4 * lane);
  };
  load_w(0);
  float bias[OUTPUTS];
#pragma unroll
  for (int o = 0; o < OUTPUTS; o++)
    bias[o] = output + o < p.outputs ? bias_of<float>(p, output + o) : 0.0f;
  begin();
  float sums[OUTPUTS][ROWS] = {};
  for (u32 chunk = 0; chunk < p.inputs; chunk += AHEAD * CHUNK) {
    if (chunk) load_w(chunk);
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      float4 x[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        x[r] = load(p.x, row + r, p.rows, chunk + a * CHUNK + 4 * lane);
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          float sum = __fmaf_rn(w[a][o].x, x[r].x, sums[o][r]);
          sum = __fmaf_rn(w[a][o].y, x[r].y, sum);
          sum = __fmaf_rn(w[a][o].z, x[r].z, sum);
          sums[o][r] = __fmaf_rn(w[a][o].w, x[r].w, sum);
        }
    }
  }
#pragma unroll
  for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float sum = warp_sum(sums[o][r]);
      if (lane == (o * ROWS + r) % WARP && output + o < p.outputs && row + r < p.rows)
        finish<float>(p, row + r, output + o, sum, bias[o]);
    }
}

// The same of any number of inputs, also in bf16: a warp takes an output and 8 rows, a thread every
// 32nd input. Grid: outputs / WARPS, rows / 8, rounded up; block: 32 WARPS.
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
    if (lane == 0 && r < rows) finish<T>(p, row + r, output, sum, bias_of<T>(p, output));
  }
}

// out (rows, C) = the embeddings of tokens, of which the first stands at position *starts, or each
// at one of its own, as `embedding_forward` makes them; wpe may be null. Grid: rows; block: 128.
template <class T>
__global__ void embed_rows(T *out, const u32 *tokens, const u32 *starts, const T *wte, const T *wpe,
                           u32 channels, u32 of_each) {
  begin();
  u32 at = of_each ? starts[blockIdx.x] : *starts + blockIdx.x;
  const T *token = wte + (size_t)tokens[blockIdx.x] * channels;
  const T *position = wpe + (size_t)at * channels;
  for (u32 i = threadIdx.x; i < channels; i += blockDim.x)
    out[(size_t)blockIdx.x * channels + i] =
        wpe ? from_f32<T>(__fadd_rn(to_f32(token[i]), to_f32(position[i]))) : token[i];
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
