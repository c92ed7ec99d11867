// Attention at the source layer: output, log-sum-exp and the outliers of every row.
#include <tuple>

#include "core/outliers.h"
#include "library.h"

namespace attnrb::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> source_attention(const Tensor& query_tensor, const Tensor& key_tensor,
                                                            const Tensor& value_tensor, double threshold, bool causal,
                                                            int64_t query_offset, int64_t key_offset, int64_t window,
                                                            const OptionalTensor& key_start,
                                                            const OptionalTensor& key_end, const OptionalTensor& mask,
                                                            double scale, double softcap, const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  const DType dtype = check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  check_threshold(threshold);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  const int64_t capacity = outlier_capacity(threshold, shape.keys);
  Tensor lse = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().float32, query);
  Tensor indices = empty<4>({shape.batch, shape.heads, shape.queries, capacity}, dtype_codes().int32, query);
  Tensor counts = empty<3>({shape.batch, shape.heads, shape.queries}, dtype_codes().int32, query);

  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) {
    // What any set of keys gives when it is empty.
    Tensor output = empty_output(OutputLayout(shape), query);
    torch::stable::zero_(output);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    torch::stable::zero_(counts);
    return {std::move(output), std::move(lse), std::move(indices), std::move(counts)};
  }

  AttentionProblem problem = attention_problem(query, key, value, dtype, shape, shared);
  problem.lse = static_cast<float*>(lse.mutable_data_ptr());
  problem.emit.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  problem.emit.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  problem.emit.capacity = capacity;
  problem.emit.threshold = threshold;
  Tensor output = attend_on_device(problem, query_tensor, key_tensor, value_tensor, 1);
  return {std::move(output), std::move(lse), std::move(indices), std::move(counts)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, ATTNRB_CUDA_KEY, library) {
  library.impl("source_attention", TORCH_BOX(&source_attention));
  library.impl("source_attention_training", TORCH_BOX(&source_attention));
}

}  // namespace attnrb::ops
