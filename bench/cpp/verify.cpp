#include "verify.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "oracle.h"

namespace attnrb::bench {

namespace {

const void* element(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * element_size(dtype);
}

// The problem of one row, of which the oracle makes short work.
AttentionProblem row_problem(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t query) {
  const int64_t key_head = head / (problem.shape.heads / problem.shape.key_heads);
  const int64_t index = (batch * problem.shape.heads + head) * problem.shape.queries + query;
  AttentionProblem row = problem;
  row.shape.batch = row.shape.heads = row.shape.key_heads = row.shape.queries = 1;
  const int64_t *q = problem.query.strides, *k = problem.key.strides, *v = problem.value.strides;
  row.query.data = element(problem.query.data, problem.dtype, batch * q[0] + head * q[1] + query * q[2]);
  row.key.data = element(problem.key.data, problem.dtype, batch * k[0] + key_head * k[1]);
  row.value.data = element(problem.value.data, problem.dtype, batch * v[0] + key_head * v[1]);
  row.visibility.query_offset += query;
  if (row.edit.indices != nullptr) {
    row.edit.indices += index * row.edit.capacity;
    row.edit.counts += index;
    row.edit.gain += head;
  }
  return row;
}

bool refused = false;

}  // namespace

void refuse(benchmark::State& state, const std::string& reason) {
  refused = true;
  state.SkipWithError(reason.c_str());
}

bool any_refused() { return refused; }

bool close(const Kernels& kernels, double got, double expected, double tolerance, double tile_tolerance) {
  return std::fabs(got - expected) <= (std::strcmp(kernels.name, "amx") == 0 ? tile_tolerance : tolerance);
}

std::string verify_attention(const Kernels& kernels, testing::AttentionCase& attention,
                             const AttentionProblem& problem) {
  const Shape& shape = attention.shape;
  std::ostringstream wrong;
  constexpr int64_t kRows = 24;
  for (int64_t sample = 0; sample < kRows; ++sample) {
    const int64_t row = (attention.rows() - 1) * sample / (kRows - 1);
    const int64_t b = row / shape.queries / shape.heads, h = row / shape.queries % shape.heads, i = row % shape.queries;
    const testing::AttentionTruth truth = testing::attention_truth(row_problem(problem, b, h, i));
    const testing::Bounded& lse = truth.lse[0];
    if (!close(kernels, attention.lse[size_t(row)], lse.value, lse.tolerance, lse.tile_tolerance))
      wrong << "lse of row " << row << " is " << attention.lse[size_t(row)] << ", not " << lse.value << "; ";
    for (int64_t d = 0; d < shape.value_width; ++d) {
      const testing::Bounded& expected = truth.output[size_t(d)];
      const double got = attention.output.at(b, h, i, d);
      if (!close(kernels, got, expected.value, expected.tolerance, expected.tile_tolerance))
        wrong << "output of row " << row << ", column " << d << " is " << got << ", not " << expected.value << "; ";
    }
    if (attention.role != testing::Role::source) continue;
    int64_t certain = 0, possible = 0;
    for (int64_t j = 0; j < shape.keys; ++j) {
      const testing::Bounded& weight = truth.weights[size_t(j)];
      if (!truth.visible[size_t(j)] || j == attention.visibility.query_offset + i) continue;
      certain += weight.value > attention.threshold * (1.0 + weight.tile_tolerance);
      possible += weight.value > attention.threshold * (1.0 - weight.tile_tolerance);
    }
    const int64_t found = attention.found_counts[size_t(row)];
    if (found < certain || found > possible)
      wrong << "row " << row << " has " << found << " outliers, not " << certain << "; ";
  }
  return wrong.str();
}

}  // namespace attnrb::bench
