// How problems are laid out for a device.
#include <gtest/gtest.h>

#include "cases.h"
#include "sparse.h"

namespace attnrb::cuda {
namespace {

Device device(int64_t kilobytes) {
  Device device;
  device.shared_bytes = kilobytes * 1024;
  return device;
}

// A multiprocessor has 1 KB more than a block may ask for, and keeps as much of it for each block.
int64_t blocks(int64_t shared_bytes, const Device& device) {
  return (device.shared_bytes + 1024) / (shared_bytes + 1024);
}

TEST(Plan, TwoBlocksFitAMultiprocessorAtACommonWidth) {
  testing::AttentionCase attention = testing::simple_case({1, 4, 1, 200, 200, 128, 128}, DType::bfloat16);
  attention.role = testing::Role::source;
  const AttentionProblem problem = attention.problem();
  for (const int64_t kilobytes : {99, 163, 227}) {
    const AttentionPlan plan = plan_attention(problem, device(kilobytes));
    EXPECT_GE(blocks(plan.shared_bytes, device(kilobytes)), 2) << kilobytes;
    // The third buffer comes where it costs no block.
    EXPECT_EQ(plan.parameters.ahead, kilobytes > 99) << kilobytes;
    const SparsePlan sparse = plan_sparse(problem, {}, device(kilobytes));
    EXPECT_GE(blocks(sparse.shared_bytes, device(kilobytes)), 2) << kilobytes;
  }
}

TEST(Plan, AThirdBufferNeverCostsABlock) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const int64_t width : {8, 40, 64, 72, 128, 136, 192, 256})
      for (const int64_t kilobytes : {99, 163, 227}) {
        testing::AttentionCase attention = testing::simple_case({1, 2, 2, 20, 20, width, width}, dtype);
        const AttentionPlan plan = plan_attention(attention.problem(), device(kilobytes));
        EXPECT_LE(plan.shared_bytes, kilobytes * 1024);
        EXPECT_GE(blocks(plan.shared_bytes, device(kilobytes)), plan.parameters.ahead ? 2 : 1);
      }
}

}  // namespace
}  // namespace attnrb::cuda
