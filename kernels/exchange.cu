// What ranks and lanes of a step do with gradients.

// gradients = others + gradients, each of `vectors` times four numbers. Grid: any; block: any.
__global__ void join_gradients(float4 *gradients, const float4 *others, u64 vectors) {
  begin();
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < vectors;
       i += (u64)gridDim.x * blockDim.x) {
    float4 a = others[i], b = gradients[i];
    gradients[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  }
}
