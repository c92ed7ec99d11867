// The op that writes new keys and values into blocks.
#pragma once

#include <cstring>
#include <tuple>

#include "ops/paging.h"

namespace attnrb::ops {

struct WrittenRows {
  const char* from;
  char* to;
  int64_t from_strides[2], to_strides[3];  // bytes: row, head; block, head, row
  int64_t row_bytes;
};

inline WrittenRows written_rows(const Operand& rows, const Operand& pool, const Tensor& pool_tensor) {
  const int64_t size = pool_tensor.element_size();
  return {static_cast<const char*>(rows.data()),
          static_cast<char*>(pool_tensor.mutable_data_ptr()),
          {rows.strides[0] * size, rows.strides[1] * size},
          {pool.strides[0] * size, pool.strides[1] * size, pool.strides[2] * size},
          rows.sizes[2] * size};
}

// Row t of key [T, Hk, D] and value [T, Hk, Dv] goes to row slot_mapping[t] mod P of block slot_mapping[t] / P; -1:
// nowhere. All slots are checked before anything is written. Threads share heads, so that the later of two rows for one
// place stays.
inline std::tuple<> write_keys(Arguments& arguments) {
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
  const int64_t rows = key.sizes[0], heads = key.sizes[1], blocks = key_pool.sizes[0], block_rows = key_pool.sizes[2];
  check_shape(value, {rows, heads, value.sizes[2]}, "[T, Hk, Dv]");
  check_shape(key_pool, {blocks, heads, block_rows, key.sizes[2]}, "[blocks, Hk, P, D]");
  check_shape(value_pool, {blocks, heads, block_rows, value.sizes[2]}, "[blocks, Hk, P, Dv]");
  check_shape(slots, {rows}, "[T]");
  check_dtype(slots, dtype_codes().int64);
  for (const Operand* each : {&value, &key_pool, &value_pool}) check_companion(*each, key);
  for (const Operand* each : {&key, &value, &key_pool, &value_pool}) check_columns(*each);
  check_device(slots, key);
  const int64_t* slot = static_cast<const int64_t*>(slots.data());
  const int64_t step = slots.strides[0], held = block_rows == 0 ? 0 : blocks * block_rows;
  for (int64_t t = 0; t < rows; ++t)
    if (slot[t * step] < -1 || slot[t * step] >= held)
      refuse("slot_mapping", "expected -1 or numbers below ", held, ", got ", slot[t * step], " for row ", t);
  if (rows * heads == 0) return {};

  const WrittenRows pools[2] = {written_rows(key, key_pool, key_pool_tensor),
                                written_rows(value, value_pool, value_pool_tensor)};
  // A thread for each 64 KiB, at most one a head.
  ThreadPool pool = torch_threads();
  pool.workers = std::min(pool.workers, rows * heads * (pools[0].row_bytes + pools[1].row_bytes) / (1 << 16) + 1);
  for_each_task(pool, 2 * heads, [&](int64_t /*worker*/, int64_t task) {
    const WrittenRows& each = pools[task % 2];
    const int64_t head = task / 2;
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t place = slot[t * step];
      if (place < 0) continue;
      const int64_t block = place / block_rows, row = place % block_rows;
      std::memcpy(each.to + block * each.to_strides[0] + head * each.to_strides[1] + row * each.to_strides[2],
                  each.from + t * each.from_strides[0] + head * each.from_strides[1], size_t(each.row_bytes));
    }
  });
  return {};
}

}  // namespace attnrb::ops
