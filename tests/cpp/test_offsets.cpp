// Operands whose elements lie more than 2^31 apart. Their memory is reserved, not taken: only the pages that are
// touched exist.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "gradient_case.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

constexpr size_t kNoAxis = 4;

// Strides that put the first and the last element along `axis` more than 2^31 elements apart; rows stay aligned.
Sizes far_strides(const Sizes& sizes, size_t axis) {
  constexpr int64_t kFar = (int64_t(1) << 31) + (int64_t(1) << 20);
  Sizes strides = {};
  int64_t stride = 1;
  for (size_t i = 4; i-- > 0;) {
    strides[i] = stride;
    if (i != axis) stride *= i == 3 ? (sizes[i] + 7) / 8 * 8 : sizes[i];
  }
  if (axis != kNoAxis && sizes[axis] > 1) strides[axis] = (kFar / (sizes[axis] - 1) + 8) / 8 * 8;
  return strides;
}

// A view whose last element is the last before a page that may not be touched.
class FarMemory {
 public:
  FarMemory(const Sizes& sizes, size_t axis, int64_t element_bytes)
      : sizes_(sizes), strides_(far_strides(sizes, axis)), element_bytes_(element_bytes) {
    int64_t elements = 1;
    for (size_t i = 0; i < 4; ++i) elements += (sizes[i] - 1) * strides_[i];
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(elements * element_bytes);
    const size_t before = (bytes + page - 1) / page * page;
    whole_ = before + page;
    void* memory = mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    begin_ = static_cast<unsigned char*>(memory);
    data_ = begin_ + before - bytes;
    mprotect(begin_ + before, page, PROT_NONE);
  }
  ~FarMemory() {
    if (begin_ != nullptr) munmap(begin_, whole_);
  }
  FarMemory(const FarMemory&) = delete;
  FarMemory& operator=(const FarMemory&) = delete;

  void* data() const { return data_; }
  const Sizes& strides() const { return strides_; }
  View view() const { return {data_, {strides_[0], strides_[1], strides_[2], strides_[3]}}; }

  // visit(a, b, c, d, address) for every element.
  template <class Visit>
  void each(Visit&& visit) const {
    for (int64_t a = 0; a < sizes_[0]; ++a)
      for (int64_t b = 0; b < sizes_[1]; ++b)
        for (int64_t c = 0; c < sizes_[2]; ++c)
          for (int64_t d = 0; d < sizes_[3]; ++d)
            visit(a, b, c, d,
                  data_ + (a * strides_[0] + b * strides_[1] + c * strides_[2] + d * strides_[3]) * element_bytes_);
  }

 private:
  Sizes sizes_, strides_;
  int64_t element_bytes_;
  size_t whole_ = 0;
  unsigned char *begin_ = nullptr, *data_ = nullptr;
};

void copy_in(const FarMemory& memory, const Array& array) {
  memory.each([&](int64_t a, int64_t b, int64_t c, int64_t d, unsigned char* to) {
    const float value = float(array.at(a, b, c, d));
    if (array.dtype() == DType::float32)
      std::memcpy(to, &value, 4);
    else if (array.dtype() == DType::bfloat16)
      *reinterpret_cast<bfloat16*>(to) = from_float<bfloat16>(value);
    else
      *reinterpret_cast<float16*>(to) = from_float<float16>(value);
  });
}

class Offsets : public KernelTest {};

// Runs a case of these widths with every operand spread along `axis`.
::testing::AssertionResult right_in_far_memory(const Kernels& kernels, const Shape& shape, DType dtype, Role role,
                                               size_t axis) {
  AttentionCase attention = simple_case(shape, dtype);
  Random random(axis);
  attention.role = role;
  if (role == Role::rebalanced) add_outliers(attention, random, 5);
  const AttentionTruth truth = attention_truth(attention.problem());

  const int64_t bytes = element_size(dtype);
  const FarMemory query({shape.batch, shape.heads, shape.queries, shape.width}, axis, bytes);
  const FarMemory key({shape.batch, shape.key_heads, shape.keys, shape.width}, axis, bytes);
  const FarMemory value({shape.batch, shape.key_heads, shape.keys, shape.value_width}, axis, bytes);
  const FarMemory output({shape.batch, shape.heads, shape.queries, shape.value_width}, axis == 3 ? 2 : axis, bytes);
  const FarMemory mask({shape.batch, shape.heads, shape.queries, shape.keys}, axis, 1);
  if (!query.data() || !key.data() || !value.data() || !output.data() || !mask.data())
    return ::testing::AssertionFailure() << "the address space has no room for the operands";
  copy_in(query, attention.query);
  copy_in(key, attention.key);
  copy_in(value, attention.value);
  mask.each([](int64_t, int64_t, int64_t, int64_t, unsigned char* to) { *to = 1; });

  AttentionProblem problem = attention.problem();
  problem.query = query.view();
  problem.key = key.view();
  problem.value = value.view();
  problem.visibility.mask = static_cast<const bool*>(mask.data());
  std::memcpy(problem.visibility.mask_strides, mask.strides().data(), sizeof(problem.visibility.mask_strides));
  problem.output = output.data();
  std::memcpy(problem.output_strides, output.strides().data(), sizeof(problem.output_strides));
  ScratchLease scratch;
  if (kernels.attention(problem, test_pool(1), *scratch) != Status::ok)
    return ::testing::AssertionFailure() << "status";
  output.each([&](int64_t a, int64_t b, int64_t c, int64_t d, const unsigned char* from) {
    attention.output.set(a, b, c, d, load_element(from, dtype, 0));
  });
  int64_t ties = 0;
  return matches(kernels, attention, truth, &ties) << ", axis " << axis << ": " << attention.describe();
}

TEST_P(Offsets, AttentionReadsAndWritesBeyond32Bits) {
  for (const DType dtype : {DType::bfloat16, DType::float32})
    for (const Role role : {Role::source, Role::rebalanced})
      for (size_t axis = 0; axis < 4; ++axis)
        EXPECT_TRUE(right_in_far_memory(*GetParam(), {2, 4, 2, 70, 130, 16, 24}, dtype, role, axis));
}

// Lengths around a tile and widths around a vector; a read behind the last row ends the program.
TEST_P(Offsets, AttentionReadsNothingBehindItsOperands) {
  for (const DType dtype : {DType::bfloat16, DType::float16, DType::float32})
    for (const Role role : {Role::source, Role::rebalanced})
      for (const int64_t width : {8, 13, 16, 40})
        for (const auto& [queries, keys] : {std::pair<int64_t, int64_t>{1, 7}, {1, 65}, {5, 31}, {5, 63}, {66, 97}})
          EXPECT_TRUE(right_in_far_memory(*GetParam(), {1, 2, 1, queries, keys, width, width}, dtype, role, kNoAxis));
}

TEST_P(Offsets, ReceivedAttentionReadsBeyond32Bits) {
  for (size_t axis = 0; axis < 4; ++axis) {
    const AttentionCase attention = simple_case({2, 4, 2, 70, 130, 16, 16}, DType::bfloat16);
    const Shape& shape = attention.shape;
    const FarMemory query({shape.batch, shape.heads, shape.queries, shape.width}, axis, 2);
    const FarMemory key({shape.batch, shape.key_heads, shape.keys, shape.width}, axis, 2);
    if (!query.data() || !key.data()) GTEST_SKIP() << "the address space has no room for them";
    copy_in(query, attention.query);
    copy_in(key, attention.key);

    std::vector<float> received;
    ReceivedProblem problem = attention.received_problem(received);
    const std::vector<Bounded> truth = received_truth(problem);
    problem.query = query.view();
    problem.key = key.view();
    ScratchLease scratch;
    GetParam()->received_attention(problem, test_pool(1), *scratch);
    for (size_t i = 0; i < truth.size(); ++i)
      ASSERT_TRUE(close(*GetParam(), received[i], truth[i]))
          << "axis " << axis << ", element " << i << ": expected " << truth[i].value << ", got " << received[i];
  }
}

// Gradients with every operand spread along `axis`: element by element the bits that they have close together.
::testing::AssertionResult same_gradients_in_far_memory(const Kernels& kernels, DType dtype, int64_t key_heads,
                                                        bool received, size_t axis) {
  AttentionCase attention = simple_case({2, 4, key_heads, 70, 130, 16, 24}, dtype);
  const Shape& shape = attention.shape;
  Random random(axis);
  if (!received) add_outliers(attention, random, 5);
  const Sizes of_mask = {shape.batch, shape.heads, shape.queries, shape.keys};
  const int64_t pairs = of_mask[0] * of_mask[1] * of_mask[2] * of_mask[3];
  attention.mask = std::make_unique<bool[]>(size_t(pairs));
  for (int64_t i = 0; i < pairs; ++i) attention.mask[size_t(i)] = random.chance(0.8);
  for (int64_t i = 3, stride = 1; i >= 0; stride *= of_mask[size_t(i--)]) attention.visibility.mask_strides[i] = stride;
  GradientCase gradient(attention, random, received);
  GradientProblem problem = gradient.problem();
  ScratchLease scratch;
  if (kernels.gradient(problem, test_pool(1), *scratch) != Status::ok) return ::testing::AssertionFailure() << "status";

  struct Operand {
    const Array& near;
    View& view;
    FarMemory far;
  };
  struct Target {
    const Array& near;
    GradientProblem::Target& target;
    FarMemory far;
  };
  const int64_t bytes = element_size(dtype);
  const size_t written = axis == 3 ? 2 : axis;
  std::vector<std::unique_ptr<Operand>> operands;
  std::vector<std::unique_ptr<Target>> targets;
  const auto read = [&](const Array& near, View& view) {
    operands.push_back(std::unique_ptr<Operand>(new Operand{near, view, {near.sizes(), axis, bytes}}));
  };
  const auto write = [&](const Array& near, GradientProblem::Target& target) {
    targets.push_back(std::unique_ptr<Target>(new Target{near, target, {near.sizes(), written, bytes}}));
  };
  read(attention.query, problem.query);
  read(attention.key, problem.key);
  write(gradient.grad_query, problem.grad_query);
  write(gradient.grad_key, problem.grad_key);
  if (!received) {
    read(attention.value, problem.value);
    read(attention.output, problem.output);
    read(gradient.grad_output, problem.grad_output);
    write(gradient.grad_value, problem.grad_value);
  }
  const FarMemory mask(of_mask, axis, 1);
  bool room = mask.data() != nullptr;
  for (const auto& operand : operands) room = room && operand->far.data() != nullptr;
  for (const auto& target : targets) room = room && target->far.data() != nullptr;
  if (!room) return ::testing::AssertionFailure() << "the address space has no room for the operands";

  for (const auto& operand : operands) {
    copy_in(operand->far, operand->near);
    operand->view = operand->far.view();
  }
  for (const auto& target : targets) {
    target->target.data = target->far.data();
    std::copy_n(target->far.strides().begin(), 3, target->target.strides);
  }
  int64_t pair = 0;
  mask.each([&](int64_t, int64_t, int64_t, int64_t, unsigned char* to) { *to = attention.mask[size_t(pair++)]; });
  problem.visibility.mask = static_cast<const bool*>(mask.data());
  std::copy_n(mask.strides().begin(), 4, problem.visibility.mask_strides);
  if (kernels.gradient(problem, test_pool(1), *scratch) != Status::ok) return ::testing::AssertionFailure() << "status";
  int64_t different = 0;
  for (const auto& target : targets)
    target->far.each([&](int64_t a, int64_t b, int64_t c, int64_t d, const unsigned char* at) {
      different += load_element(at, dtype, 0) != target->near.at(a, b, c, d);
    });
  if (different == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << different << " elements differ, axis " << axis << ": " << attention.describe()
                                       << (received ? " received" : "");
}

TEST_P(Offsets, GradientsAreReadAndWrittenBeyond32Bits) {
  if (GetParam()->gradient == nullptr) GTEST_SKIP() << "these kernels have no backward of their own";
  for (const DType dtype : {DType::bfloat16, DType::float32})
    for (const bool received : {false, true})
      // Of the heads that share one key head, the last lies far from the first as well.
      for (const auto& [key_heads, axis] : {std::pair<int64_t, size_t>{2, 0}, {2, 1}, {1, 1}, {2, 2}, {2, 3}})
        EXPECT_TRUE(same_gradients_in_far_memory(*GetParam(), dtype, key_heads, received, axis));
}

TEST_P(Offsets, WeightsAreReadBeyond32Bits) {
  const Sizes sizes = {2, 3, 5, 40};
  for (size_t axis = 0; axis < 4; ++axis) {
    const FarMemory weights(sizes, axis, 4);
    if (!weights.data()) GTEST_SKIP() << "the address space has no room for them";
    const auto weight = [](int64_t a, int64_t b, int64_t c, int64_t d) {
      return float((a * 7 + b * 5 + c * 3 + d) % 11) / 10.0f;
    };
    weights.each([&](int64_t a, int64_t b, int64_t c, int64_t d, unsigned char* to) {
      const float value = weight(a, b, c, d);
      std::memcpy(to, &value, 4);
    });
    const size_t count = size_t(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
    const auto mask = std::make_unique<bool[]>(count);
    OutlierMaskProblem find;
    find.shape = {sizes[0], sizes[1], sizes[1], sizes[2], sizes[3], 0, 0};
    find.weights = weights.view();
    find.threshold = 0.45;
    find.query_offset = -sizes[2];  // no key is a query's own
    find.mask = mask.get();
    GetParam()->outlier_mask(find, test_pool(1));

    const std::vector<float> gain = {1.0f, 1.0f, 1.0f};
    std::vector<float> output(count);
    RebalanceProblem strengthen;
    strengthen.shape = find.shape;
    strengthen.weights = weights.view();
    strengthen.mask = {mask.get(), {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}};
    strengthen.gain = gain.data();
    strengthen.output = output.data();
    GetParam()->rebalance(strengthen, test_pool(1));
    size_t at = 0;
    weights.each([&](int64_t a, int64_t b, int64_t c, int64_t d, const unsigned char*) {
      const float value = weight(a, b, c, d);
      EXPECT_EQ(mask[at], value > 0.45f);
      EXPECT_EQ(output[at], value > 0.45f ? 2.0f * value : value);
      ++at;
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Offsets, ::testing::ValuesIn(tested_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
