// The kernels of one element type for ragged sequences whose keys lie in blocks; they compile beside launch_types.h.
#pragma once

#include "kernels/ragged_attention.h"
#include "launch.h"

namespace attnrb::cuda {

template <class T>
struct RaggedTypeLaunches {
  template <int Width, Task task>
  static void attention_of(const AttentionPlan& plan, void* stream) {
    launch<ragged_attention_kernel<T, Width, task>>(plan.blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
  }

  template <Task task>
  static void attention_of_width(const AttentionPlan& plan, void* stream) {
    start_of_width<task, sizeof(T), true>(
        plan.width, [&](auto width) { attention_of<decltype(width)::value, task>(plan, stream); });
  }

  // Of the tasks these three, which serve every edit: see plan.cpp.
  static void attention(const AttentionPlan& plan, void* stream) {
    if (plan.task == Task::rest)
      attention_of_width<Task::rest>(plan, stream);
    else if (plan.task == Task::edited)
      attention_of_width<Task::edited>(plan, stream);
    else
      attention_of_width<Task::rebalance>(plan, stream);
  }

  static void merge(const AttentionPlan& plan, void* stream) {
    const AttentionParameters& p = plan.parameters;
    const int64_t warps = p.problem.shape.key_heads * p.rows * merge_warps(p);
    launch<ragged_merge_kernel<T>>((warps + kWarps - 1) / kWarps, kThreads, 0, stream, p);
  }

  static constexpr RaggedLaunches table{&attention, &merge};
};

}  // namespace attnrb::cuda
