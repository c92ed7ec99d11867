// outlier_mask, rebalance and its gradient, on weight matrices in memory.
#include <cmath>
#include <memory>

#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

struct WeightsCase {
  Shape shape;
  Array weights;
  std::unique_ptr<bool[]> mask;
  View mask_view;
  std::vector<float> gain;
};

WeightsCase generate_weights(uint64_t seed) {
  Random random(seed);
  WeightsCase weights;
  Shape& shape = weights.shape;
  shape.batch = random.integer(1, 2);
  shape.heads = shape.key_heads = random.integer(1, 5);
  shape.queries = random.integer(1, 70);
  shape.keys = random.integer(1, 70);
  Layout layout;
  if (random.chance(0.3)) layout.column_step = 2;
  if (random.chance(0.3)) layout.row_padding = 3;
  if (random.chance(0.3)) std::swap(layout.order[2], layout.order[3]);
  weights.weights = Array(random.pick({DType::float32, DType::bfloat16, DType::float16}),
                          {shape.batch, shape.heads, shape.queries, shape.keys}, layout);
  weights.weights.fill_uniform(random, 0.0, 0.1);
  const int64_t count = shape.batch * shape.heads * shape.queries * shape.keys;
  weights.mask = std::make_unique<bool[]>(size_t(count));
  for (int64_t i = 0; i < count; ++i) weights.mask[size_t(i)] = random.chance(0.3);
  weights.mask_view = {weights.mask.get(),
                       {shape.heads * shape.queries * shape.keys, shape.queries * shape.keys, shape.keys, 1}};
  if (random.chance(0.3)) weights.mask_view.strides[1] = 0;  // one mask for all heads
  for (int64_t h = 0; h < shape.heads; ++h) weights.gain.push_back(float(random.uniform(-0.5, 1.0)));
  return weights;
}

// Every other element of every row.
const Layout kSteps = {{0, 1, 2, 3}, 2, 0, 0};

class Elementwise : public KernelTest {};

TEST_P(Elementwise, OutlierMaskMatchesItsDefinition) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const WeightsCase given = generate_weights(seed);
    const Shape& shape = given.shape;
    const int64_t offset = int64_t(seed % 7) - 3 + shape.keys - shape.queries;
    const size_t count = size_t(shape.batch * shape.heads * shape.queries * shape.keys);
    const std::unique_ptr<bool[]> mask = std::make_unique<bool[]>(count + 1);
    mask[count] = true;  // behind the last row, whose own key may be the one after the last
    OutlierMaskProblem problem;
    problem.shape = shape;
    problem.dtype = given.weights.dtype();
    problem.weights = given.weights.view();
    problem.threshold = 0.05;
    problem.query_offset = offset;
    problem.mask = mask.get();
    GetParam()->outlier_mask(problem, test_pool(2));
    ASSERT_TRUE(mask[count]);
    size_t at = 0;
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t i = 0; i < shape.queries; ++i)
          for (int64_t j = 0; j < shape.keys; ++j, ++at)
            ASSERT_EQ(mask[at], given.weights.at(b, h, i, j) > 0.05 && j != offset + i)
                << "seed " << seed << " at [" << b << ", " << h << ", " << i << ", " << j << "]";
  }
}

TEST_P(Elementwise, OutlierMaskIsStrict) {
  Array weights(DType::float32, {1, 1, 1, 3});
  weights.set(0, 0, 0, 0, 0.25);
  weights.set(0, 0, 0, 1, std::nextafter(0.25f, 1.0f));
  weights.set(0, 0, 0, 2, 0.9);
  bool mask[3];
  OutlierMaskProblem problem;
  problem.shape.batch = problem.shape.heads = problem.shape.queries = 1;
  problem.shape.keys = 3;
  problem.weights = weights.view();
  problem.threshold = 0.25;
  problem.query_offset = 2;
  problem.mask = mask;
  GetParam()->outlier_mask(problem, ThreadPool());
  EXPECT_FALSE(mask[0]) << "the threshold itself is no outlier";
  EXPECT_TRUE(mask[1]);
  EXPECT_FALSE(mask[2]) << "the query's own key is none";
}

TEST_P(Elementwise, RebalanceMatchesTheOracle) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const WeightsCase given = generate_weights(seed);
    const Shape& shape = given.shape;
    Array output(given.weights.dtype(), {shape.batch, shape.heads, shape.queries, shape.keys});
    RebalanceProblem problem;
    problem.shape = shape;
    problem.dtype = given.weights.dtype();
    problem.weights = given.weights.view();
    problem.mask = given.mask_view;
    problem.gain = given.gain.data();
    problem.normalize = seed % 2 == 1;
    problem.output = output.data();
    GetParam()->rebalance(problem, test_pool(3));
    const std::vector<Bounded> truth = rebalance_truth(problem);
    for (size_t i = 0; i < truth.size(); ++i)
      ASSERT_TRUE(close(*GetParam(), load_element(output.data(), output.dtype(), int64_t(i)), truth[i]))
          << "seed " << seed << ", element " << i << ": expected " << truth[i].value << " within "
          << tolerance(*GetParam(), truth[i]);
    EXPECT_TRUE(output.surroundings_untouched());
  }
}

TEST_P(Elementwise, NormalizingARowOfZerosKeepsIt) {
  Array weights(DType::float32, {1, 1, 1, 4}), output(DType::float32, {1, 1, 1, 4});
  for (int64_t j = 0; j < 4; ++j) weights.set(0, 0, 0, j, 0.0);
  const bool mask[4] = {true, false, true, false};
  const float gain = 0.2f;
  RebalanceProblem problem;
  problem.shape.batch = problem.shape.heads = problem.shape.queries = 1;
  problem.shape.keys = 4;
  problem.weights = weights.view();
  problem.mask = {mask, {4, 4, 4, 1}};
  problem.gain = &gain;
  problem.normalize = true;
  problem.output = output.data();
  GetParam()->rebalance(problem, ThreadPool());
  for (int64_t j = 0; j < 4; ++j) EXPECT_EQ(output.at(0, 0, 0, j), 0.0);
}

TEST_P(Elementwise, GradientMatchesTheOracleWithTheSameBitsOnAnyThreads) {
  if (GetParam()->rebalance_gradient == nullptr) GTEST_SKIP() << "these kernels have no gradients";
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const WeightsCase given = generate_weights(seed);
    const Shape& shape = given.shape;
    const DType dtype = given.weights.dtype();
    Random random(seed + 1000);
    Array upstream(dtype, {shape.batch, shape.heads, shape.queries, shape.keys},
                   random.chance(0.5) ? Layout{} : kSteps);
    upstream.fill_uniform(random, -1.0, 1.0);
    Array weights_once, weights_again;
    std::vector<float> gains_once, gains_again;
    RebalanceGradientProblem problem;
    const auto run = [&](int64_t threads, Array& grad_weights, std::vector<float>& grad_gain) {
      grad_weights = Array(dtype, {shape.batch, shape.heads, shape.queries, shape.keys});
      grad_gain.assign(size_t(shape.heads), 0.0f);
      std::vector<double> rows(size_t(shape.batch * shape.heads * shape.queries));
      problem.shape = shape;
      problem.dtype = dtype;
      problem.weights = given.weights.view();
      problem.grad_output = upstream.view();
      problem.mask = given.mask_view;
      problem.gain = given.gain.data();
      problem.normalize = seed % 2 == 1;
      problem.grad_weights = grad_weights.data();
      problem.gain_rows = rows.data();
      problem.grad_gain = grad_gain.data();
      GetParam()->rebalance_gradient(problem, test_pool(threads));
    };
    run(1, weights_once, gains_once);
    run(3, weights_again, gains_again);
    EXPECT_EQ(weights_once.bytes(), weights_again.bytes());
    EXPECT_EQ(gains_once, gains_again);
    EXPECT_TRUE(weights_once.surroundings_untouched());
    const RebalanceGradientTruth truth = rebalance_gradient_truth(problem);
    for (size_t i = 0; i < truth.weights.size(); ++i)
      ASSERT_TRUE(close(*GetParam(), load_element(weights_once.data(), dtype, int64_t(i)), truth.weights[i]))
          << "seed " << seed << ", element " << i << ": expected " << truth.weights[i].value << " within "
          << tolerance(*GetParam(), truth.weights[i]);
    for (size_t h = 0; h < truth.gain.size(); ++h)
      ASSERT_TRUE(close(*GetParam(), gains_once[h], truth.gain[h])) << "seed " << seed << ", gain of head " << h;
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Elementwise, ::testing::ValuesIn(tested_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
