// The bias gradient of a linear layer: column sums.

// partial (parts, outputs) = sums over every parts-th stretch of rows of dy (rows, outputs); block
// y takes rows y * ceil(rows / parts) .. . Overwrites. Grid: (outputs / 256, parts), rounded up;
// block: 256, as 32 threads of 8 columns by 8 rows.
template <class T>
__global__ void bias_gradient(float *partial, const T *dy, u32 rows, u32 outputs) {
  begin();
  __shared__ float sums[8][256 + 8];
  u32 lane = threadIdx.x % 32, part = threadIdx.x / 32;
  u32 column = blockIdx.x * 256 + lane * 8;
  u32 stretch = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * stretch;
  u32 last = min(first + stretch, rows);
  float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (outputs % 8 == 0 && column < outputs) {
#pragma unroll 4
    for (u32 r = first + part; r < last; r += 8) {
      float v[8];
      load8(dy + (size_t)r * outputs + column, v);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += v[j];
    }
  } else {
    for (u32 r = first + part; r < last; r += 8)
      for (u32 j = 0; j < 8 && column + j < outputs; j++)
        sum[j] += to_f32(dy[(size_t)r * outputs + column + j]);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) sums[part][lane * 8 + j] = sum[j];
  __syncthreads();
  column = blockIdx.x * 256 + threadIdx.x;
  if (column < outputs) {
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < 8; p++) total += sums[p][threadIdx.x];
    partial[(size_t)blockIdx.y * outputs + column] = total;
  }
}

// to (n) += the sums of the columns of partial (parts, n) over the parts, in a fixed order; or =
// them, where `accumulate` is 0. Where `second` is not null, partial is (parts, 2, n), and the
// second n are for it. Grid: n / 32, or 2 n / 32, rounded up; block: 1,024, as 32 columns by 32
// parts. NOTE: what takes time is waiting for one load after the other: with 256 threads, 8 parts,
// a launch took 17 us (H100). As additional blocks of 128 threads of the kernel that quantizes x,
// which spares the launch, it made a step of 345M 1% slower.
__global__ void __launch_bounds__(1024)
    add_partials(float *to, float *second, const float *partial, u32 parts, u32 n, u32 accumulate) {
  begin();
  __shared__ float sums[32][33];
  u32 lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * 32 + lane,
      columns = second ? 2 * n : n;
  float sum = 0.0f;
  if (column < columns)
#pragma unroll 8
    for (u32 p = part; p < parts; p += 32) sum += partial[(size_t)p * columns + column];
  sums[part][lane] = sum;
  __syncthreads();
  // A warp adds up one column.
  column = blockIdx.x * 32 + part;
  float total = warp_sum(sums[lane][part]);
  if (lane == 0 && column < columns) {
    float *at = column < n ? to + column : second + (column - n);
    *at = accumulate ? *at + total : total;
  }
}
