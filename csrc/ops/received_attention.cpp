// How much attention each key receives: the mean weight that the queries which can see it give it.
#include "ops/cpu.h"

namespace attnrb::ops {
namespace {

Tensor received_attention(const Tensor& query_tensor, const Tensor& key_tensor, bool causal, int64_t query_offset,
                          int64_t key_offset, int64_t window, const OptionalTensor& key_start,
                          const OptionalTensor& key_end, const OptionalTensor& mask, double scale, double softcap,
                          const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor);
  ReceivedProblem problem;
  problem.dtype = check_element_type(query);
  problem.shape = check_query_key(query, key);
  const Shape& shape = problem.shape;
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);

  Tensor received = empty<3>({shape.batch, shape.heads, shape.keys}, dtype_codes().float32, query);
  const int64_t count = shape.batch * shape.heads * shape.keys;
  if (count == 0) return received;

  problem.received = static_cast<float*>(received.mutable_data_ptr());
  if (shape.queries == 0) {
    std::fill_n(problem.received, count, 0.0f);
    return received;
  }
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.visibility = shared.visibility;
  problem.scoring = shared.scoring;
  ScratchLease scratch;
  kernels().received_attention(problem, torch_threads(), *scratch);
  return received;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, CPU, library) { library.impl("received_attention", TORCH_BOX(&received_attention)); }

}  // namespace attnrb::ops
