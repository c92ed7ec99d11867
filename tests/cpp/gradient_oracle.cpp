#include "gradient_oracle.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "oracle_rows.h"

namespace attnrb::testing {

namespace {

// An error for each kind of kernels.
struct Errors {
  double plain = 0.0, tile = 0.0, cuda = 0.0;
};

// A sum with what its rounding errors scale with.
struct Sum {
  double value = 0.0, size = 0.0;
  Errors error;

  void add(double term, const Errors& of_term, double by = 1.0) {
    value += term;
    size += std::fabs(term);
    error.plain += of_term.plain * by;
    error.tile += of_term.tile * by;
    error.cuda += of_term.cuda * by;
  }
  Bounded bounded(DType dtype, double factor, int64_t terms) const {
    // Weights below float32's smallest normal number are flushed to zero.
    const double by = std::fabs(factor), rounding = (sum_error(terms) + 4.0 * kRounding) * size + 1e-35;
    const auto within = [&](double of_kind) { return stored(dtype, factor * value, by * (of_kind + rounding)); };
    return {factor * value, within(error.plain), within(error.tile), within(error.cuda + cut_off_error(terms) * size)};
  }
};

std::vector<Bounded> bounded(const std::vector<Sum>& sums, DType dtype, double factor, int64_t terms) {
  std::vector<Bounded> out;
  for (const Sum& sum : sums) out.push_back(sum.bounded(dtype, factor, terms));
  return out;
}

// A number known within an error.
struct Known {
  double value = 0.0;
  Errors error;
};

}  // namespace

GradientTruth gradient_truth(const GradientProblem& problem) {
  const Shape& shape = problem.shape;
  const DType dtype = problem.dtype;
  const RowSource source{shape, dtype, problem.query, problem.key, problem.visibility, problem.scoring};
  const int64_t group = shape.heads / shape.key_heads, keys = shape.keys, width = shape.width,
                value_width = shape.value_width;
  const bool received = problem.grad_received != nullptr, normalize = problem.edit.rule == Rule::row;
  const double cap = problem.scoring.softcap;
  const double rounding = dtype == DType::bfloat16 ? tile_probability_rounding(dtype) : 0.0;
  const double cuda_rounding = cuda_probability_rounding(dtype), least = dtype == DType::float16 ? 0x1p-25 : 0.0;
  std::vector<Sum> query(size_t(shape.batch * shape.heads * shape.queries * width));
  std::vector<Sum> key(size_t(shape.batch * shape.key_heads * keys * width));
  std::vector<Sum> value(size_t(shape.batch * shape.key_heads * keys * value_width));
  std::vector<Sum> gains(size_t(shape.heads)), sinks(size_t(shape.heads));

  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      const int64_t key_head = h / group;
      std::vector<int64_t> seen_by(size_t(keys), 0);
      for (int64_t i = 0; i < shape.queries; ++i)
        for (int64_t j = 0; j < keys; ++j) seen_by[size_t(j)] += visible(problem.visibility, b, h, i, j);
      for (int64_t i = 0; i < shape.queries; ++i) {
        const int64_t index = (b * shape.heads + h) * shape.queries + i;
        RowTruth row = row_truth(source, b, h, i);
        if (std::isinf(row.lse)) continue;

        std::set<int64_t> outliers;
        double gain = 0.0;
        if (problem.edit.indices != nullptr) {
          const int32_t* slots = problem.edit.indices + index * problem.edit.capacity;
          outliers.insert(slots, slots + problem.edit.counts[index]);
          gain = double(problem.edit.gain[h]);
        }
        std::vector<double> factor(size_t(keys), 1.0);
        double divisor = 1.0;
        for (int64_t j = 0; j < keys; ++j) {
          if (outliers.count(problem.visibility.key_offset + j) == 0) continue;
          factor[size_t(j)] = 1.0 + gain;
          if (normalize) divisor += gain * row.weights[size_t(j)];
        }
        const double lse = row.lse + std::log(divisor), of_lse = 4.0 * kRounding * std::fabs(lse);
        const Errors weight_error{row.error + of_lse, row.tile_error + of_lse, row.cuda_error + of_lse};
        for (double& weight : row.weights) weight /= divisor;

        // Gradients of the weights, and delta.
        std::vector<Known> upstream;
        Known delta;
        for (int64_t j = 0; j < keys; ++j) {
          double sum = 0.0, size = 0.0;
          if (received && row.visible[size_t(j)]) {
            sum = double(problem.grad_received[(b * shape.heads + h) * keys + j]) / double(seen_by[size_t(j)]);
            size = std::fabs(sum);
          } else if (row.visible[size_t(j)]) {
            for (int64_t d = 0; d < value_width; ++d) {
              const double term =
                  element(problem.grad_output, dtype, b, h, i, d) * element(problem.value, dtype, b, key_head, j, d);
              sum += term;
              size += std::fabs(term);
            }
          }
          const double error = sum_error(value_width + 1) * size;
          upstream.push_back({sum, {error, error, error + cut_off_error(value_width) * size}});
        }
        if (received) {
          for (int64_t j = 0; j < keys; ++j) {
            const double term = row.weights[size_t(j)] * upstream[size_t(j)].value;
            delta.value += term;
            delta.error.plain += std::fabs(term) * (weight_error.plain + sum_error(keys));
            delta.error.tile += std::fabs(term) * (weight_error.tile + sum_error(keys));
            delta.error.cuda += std::fabs(term) * (weight_error.cuda + sum_error(keys));
          }
        } else {
          double error = 0.0;
          for (int64_t d = 0; d < value_width; ++d) {
            double output = 0.0;
            for (int64_t j = 0; j < keys; ++j)
              if (row.visible[size_t(j)])
                output += factor[size_t(j)] * row.weights[size_t(j)] * element(problem.value, dtype, b, key_head, j, d);
            const double upstream_d = element(problem.grad_output, dtype, b, h, i, d);
            delta.value += upstream_d * output;
            error += std::fabs(upstream_d) * (stored(dtype, output, 0.0) + sum_error(value_width) * std::fabs(output));
          }
          if (problem.grad_lse != nullptr) delta.value -= double(problem.grad_lse[index]);
          error += 4.0 * kRounding * std::fabs(delta.value);
          delta.error = {error, error, error};
        }

        for (int64_t j = 0; j < keys; ++j) {
          if (!row.visible[size_t(j)]) continue;
          const double p = row.weights[size_t(j)], w = factor[size_t(j)];
          const Known up = upstream[size_t(j)];
          const double tanh = cap > 0.0 ? row.scores[size_t(j)] / cap : 0.0, slope = 1.0 - tanh * tanh;
          const double slope_error =
              cap > 0.0 ? 2.0 * std::fabs(tanh) * (row.error / cap + 4.0 * kRounding) + 4.0 * kRounding : 0.0;
          const double inner = normalize ? w * (up.value - delta.value) : w * up.value - delta.value;
          const double delta_factor = normalize ? std::fabs(w) : 1.0;
          const double size = std::fabs(w * up.value) + delta_factor * std::fabs(delta.value);
          const double gradient = p * inner * slope;
          const auto gradient_error = [&](double of_weight, double of_upstream, double of_delta) {
            return p * slope *
                       (size * (of_weight + 8.0 * kRounding) + std::fabs(w) * of_upstream + delta_factor * of_delta) +
                   p * size * slope_error;
          };
          const Errors error{
              gradient_error(weight_error.plain, up.error.plain, delta.error.plain),
              gradient_error(weight_error.tile, up.error.tile, delta.error.tile) + rounding * std::fabs(gradient),
              gradient_error(weight_error.cuda, up.error.cuda, delta.error.cuda) + cuda_rounding * std::fabs(gradient) +
                  least};
          for (int64_t d = 0; d < width; ++d) {
            const double k = element(problem.key, dtype, b, key_head, j, d),
                         q = element(problem.query, dtype, b, h, i, d);
            query[size_t(index * width + d)].add(gradient * k, error, std::fabs(k));
            key[size_t(((b * shape.key_heads + key_head) * keys + j) * width + d)].add(gradient * q, error,
                                                                                       std::fabs(q));
          }
          for (int64_t d = 0; d < value_width; ++d) {
            const double dy = element(problem.grad_output, dtype, b, h, i, d), term = w * p * dy;
            const Errors of_term{weight_error.plain, weight_error.tile + rounding, weight_error.cuda + cuda_rounding};
            Sum& sum = value[size_t(((b * shape.key_heads + key_head) * keys + j) * value_width + d)];
            sum.add(term, of_term, std::fabs(term));
            sum.error.cuda += least * std::fabs(dy);
          }
          if (outliers.count(problem.visibility.key_offset + j) != 0) {
            const double by = normalize ? up.value - delta.value : up.value;
            const double by_size = std::fabs(up.value) + (normalize ? std::fabs(delta.value) : 0.0);
            const auto by_error = [&](double of_weight, double of_upstream, double of_delta) {
              return p * (of_upstream + (normalize ? of_delta : 0.0) + 4.0 * kRounding * by_size + by_size * of_weight);
            };
            gains[size_t(h)].add(p * by, {by_error(weight_error.plain, up.error.plain, delta.error.plain),
                                          by_error(weight_error.tile, up.error.tile, delta.error.tile),
                                          by_error(weight_error.cuda, up.error.cuda, delta.error.cuda)});
          }
        }
        if (problem.scoring.sinks != nullptr) {
          const double share = std::exp(double(problem.scoring.sinks[h]) - lse);
          const double of_share = std::fabs(delta.value) * of_lse;
          sinks[size_t(h)].add(-share * delta.value,
                               {delta.error.plain + of_share, delta.error.tile + of_share, delta.error.cuda + of_share},
                               share);
        }
      }
    }

  const double scale = problem.scoring.scale;
  const int64_t rows = shape.queries * group;
  return {bounded(query, dtype, scale, keys), bounded(key, dtype, scale, rows), bounded(value, dtype, 1.0, rows),
          bounded(gains, DType::float32, 1.0, 1), bounded(sinks, DType::float32, 1.0, 1)};
}

}  // namespace attnrb::testing
