// Gradients of the three attention ops on the CPU.
#include "ops/attention_backward.h"

#include "ops/cpu.h"

namespace attnrb::ops {
namespace {

struct Processor {
  using Gain = GainRow;
  static const float* numbers(const GainRow& gain) { return gain.data(); }
  static void differentiate(const GradientProblem& problem, const Operand& /*query*/, const GainRow* /*gain*/,
                            const BackwardTensors* /*tensors*/) {
    ScratchLease scratch;
    check_status(kernels().gradient(problem, torch_threads(), *scratch), problem.boost.capacity);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(attnrb, CPU, library) {
  library.impl("source_attention_backward", TORCH_BOX(&source_attention_backward<Processor>));
  library.impl("rebalanced_attention_backward", TORCH_BOX(&rebalanced_attention_backward<Processor>));
  library.impl("received_attention_backward", TORCH_BOX(&received_attention_backward<Processor>));
}

}  // namespace attnrb::ops
