// torch.ops.fasttrace_ext: the launchers of this folder on torch's stable ABI, so that one build serves torch 2.11 and
// later. Without USE_CUDA only the CPU twins are registered.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "rank_update.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

int32_t type_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: STD_TORCH_CHECK(false, "rank_update: weights must be fp32, fp16 or bf16");
  }
}

void check_rows(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.stride(1) == 1 && tensor.scalar_type() == like.scalar_type() &&
          tensor.get_device_index() == like.get_device_index() && tensor.is_cuda() == like.is_cuda(),
      "rank_update: ", name, " must be matrices of one dtype on one device, with contiguous rows");
}

void check_factor(const Tensor& factor, int64_t length, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      factor.dim() == 2 && factor.size(0) == length && factor.is_contiguous() &&
          factor.scalar_type() == ScalarType::Float && factor.get_device_index() == like.get_device_index() &&
          factor.is_cuda() == like.is_cuda(),
      "rank_update: ", name, " factors must be contiguous fp32 on the weights' device, one row for each of ", length);
}

std::vector<RankUpdateMatrix> table(const Tensors& out, const Tensors& weights, const Tensors& left, const Tensors& right) {
  STD_TORCH_CHECK(
      out.size() == weights.size() && left.size() == weights.size() && right.size() == weights.size(),
      "rank_update: the four lists must have one length");
  std::vector<RankUpdateMatrix> matrices;
  matrices.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    check_rows(weight, weights[0], "weights");
    check_rows(out[i], weights[0], "outputs");
    const int64_t rows = weight.size(0), columns = weight.size(1);
    STD_TORCH_CHECK(out[i].size(0) == rows && out[i].size(1) == columns, "rank_update: an output's shape is not its weight's");
    check_factor(left[i], rows, weight, "left");
    check_factor(right[i], columns, weight, "right");
    STD_TORCH_CHECK(left[i].size(1) == right[i].size(1), "rank_update: two factors of different rank");
    matrices.push_back({
        weight.const_data_ptr(),
        out[i].mutable_data_ptr(),
        static_cast<const float*>(left[i].const_data_ptr()),
        static_cast<const float*>(right[i].const_data_ptr()),
        weight.stride(0),
        out[i].stride(0),
        static_cast<int32_t>(rows),
        static_cast<int32_t>(columns),
        static_cast<int32_t>(left[i].size(1)),
    });
  }
  return matrices;
}

void rank_update_cpu(const Tensors& out, const Tensors& weights, const Tensors& left, const Tensors& right) {
  const auto matrices = table(out, weights, left, right);
  if (matrices.empty()) return;
  const int32_t type = type_of(weights[0]);
  std::vector<float> transposed;
  for (const RankUpdateMatrix& m : matrices) {
    transposed.resize(static_cast<size_t>(m.rank) * m.columns);
    for (int64_t c = 0; c < m.columns; ++c)
      for (int64_t r = 0; r < m.rank; ++r) transposed[r * m.columns + c] = m.right[c * m.rank + r];
    const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max(1, m.columns));
    torch::stable::parallel_for(0, m.rows, grain, [&](int64_t first, int64_t last) {
      fasttrace_rank_update_cpu(&m, transposed.data(), first, last, type);
    });
  }
}

#ifdef USE_CUDA
void rank_update_cuda(const Tensors& out, const Tensors& weights, const Tensors& left, const Tensors& right) {
  const auto matrices = table(out, weights, left, right);
  if (matrices.empty()) return;
  const int32_t device = weights[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error =
      fasttrace_rank_update_cuda(matrices.data(), static_cast<int32_t>(matrices.size()), type_of(weights[0]), stream);
  STD_TORCH_CHECK(error == 0, "rank_update: the launch failed with cudaError_t ", error);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(fasttrace_ext, m) {
  m.def("rank_update(Tensor(a!)[] out, Tensor[] weights, Tensor[] left, Tensor[] right) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fasttrace_ext, CPU, m) { m.impl("rank_update", TORCH_BOX(&rank_update_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fasttrace_ext, CUDA, m) { m.impl("rank_update", TORCH_BOX(&rank_update_cuda)); }
#endif
