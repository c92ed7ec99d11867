#include "runner.h"

#include <cmath>
#include <cstring>

#include "core/outliers.h"
#include "threads.h"
#if defined(ATTNRB_TEST_EMULATED_CUDA)
#include "table.h"
#endif

namespace attnrb {

#if defined(ATTNRB_TEST_EMULATED_AMX)
extern const Kernels emulated_amx_kernels;
#endif

namespace testing {

#if defined(ATTNRB_TEST_EMULATED_CUDA)
std::vector<const Kernels*> tested_kernels() { return {&emulated_cuda_kernels, &emulated_cuda_split_kernels}; }

bool splits_keys(const Kernels& kernels) { return &kernels == &emulated_cuda_split_kernels; }

std::string kernel_name(const ::testing::TestParamInfo<const Kernels*>& info) {
  return info.param == &emulated_cuda_kernels ? "emulated_cuda" : "emulated_cuda_split_keys";
}
#else
bool splits_keys(const Kernels& /*kernels*/) { return false; }

std::vector<const Kernels*> tested_kernels() {
  std::vector<const Kernels*> tables;
  for (const char* const* name = available_kernels(); *name != nullptr; ++name) {
#if defined(__SANITIZE_ADDRESS__)
    // Its memory is not watched (cmake/Core.cmake), that of emulated tiles is: both at once would be a false alarm.
    if (std::strcmp(*name, "amx") == 0) continue;
#endif
    tables.push_back(find_kernels(*name));
  }
#if defined(ATTNRB_TEST_EMULATED_AMX)
  if (find_kernels("avx512") != nullptr && __builtin_cpu_supports("avx512bf16"))
    tables.push_back(&emulated_amx_kernels);
#endif
  return tables;
}

std::string kernel_name(const ::testing::TestParamInfo<const Kernels*>& info) {
#if defined(ATTNRB_TEST_EMULATED_AMX)
  if (info.param == &emulated_amx_kernels) return "emulated_amx";
#endif
  return info.param->name;
}
#endif

std::vector<const Kernels*> gradient_kernels() {
  std::vector<const Kernels*> tables;
  for (const Kernels* table : tested_kernels())
    if (table->gradient != nullptr) tables.push_back(table);
  return tables;
}

bool Written::operator==(const Written& other) const {
  return status == other.status && output == other.output && lse.size() == other.lse.size() &&
         std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0 && found == other.found &&
         found_counts == other.found_counts;
}

Written run_attention(const Kernels& kernels, AttentionCase& attention, int64_t threads) {
  const AttentionProblem problem = attention.problem();
  ScratchLease scratch;
  Written written;
  written.status = kernels.attention(problem, test_pool(threads), *scratch);
  written.output = attention.output.bytes();
  written.lse = attention.lse;
  written.found = attention.found;
  written.found_counts = attention.found_counts;
  return written;
}

bool on_device(const Kernels& kernels) { return std::strcmp(kernels.name, "cuda") == 0; }

double tolerance(const Kernels& kernels, const Bounded& expected) {
  if (on_device(kernels)) return expected.cuda_tolerance;
  const std::string name = kernels.name;
  const bool rounds = name == "amx" || name == "avx512_bf16" || name == "neon_bf16";
  return rounds ? expected.tile_tolerance : expected.tolerance;
}

bool close(const Kernels& kernels, double got, const Bounded& expected) {
  if (std::isinf(expected.value)) return got == expected.value;
  return std::fabs(got - expected.value) <= tolerance(kernels, expected);
}

namespace {

// Certain outliers must be there, certain others must not; what is within the error of the threshold may be either.
::testing::AssertionResult outlier_row_matches(const Kernels& kernels, const AttentionCase& attention,
                                               const AttentionTruth& truth, int64_t row, int64_t* ties) {
  const int64_t keys = attention.shape.keys, capacity = outlier_capacity(attention.threshold, keys);
  const Visibility& visibility = attention.visibility;
  const int32_t* slots = attention.found.data() + row * capacity;
  const int32_t count = attention.found_counts[size_t(row)];
  if (count < 0 || count > capacity)
    return ::testing::AssertionFailure() << "row " << row << ": count " << count << " of " << capacity;
  for (int64_t c = count; c < capacity; ++c)
    if (slots[c] != -1) return ::testing::AssertionFailure() << "row " << row << ": padding is " << slots[c];
  int64_t next = 0;
  const int64_t batch = row / attention.shape.queries / attention.shape.heads;
  const int64_t own =
      (attention.query_offsets.empty() ? visibility.query_offset : attention.query_offsets[size_t(batch)]) +
      row % attention.shape.queries;
  for (int64_t j = 0; j < keys; ++j) {
    const Bounded& weight = truth.weights[size_t(row * keys + j)];
    const int64_t slot = visibility.key_offset + j;
    const bool emitted = next < count && slots[next] == slot;
    if (emitted) ++next;
    const double margin = tolerance(kernels, weight) * attention.threshold;
    const bool eligible = truth.visible[size_t(row * keys + j)] && slot != own;
    const bool tie = eligible && std::fabs(weight.value - attention.threshold) <= margin;
    if (tie) ++*ties;
    if (!tie && emitted != (eligible && weight.value > attention.threshold))
      return ::testing::AssertionFailure() << "row " << row << ", slot " << slot << ": weight " << weight.value
                                           << " is " << (emitted ? "" : "not ") << "among the outliers";
  }
  if (next != count)
    return ::testing::AssertionFailure() << "row " << row << ": " << count - next
                                         << " outliers are no cached slots, or do not ascend, from " << slots[next];
  return ::testing::AssertionSuccess();
}

}  // namespace

::testing::AssertionResult matches(const Kernels& kernels, const AttentionCase& attention, const AttentionTruth& truth,
                                   int64_t* ties) {
  const Shape& shape = attention.shape;
  if (!attention.output.surroundings_untouched())
    return ::testing::AssertionFailure() << "memory around the output was written";
  if (attention.emits() && attention.found.back() != kUnwritten)
    return ::testing::AssertionFailure() << "memory behind the outliers was written";
  for (int64_t row = 0; row < attention.rows(); ++row) {
    const int64_t b = row / shape.queries / shape.heads, h = row / shape.queries % shape.heads, i = row % shape.queries;
    const Bounded& lse = truth.lse[size_t(row)];
    if (!close(kernels, attention.lse[size_t(row)], lse))
      return ::testing::AssertionFailure()
             << "lse [" << b << ", " << h << ", " << i << "]: expected " << lse.value << " within "
             << tolerance(kernels, lse) << ", got " << attention.lse[size_t(row)];
    for (int64_t d = 0; d < shape.value_width; ++d) {
      const Bounded& expected = truth.output[size_t(row * shape.value_width + d)];
      const double got = attention.output.at(b, h, i, d);
      if (!close(kernels, got, expected))
        return ::testing::AssertionFailure()
               << "output [" << b << ", " << h << ", " << i << ", " << d << "]: expected " << expected.value
               << " within " << tolerance(kernels, expected) << ", got " << got;
    }
    if (!attention.emits()) continue;
    const ::testing::AssertionResult row_result = outlier_row_matches(kernels, attention, truth, row, ties);
    if (!row_result) return row_result;
  }
  return ::testing::AssertionSuccess();
}

namespace {

::testing::AssertionResult array_matches(const Kernels& kernels, const char* name, const Array& got,
                                         const std::vector<Bounded>& expected) {
  if (!got.surroundings_untouched()) return ::testing::AssertionFailure() << "memory around " << name << " was written";
  const Sizes& n = got.sizes();
  size_t at = 0;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d, ++at)
          if (!close(kernels, got.at(a, b, c, d), expected[at]))
            return ::testing::AssertionFailure()
                   << name << " [" << a << ", " << b << ", " << c << ", " << d << "]: expected " << expected[at].value
                   << " within " << tolerance(kernels, expected[at]) << ", got " << got.at(a, b, c, d);
  return ::testing::AssertionSuccess();
}

}  // namespace

::testing::AssertionResult numbers_match(const Kernels& kernels, const char* name, const std::vector<float>& got,
                                         const std::vector<Bounded>& expected) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!close(kernels, got[i], expected[i]))
      return ::testing::AssertionFailure() << name << " [" << i << "]: expected " << expected[i].value << " within "
                                           << tolerance(kernels, expected[i]) << ", got " << got[i];
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult received_matches(const Kernels& kernels, const AttentionCase& attention) {
  std::vector<float> received;
  const ReceivedProblem problem = attention.received_problem(received);
  const std::vector<Bounded> truth = received_truth(problem);
  ScratchLease scratch;
  kernels.received_attention(problem, test_pool(2), *scratch);
  return numbers_match(kernels, "received", received, truth);
}

void check_gradient(const Kernels& kernels, const GradientCase& gradient, const GradientTruth& truth) {
  ASSERT_TRUE(array_matches(kernels, "grad_query", gradient.grad_query, truth.query));
  ASSERT_TRUE(array_matches(kernels, "grad_key", gradient.grad_key, truth.key));
  ASSERT_TRUE(numbers_match(kernels, "grad_sinks", gradient.grad_sinks, truth.sinks));
  ASSERT_TRUE(numbers_match(kernels, "grad_bias", gradient.grad_bias, truth.bias));
  if (gradient.received) return;
  ASSERT_TRUE(array_matches(kernels, "grad_value", gradient.grad_value, truth.value));
  if (!gradient.attention.edits()) return;
  ASSERT_TRUE(numbers_match(kernels, "grad_gain", gradient.grad_gain, truth.gain));
}

}  // namespace testing
}  // namespace attnrb
