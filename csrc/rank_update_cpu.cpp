// CPU twin of rank_update.cu: the same table, one read and one write of W.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "rank_update.h"

namespace {

constexpr int kBlock = 512;  // columns whose fp32 sums stay in the first-level cache

template <typename T>
void update_rows(const RankUpdateMatrix& m, const float* right_transposed, int64_t first, int64_t last) {
  float sum[kBlock];
  for (int64_t row = first; row < last; ++row) {
    const T* weight = static_cast<const T*>(m.weight) + row * m.weight_stride;
    T* out = static_cast<T*>(m.out) + row * m.out_stride;
    for (int64_t start = 0; start < m.columns; start += kBlock) {
      const int64_t width = std::min<int64_t>(kBlock, m.columns - start);
      for (int64_t c = 0; c < width; ++c) sum[c] = static_cast<float>(weight[start + c]);
      for (int64_t i = 0; i < m.rank; ++i) {
        const float a = m.left[row * m.rank + i];
        const float* b = right_transposed + i * m.columns + start;
        for (int64_t c = 0; c < width; ++c) sum[c] += a * b[c];
      }
      for (int64_t c = 0; c < width; ++c) out[start + c] = static_cast<T>(sum[c]);
    }
  }
}

}  // namespace

extern "C" void fasttrace_rank_update_cpu(
    const RankUpdateMatrix* matrix, const float* right_transposed, int64_t first, int64_t last, int32_t type) {
  switch (type) {
    case kFloat32: return update_rows<float>(*matrix, right_transposed, first, last);
    case kFloat16: return update_rows<torch::headeronly::Half>(*matrix, right_transposed, first, last);
    case kBFloat16: return update_rows<torch::headeronly::BFloat16>(*matrix, right_transposed, first, last);
  }
}
