#include "blocks.h"

#include "kernels/tables.h"
#include "kernels/write_keys.h"
#include "layout.h"

namespace attnrb::cuda {
namespace {

bool whole(const WriteProblem& problem, int64_t unit) {
  bool fits = true;
  const auto look = [&](int64_t number) { fits = fits && number % unit == 0; };
  for (const WrittenRows& each : problem.pools) {
    look(int64_t(reinterpret_cast<uintptr_t>(each.from)));
    look(int64_t(reinterpret_cast<uintptr_t>(each.to)));
    look(each.row_bytes);
    for (const int64_t stride : each.from_strides) look(stride);
    for (const int64_t stride : each.to_strides) look(stride);
  }
  return fits;
}

template <class U>
void write(const WriteProblem& problem, void* stream) {
  const int64_t blocks = check_blocks(divide_up(problem.rows * problem.heads, kWarps));
  launch<write_keys_kernel<U>>(blocks, kThreads, 0, stream, problem);
}

}  // namespace

void start_tables(const TableParameters& parameters, void* stream) {
  constexpr int64_t kWords = 2 * kWarps;
  launch<tables_kernel<kThreads>>(check_blocks(parameters.batch), kThreads, kWords * int64_t(sizeof(int32_t)), stream,
                                  parameters);
}

void start_write_keys(const WriteProblem& problem, void* stream) {
  if (whole(problem, 16))
    write<SixteenBytes>(problem, stream);
  else if (whole(problem, 4))
    write<uint32_t>(problem, stream);
  else
    write<uint16_t>(problem, stream);
}

}  // namespace attnrb::cuda
