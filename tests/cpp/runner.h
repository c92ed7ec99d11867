// Runs kernels on generated cases and compares what they write with the oracle.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cases.h"
#include "core/kernels.h"
#include "gradient_case.h"
#include "gradient_oracle.h"
#include "oracle.h"

namespace attnrb::testing {

// Every kernel table to test: those that this processor runs, and the tile kernels on emulated tiles where it can.
std::vector<const Kernels*> tested_kernels();
// Those of them that have a backward: tables that differ in their forward alone share one.
std::vector<const Kernels*> gradient_kernels();
// The numbers of threads, beside one, on which results must have the same bits. The emulated device knows no such
// thing; there each run takes the work in another order.
inline std::vector<int64_t> other_threads() {
#if defined(ATTNRB_TEST_EMULATED_CUDA)
  return {2};
#else
  return {2, 4};
#endif
}

// Everything an attention kernel writes, to be compared bit by bit.
struct Written {
  Status status = Status::ok;
  std::vector<unsigned char> output;
  std::vector<float> lse;
  std::vector<int32_t> found, found_counts;

  bool operator==(const Written& other) const;
};

Written run_attention(const Kernels& kernels, AttentionCase& attention, int64_t threads);

// Output, LSE and outliers that `kernels` wrote last, against the truth. Adds to `ties` the entries too near the
// threshold to tell.
::testing::AssertionResult matches(const Kernels& kernels, const AttentionCase& attention, const AttentionTruth& truth,
                                   int64_t* ties);

// Whether these are CUDA kernels, on a device that is real or emulated.
bool on_device(const Kernels& kernels);

// Whether blocks share the keys of rows, however many rows there are.
bool splits_keys(const Kernels& kernels);

// How far from the truth these kernels may be.
double tolerance(const Kernels& kernels, const Bounded& expected);

// Within tolerance, or the same infinity.
bool close(const Kernels& kernels, double got, const Bounded& expected);

// Each of `got` against the truth.
::testing::AssertionResult numbers_match(const Kernels& kernels, const char* name, const std::vector<float>& got,
                                         const std::vector<Bounded>& expected);

// The attention that keys receive, as `kernels` compute it on two threads, against the truth.
::testing::AssertionResult received_matches(const Kernels& kernels, const AttentionCase& attention);

// All that `kernels` wrote last of a backward, against the truth.
void check_gradient(const Kernels& kernels, const GradientCase& gradient, const GradientTruth& truth);

// A parameterised suite over tested_kernels().
class KernelTest : public ::testing::TestWithParam<const Kernels*> {};
std::string kernel_name(const ::testing::TestParamInfo<const Kernels*>& info);

}  // namespace attnrb::testing
