// The operations on whole weight matrices, and received attention: bound by memory, respectively by recomputed scores.
#include <benchmark/benchmark.h>

#include <memory>
#include <string>
#include <vector>

#include "benches.h"
#include "oracle.h"
#include "pool.h"
#include "verify.h"

namespace attnrb::bench {

namespace {

constexpr int64_t kHeads = 8, kLength = 512;

// Weights, a mask and room for results; the first rows serve as the sample that is verified.
struct Weights {
  explicit Weights(DType dtype)
      : weights(dtype, {1, kHeads, kLength, kLength}),
        output(dtype, {1, kHeads, kLength, kLength}),
        mask(new bool[size_t(kHeads * kLength * kLength)]) {
    testing::Random random(3);
    weights.fill_uniform(random, 0.0, 0.02);
    for (int64_t i = 0; i < kHeads * kLength * kLength; ++i) mask[size_t(i)] = random.chance(0.05);
    shape.batch = 1;
    shape.heads = shape.key_heads = kHeads;
    shape.queries = shape.keys = kLength;
  }
  Shape shape;
  testing::Array weights, output;
  std::unique_ptr<bool[]> mask;
};

void count_bytes(benchmark::State& state, int64_t bytes_per_weight) {
  state.counters["GB/s"] = {double(kHeads * kLength * kLength * bytes_per_weight) * 1e-9,
                            benchmark::Counter::kIsIterationInvariantRate};
}

void bench_rebalance(benchmark::State& state, DType dtype, bool normalize) {
  Weights given(dtype);
  const std::vector<float> gain(size_t(kHeads), 0.2f);
  RebalanceProblem problem;
  problem.shape = given.shape;
  problem.dtype = dtype;
  problem.weights = given.weights.view();
  problem.mask = {given.mask.get(), {kHeads * kLength * kLength, kLength * kLength, kLength, 1}};
  problem.gain = gain.data();
  problem.normalize = normalize;
  problem.output = given.output.data();
  const ThreadPool pool = standing_pool(2);
  kernels().rebalance(problem, pool);
  RebalanceProblem sample = problem;
  sample.shape.heads = 1;
  const std::vector<testing::Bounded> truth = testing::rebalance_truth(sample);
  for (size_t i = 0; i < truth.size(); ++i)
    if (!close(kernels(), testing::load_element(problem.output, dtype, int64_t(i)), truth[i].value, truth[i].tolerance,
               truth[i].tile_tolerance))
      return refuse(state, "output differs from the oracle");
  for (auto _ : state) kernels().rebalance(problem, pool);
  count_bytes(state, 2 * element_size(dtype) + 1);
}

void bench_outlier_mask(benchmark::State& state, DType dtype) {
  Weights given(dtype);
  OutlierMaskProblem problem;
  problem.shape = given.shape;
  problem.dtype = dtype;
  problem.weights = given.weights.view();
  problem.threshold = 0.01;
  problem.mask = given.mask.get();
  const ThreadPool pool = standing_pool(2);
  kernels().outlier_mask(problem, pool);
  for (int64_t i = 0; i < kLength; ++i)
    for (int64_t j = 0; j < kLength; ++j)
      if (given.mask[size_t(i * kLength + j)] != (given.weights.at(0, 0, i, j) > 0.01 && i != j))
        return refuse(state, "mask differs from its definition");
  for (auto _ : state) kernels().outlier_mask(problem, pool);
  count_bytes(state, element_size(dtype) + 1);
}

void bench_received(benchmark::State& state, DType dtype) {
  const testing::AttentionCase attention = testing::simple_case({1, 9, 3, 1024, 1024, 64, 64}, dtype);
  std::vector<float> received;
  const ReceivedProblem problem = attention.received_problem(received);
  const ThreadPool pool = standing_pool(2);
  Scratch scratch;
  kernels().received_attention(problem, pool, scratch);
  ReceivedProblem sample = problem;
  sample.shape.heads = sample.shape.key_heads = 1;
  const std::vector<testing::Bounded> truth = testing::received_truth(sample);
  for (size_t j = 0; j < truth.size(); ++j)
    if (!close(kernels(), received[j], truth[j].value, truth[j].tolerance, truth[j].tile_tolerance))
      return refuse(state, "received attention differs from the oracle");
  for (auto _ : state) kernels().received_attention(problem, pool, scratch);
  // Scores twice: once for the log-sum-exps, once for the columns.
  const double pairs = 1024.0 * 1025.0 / 2.0;
  state.counters["GFLOP/s"] = {2.0 * 2.0 * pairs * 9.0 * 64.0 * 1e-9, benchmark::Counter::kIsIterationInvariantRate};
}

}  // namespace

void register_elementwise() {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    const std::string suffix = std::string("/") + testing::dtype_name(dtype) + "/threads:2";
    const auto add = [&](const char* name, auto function, auto... arguments) {
      benchmark::RegisterBenchmark((name + suffix).c_str(), function, dtype, arguments...)
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
    };
    add("rebalance", bench_rebalance, false);
    add("rebalance_normalize", bench_rebalance, true);
    add("outlier_mask", bench_outlier_mask);
    add("received_h9_d64_n1024", bench_received);
  }
}

}  // namespace attnrb::bench
