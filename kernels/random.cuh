// Random signs and bits, as src/formats defines them: `Draws` of backend/cuda/quantize/random.rs.

// Counter words of formats::Draw, and its key as every round adds it. Then 2^16, 2^8, 2^4, 2^2 and
// 0x80. NOTE: the compiler makes shifts and sums of products with constants that it knows, for the
// pipe that is the busiest in kernels that quantize, and two instructions of some that take one.
struct Draw {
  u32 word1, word2, word3, keys[10][2], shift16, shift8, shift4, shift2, half;
};

// The transform: sign i of a group is bit i % 32 of word i / 32, a set bit being -1. Not read
// without one.
struct Transform {
  u32 signs[8];
  float scale; // the f32 nearest to 1/sqrt(group)
};

// What an operand is quantized with: the transforms of its forms along rows and down columns, and
// the bits that round both.
struct Draws {
  Transform by_rows, by_columns;
  Draw draw;
};

// 128 random bits: of the 8 elements (row, 8 column_group + 0..7), each 16.
__device__ __forceinline__ uint4 philox(const Draw &draw, u32 row, u32 column_group) {
  u32 c0 = row, c1 = draw.word1 | column_group, c2 = draw.word2, c3 = draw.word3;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    u64 p0 = (u64)c0 * 0xd2511f53u, p1 = (u64)c2 * 0xcd9e8d57u;
    c0 = (u32)(p1 >> 32) ^ c1 ^ draw.keys[i][0], c1 = (u32)p1;
    c2 = (u32)(p0 >> 32) ^ c3 ^ draw.keys[i][1], c3 = (u32)p0;
  }
  return make_uint4(c0, c1, c2, c3);
}
