#include "tables.h"

#include "ops/write_keys.h"

namespace attnrb::ops {
namespace {

// int32 or int64, side by side.
const void* side_by_side(const Operand& operand, const Tensor& tensor, OptionalTensor& copy) {
  return contiguous_data<char>(operand, tensor, operand.dtype, copy);
}

template <class T>
std::vector<T> on_host(const void* data, int64_t count, void* stream) {
  std::vector<T> numbers(static_cast<size_t>(count));
  if (count > 0) read_back(numbers.data(), data, count * int64_t(sizeof(T)), stream);
  return numbers;
}

std::vector<int64_t> numbers_on_host(const Operand& operand, const void* data, void* stream) {
  const int64_t size = operand.dtype == dtype_codes().int64 ? 8 : 4;
  const std::vector<char> bytes = on_host<char>(data, operand.sizes[0] * size, stream);
  return numbers_at(bytes.data(), operand, 1);
}

}  // namespace

DevicePaging::DevicePaging(const PagingOptions& given, const Operand& query, const Operand& key, const Operand& value)
    : tables(given, query, key, value), shape(tables.shape) {
  const int64_t batch = shape.batch;
  if (batch == 0 && shape.queries > 0)
    refuse("query_starts", "expected 0 first and T = ", shape.queries, " last, got no sequence");
  cuda::TableParameters& p = parameters_;
  p.table = contiguous_data<int32_t>(tables.table, *given.block_table, dtype_codes().int32, table_copy_);
  p.table_stride = tables.table.sizes[1];
  p.blocks = tables.blocks;
  p.block_rows = tables.block_rows;
  p.room = tables.room();
  p.starts = side_by_side(tables.starts, *given.query_starts, starts_copy_);
  p.lengths = side_by_side(tables.lengths, *given.seq_lens, lengths_copy_);
  p.wide_starts = tables.starts.dtype == dtype_codes().int64;
  p.wide_lengths = tables.lengths.dtype == dtype_codes().int64;
  p.batch = batch;
  p.queries = shape.queries;
  if (checks_wanted()) look(query);

  numbers_ = empty<1>({3 * batch + 1}, dtype_codes().int64, query);
  p.query_starts = static_cast<int64_t*>(numbers_->mutable_data_ptr());
  p.key_counts = p.query_starts + batch + 1;
  p.query_offsets = p.key_counts + batch;
  shape.keys = std::max<int64_t>(p.room, 1);
  shape.query_starts = p.query_starts;
  shape.key_counts = p.key_counts;
}

void DevicePaging::start(void* stream) const { cuda::start_tables(parameters_, stream); }

void DevicePaging::look(const Operand& query) const {
  const DeviceScope scope(query);
  void* stream = scope.stream();
  const std::vector<int32_t> blocks =
      on_host<int32_t>(parameters_.table, shape.batch * parameters_.table_stride, stream);
  check_tables(tables, numbers_on_host(tables.starts, parameters_.starts, stream),
               numbers_on_host(tables.lengths, parameters_.lengths, stream), blocks.data());
}

void write_keys_on_device(const WriteProblem& problem, const Operand& key) {
  if (problem.rows * problem.heads == 0) return;
  const DeviceScope scope(key);
  if (checks_wanted())
    check_slot_mapping(on_host<int64_t>(problem.slots, problem.rows, scope.stream()).data(), problem);
  cuda::start_write_keys(problem, scope.stream());
}

}  // namespace attnrb::ops
