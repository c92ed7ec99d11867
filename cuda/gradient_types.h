// The kernels of the backward for one element type. Each type has a translation unit, so that they compile side by
// side.
#pragma once

#include "gradient.h"
#include "kernels/elementwise_gradient.h"
#include "kernels/gradient.h"

namespace attnrb::cuda {

template <class T>
struct TypeGradients {
  static void rows(const GradientPlan& plan, void* stream) {
    const AttentionParameters& p = plan.parameters.rows;
    const int64_t rows = p.problem.shape.batch * p.problem.shape.key_heads * p.rows;
    launch<gradient_rows_kernel<T>>((rows + kWarps - 1) / kWarps, kThreads, 0, stream, plan.parameters);
  }

  template <int Width, GradientTask which, bool Edited>
  static void start(const GradientPlan& plan, int64_t blocks, void* stream) {
    launch<gradient_kernel<T, Width, which, Edited>>(blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
  }

  // Neither edited rows nor float32 have kernels of their own for narrow operands.
  template <GradientTask which>
  static void start_of(const GradientPlan& plan, int64_t blocks, void* stream) {
    constexpr bool kNarrow = (which == GradientTask::queries || which == GradientTask::keys) && sizeof(T) == 2;
    if (plan.edited) return start<128, which, true>(plan, blocks, stream);
    if constexpr (kNarrow)
      if (plan.width == 64) return start<64, which, false>(plan, blocks, stream);
    start<128, which, false>(plan, blocks, stream);
  }

  static void task(const GradientPlan& plan, GradientTask which, void* stream) {
    switch (which) {
      case GradientTask::queries:
        return start_of<GradientTask::queries>(plan, plan.query_blocks, stream);
      case GradientTask::keys:
        return start_of<GradientTask::keys>(plan, plan.key_blocks, stream);
      case GradientTask::received_deltas:
        return start_of<GradientTask::received_deltas>(plan, plan.query_blocks, stream);
      case GradientTask::received_queries:
        return start_of<GradientTask::received_queries>(plan, plan.query_blocks, stream);
      case GradientTask::received_keys:
        return start_of<GradientTask::received_keys>(plan, plan.key_blocks, stream);
      case GradientTask::rest:
        return start<128, GradientTask::rest, true>(plan, plan.query_blocks, stream);
      case GradientTask::bias:
        return start<128, GradientTask::bias, true>(plan, plan.key_blocks * plan.parameters.rows.group, stream);
    }
  }

  static void rebalance(const RebalanceGradientParameters& parameters, int64_t blocks, void* stream) {
    launch<rebalance_gradient_kernel<T>>(blocks, kThreads, 0, stream, parameters);
  }

  static constexpr GradientLaunches table{&rows, &task, &rebalance};
};

}  // namespace attnrb::cuda
