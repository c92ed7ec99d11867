// Attention as models call it: prefill and decoding, plain, as source layer, and re-balanced.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>

#include "benches.h"
#include "pool.h"
#include "verify.h"

namespace attnrb::bench {

namespace {

using testing::AttentionCase;
using testing::Role;

struct Setting {
  const char* name;
  Shape shape;
};

// Llama 3 8B's heads, and SmolLM2-135M's.
constexpr Setting kSettings[] = {
    {"prefill_h32_d128_n2048", {1, 32, 8, 2048, 2048, 128, 128}},
    {"prefill_h9_d64_n2048", {1, 9, 3, 2048, 2048, 64, 64}},
    {"decode_h32_d128_n16384", {1, 32, 8, 1, 16384, 128, 128}},
    {"decode_h9_d64_n2048", {1, 9, 3, 1, 2048, 64, 64}},
};

AttentionCase make_case(const Setting& setting, DType dtype, Role role) {
  AttentionCase attention = testing::simple_case(setting.shape, dtype);
  // Rows of a handful of outliers each, as on real text.
  attention.scoring.scale = 2.0f / float(setting.shape.width);
  attention.role = role;
  if (role == Role::rebalanced) {
    testing::Random random(5);
    for (int64_t row = 0; row < attention.rows(); ++row) {
      const int64_t seen = attention.visibility.query_offset + row % setting.shape.queries + 1;
      const int64_t count = std::min<int64_t>(8, seen);
      for (int64_t c = 0; c < count; ++c) attention.indices.push_back(int32_t(seen * c / count));
      attention.indices.resize(size_t(row + 1) * 99, -1);
      attention.counts.push_back(int32_t(count));
    }
    attention.capacity = 99;
    attention.gain.assign(size_t(setting.shape.heads), 0.2f);
  }
  return attention;
}

void count_work(benchmark::State& state, const AttentionCase& attention) {
  const Shape& shape = attention.shape;
  double pairs = 0.0;
  for (int64_t i = 0; i < shape.queries; ++i) pairs += double(attention.visibility.query_offset + i + 1);
  const double flops = 2.0 * pairs * double(shape.batch * shape.heads * (shape.width + shape.value_width));
  const double bytes = double(shape.batch * (shape.heads * shape.queries + shape.key_heads * shape.keys) *
                              (shape.width + shape.value_width) * element_size(attention.dtype));
  state.counters["GFLOP/s"] = {flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate};
  state.counters["GB/s"] = {bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate};
}

void bench_attention(benchmark::State& state, const Kernels& kernels, const Setting& setting, DType dtype, Role role,
                     int64_t threads) {
  AttentionCase attention = make_case(setting, dtype, role);
  const AttentionProblem problem = attention.problem();
  const ThreadPool pool = standing_pool(threads);
  Scratch scratch;
  kernels.attention(problem, pool, scratch);
  const std::string wrong = verify_attention(kernels, attention, problem);
  if (!wrong.empty()) return refuse(state, wrong);
  for (auto _ : state) kernels.attention(problem, pool, scratch);
  count_work(state, attention);
}

}  // namespace

void register_attention() {
  const char* const roles[] = {"plain", "source", "rebalanced"};
  const int64_t cores = std::max<int64_t>(1, int64_t(std::thread::hardware_concurrency()));
  const Kernels* best = nullptr;
  for (const char* const* name = available_kernels(); *name != nullptr; ++name) best = find_kernels(*name);
  for (const Setting& setting : kSettings)
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      for (const Role role : {Role::plain, Role::source, Role::rebalanced})
        for (const char* const* name = available_kernels(); *name != nullptr; ++name) {
          const Kernels* kernels = find_kernels(*name);
          // Lower instruction sets once per setting, everything else on the best.
          if (kernels != best && (dtype != DType::float32 || role != Role::plain)) continue;
          const std::string label = std::string(setting.name) + "/" + testing::dtype_name(dtype) + "/" +
                                    roles[int(role)] + "/" + kernels->name + "/threads:" + std::to_string(cores);
          benchmark::RegisterBenchmark(label.c_str(), bench_attention, *kernels, setting, dtype, role, cores)
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
        }
}

}  // namespace attnrb::bench
