// What ranks and lanes of a step do with gradients.

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// gradients = others + gradients, each of `vectors` times four numbers. Grid: any; block: any.
__global__ void join_gradients(float4 *gradients, const float4 *others, u64 vectors) {
  begin();
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors;
       i += (u64)gridDim.x * blockDim.x)
    gradients[i] = add(others[i], gradients[i]);
}

// The parts of a sum: that of rank `mine`, and those of the others in their order.
struct Parts {
  const float4 *own, *others;
  u64 stride;
  u32 mine;

  __device__ __forceinline__ float4 of(u32 rank, u64 i) const {
    return rank == mine ? own[i] : others[(rank - (rank > mine)) * stride + i];
  }
};

// The largest power of two below n, from 2 on.
constexpr u32 left_of(u32 n) {
  u32 left = 1;
  while (2 * left < n) left *= 2;
  return left;
}

// The sum of COUNT parts from FIRST on, in the order of comm/tree.rs.
template <u32 FIRST, u32 COUNT>
__device__ __forceinline__ float4 tree(const Parts &parts, u64 i) {
  if constexpr (COUNT == 1) {
    return parts.of(FIRST, i);
  } else {
    constexpr u32 LEFT = left_of(COUNT);
    return add(tree<FIRST, LEFT>(parts, i), tree<FIRST + LEFT, COUNT - LEFT>(parts, i));
  }
}

// The same of any number, at most 4,096: as parts that come one by one are joined there.
__device__ __forceinline__ float4 tree_of(u32 count, const Parts &parts, u64 i) {
  float4 kept[12], sum = parts.of(0, i);
  u32 in_use = 0;
  for (u32 done = 1; done < count; done++) {
    kept[in_use++] = sum;
    sum = parts.of(done, i);
    // Those that are whole, or at the end all.
    u32 joined = done + 1 == count ? in_use : __ffs(done + 1) - 1;
    while (joined--) sum = add(kept[--in_use], sum);
  }
  return sum;
}

// own (vectors, 4) = the sum of the parts of COUNT ranks, or with 0 of `count`: of itself, which is
// that of rank `mine`, and of others (ranks - 1, stride, 4). Grid: any; block: any.
template <u32 COUNT>
__global__ void sum_parts(float4 *own, const float4 *others, u64 stride, u32 mine, u32 count,
                          u64 vectors) {
  begin();
  Parts parts = {own, others, stride, mine};
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors;
       i += (u64)gridDim.x * blockDim.x) {
    if constexpr (COUNT == 0) own[i] = tree_of(count, parts, i);
    else own[i] = tree<0, COUNT>(parts, i);
  }
}

// Where a slice of the gradients begins in the memory of each rank.
#define MOST_PEERS 8
struct Peers {
  float4 *of[MOST_PEERS];
};

// The sum of COUNT numbers from FIRST on, in the order of the tree.
template <u32 FIRST, u32 COUNT> __device__ __forceinline__ float4 tree(const float4 *numbers) {
  if constexpr (COUNT == 1) {
    return numbers[FIRST];
  } else {
    constexpr u32 LEFT = left_of(COUNT);
    return add(tree<FIRST, LEFT>(numbers), tree<FIRST + LEFT, COUNT - LEFT>(numbers));
  }
}

// Whose memory a sum is written to.
#define ALL_PEERS 0xffffffffu

// The slice (vectors, 4) of each of COUNT ranks, or of rank `only` alone, becomes the sum of all of
// them: one kernel reads and writes the memory of all GPUs. A thread has several vectors on their
// way, since that is far. Grid: any; block: any.
template <u32 COUNT> __global__ void sum_peers(Peers peers, u64 vectors, u32 only) {
  begin();
  constexpr u32 AT_ONCE = COUNT <= 2 ? 4 : COUNT <= 4 ? 2 : 1;
  u64 threads = (u64)gridDim.x * blockDim.x;
  for (u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x; first < vectors;
       first += AT_ONCE * threads) {
    float4 parts[AT_ONCE][COUNT];
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++)
#pragma unroll
      for (u32 rank = 0; rank < COUNT; rank++) {
        u64 i = first + k * threads;
        if (i < vectors) parts[k][rank] = peers.of[rank][i];
      }
#pragma unroll
    for (u32 k = 0; k < AT_ONCE; k++) {
      u64 i = first + k * threads;
      if (i >= vectors) break;
      float4 sum = tree<0, COUNT>(parts[k]);
#pragma unroll
      for (u32 rank = 0; rank < COUNT; rank++)
        if (only == ALL_PEERS || only == rank) peers.of[rank][i] = sum;
    }
  }
}

// ---- Gradients that are sent in less than f32: comm/wire.rs --------------------------------------

// What they are sent as. Codes of all numbers come first, then the scales of their blocks of 32.
enum Wire : u32 { BF16, FP8, MXFP4 };

// Numbers of a thread. Four threads have a block, eight the numbers that are rotated together, so
// that whole warps stay in their loops.
#define EACH 8

struct Numbers {
  float of[EACH];
};

__device__ __forceinline__ Numbers load(const float *from) {
  float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ __forceinline__ void store(float *to, const Numbers &x) {
  ((float4 *)to)[0] = make_float4(x.of[0], x.of[1], x.of[2], x.of[3]);
  ((float4 *)to)[1] = make_float4(x.of[4], x.of[5], x.of[6], x.of[7]);
}
__device__ __forceinline__ Numbers add(const Numbers &a, const Numbers &b) {
  Numbers sum;
#pragma unroll
  for (u32 k = 0; k < EACH; k++) sum.of[k] = __fadd_rn(a.of[k], b.of[k]);
  return sum;
}

// x H / 8 of 64 numbers, in the order of formats/hadamard.rs.
__device__ __forceinline__ void transform(Numbers &x) {
#pragma unroll
  for (u32 stride = 1; stride < EACH; stride *= 2)
#pragma unroll
    for (u32 k = 0; k < EACH; k++)
      if (!(k & stride)) {
        float low = x.of[k], high = x.of[k + stride];
        x.of[k] = __fadd_rn(low, high), x.of[k + stride] = __fsub_rn(low, high);
      }
#pragma unroll
  for (u32 lanes = 1; lanes < 64 / EACH; lanes *= 2)
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
      float other = __shfl_xor_sync(FULL_WARP, x.of[k], lanes);
      x.of[k] = threadIdx.x & lanes ? __fsub_rn(other, x.of[k]) : __fadd_rn(x.of[k], other);
    }
#pragma unroll
  for (u32 k = 0; k < EACH; k++) x.of[k] = __fmul_rn(x.of[k], 0.125f);
}

// Number k of a thread changes its sign where bit 8 (thread % 8) + k is set.
__device__ __forceinline__ void change_signs(Numbers &x, u64 signs) {
  u32 mine = (u32)(signs >> (EACH * (threadIdx.x % 8))) & 0xff;
#pragma unroll
  for (u32 k = 0; k < EACH; k++)
    if (mine >> k & 1) x.of[k] = -x.of[k];
}

// Bits of the largest magnitude of a block.
__device__ __forceinline__ u32 largest_of_block(const Numbers &x) {
  u32 largest = 0;
#pragma unroll
  for (u32 k = 0; k < EACH; k++) largest = max(largest, __float_as_uint(x.of[k]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
  return max(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
}

// E4M3's code of a number that is one of E4M3, and the number.
__device__ __forceinline__ u32 code_of_e4m3(float v) {
  u32 bits = __float_as_uint(v), magnitude = bits & 0x7fffffffu;
  u32 small = (u32)__fmul_rn(__uint_as_float(magnitude), 512.0f);
  return (magnitude < 0x3c800000u ? small : (magnitude >> 20) - (120u << 3)) | bits >> 31 << 7;
}
__device__ __forceinline__ float of_e4m3(u32 code) {
  u32 magnitude = code & 0x7f;
  float small = __fmul_rn((float)magnitude, 1.0f / 512.0f);
  return with_sign(magnitude < 8 ? small : __uint_as_float((magnitude << 20) + (120u << 23)),
                   __uint_as_float(code << 24));
}

// The value of a scale byte; NaN of 255.
__device__ __forceinline__ float of_e8m0(u32 byte) {
  return byte == 255 ? not_a_number() : __uint_as_float(byte ? byte << 23 : 1u << 22);
}

// Writes a thread's numbers, the `i`th eight of a message of `eights`; all threads of a warp come,
// and those write that are `inside`.
template <u32 WIRE>
__device__ __forceinline__ void write(u8 *to, u64 i, u64 eights, bool inside, const Numbers &x,
                                      const Draw &draw, u32 row) {
  if constexpr (WIRE == BF16) {
    if (inside)
      ((uint4 *)to)[i] = make_uint4(pack_bf16(x.of[0], x.of[1]), pack_bf16(x.of[2], x.of[3]),
                                    pack_bf16(x.of[4], x.of[5]), pack_bf16(x.of[6], x.of[7]));
  } else if constexpr (WIRE == FP8) {
    u32 largest = largest_of_block(x), words[2] = {};
    float scale = e4m3_scale(largest);
    bool known = !is_nan(scale);
    // A power of two within 2^100, so that the quotient is exact.
    float inverse = __uint_as_float((254u << 23) - __float_as_uint(known ? scale : 1.0f));
#pragma unroll
    for (u32 k = 0; k < EACH; k++)
      if (known) {
        float rounded = round_to_e4m3(__fmul_rn(x.of[k], inverse));
        words[k / 4] |= code_of_e4m3(rounded) << 8 * (k % 4);
      }
    if (!inside) return;
    ((uint2 *)to)[i] = make_uint2(words[0], words[1]);
    if (i % 4 == 0) to[8 * eights + i / 4] = (u8)(known ? __float_as_uint(scale) >> 23 : 255);
  } else {
    u32 byte = power_byte(FLOOR, largest_of_block(x)), word = 0;
    float factor = byte == 255 ? 0.0f : __fmul_rn(of_e8m0(254 - byte), 0.75f);
    uint4 drawn = philox(draw, row, 0);
    u32 words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
      float y = __fmul_rn(fabsf(x.of[k]), factor);
      u32 bits = words[k / 2] >> 16 * (k % 2) & 0xffff, first = 252;
      if (y < 1.0f) y = __fadd_rn(y, 1.0f), first = 254;
      u32 code = ((__float_as_uint(y) + (bits << 6 | 32)) >> 22) - first;
      word |= (code | __float_as_uint(x.of[k]) >> 31 << 3) << 4 * k;
    }
    if (!inside) return;
    ((u32 *)to)[i] = byte == 255 ? 0 : word;
    if (i % 4 == 0) to[4 * eights + i / 4] = (u8)byte;
  }
}

// The `i`th eight numbers of a message of `eights`.
template <u32 WIRE>
__device__ __forceinline__ Numbers read(const u8 *from, u64 i, u64 eights) {
  Numbers x;
  if constexpr (WIRE == BF16) {
    uint4 pairs = ((const uint4 *)from)[i];
    u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (u32 k = 0; k < EACH; k++)
      x.of[k] = __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
  } else if constexpr (WIRE == FP8) {
    uint2 codes = ((const uint2 *)from)[i];
    u32 words[2] = {codes.x, codes.y};
    float scale = of_e8m0(from[8 * eights + i / 4]);
#pragma unroll
    for (u32 k = 0; k < EACH; k++)
      x.of[k] = __fmul_rn(of_e4m3(words[k / 4] >> 8 * (k % 4) & 0xff), scale);
  } else {
    u32 word = ((const u32 *)from)[i];
    float scale = of_e8m0(from[4 * eights + i / 4]);
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
      u32 code = word >> 4 * k & 15;
      float number = with_sign(decode(code & 7), __uint_as_float(code << 28));
      x.of[k] = __fmul_rn(__fmul_rn(number, scale), 4.0f / 3.0f);
    }
  }
  return x;
}

// to: a message of `eights` times eight numbers of `from`, which are rotated before where `rotates`;
// the first is that of row `row` of the draw. Grid: any; block: whole warps.
template <u32 WIRE>
__global__ void pack_wire(u8 *to, const float *from, u64 eights, u32 row, u64 signs, u32 rotates,
                          const __grid_constant__ Draw draw) {
  begin();
  for (u64 first = (u64)blockIdx.x * blockDim.x; first < eights;
       first += (u64)gridDim.x * blockDim.x) {
    u64 i = first + threadIdx.x;
    bool inside = i < eights;
    Numbers x = {};
    if (inside) x = load(from + EACH * i);
    if (rotates) change_signs(x, signs), transform(x);
    write<WIRE>(to, i, eights, inside, x, draw, row + (u32)i);
  }
}

// own (eights, 8) = the sum of the parts of `count` ranks in the order of the tree: of itself, which
// is that of rank `mine` and is rotated for that with MXFP4, and of the messages of the others, rank
// r's at others + r stride. With `last` the sum is rotated back. Grid: any; block: whole warps.
template <u32 WIRE>
__global__ void sum_wire(float *own, const u8 *others, u64 stride, u32 mine, u32 count, u64 eights,
                         u64 signs, u32 last) {
  begin();
  for (u64 first = (u64)blockIdx.x * blockDim.x; first < eights;
       first += (u64)gridDim.x * blockDim.x) {
    u64 i = first + threadIdx.x;
    bool inside = i < eights;
    Numbers own_part = {}, sum = {};
    if (inside) own_part = load(own + EACH * i);
    if constexpr (WIRE == MXFP4) change_signs(own_part, signs), transform(own_part);
    if (inside) {
      auto part = [&](u32 rank) {
        return rank == mine ? own_part : read<WIRE>(others + rank * stride, i, eights);
      };
      // As `tree_of`.
      Numbers kept[12];
      u32 in_use = 0;
      sum = part(0);
      for (u32 done = 1; done < count; done++) {
        kept[in_use++] = sum;
        sum = part(done);
        u32 joined = done + 1 == count ? in_use : __ffs(done + 1) - 1;
        while (joined--) sum = add(kept[--in_use], sum);
      }
    }
    if constexpr (WIRE == MXFP4)
      if (last) transform(sum), change_signs(sum, signs);
    if (inside) store(own + EACH * i, sum);
  }
}

// to (eights, 8): the numbers of a message, with MXFP4 rotated back. Grid: any; block: whole warps.
template <u32 WIRE>
__global__ void unpack_wire(float *to, const u8 *from, u64 eights, u64 signs) {
  begin();
  for (u64 first = (u64)blockIdx.x * blockDim.x; first < eights;
       first += (u64)gridDim.x * blockDim.x) {
    u64 i = first + threadIdx.x;
    bool inside = i < eights;
    Numbers x = {};
    if (inside) x = read<WIRE>(from, i, eights);
    if constexpr (WIRE == MXFP4) transform(x), change_signs(x, signs);
    if (inside) store(to + EACH * i, x);
  }
}
