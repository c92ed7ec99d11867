// Starting the kernels: torch-free, like the core. Pointers lead into device memory, work is enqueued on `stream`, and
// nothing waits for the device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/problem.h"
#include "kernels/parameters.h"

namespace attnrb::cuda {

// What the host has to know of a device.
struct Device {
  int multiprocessors = 1;
  int64_t shared_bytes = 48 * 1024;  // that a block may ask for
  int capability = 80;               // 10 major + minor
};

// An attention call laid out for a device.
struct AttentionPlan {
  AttentionParameters parameters;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
  int width = 64;  // width_class()
  Task task = Task::rebalance;
  int64_t workspace_bytes = 0;  // device memory the caller has to lend until the work is done
};

// Throws std::invalid_argument where the device cannot run the kernels on such a problem. `gain_stride` 0: one gain for
// all heads. `values` false: only the rows' softmax is wanted. `split` false: no two blocks share a row. Ragged
// sequences lie in blocks, which have a table, and shape.keys is the most that one of them may have.
AttentionPlan plan_attention(const AttentionProblem& problem, const Device& device, bool values = true,
                             int gain_stride = 1, bool split = true);
// `status`, if any, is set to what is wrong with outlier rows; it has to be Status::ok before.
void start_attention(AttentionPlan& plan, void* workspace, int32_t* status, void* stream);

struct ReceivedPlan {
  AttentionPlan softmax;
  ReceivedParameters parameters;
  int64_t blocks = 0;
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;
};

ReceivedPlan plan_received(const ReceivedProblem& problem, const Device& device);
void start_received(ReceivedPlan& plan, void* workspace, void* stream);

void start_outlier_mask(const OutlierMaskProblem& problem, void* stream);
// One gain for all heads, `gain`, where problem.gain is null.
void start_rebalance(const RebalanceProblem& problem, int gain_stride, float gain, void* stream);

// Calls start(width) with a plan's width as a constant, of those that width_class() gives the task.
template <Task task, int64_t element_bytes, bool ragged, class Start>
void start_of_width(int width, Start&& start) {
  constexpr auto has = [](int of) { return width_class(task, of, element_bytes, ragged) == of; };
  if constexpr (has(64))
    if (width == 64) return start(std::integral_constant<int, 64>());
  if constexpr (has(128))
    if (width == 128) return start(std::integral_constant<int, 128>());
  if constexpr (has(256)) start(std::integral_constant<int, 256>());
}

// What each dtype's translation unit defines (launch_types.h).
struct Launches {
  void (*attention)(const AttentionPlan& plan, void* stream);
  void (*merge)(const AttentionPlan& plan, void* stream);
  void (*received)(const ReceivedPlan& plan, void* stream);
  void (*outlier_mask)(const struct OutlierMaskParameters& parameters, int64_t blocks, void* stream);
  void (*rebalance)(const struct RebalanceParameters& parameters, int64_t blocks, void* stream);
};
extern const Launches float32_launches, bfloat16_launches, float16_launches;

// The same for ragged sequences whose keys lie in blocks (ragged_types.h).
struct RaggedLaunches {
  void (*attention)(const AttentionPlan& plan, void* stream);
  void (*merge)(const AttentionPlan& plan, void* stream);
};
extern const RaggedLaunches ragged_float32_launches, ragged_bfloat16_launches, ragged_float16_launches;

}  // namespace attnrb::cuda
