// A kernel to compile in tests; it is not run.
extern "C" __global__ void __launch_bounds__(128) copy(const float *from, float *to) {
  __shared__ float row[E];
  row[threadIdx.x % E] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = row[threadIdx.x % E];
}
