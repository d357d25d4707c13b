// Launcher of the rank-r update on a CUDA stream.
#include <cuda_runtime.h>

#include "rank_update.cuh"

namespace {

template <typename T>
cudaError_t launch(const RankUpdateMatrix* matrices, int count, cudaStream_t stream) {
  while (count > 0) {
    fasttrace::RankUpdateBatch batch;
    int grid = 0;
    const int taken = fasttrace::fill_batch(matrices, count, sizeof(fasttrace::Vector<T>), batch, grid);
    if (grid > 0) {
      fasttrace::rank_update_kernel<T><<<grid, fasttrace::kThreads, 0, stream>>>(batch);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
    matrices += taken;
    count -= taken;
  }
  return cudaSuccess;
}

}  // namespace

extern "C" int fasttrace_rank_update_cuda(const RankUpdateMatrix* matrices, int32_t count, int32_t type, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (type) {
    case kFloat32: return launch<float>(matrices, count, cuda_stream);
    case kFloat16: return launch<__half>(matrices, count, cuda_stream);
    case kBFloat16: return launch<__nv_bfloat16>(matrices, count, cuda_stream);
    default: return cudaErrorInvalidValue;
  }
}
