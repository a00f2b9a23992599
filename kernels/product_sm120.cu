// Products of MXFP4 operands on the FP4 tensor cores of compute capability 12, which take a block's
// scale with its elements.
//
// The instruction multiplies 16 x 64 by 64 x 8 elements of a warp, two blocks along the reduction.
// Codes are stored so that its fragments are what ldmatrix loads: 8 elements of a row are the 32
// bits of a thread, so a row of one of ldmatrix' 8 x 8 matrices of 16-bit numbers is a block.
// Scales lie in registers of some of the threads, two bytes each.
//
// Fragments and scales: PTX ISA, "Matrix Fragments for mma.m16n8k64" and "Block Scaling for
// mma.sync"; CUTLASS has the same in MMA_Traits<SM120_16x8x64_TN_VS>. Tests run this file on the
// processor, with a model of the instruction that is written from the former.

#define TILE 128   // rows of C and columns that a thread block takes
#define DEPTH 128  // elements along the reduction that are in shared memory as one stage
#define LINE (DEPTH / 2)
#define BLOCKS (DEPTH / 32)
#define STAGES 4
#define THREADS 256

// Codes (TILE, LINE) and the scales of each line as one word, of A and of B.
struct Stage {
  u8 codes[2][TILE * LINE];
  u32 scales[2][TILE];
};

// D (16, 8) += A (16, 64) B (8, 64)^T, each block times its scale. With the selectors {0, 0}, A's
// scales of row i are the low two bytes of thread 4 (i % 8) + i / 8, and B's of its row i those of
// thread 4 i. NOTE: other selectors would let a register hold the scales of more rows and blocks,
// and spare 3 of 4 loads of scales, of which there are few. These are the ones that everyone uses.
#ifndef EMULATED
__device__ __forceinline__ void multiply(float d[4], const u32 a[4], const u32 b[2], u32 a_scales,
                                         u32 b_scales) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X"
               ".f32.e2m1.e2m1.f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3}, {%10}, {0, 0}, {%11}, {0, 0};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(a_scales),
                 "r"(b_scales));
}
#endif

// ---- Loading ------------------------------------------------------------------------------------

// Where 16 bytes of a line lie in shared memory. Two lines share the banks' 128 bytes; of 8 lines
// the same piece lies in 8 different places of these, so that neither ldmatrix nor the copies meet
// in a bank.
__device__ __forceinline__ u32 place(u32 line, u32 piece) {
  return line * LINE + ((piece ^ line / 2) % 4) * 16;
}

// Starts loading stage number `number` of an operand (lines, k) from line `first` on.
__device__ __forceinline__ void load_operand(u8 *codes, u32 *scales, const u8 *from,
                                             const u8 *from_scales, u32 first, u32 lines, u32 k,
                                             u32 number, bool with_scales) {
  u32 blocks = k / 32;
#pragma unroll
  for (u32 i = 0; i < TILE * BLOCKS / THREADS; i++) {
    u32 line = (threadIdx.x + i * THREADS) / BLOCKS, piece = threadIdx.x % BLOCKS,
        block = number * BLOCKS + piece;
    bool inside = first + line < lines && block < blocks;
    copy16(codes + place(line, piece),
           inside ? from + ((size_t)(first + line) * blocks + block) * 16 : from, inside);
  }
  if (!with_scales) return;
  u32 line = threadIdx.x % TILE;
  bool inside = first + line < lines;
  const u8 *source = from_scales + (inside ? (size_t)(first + line) * blocks + number * BLOCKS : 0);
  if (blocks % BLOCKS == 0) {
    copy4(scales + line, source, inside);
  } else {
    u32 word = 0;
    for (u32 i = 0; inside && i < BLOCKS && number * BLOCKS + i < blocks; i++)
      word |= (u32)source[i] << 8 * i;
    scales[line] = word;
  }
}

// ---- Storing ------------------------------------------------------------------------------------

__device__ __forceinline__ void store2(float *to, float first, float second) {
  *(float2 *)to = make_float2(first, second);
}
__device__ __forceinline__ void store2(bf16 *to, float first, float second) {
  *(u32 *)to = pack_bf16(first, second);
}

// Two numbers of a row, `count` of which are inside.
template <class T>
__device__ __forceinline__ void store_pair(T *to, float first, float second, u32 count,
                                           bool aligned, bool accumulate) {
  if (accumulate) {
    first += to_f32(to[0]);
    if (count > 1) second += to_f32(to[1]);
  }
  if (count > 1 && aligned) return store2(to, first, second);
  to[0] = from_f32<T>(first);
  if (count > 1) to[1] = from_f32<T>(second);
}

// ---- The product --------------------------------------------------------------------------------

// `Fp4Product` of the host. A: codes a (m, k / 2) and scales a_scales (m, k / 32); B: b (n, k / 2)
// and b_scales (n, k / 32); k a multiple of 32; all of them aligned to 16 bytes. c (m, n) with rows
// `stride` elements apart.
template <class T> struct Product {
  T *c;
  const u8 *a, *a_scales, *b, *b_scales;
  u32 m, n, k, stride;
  float alpha;
  u32 accumulate;
};

// c = alpha A B^T, or with `accumulate` that is added. Eight warps take 64 rows of the tile and 32
// columns each. Grid: n / 128, m / 128, rounded up; block: 256; dynamic shared memory: STAGES *
// sizeof(Stage).
template <class T>
__global__ void __launch_bounds__(THREADS, 1) product_mxfp4(const __grid_constant__ Product<T> p) {
  begin();
  u32 m = p.m, n = p.n, k = p.k;
  Stage *stages = (Stage *)shared;
  u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  u32 first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
  u32 row = warp % 2 * 64, column = warp / 2 * 32; // the warp's, in the tile
  u32 count = (k + DEPTH - 1) / DEPTH;

  auto load = [&](u32 number) {
    Stage &stage = stages[number % STAGES];
    bool second = threadIdx.x >= TILE; // the second half of the threads loads B's scales
    load_operand(stage.codes[0], stage.scales[0], p.a, p.a_scales, first_row, m, k, number,
                 !second);
    load_operand(stage.codes[1], stage.scales[1], p.b, p.b_scales, first_column, n, k, number,
                 second);
  };
#pragma unroll
  for (u32 i = 0; i < STAGES - 1; i++) {
    if (i < count) load(i);
    end_copies();
  }

  float sums[4][4][4] = {};
  for (u32 number = 0; number < count; number++) {
    wait_for_groups<STAGES - 2>();
    // Everyone's copies have arrived, and nobody reads the stage any more that is loaded next.
    __syncthreads();
    if (number + STAGES - 1 < count) load(number + STAGES - 1);
    end_copies();

    const Stage &stage = stages[number % STAGES];
    u32 row_scales[4], column_scales[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      row_scales[i] = stage.scales[0][row + 16 * i + lane / 4 + 8 * (lane % 2)];
      column_scales[i] = stage.scales[1][column + 8 * i + lane / 4];
    }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      u32 x[4][4], y[2][4], matrix = lane / 8;
      // Of A: rows 0 to 7 and 8 to 15 of the first block, then of the second. Of B: the blocks of
      // rows 0 to 7, then of 8 to 15.
#pragma unroll
      for (u32 i = 0; i < 4; i++)
        load_matrices(x[i], stage.codes[0] + place(row + 16 * i + lane % 8 + 8 * (matrix % 2),
                                                   2 * half + matrix / 2));
#pragma unroll
      for (u32 i = 0; i < 2; i++)
        load_matrices(y[i], stage.codes[1] + place(column + 16 * i + lane % 8 + 8 * (matrix / 2),
                                                   2 * half + matrix % 2));
#pragma unroll
      for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++)
          multiply(sums[i][j], x[i], &y[j / 2][j % 2 * 2], row_scales[i] >> 16 * half,
                   column_scales[j] >> 16 * half);
    }
  }

#pragma unroll
  for (u32 i = 0; i < 8; i++) {
    u32 at = first_row + row + 8 * i + lane / 4;
    if (at >= m) continue;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      u32 x = first_column + column + 8 * j + lane % 4 * 2;
      const float *pair = sums[i / 2][j] + i % 2 * 2;
      if (x < n)
        store_pair(p.c + (size_t)at * p.stride + x, pair[0] * p.alpha, pair[1] * p.alpha, n - x,
                   p.stride % 2 == 0, p.accumulate != 0);
    }
  }
}
