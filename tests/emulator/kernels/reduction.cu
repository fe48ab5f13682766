// reduction - per row: the sum, and the largest value of the row divided by it. One shared array serves both reductions.
#include "hopper.cuh"

// in [rows x 1024] floats, weight [1024]; scaled = in * weight / sum(in * weight); largest = max of it. 256 threads.
extern "C" __global__ void __launch_bounds__(256) reduction(const float* in, const float* weight, float* scaled, float* largest) {
  SHARED_ARRAY(float, part, [8]);
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  hw::griddep_wait();
  float4 x = hw::ld16<float4>(in + blockIdx.x * 1024 + t * 4);
  const float4 w = hw::ld16<float4>(weight + t * 4);
  x.x *= w.x, x.y *= w.y, x.z *= w.z, x.w *= w.w;
  float sum = hw::warp_sum(x.x + x.y + x.z + x.w);
  if (lane == 0) part[warp] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 8; i++) sum += part[i];
  x.x /= sum, x.y /= sum, x.z /= sum, x.w /= sum;
  __syncthreads();  // part[] is read above and rewritten below
  float top = hw::warp_max(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  if (lane == 0) part[warp] = top;
  __syncthreads();
  top = part[0];
  for (int i = 1; i < 8; i++) top = fmaxf(top, part[i]);
  hw::st16(scaled + blockIdx.x * 1024 + t * 4, x);
  if (t == 0) largest[blockIdx.x] = top;
}
EXPORT_KERNEL(reduction)
