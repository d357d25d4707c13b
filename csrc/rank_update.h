// W' = W + A Bᵀ for a batch of matrices: the table that both launchers read. Free of torch and of CUDA headers.
#pragma once

#include <cstdint>

// One matrix. Rows of `weight` and `out` lie `*_stride` elements apart and are themselves contiguous; the factors are
// fp32 and contiguous. `out` may be `weight`.
struct RankUpdateMatrix {
  const void* weight;  // [rows, columns]
  void* out;           // [rows, columns]
  const float* left;   // [rows, rank]
  const float* right;  // [columns, rank]
  int64_t weight_stride;
  int64_t out_stride;
  int32_t rows;
  int32_t columns;
  int32_t rank;
};

enum RankUpdateType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

extern "C" {

// Queues the whole batch on a CUDA stream, 48 matrices a launch; nothing is allocated, copied or waited for, so it can be
// captured in a graph. Returns a cudaError_t.
int fasttrace_rank_update_cuda(const RankUpdateMatrix* matrices, int32_t count, int32_t type, void* stream);

// Rows [first, last) of one matrix, on the calling thread; `right_transposed` is `right` as [rank, columns].
void fasttrace_rank_update_cpu(
    const RankUpdateMatrix* matrix, const float* right_transposed, int64_t first, int64_t last, int32_t type);
}
