// Lays attention problems out for a device and starts what comes of it. Nothing here looks at device memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/elementwise_parameters.h"
#include "launch.h"
#include "layout.h"

namespace attnrb::cuda {
namespace {

const Launches& launches(DType dtype) {
  return dtype == DType::float32 ? float32_launches : dtype == DType::bfloat16 ? bfloat16_launches : float16_launches;
}

const RaggedLaunches& ragged_launches(DType dtype) {
  return dtype == DType::float32    ? ragged_float32_launches
         : dtype == DType::bfloat16 ? ragged_bfloat16_launches
                                    : ragged_float16_launches;
}

// Keys in a tile: Tile<T, Width>::keys.
int64_t tile_keys(DType dtype, int width) {
  if (dtype == DType::float32) return width <= 128 ? Tile<float, 128>::keys : Tile<float, 256>::keys;
  return width <= 128 ? Tile<bfloat16, 128>::keys : Tile<bfloat16, 256>::keys;
}

// A multiprocessor has 1 KB more than a block may ask for, and takes as much for each block.
int64_t blocks_that_fit(int64_t shared_bytes, const Device& device) {
  return (device.shared_bytes + 1024) / (shared_bytes + 1024);
}

// Four blocks for each multiprocessor keep a device busy; a split shorter than two tiles costs more than it brings.
int split_keys(const AttentionProblem& problem, int64_t blocks, int64_t keys_in_tile, const Device& device) {
  if (blocks == 0) return 1;
  int64_t keys = problem.shape.keys;
  for (const int64_t reach : {problem.visibility.window, problem.visibility.chunk})
    if (reach > 0) keys = std::min(keys, reach + problem.shape.queries);
  const int64_t wanted = divide_up(4 * int64_t(device.multiprocessors), blocks);
  const int64_t useful = divide_up(divide_up(keys, keys_in_tile), 2);
  return 2 * blocks > 4 * int64_t(device.multiprocessors)
             ? 1
             : int(std::clamp<int64_t>(wanted, 1, std::min<int64_t>(useful, 64)));
}

// How often the rows of a key head are counted from the first on.
int64_t grids(const Shape& shape) { return shape.ragged() ? 1 : shape.batch; }

// See Note: [Ragged rows].
void set_sequences(AttentionParameters& p) {
  const Shape& shape = p.problem.shape;
  if (p.rows + kTileRows * shape.batch > std::numeric_limits<int32_t>::max())
    refuse("query: expected fewer rows of a key head than 2^31, got ", p.rows);
  p.row_tiles = p.rows / kTileRows + shape.batch;
  const KeyRows& key = p.problem.key;
  BlockTable& blocks = p.blocks;
  blocks.table = key.table;
  blocks.stride = key.table_stride;
  blocks.rows = key.block_rows;
  int bits = 0;
  while ((uint64_t(1) << bits) < blocks.rows) ++bits;
  blocks.shift = 31 + bits;
  blocks.factor = uint32_t(((uint64_t(1) << blocks.shift) + blocks.rows - 1) / blocks.rows);
}

int64_t carve_partials(AttentionParameters& p, void* workspace) {
  if (p.splits == 1) return 0;
  const Shape& shape = p.problem.shape;
  const int64_t count = grids(shape) * shape.key_heads * p.rows * p.splits;
  Carver carver(workspace);
  p.partials.state = carver.take<float>(4 * count);
  p.partials.sums = carver.take<float>(count * shape.value_width);
  const Edit& edit = p.problem.edit;
  if (edit.indices != nullptr && edit.rule == Rule::rest) {
    p.partials.chosen_state = carver.take<float>(4 * count);
    p.partials.chosen_sums = carver.take<float>(count * shape.value_width);
  }
  if (p.problem.emit.indices != nullptr) {
    p.partials.candidate_scores = carver.take<float>(count * p.problem.emit.capacity);
    p.partials.candidates = carver.take<int32_t>(count * p.problem.emit.capacity);
    p.partials.candidate_counts = carver.take<int32_t>(count);
  }
  return carver.taken();
}

// See Task: what is asked for most has kernels of its own.
Task task_of(const AttentionProblem& problem, bool values) {
  const Edit& edit = problem.edit;
  const bool emits = problem.emit.indices != nullptr, boosts = edit.indices != nullptr;
  if (!values) return edit.key_bias != nullptr ? Task::biased_softmax : Task::softmax;
  if (boosts && edit.rule == Rule::rest) return Task::rest;
  if (edit.key_bias != nullptr || (boosts && emits) || (emits && problem.shape.ragged())) return Task::edited;
  return emits ? Task::source : Task::rebalance;
}

}  // namespace

AttentionPlan plan_attention(const AttentionProblem& problem, const Device& device, bool values, int gain_stride,
                             bool split) {
  check_capability(device);
  const Shape& shape = problem.shape;
  if (shape.keys > std::numeric_limits<int32_t>::max() - 256)
    refuse("key: expected fewer than 2^31 - 256 keys, got ", shape.keys);
  AttentionPlan plan;
  AttentionParameters& p = plan.parameters;
  p.problem = problem;
  set_rows(p, problem, values ? shape.value_width : 0, gain_stride);
  if (shape.ragged()) set_sequences(p);
  plan.task = task_of(problem, values);
  if (problem.emit.indices != nullptr) p.threshold_log2 = float(std::log2(problem.emit.threshold));

  const int64_t size = element_size(problem.dtype), unit = 16 / size;
  const int64_t value_width = values ? shape.value_width : 0;
  plan.width = width_class(plan.task, std::max(shape.width, value_width), size, shape.ragged());
  p.slices = int32_t(std::max<int64_t>(1, divide_up(value_width, plan.width)));
  p.columns = int32_t(round_up(shape.width, 2 * unit));
  p.value_columns = int32_t(round_up(std::clamp<int64_t>(value_width, 1, plan.width), 16));
  const int64_t keys = tile_keys(problem.dtype, plan.width);
  p.layout = row_layout(p.columns, size);
  const int64_t row_bytes = p.layout.stride * size;
  const int64_t value_row_bytes = (p.value_columns + unit) * size;
  plan.shared_bytes = (kTileRows + keys) * row_bytes + keys * std::max(row_bytes, value_row_bytes);
  if (may_have_bias(plan.task)) {
    p.kept = int32_t(plan.shared_bytes);
    plan.shared_bytes += kKeptWords * kThreads * int64_t(sizeof(uint32_t));
  }
  if (shape.ragged()) {
    p.of_sequence = int32_t(plan.shared_bytes);
    plan.shared_bytes += round_up(kSequenceBytes, 16);
  }
  check_shared("query", plan.shared_bytes, device);
  // See Note: [Two stages].
  const int64_t third = values ? keys * row_bytes : 0;
  p.ahead = has_third_buffer(plan.task, plan.width, size) &&
            (blocks_that_fit(plan.shared_bytes + third, device) >= 2 || third == 0);
  if (p.ahead) {
    plan.shared_bytes += third;
    if (p.of_sequence != 0) p.of_sequence += int32_t(third);
  }

  const int64_t blocks = grids(shape) * shape.key_heads * p.row_tiles * p.slices;
  p.splits = split ? split_keys(problem, blocks, keys, device) : 1;
  plan.blocks = check_blocks(blocks * p.splits);
  plan.workspace_bytes = carve_partials(p, nullptr);
  return plan;
}

void start_attention(AttentionPlan& plan, void* workspace, int32_t* status, void* stream) {
  AttentionParameters& p = plan.parameters;
  carve_partials(p, workspace);
  p.status = status;
  const auto run = [&](const auto& start) {
    start.attention(plan, stream);
    if (p.splits > 1) start.merge(plan, stream);
  };
  if (p.problem.shape.ragged())
    run(ragged_launches(p.problem.dtype));
  else
    run(launches(p.problem.dtype));
}

ReceivedPlan plan_received(const ReceivedProblem& problem, const Device& device) {
  AttentionProblem rows;
  rows.shape = problem.shape;
  rows.shape.value_width = 0;
  rows.dtype = problem.dtype;
  rows.query = problem.query;
  rows.key = problem.key;
  rows.visibility = problem.visibility;
  rows.scoring = problem.scoring;
  rows.lse = problem.lse;
  rows.edit = problem.edit;
  rows.edit.indices = nullptr;

  ReceivedPlan plan;
  plan.softmax = plan_attention(rows, device, false);
  AttentionParameters& p = plan.parameters.rows = plan.softmax.parameters;
  const Shape& shape = p.problem.shape;
  p.group = 1;
  p.rows = shape.queries;
  p.row_tiles = divide_up(p.rows, kTileRows);
  plan.parameters.received = problem.received;
  const int64_t size = element_size(problem.dtype), row_bytes = (p.columns + 16 / size) * size;
  const int64_t keys = tile_keys(problem.dtype, plan.softmax.width);
  plan.blocks = check_blocks(shape.batch * shape.heads * divide_up(shape.keys, keys));
  const auto shared_bytes = [&](int64_t stages) {
    return std::max<int64_t>((keys + stages * kTileRows) * row_bytes, kWarps * keys * 8);
  };
  plan.parameters.stages = shared_bytes(2) <= device.shared_bytes ? 2 : 1;
  plan.shared_bytes = shared_bytes(plan.parameters.stages);
  check_shared("query", plan.shared_bytes, device);
  plan.workspace_bytes = round_up(shape.batch * shape.heads * shape.queries * 2 * int64_t(sizeof(float)), 256) +
                         plan.softmax.workspace_bytes;
  return plan;
}

void start_received(ReceivedPlan& plan, void* workspace, void* stream) {
  const Shape& shape = plan.softmax.parameters.problem.shape;
  const int64_t bytes = plan.workspace_bytes - plan.softmax.workspace_bytes;
  float* softmax = static_cast<float*>(workspace);
  plan.softmax.parameters.problem.softmax = plan.parameters.rows.problem.softmax = softmax;
  if (shape.queries > 0) start_attention(plan.softmax, static_cast<char*>(workspace) + bytes, nullptr, stream);
  launches(plan.softmax.parameters.problem.dtype).received(plan, stream);
}

void start_outlier_mask(const OutlierMaskProblem& problem, void* stream) {
  OutlierMaskParameters parameters;
  parameters.problem = problem;
  // float32 w > threshold exactly where w > the largest float32 that is not above the threshold.
  parameters.bound = float(problem.threshold);
  if (double(parameters.bound) > problem.threshold) parameters.bound = std::nextafter(parameters.bound, 0.0f);
  parameters.aligned = whole_rows(problem.weights, problem);
  launches(problem.dtype).outlier_mask(parameters, row_blocks(problem.shape), stream);
}

void start_rebalance(const RebalanceProblem& problem, int gain_stride, float gain, void* stream) {
  RebalanceParameters parameters;
  parameters.problem = problem;
  parameters.gain_stride = gain_stride;
  parameters.gain = gain;
  parameters.aligned = whole_rows(problem.weights, problem) && reinterpret_cast<uintptr_t>(problem.output) % 16 == 0;
  launches(problem.dtype).rebalance(parameters, row_blocks(problem.shape), stream);
}

}  // namespace attnrb::cuda
