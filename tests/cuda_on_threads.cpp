// Runs the CUDA kernel of csrc/rank_update.cuh on host threads, one for each CUDA thread of a block, so that its indexing
// and its barriers are checked on a machine without a GPU. Defines the CUDA launcher that csrc/rank_update.h declares.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  int x;
};
static thread_local Index threadIdx, blockIdx;
static std::barrier<>* block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }
using std::min;

#include "rank_update.cuh"

template <typename T>
static void run(const RankUpdateMatrix* matrices, int count) {
  while (count > 0) {
    fasttrace::RankUpdateBatch batch;
    int grid = 0;
    const int taken = fasttrace::fill_batch(matrices, count, sizeof(fasttrace::Vector<T>), batch, grid);
    for (int block = 0; block < grid; ++block) {
      std::barrier<> barrier(fasttrace::kThreads);
      block_barrier = &barrier;
      std::vector<std::thread> threads;
      for (int thread = 0; thread < fasttrace::kThreads; ++thread)
        threads.emplace_back([=, &batch] {
          threadIdx.x = thread;
          blockIdx.x = block;
          fasttrace::rank_update_kernel<T>(batch);
        });
      for (auto& thread : threads) thread.join();
    }
    matrices += taken;
    count -= taken;
  }
}

extern "C" int fasttrace_rank_update_cuda(const RankUpdateMatrix* matrices, int32_t count, int32_t type, void*) {
  switch (type) {
    case kFloat32: run<float>(matrices, count); return 0;
    case kFloat16: run<__half>(matrices, count); return 0;
    case kBFloat16: run<__nv_bfloat16>(matrices, count); return 0;
    default: return 1;
  }
}
