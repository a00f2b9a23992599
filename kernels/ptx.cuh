// Instructions that CUDA C++ has no name for, a function each: what every file begins with, before
// prelude.cuh.
//
// NOTE: on the processor, where tests run kernels, all of this has twins instead
// (backend/cuda/emulator). So PTX of files that run there stands here, but for the product of
// product_sm120.cu; attention on tensor cores, which does not run there, keeps its own.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// What every kernel begins with, all but four: it is launched while the one before it still ends,
// and waits here for what that has written; and it lets the next one be launched as soon as all of
// its own blocks run. Waiting for one waits for all before.
//
// So what kernels before the one before have written is there already: that one has waited for
// them. Kernels that write text read weights and keys ahead of this, which are written before a
// copy that all wait for (`Decode::write_rows`); a test knows them.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for memory to be brought into the L2 cache, at any time: nothing is read.
__device__ __forceinline__ void ask_for(const void *from, size_t bytes) {
#if __CUDA_ARCH__ >= 900
  size_t start = (size_t)__cvta_generic_to_global(from), end = (start + bytes) & ~(size_t)15;
  start &= ~(size_t)15;
  if (start < end)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(start),
                 "r"((u32)(end - start)));
#endif
}

// Waits for the COUNT threads of a block that name this barrier, from 1 to 15.
template <u32 COUNT> __device__ __forceinline__ void wait_at(u32 barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// A thread block's dynamic shared memory.
extern __shared__ __align__(128) u8 shared[];

// Stores words in one access of global memory, which the compiler makes one of each.
__device__ __forceinline__ void store_words(void *to, u32 a, u32 b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(a),
               "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_words(void *to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- Numbers --------------------------------------------------------------------------------

// Two floats to two bf16, to nearest even, `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Two numbers to FP8, `low` in the low byte, saturated. From compute capability 8.9 on.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
  u16 out = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
#endif
  return out;
}
__device__ __forceinline__ u32 pack_e5m2(float low, float high) {
  u16 out = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
#endif
  return out;
}

// Two numbers rounded to E4M3, as floats again. From compute capability 8.9 on.
__device__ __forceinline__ void through_e4m3(float &a, float &b) {
#if __CUDA_ARCH__ >= 890
  u32 halves;
  asm("{.reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, %2, %1; cvt.rn.f16x2.e4m3x2 %0, both;}"
      : "=r"(halves)
      : "f"(a), "f"(b));
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(a), "=f"(b)
      : "r"(halves));
#endif
}

// 2^v to a relative 2^-22; a result below f32's ordinary range is 0.
__device__ __forceinline__ float exp2_fast(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

__device__ __forceinline__ float reciprocal_of(float v) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

__device__ __forceinline__ float inverse_root_of(float v) {
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// The larger of both halves, each by itself.
__device__ __forceinline__ u32 max_halves(u32 a, u32 b) {
#if __CUDA_ARCH__ >= 900
  u32 out;
  asm("max.u16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
#else
  return max(a & 0xffff, b & 0xffff) | max(a & 0xffff0000, b & 0xffff0000);
#endif
}

// Larger of two, NaN larger than everything.
__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// Smaller of two, NaN smaller than everything.
__device__ __forceinline__ float min_nan(float a, float b) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// 1 where a < b, else 0.
__device__ __forceinline__ float one_if_less(float a, float b) {
  float out;
  asm("set.lt.f32.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// Products of two bf16 numbers with two others, rounded once.
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {
  u32 out;
  // NOTE: with -0 added, for multiplying alone is an instruction of 9.0.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
}

// c (16, 8) += a (16, 16) b (16, 8), a and b in bf16, on a warp's tensor cores. With g = lane / 4
// and t = lane % 4, a thread has of c rows g and g + 8, columns 2 t and 2 t + 1; of a those rows,
// columns 2 t and 2 t + 1 (words 0 and 1), then 2 t + 8 and 2 t + 9; of b the same rows of column
// g.
__device__ __forceinline__ void multiply_bf16_tiles(float c[4], const u32 a[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Bits -----------------------------------------------------------------------------------

// Four of eight bytes, one for each digit of the selector. NOTE: __byte_perm would clear bits of
// the selector that are clear.
__device__ __forceinline__ u32 pick_bytes(u64 bytes, u32 selector) {
  u32 out;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(out)
      : "r"((u32)bytes), "r"((u32)(bytes >> 32)), "r"(selector));
  return out;
}

// a | b, as an instruction of its own.
__device__ __forceinline__ u32 or_bits(u32 a, u32 b) {
  asm("or.b32 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// ---- Copies to shared memory, and out of it -----------------------------------------------------

// Starts copying 16 bytes; waits for all of a thread's copies.
__device__ __forceinline__ void copy_async(u8 *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from));
}
__device__ __forceinline__ void wait_for_all_copies() { asm volatile("cp.async.wait_all;"); }

// Starts copying 16 bytes, or 4, zeros where not `inside`; in groups.
__device__ __forceinline__ void copy16(void *to, const u8 *from, bool inside) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
      "l"(from), "r"(inside ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void copy4(void *to, const u8 *from, bool inside) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
      "l"(from), "r"(inside ? 4 : 0)
      : "memory");
}
// Ends a group of copies; waits for all groups but the latest LEFT.
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four matrices of 8 rows of 16 bytes. Thread i gives the address of row i % 8 of matrix i / 8, and
// gets of each matrix 4 bytes: of row i / 4 those from 4 (i % 4) on.
__device__ __forceinline__ void load_matrices(u32 out[4], const u8 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}
