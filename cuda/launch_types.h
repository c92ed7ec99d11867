// The kernels of one element type. Each type has a translation unit, so that they compile side by side.
#pragma once

#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/merge.h"
#include "kernels/received.h"
#include "launch.h"

namespace attnrb::cuda {

template <class T>
struct TypeLaunches {
  template <int Width, Task task>
  static void attention_of(const AttentionPlan& plan, void* stream) {
    launch<attention_kernel<T, Width, task>>(plan.blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
  }

  template <Task task>
  static void attention_of_width(const AttentionPlan& plan, void* stream) {
    start_of_width<task, sizeof(T), false>(
        plan.width, [&](auto width) { attention_of<decltype(width)::value, task>(plan, stream); });
  }

  static void attention(const AttentionPlan& plan, void* stream) {
    switch (plan.task) {
      case Task::source:
        return attention_of_width<Task::source>(plan, stream);
      case Task::rebalance:
        return attention_of_width<Task::rebalance>(plan, stream);
      case Task::edited:
        return attention_of_width<Task::edited>(plan, stream);
      case Task::rest:
        return attention_of_width<Task::rest>(plan, stream);
      case Task::softmax:
        return attention_of_width<Task::softmax>(plan, stream);
      case Task::biased_softmax:
        return attention_of_width<Task::biased_softmax>(plan, stream);
    }
  }

  static void merge(const AttentionPlan& plan, void* stream) {
    const AttentionParameters& p = plan.parameters;
    const int64_t warps = p.problem.shape.batch * p.problem.shape.key_heads * p.rows * merge_warps(p);
    launch<merge_kernel<T>>((warps + kWarps - 1) / kWarps, kThreads, 0, stream, p);
  }

  template <bool Biased>
  static void received_of(const ReceivedPlan& plan, void* stream) {
    if (plan.softmax.width == 256)
      launch<received_kernel<T, 256, Biased>>(plan.blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
    else
      launch<received_kernel<T, 128, Biased>>(plan.blocks, kThreads, plan.shared_bytes, stream, plan.parameters);
  }

  static void received(const ReceivedPlan& plan, void* stream) {
    if (plan.softmax.task == Task::biased_softmax)
      received_of<true>(plan, stream);
    else
      received_of<false>(plan, stream);
  }

  static void outlier_mask(const OutlierMaskParameters& parameters, int64_t blocks, void* stream) {
    launch<outlier_mask_kernel<T>>(blocks, kThreads, 0, stream, parameters);
  }

  static void rebalance(const RebalanceParameters& parameters, int64_t blocks, void* stream) {
    launch<rebalance_kernel<T>>(blocks, kThreads, 0, stream, parameters);
  }

  static constexpr Launches table{&attention, &merge, &received, &outlier_mask, &rebalance};
};

}  // namespace attnrb::cuda
