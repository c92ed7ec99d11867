// Keys in blocks on the device: the tables of a call, and the writer.
#pragma once

#include "blocks.h"
#include "device.h"
#include "ops/paging.h"

namespace attnrb::ops {

// Nothing waits for the device, so what stands in the tables is looked at there, and rows of tables that break the
// rules become NaN (cuda/kernels/tables.h). Where ATTNRB_CUDA_CHECKS asks for it, the host looks too, and refuses them
// as on the CPU.
class DevicePaging {
 public:
  DevicePaging(const PagingOptions& given, const Operand& query, const Operand& key, const Operand& value);
  DevicePaging(const DevicePaging&) = delete;
  DevicePaging& operator=(const DevicePaging&) = delete;

  // Fills in the numbers that `shape` and the offsets lead to, on a stream.
  void start(void* stream) const;

  const PagingTables tables;
  Shape shape;  // the keys: as many as the table has room for

  int64_t room() const { return tables.room(); }
  const int64_t* query_offsets() const { return parameters_.query_offsets; }
  KeyRows rows(const Operand& pool) const { return tables.rows(pool, parameters_.table); }

 private:
  void look(const Operand& query) const;

  cuda::TableParameters parameters_;
  OptionalTensor table_copy_, starts_copy_, lengths_copy_, numbers_;
};

void write_keys_on_device(const WriteProblem& problem, const Operand& key);

}  // namespace attnrb::ops
