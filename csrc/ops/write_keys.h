// The op that writes new keys and values into blocks.
#pragma once

#include <algorithm>
#include <cstring>
#include <tuple>

#include "core/thread_pool.h"
#include "ops/paging.h"

namespace attnrb::ops {

inline WrittenRows written_rows(const Operand& rows, const Operand& pool, const Tensor& pool_tensor) {
  const int64_t size = pool_tensor.element_size();
  return {static_cast<const char*>(rows.data()),
          static_cast<char*>(pool_tensor.mutable_data_ptr()),
          {rows.strides[0] * size, rows.strides[1] * size},
          {pool.strides[0] * size, pool.strides[1] * size, pool.strides[2] * size},
          rows.sizes[2] * size};
}

inline void check_slot_mapping(const int64_t* slots, const WriteProblem& problem) {
  const int64_t held = problem.blocks * problem.block_rows;
  for (int64_t t = 0; t < problem.rows; ++t)
    if (slots[t] < -1 || slots[t] >= held)
      refuse("slot_mapping", "expected -1 or numbers below ", held, ", got ", slots[t], " for row ", t);
}

// Row t of key [T, Hk, D] and value [T, Hk, Dv] goes to row slot_mapping[t] mod P of block slot_mapping[t] / P; -1:
// nowhere. A Device has write_keys(problem, key), which checks slots where it can, all of them before it writes.
template <class Device>
std::tuple<> write_keys(Arguments& arguments) {
  const Tensor key_tensor = arguments.next<Tensor>(), value_tensor = arguments.next<Tensor>(),
               key_pool_tensor = arguments.next<Tensor>(), value_pool_tensor = arguments.next<Tensor>(),
               slots_tensor = arguments.next<Tensor>();
  arguments.finish();
  const Operand key("key", key_tensor), value("value", value_tensor), key_pool("key_pool", key_pool_tensor),
      value_pool("value_pool", value_pool_tensor), slots("slot_mapping", slots_tensor);
  check_element_type(key);
  check_rank(key, 3, "[T, Hk, D]");
  check_rank(value, 3, "[T, Hk, Dv]");
  check_rank(key_pool, 4, "[blocks, Hk, P, D]");
  WriteProblem problem;
  problem.rows = key.sizes[0];
  problem.heads = key.sizes[1];
  problem.blocks = key_pool.sizes[0];
  problem.block_rows = key_pool.sizes[2];
  const int64_t rows = problem.rows, heads = problem.heads;
  check_shape(value, {rows, heads, value.sizes[2]}, "[T, Hk, Dv]");
  check_shape(key_pool, {problem.blocks, heads, problem.block_rows, key.sizes[2]}, "[blocks, Hk, P, D]");
  check_shape(value_pool, {problem.blocks, heads, problem.block_rows, value.sizes[2]}, "[blocks, Hk, P, Dv]");
  check_shape(slots, {rows}, "[T]");
  check_dtype(slots, dtype_codes().int64);
  for (const Operand* each : {&value, &key_pool, &value_pool}) check_companion(*each, key);
  for (const Operand* each : {&key, &value, &key_pool, &value_pool}) check_columns(*each);
  check_device(slots, key);
  OptionalTensor copy;
  problem.slots = contiguous_data<int64_t>(slots, slots_tensor, dtype_codes().int64, copy);
  problem.pools[0] = written_rows(key, key_pool, key_pool_tensor);
  problem.pools[1] = written_rows(value, value_pool, value_pool_tensor);
  Device::write_keys(problem, key);
  return {};
}

// By the host. Threads share heads, so that the later of two rows for one place stays.
inline void write_on_threads(const WriteProblem& problem) {
  const int64_t rows = problem.rows, heads = problem.heads;
  const WrittenRows* pools = problem.pools;
  // A thread for each 64 KiB, at most one a head.
  ThreadPool pool = torch_threads();
  pool.workers = std::min(pool.workers, rows * heads * (pools[0].row_bytes + pools[1].row_bytes) / (1 << 16) + 1);
  for_each_task(pool, 2 * heads, [&](int64_t /*worker*/, int64_t task) {
    const WrittenRows& each = pools[task % 2];
    const int64_t head = task / 2;
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t place = problem.slots[t];
      if (place < 0) continue;
      const int64_t block = place / problem.block_rows, row = place % problem.block_rows;
      std::memcpy(each.to + block * each.to_strides[0] + head * each.to_strides[1] + row * each.to_strides[2],
                  each.from + t * each.from_strides[0] + head * each.from_strides[1], size_t(each.row_bytes));
    }
  });
}

}  // namespace attnrb::ops
