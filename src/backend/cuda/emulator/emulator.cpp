// A thread block on the processor, for tests: what stands in front of a kernel file in place of
// CUDA's own language and of ptx.cuh.
//
// Every thread is a coroutine that runs until it waits for others. `order` says in which order
// threads get their turn, and `late` that a copy to shared memory happens only when it is waited
// for, else it happens at once: what a kernel may rely on is right in all of these.
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __CUDA_ARCH__ 1200
#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Dimensions {
  unsigned x, y, z;
};
Dimensions threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] static void fail(const char *what) {
  fprintf(stderr, "thread %u of block (%u, %u): %s\n", threadIdx.x, blockIdx.x, blockIdx.y, what);
  abort();
}

// ---- Threads ------------------------------------------------------------------------------------

struct Copy {
  void *to;
  const void *from;
  size_t bytes;
  bool inside;
  void make() const { inside ? (void)memcpy(to, from, bytes) : (void)memset(to, 0, bytes); }
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> groups;  // the last one is not ended yet
  bool done;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static bool late;
static unsigned steps;  // barriers passed and threads done
static void (*body)(void *);
static void *argument;

static Thread &self() { return threads[threadIdx.x]; }
static void yield() { swapcontext(&self().context, &scheduler); }
static void run_thread() {
  body(argument);
  self().done = true, steps++;
  yield();
}

struct Barrier {
  unsigned arrived, passed;
  void wait(unsigned count) {
    unsigned before = passed;
    if (++arrived == count) {
      arrived = 0, passed++, steps++;
      return;
    }
    while (passed == before) yield();
  }
};
static Barrier whole, warps[32], named[16];

void __syncthreads() { whole.wait(blockDim.x); }
static unsigned lane() { return threadIdx.x % 32; }
static unsigned warp() { return threadIdx.x / 32; }
static void wait_for_warp() { warps[warp()].wait(32); }
// Which of two buffers threads of a warp exchange things in until they have waited for each other:
// nobody writes to the other one again before everybody has read it.
static unsigned turn() { return warps[warp()].passed % 2; }

static void run_block(unsigned order) {
  whole = {};
  for (Barrier &barrier : warps) barrier = {};
  for (Barrier &barrier : named) barrier = {};
  unsigned count = blockDim.x;
  threads.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Thread &thread = threads[i];
    thread.stack.resize(1 << 17);
    thread.groups.assign(1, {});
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data(),
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (unsigned left = count; left > 0;) {
    unsigned before = steps;
    left = 0;
    for (unsigned i = 0; i < count; i++) {
      // Forwards, backwards, or with a stride that visits all.
      threadIdx.x = order == 0 ? i : order == 1 ? count - 1 - i : (i * 37 + steps) % count;
      if (self().done) continue;
      left++;
      swapcontext(&scheduler, &self().context);
    }
    if (left > 0 && steps == before) fail("all threads wait for each other");
  }
}

typedef void Multiply(float d[32][4], const unsigned a[32][4], const unsigned b[32][2],
                      const unsigned a_scales[32], const unsigned b_scales[32]);
static Multiply *multiply_warp;

static unsigned char shared[1 << 17] __align__(128);

extern "C" void run_grid(unsigned order, unsigned copies_are_late, unsigned grid_x, unsigned grid_y,
                         unsigned block, void (*kernel)(void *), void *context,
                         Multiply *multiply) {
  late = copies_are_late, body = kernel, argument = context, multiply_warp = multiply;
  gridDim = {grid_x, grid_y, 1}, blockDim = {block, 1, 1};
  for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) {
      memset(shared, 0xa5, sizeof(shared));
      run_block(order);
    }
}

// ---- Instructions -------------------------------------------------------------------------------

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From> static To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
static unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
static float __uint_as_float(unsigned v) { return bits<float>(v); }
static float __int_as_float(int v) { return bits<float>(v); }

using std::isfinite;
using std::isnan;
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __fsqrt_rn(float v) { return sqrtf(v); }
// The system's headers have one of this name.
#define __expf expf
static float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static double __dadd_rn(double a, double b) { return a + b; }
static double __dsub_rn(double a, double b) { return a - b; }
static double __dmul_rn(double a, double b) { return a * b; }
static float rsqrtf(float v) { return 1.0f / sqrtf(v); }
static int __ffs(unsigned v) { return __builtin_ffs((int)v); }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
  unsigned long long both = (unsigned long long)high << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; i++)
    out |= (unsigned)(both >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

static unsigned exchanged[2][32][32];
template <class T> static T __shfl_xor_sync(unsigned, T v, unsigned mask) {
  unsigned *all = exchanged[turn()][warp()];
  all[lane()] = bits<unsigned>(v);
  wait_for_warp();
  return bits<T>(all[lane() ^ mask]);
}
template <class T> static T __shfl_sync(unsigned, T v, unsigned from) {
  unsigned *all = exchanged[turn()][warp()];
  all[lane()] = bits<unsigned>(v);
  wait_for_warp();
  return bits<T>(all[from]);
}
static void __syncwarp() { wait_for_warp(); }
static double __shfl_xor_sync(unsigned, double v, unsigned mask) {
  unsigned long long all = bits<unsigned long long>(v);
  unsigned long long low = __shfl_xor_sync(0, (unsigned)all, mask),
                     high = __shfl_xor_sync(0, (unsigned)(all >> 32), mask);
  return bits<double>(high << 32 | low);
}
static unsigned __reduce_max_sync(unsigned, unsigned v) {
  for (unsigned mask = 1; mask < 32; mask *= 2) v = max(v, __shfl_xor_sync(0, v, mask));
  return v;
}
static bool __any_sync(unsigned, bool v) { return __reduce_max_sync(0, v) != 0; }
static unsigned __reduce_add_sync(unsigned, unsigned v) {
  for (unsigned mask = 1; mask < 32; mask *= 2) v += __shfl_xor_sync(0, v, mask);
  return v;
}
static unsigned atomicAdd(unsigned *at, unsigned v) {
  unsigned before = *at;
  *at = before + v;
  return before;
}
static unsigned atomicMax(unsigned *at, unsigned v) {
  unsigned before = *at;
  *at = max(before, v);
  return before;
}

// ---- Twins of ptx.cuh ---------------------------------------------------------------------------

// Kernels run one after the other here.
static void begin() {}
static void ask_for(const void *, size_t) {}
template <u32 COUNT> static void wait_at(u32 barrier) { named[barrier].wait(COUNT); }

static void store_words(void *to, u32 a, u32 b) { *(uint2 *)to = {a, b}; }
static void store_words(void *to, u32 a, u32 b, u32 c, u32 d) { *(uint4 *)to = {a, b, c, d}; }

static u32 bf16_of(float v) {
  u32 x = __float_as_uint(v);
  return std::isnan(v) ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static u32 pack_bf16(float low, float high) { return bf16_of(high) << 16 | bf16_of(low); }
static float e4m3(u32 byte) {
  u32 exponent = byte >> 3, fraction = byte & 7;
  return exponent ? ldexpf(8 + fraction, (int)exponent - 10) : ldexpf(fraction, -9);
}
static float e5m2(u32 byte) {
  u32 exponent = byte >> 2, fraction = byte & 3;
  return exponent ? ldexpf(4 + fraction, (int)exponent - 17) : ldexpf(fraction, -16);
}
// The byte of the nearest number, of two the even one, saturated at the last before `end`.
static u32 nearest(float v, float (*decode)(u32), u32 end) {
  if (std::isnan(v)) return 0x7f;
  u32 best = 0;
  // Most of what is converted for its sign alone is too small for any other number.
  for (u32 byte = 1; byte < end && fabsf(v) > ldexpf(1, -18); byte++) {
    float distance = fabsf(fabsf(v) - decode(byte)), least = fabsf(fabsf(v) - decode(best));
    if (distance < least || (distance == least && byte % 2 == 0)) best = byte;
  }
  return best | (std::signbit(v) ? 0x80 : 0);
}
static u32 pack_e4m3(float low, float high) {
  return nearest(high, e4m3, 0x7f) << 8 | nearest(low, e4m3, 0x7f);
}
static u32 pack_e5m2(float low, float high) {
  return nearest(high, e5m2, 0x7c) << 8 | nearest(low, e5m2, 0x7c);
}
static float rounded_to_e4m3(float v) {
  u32 byte = nearest(v, e4m3, 0x7f);
  return (byte & 0x7f) == 0x7f ? NAN : copysignf(e4m3(byte & 0x7f), v);
}
static void through_e4m3(float &a, float &b) { a = rounded_to_e4m3(a), b = rounded_to_e4m3(b); }
static float exp2_fast(float v) { return exp2f(v); }
static float reciprocal_of(float v) { return 1.0f / v; }
static float inverse_root_of(float v) { return 1.0f / sqrtf(v); }
static u32 max_halves(u32 a, u32 b) {
  return max(a & 0xffff, b & 0xffff) | max(a & 0xffff0000, b & 0xffff0000);
}
static float max_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? __uint_as_float(0x7fffffff) : fmaxf(a, b);
}
static float min_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? __uint_as_float(0x7fffffff) : fminf(a, b);
}
static float one_if_less(float a, float b) { return a < b ? 1.0f : 0.0f; }
static float low_of(u32 pair) { return __uint_as_float(pair << 16); }
static float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000); }
static u32 multiply_bf16(u32 a, u32 b) {
  return pack_bf16(low_of(a) * low_of(b), high_of(a) * high_of(b));
}
static u32 pick_bytes(u64 bytes, u32 selector) {
  return __byte_perm((u32)bytes, (u32)(bytes >> 32), selector);
}
static u32 or_bits(u32 a, u32 b) { return a | b; }

// What may be copied from.
static std::vector<std::pair<uintptr_t, uintptr_t>> readable;
extern "C" void may_read(const void *from, size_t bytes) {
  readable.emplace_back((uintptr_t)from, (uintptr_t)from + bytes);
}

static void copy(void *to, const void *from, size_t bytes, bool inside) {
  uintptr_t start = (uintptr_t)from;
  if ((uintptr_t)to % bytes || start % bytes) fail("a copy is not aligned");
  bool found = !inside;
  for (auto [first, end] : readable) found |= first <= start && start + bytes <= end;
  if (!found) fail("a copy reads beyond its operand");
  Copy one = {to, from, bytes, inside};
  late ? self().groups.back().push_back(one) : one.make();
}
static void copy16(void *to, const unsigned char *from, bool inside) { copy(to, from, 16, inside); }
static void copy4(void *to, const unsigned char *from, bool inside) { copy(to, from, 4, inside); }
static void end_copies() { self().groups.emplace_back(); }
template <int LEFT> static void wait_for_groups() {
  auto &groups = self().groups;
  // The one that is not ended is not waited for.
  for (size_t i = 0; i + LEFT + 1 < groups.size(); i++) {
    for (const Copy &copy : groups[i]) copy.make();
    groups[i].clear();
  }
}
static void copy_async(u8 *to, const void *from) { copy16(to, (const u8 *)from, true); }
static void wait_for_all_copies() { end_copies(), wait_for_groups<0>(); }

static const unsigned char *rows[2][32][32];
static void load_matrices(unsigned out[4], const unsigned char *row) {
  if ((uintptr_t)row % 16) fail("a row of a matrix is not aligned");
  const unsigned char **all = rows[turn()][warp()];
  all[lane()] = row;
  wait_for_warp();
  for (unsigned i = 0; i < 4; i++) memcpy(&out[i], all[8 * i + lane() / 4] + 4 * (lane() % 4), 4);
}

// ---- Tensor cores
// --------------------------------------------------------------------------------

struct Tiles {
  u32 a[32][4], b[32][2];
};
static Tiles tiles[2][32];
// One number of two that stand in a word.
static double number_of(u32 word, unsigned second) { return second ? high_of(word) : low_of(word); }
static void multiply_bf16_tiles(float c[4], const u32 a[4], u32 b0, u32 b1) {
  Tiles &all = tiles[turn()][warp()];
  memcpy(all.a[lane()], a, 16), all.b[lane()][0] = b0, all.b[lane()][1] = b1;
  wait_for_warp();
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane() / 4, column = lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 16; k++) {
      const u32 *of_a = all.a[row * 4 + k % 8 / 2], *of_b = all.b[column * 4 + k % 8 / 2];
      sum += number_of(of_a[i / 2 + k / 8 * 2], k % 2) * number_of(of_b[k / 8], k % 2);
    }
    c[i] = (float)sum;
  }
}

// ---- The FP4 instruction: a warp's registers go to the model ------------------------------------

struct Registers {
  float d[32][4];
  unsigned a[32][4], b[32][2], a_scales[32], b_scales[32];
  bool multiplied;
};
static Registers registers[2][32];
static void multiply(float d[4], const unsigned a[4], const unsigned b[2], unsigned a_scales,
                     unsigned b_scales) {
  Registers &all = registers[turn()][warp()];
  memcpy(all.d[lane()], d, 16), memcpy(all.a[lane()], a, 16), memcpy(all.b[lane()], b, 8);
  all.a_scales[lane()] = a_scales, all.b_scales[lane()] = b_scales;
  all.multiplied = false;
  wait_for_warp();
  if (!all.multiplied) multiply_warp(all.d, all.a, all.b, all.a_scales, all.b_scales);
  all.multiplied = true;
  memcpy(d, all.d[lane()], 16);
}
