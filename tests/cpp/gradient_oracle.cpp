#include "gradient_oracle.h"

#include <algorithm>
#include <cmath>

#include "oracle_rows.h"

namespace attnrb::testing {

namespace {

// Of what float32 may not see at all: any finite number does.
constexpr double kAnything = 1e30;
// A bias is added up over the rows of a tile in float32, over tiles in float64.
constexpr int64_t kTileRows = 256;

// An error for each kind of kernels.
struct Errors {
  double plain = 0.0, tile = 0.0, cuda = 0.0;

  void add(const Errors& other, double by = 1.0) {
    if (by == 0.0) return;
    plain += other.plain * by;
    tile += other.tile * by;
    cuda += other.cuda * by;
  }
};

// A sum with what its rounding errors scale with.
struct Sum {
  double value = 0.0, size = 0.0;
  Errors error;

  void add(double term, const Errors& of_term, double by = 1.0) {
    value += term;
    size += std::fabs(term);
    error.add(of_term, by);
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

// Elements of the bias's gradient, and the one of a key.
size_t bias_size(const GradientProblem& problem) {
  const int64_t* s = problem.grad_bias_strides;
  return size_t((s[0] != 0 ? problem.shape.batch : 1) * (s[1] != 0 ? problem.shape.heads : 1) *
                problem.edit.bias_slots);
}
size_t bias_place(const GradientProblem& problem, int64_t b, int64_t h, int64_t key) {
  const int64_t* s = problem.grad_bias_strides;
  return size_t(b * s[0] + h * s[1] + (problem.visibility.key_offset + key) * s[2]);
}

}  // namespace

GradientTruth gradient_truth(const GradientProblem& problem) {
  const Shape& shape = problem.shape;
  const DType dtype = problem.dtype;
  const RowSource source = row_source(problem);
  const int64_t group = shape.heads / shape.key_heads, keys = shape.keys, width = shape.width,
                value_width = shape.value_width;
  const bool received = problem.grad_received != nullptr, edits = problem.edit.indices != nullptr;
  const bool normalize = edits && problem.edit.rule == Rule::row, shares = edits && problem.edit.rule == Rule::rest;
  const Loaded values(problem.value, dtype, {shape.batch, shape.key_heads, keys, value_width});
  const Loaded upstreams(problem.grad_output, dtype, {shape.batch, shape.heads, shape.queries, value_width});
  const double cap = problem.scoring.softcap;
  const double rounding = tile_probability_rounding(dtype), left_out = dtype == DType::float16 ? 0x1p-16 : 0.0;
  const double cuda_rounding = cuda_probability_rounding(dtype), least = dtype == DType::float16 ? 0x1p-25 : 0.0;
  std::vector<Sum> query(size_t(shape.batch * shape.heads * shape.queries * width));
  std::vector<Sum> key(size_t(shape.batch * shape.key_heads * keys * width));
  std::vector<Sum> value(size_t(shape.batch * shape.key_heads * keys * value_width));
  std::vector<Sum> gains(size_t(shape.heads)), sinks(size_t(shape.heads));
  std::vector<Sum> biases(problem.grad_bias != nullptr ? bias_size(problem) : 0);

  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      const int64_t key_head = h / group;
      std::vector<int64_t> seen_by(size_t(keys), 0);
      for (int64_t i = 0; received && i < shape.queries; ++i) {
        const RowTruth row = row_truth(source, b, h, i);
        for (int64_t j = 0; j < keys; ++j) seen_by[size_t(j)] += row.visible[size_t(j)];
      }
      for (int64_t i = 0; i < shape.queries; ++i) {
        const int64_t index = (b * shape.heads + h) * shape.queries + i;
        RowTruth row = row_truth(source, b, h, i);
        if (std::isinf(row.lse)) continue;

        const RowEdit edited = row_edit(problem.edit, shape, problem.visibility, problem.scoring, row, b, h, i);
        const double gain = edits ? double(problem.edit.gain[h]) : 0.0;
        // Of P as the backward has it: divided under rule row, whose log-sum-exp says so.
        const auto factor = [&](int64_t j) {
          return (edited.marked[size_t(j)] ? edited.of_marked : edited.of_others) * edited.divisor;
        };
        const double lse = row.lse + std::log(edited.divisor), of_lse = 4.0 * kRounding * std::fabs(lse);
        const Errors weight_error{row.error + of_lse, row.tile_error + of_lse, row.cuda_error + of_lse};
        for (double& weight : row.weights) weight /= edited.divisor;

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
              const double term = upstreams.row(b, h, i)[d] * values.row(b, key_head, j)[d];
              sum += term;
              size += std::fabs(term);
            }
          }
          const double error = sum_error(value_width + 1) * size;
          const double in_tiles = error + (received ? 0.0 : left_out * size);
          upstream.push_back({sum, {error, in_tiles, error + cut_off_error(value_width) * size}});
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
              if (row.visible[size_t(j)]) output += factor(j) * row.weights[size_t(j)] * values.row(b, key_head, j)[d];
            const double upstream_d = upstreams.row(b, h, i)[d];
            delta.value += upstream_d * output;
            error += std::fabs(upstream_d) * (stored(dtype, output, 0.0) + sum_error(value_width) * std::fabs(output));
          }
          if (problem.grad_lse != nullptr) delta.value -= double(problem.grad_lse[index]);
          error += 4.0 * kRounding * std::fabs(delta.value);
          delta.error = {error, error, error};
        }

        // Under rule rest: the mean over the others of dW, and how large its terms are.
        Known mean;
        double mean_size = 0.0;
        const double ratio = std::fabs(edited.ratio);
        if (shares && edited.rest > 0.0) {
          for (int64_t j = 0; j < keys; ++j) {
            if (!row.visible[size_t(j)] || edited.marked[size_t(j)]) continue;
            const double share = row.weights[size_t(j)] / edited.rest;
            const Known up = upstream[size_t(j)];
            mean.value += share * up.value;
            mean_size += share * std::fabs(up.value);
            mean.error.add(up.error, share);
          }
          mean.error.add(weight_error, 2.0 * mean_size);
          mean.error.add({sum_error(keys), sum_error(keys), sum_error(keys) + cut_off_error(keys)}, mean_size);
        }

        for (int64_t j = 0; j < keys; ++j) {
          if (!row.visible[size_t(j)]) continue;
          const bool marked = edited.marked[size_t(j)];
          const double p = row.weights[size_t(j)], w = factor(j);
          const Known up = upstream[size_t(j)];
          const double tanh = cap > 0.0 ? row.scores[size_t(j)] / cap : 0.0, slope = 1.0 - tanh * tanh;
          const double slope_error =
              cap > 0.0 ? 2.0 * std::fabs(tanh) * (row.error / cap + 4.0 * kRounding) + 4.0 * kRounding : 0.0;
          // dt = P inner; the mean joins by as much as this.
          const double by_mean = !shares ? 0.0 : marked ? -gain : edited.ratio;
          const double inner =
              normalize ? w * (up.value - delta.value) : w * up.value - delta.value + by_mean * mean.value;
          const double delta_factor = normalize ? std::fabs(w) : 1.0;
          // Under rule none what an outlier gains is added to what it had.
          const double whole_up = marked && !normalize && !shares ? 1.0 + std::fabs(gain) : std::fabs(w);
          double size =
              whole_up * std::fabs(up.value) + delta_factor * std::fabs(delta.value) + std::fabs(by_mean) * mean_size;
          // A ratio of masses errs twice as a weight does.
          if (shares && !marked) size += 2.0 * ratio * (std::fabs(up.value) + mean_size);
          if (edited.hopeless) size = kAnything;
          const double gradient = p * inner * slope;
          const auto score_error = [&](double Errors::* of) {  // before the softcap
            return p * (size * (weight_error.*of + 8.0 * kRounding) + std::fabs(w) * up.error.*of +
                        delta_factor * delta.error.*of + std::fabs(by_mean) * mean.error.*of);
          };
          const auto gradient_error = [&](double Errors::* of) {
            return slope * score_error(of) + p * size * slope_error;
          };
          const Errors error{gradient_error(&Errors::plain),
                             gradient_error(&Errors::tile) + rounding * std::fabs(gradient),
                             gradient_error(&Errors::cuda) + cuda_rounding * std::fabs(gradient) + least};
          if (!biases.empty() && row.biased[size_t(j)] && problem.visibility.key_offset + j < problem.edit.bias_slots)
            biases[bias_place(problem, b, h, j)].add(
                p * inner, {score_error(&Errors::plain), score_error(&Errors::tile), score_error(&Errors::cuda)});
          for (int64_t d = 0; d < width; ++d) {
            const double k = source.key.row(b, key_head, j)[d], q = source.query.row(b, h, i)[d];
            query[size_t(index * width + d)].add(gradient * k, error, std::fabs(k));
            key[size_t(((b * shape.key_heads + key_head) * keys + j) * width + d)].add(gradient * q, error,
                                                                                       std::fabs(q));
          }
          for (int64_t d = 0; d < value_width; ++d) {
            const double dy = upstreams.row(b, h, i)[d], term = w * p * dy;
            // What the others get is a difference.
            const double whole = edited.hopeless ? kAnything : shares && !marked ? 1.0 + 3.0 * ratio : std::fabs(w);
            const Errors of_term{weight_error.plain, weight_error.tile + rounding, weight_error.cuda + cuda_rounding};
            Sum& sum = value[size_t(((b * shape.key_heads + key_head) * keys + j) * value_width + d)];
            sum.add(term, of_term, whole * p * std::fabs(dy));
            sum.error.cuda += least * std::fabs(dy);
          }
          if (marked && !(shares && edited.rest == 0.0)) {
            const Known less = normalize ? delta : mean;  // under rule none: of nothing
            const double by = up.value - less.value;
            const double by_size =
                edited.hopeless ? kAnything : std::fabs(up.value) + std::max(std::fabs(less.value), mean_size);
            const auto by_error = [&](double Errors::* of) {
              return p * (up.error.*of + less.error.*of + 4.0 * kRounding * by_size + by_size * weight_error.*of);
            };
            gains[size_t(h)].add(p * by, {by_error(&Errors::plain), by_error(&Errors::tile), by_error(&Errors::cuda)});
          }
        }
        if (problem.scoring.sinks != nullptr) {
          const double share = std::exp(double(problem.scoring.sinks[h]) - lse);
          // Under rule rest a sink is one of the others, whose dW is 0.
          const double of_row = delta.value - edited.ratio * mean.value, of_share = std::fabs(of_row) * of_lse;
          Errors error = delta.error;
          error.add(mean.error, ratio);
          error.add(weight_error, edited.hopeless ? kAnything : 2.0 * ratio * mean_size);
          error.add({of_share, of_share, of_share});
          sinks[size_t(h)].add(-share * of_row, error, share);
        }
      }
    }

  const double scale = problem.scoring.scale;
  const int64_t rows = shape.queries * group;
  return {bounded(query, dtype, scale, keys),     bounded(key, dtype, scale, rows),
          bounded(value, dtype, 1.0, rows),       bounded(gains, DType::float32, 1.0, 1),
          bounded(sinks, DType::float32, 1.0, 1), bounded(biases, DType::float32, 1.0, kTileRows)};
}

}  // namespace attnrb::testing
