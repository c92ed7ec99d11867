// The ops on the CPU: the chosen kernels under the checks that every device shares.
#include "ops/cpu.h"

#include "ops/attention.h"
#include "ops/attention_backward.h"
#include "ops/paged_attention.h"
#include "ops/received_attention.h"
#include "ops/weights.h"
#include "ops/write_keys.h"

namespace attnrb::ops {
namespace {

struct Processor {
  using Gain = GainRow;
  using Paging = HostPaging;
  static constexpr bool values_on_host = true;
  static const float* numbers(const GainRow& gain) { return gain.data(); }
  static void clear(const Tensor& tensor) { clear_contiguous(tensor); }

  static Tensor attend(AttentionProblem& problem, const Operand& query, const AttentionTensors& tensors,
                       const GainRow* /*gain*/) {
    const OutputLayout layout(problem.shape, tensors.rows_first);
    Tensor output = empty_output(layout, query);
    set_output(problem, layout, output);
    attend_into(problem);
    return output;
  }

  static void attend_into(const AttentionProblem& problem) {
    ScratchLease scratch;
    check_status(kernels().attention(problem, threads_for(problem.shape), *scratch), problem.edit.capacity);
  }

  static void attend_in_blocks(const AttentionProblem& problem, const HostPaging& paging, const Attended& attended,
                               const Operand& /*query*/, const GainRow* /*gain*/, bool own_output) {
    clear_skipped(paging, attended, problem.emit.capacity, own_output);
    const Shape& shape = problem.shape;
    if (shape.batch * shape.heads * shape.queries * shape.keys != 0) attend_into(problem);
  }

  static void write_keys(const WriteProblem& problem, const Operand& /*key*/) {
    check_slot_mapping(problem.slots, problem);
    if (problem.rows * problem.heads != 0) write_on_threads(problem);
  }

  static void receive(const ReceivedProblem& problem, const Operand& /*query*/) {
    ScratchLease scratch;
    kernels().received_attention(problem, torch_threads(), *scratch);
  }

  static void differentiate(const GradientProblem& problem, const Operand& /*query*/, const GainRow* /*gain*/,
                            const BackwardTensors* /*tensors*/) {
    ScratchLease scratch;
    check_status(kernels().gradient(problem, torch_threads(), *scratch), problem.edit.capacity);
  }

  static void outlier_mask(const OutlierMaskProblem& problem, const Operand& /*weights*/) {
    kernels().outlier_mask(problem, torch_threads());
  }

  static void rebalance(const RebalanceProblem& problem, const GainRow& /*gain*/, const Operand& /*weights*/) {
    kernels().rebalance(problem, torch_threads());
  }

  static void rebalance_gradient(RebalanceGradientProblem& problem, const GainRow& /*gain*/,
                                 const Operand& /*weights*/) {
    std::vector<double> rows(size_t(problem.shape.batch * problem.shape.heads * problem.shape.queries));
    problem.gain_rows = rows.data();
    kernels().rebalance_gradient(problem, torch_threads());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, CPU, library) {
  library.impl("attention", &boxed<&attention<Processor>>);
  library.impl("attention.output", &boxed<&attention_output<Processor>>);
  library.impl("attention.output_heads_first", &boxed<&attention_output_heads_first<Processor>>);
  library.impl("attention.into", &boxed<&attention_into<Processor>>);
  library.impl("attention.output_into", &boxed<&attention_output_into<Processor>>);
  library.impl("write_keys", &boxed<&write_keys<Processor>>);
  library.impl("attention_training", &boxed<&attention_training<Processor>>);
  library.impl("attention_backward", &boxed<&attention_backward<Processor>>);
  library.impl("source_attention", &boxed<&source_attention<Processor>>);
  library.impl("rebalanced_attention", &boxed<&rebalanced_attention<Processor>>);
  library.impl("received_attention", &boxed<&received_attention<Processor>>);
  library.impl("received_attention_training", &boxed<&received_attention_training<Processor>>);
  library.impl("received_attention.edited", &boxed<&received_attention<Processor>>);
  library.impl("outlier_mask", TORCH_BOX(&outlier_mask<Processor>));
  library.impl("rebalance", TORCH_BOX(&rebalance_uniform<Processor>));
  library.impl("rebalance.per_head", TORCH_BOX(&rebalance_per_head<Processor>));
  library.impl("rebalance_backward", TORCH_BOX(&rebalance_backward<Processor>));
  library.impl("received_attention_backward", &boxed<&received_attention_backward<Processor>>);
}

}  // namespace attnrb::ops
