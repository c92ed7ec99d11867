#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "array.h"
#include "oracle_rows.h"

namespace attnrb::testing {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kExp2Error = 4.0 * kRounding;

// Half a unit in the last place of `value`, and what the dtype cannot resolve near zero.
double storage_rounding(DType dtype, double value) {
  switch (dtype) {
    case DType::bfloat16:
      return 0x1p-8 * std::fabs(value) + 0x1p-126;
    case DType::float16:
      return 0x1p-11 * std::fabs(value) + 0x1p-25;
    default:
      return kRounding * std::fabs(value) + 0x1p-126;
  }
}

int64_t slot_of(const Visibility& visibility, int64_t b, int64_t query) {
  return (visibility.query_offsets != nullptr ? visibility.query_offsets[b] : visibility.query_offset) + query;
}

bool reaches(const Edit& edit, const Visibility& visibility, int64_t b, int64_t query) {
  return edit.key_bias != nullptr &&
         (edit.first_query == nullptr || slot_of(visibility, b, query) >= edit.first_query[b]);
}

double bias_of(const Edit& edit, const Visibility& visibility, int64_t b, int64_t h, int64_t query, int64_t key) {
  const int64_t slot = visibility.key_offset + key, *s = edit.bias_strides;
  if (!reaches(edit, visibility, b, query) || slot >= edit.bias_slots) return 0.0;
  return double(edit.key_bias[b * s[0] + h * s[1] + slot * s[2]]);
}

}  // namespace

double cuda_probability_rounding(DType dtype) {
  return dtype == DType::bfloat16 ? 0x1p-8 : dtype == DType::float16 ? 0x1p-11 : 0.0;
}

// What tensor cores cut off along a sum of so many products, relative to the sum of their absolute values.
double cut_off_error(int64_t products) { return (double(products) / 8.0 + 4.0) * kRounding; }

// See Note: [Error bounds].
double sum_error(int64_t terms) { return (6.0 * std::sqrt(double(terms)) + 3.0) * kRounding; }

double tile_probability_rounding(DType dtype) {
  return dtype == DType::bfloat16 ? 0x1p-8 : dtype == DType::float16 ? 0x1p-15 : 0.0;
}

double stored(DType dtype, double value, double error) {
  return error + storage_rounding(dtype, std::fabs(value) + error);
}

double element(const View& view, DType dtype, int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t* s = view.strides;
  return load_element(view.data, dtype, a * s[0] + b * s[1] + c * s[2] + d * s[3]);
}

Loaded::Loaded(const View& view, DType dtype, const std::array<int64_t, 4>& sizes) : sizes_(sizes) {
  elements_.reserve(size_t(sizes[0] * sizes[1] * sizes[2] * sizes[3]));
  for (int64_t a = 0; a < sizes[0]; ++a)
    for (int64_t b = 0; b < sizes[1]; ++b)
      for (int64_t c = 0; c < sizes[2]; ++c)
        for (int64_t d = 0; d < sizes[3]; ++d) elements_.push_back(element(view, dtype, a, b, c, d));
}

RowEdit row_edit(const Edit& edit, const Shape& shape, const Visibility& visibility, const Scoring& scoring,
                 const RowTruth& row, int64_t b, int64_t h, int64_t i) {
  RowEdit edited;
  edited.marked.assign(size_t(shape.keys), false);
  if (edit.indices == nullptr) return edited;
  const int64_t list = edit.shared_rows ? b * shape.heads + h : (b * shape.heads + h) * shape.queries + i;
  for (int64_t c = 0; c < edit.counts[list]; ++c) {
    const int64_t key = int64_t(edit.indices[list * edit.capacity + c]) - visibility.key_offset;
    if (key >= 0 && key < shape.keys && row.visible[size_t(key)]) edited.marked[size_t(key)] = true;
  }
  for (int64_t j = 0; j < shape.keys; ++j)
    (edited.marked[size_t(j)] ? edited.mass : edited.rest) += row.weights[size_t(j)];
  if (scoring.sinks != nullptr && !std::isinf(row.lse)) edited.rest += std::exp(double(scoring.sinks[h]) - row.lse);
  const double gain = double(edit.gain[h]);
  edited.of_marked = 1.0 + gain;
  if (edit.rule == Rule::row) {
    edited.divisor = 1.0 + gain * edited.mass;
    edited.of_marked /= edited.divisor;
    edited.of_others /= edited.divisor;
  } else if (edit.rule == Rule::rest) {
    edited.hopeless = edited.mass > 0.0 && edited.rest < 1e-25;
    if (edited.rest == 0.0) {
      edited.of_marked = 1.0;
    } else {
      edited.ratio = gain * edited.mass / edited.rest;
      edited.of_others = 1.0 - edited.ratio;
    }
  }
  return edited;
}

RowTruth row_truth(const RowSource& source, int64_t b, int64_t h, int64_t i) {
  const int64_t keys = source.shape.keys, width = source.shape.width;
  const int64_t key_head = h / (source.shape.heads / source.shape.key_heads);
  const double scale = source.scoring.scale, cap = source.scoring.softcap;

  RowTruth row;
  row.visible.resize(size_t(keys));
  row.biased.resize(size_t(keys));
  std::vector<double> scores(size_t(keys), -kInfinity);
  row.scores = scores;
  double largest_error = 0.0, largest_score = 0.0, largest_size = 0.0;
  const double* query = source.query.row(b, h, i);
  for (int64_t j = 0; j < keys; ++j) {
    const double bias = bias_of(source.edit, source.visibility, b, h, i, j);
    row.visible[size_t(j)] = visible(source.visibility, b, h, i, j) && bias != -kInfinity;
    if (!row.visible[size_t(j)]) continue;
    row.biased[size_t(j)] = reaches(source.edit, source.visibility, b, i);
    const double* key = source.key.row(b, key_head, j);
    double product = 0.0, size = 0.0;
    for (int64_t d = 0; d < width; ++d) {
      const double term = query[d] * key[d];
      product += term;
      size += std::fabs(term);
    }
    const double score = cap > 0.0 ? cap * std::tanh(scale * product / cap) : scale * product;
    size *= std::fabs(scale);
    const double error = sum_error(width) * size + 4.0 * kRounding * (std::fabs(score) + std::fabs(bias) + cap);
    row.scores[size_t(j)] = score;
    scores[size_t(j)] = score + bias;
    largest_error = std::max(largest_error, error);
    largest_score = std::max({largest_score, std::fabs(score), std::fabs(score + bias)});
    largest_size = std::max(largest_size, size);
  }
  row.weights.assign(size_t(keys), 0.0);
  if (std::none_of(row.visible.begin(), row.visible.end(), [](bool shown) { return shown; })) return row;

  double largest = *std::max_element(scores.begin(), scores.end());
  const double sink = source.scoring.sinks != nullptr ? double(source.scoring.sinks[h]) : -kInfinity;
  largest = std::max(largest, sink);
  double sum = std::exp(sink - largest);
  for (int64_t j = 0; j < keys; ++j)
    if (row.visible[size_t(j)]) sum += row.weights[size_t(j)] = std::exp(scores[size_t(j)] - largest);
  row.lse = largest + std::log(sum);
  for (double& weight : row.weights) weight /= sum;
  row.error = 2.0 * (largest_error + 4.0 * kRounding * std::max(largest_score, std::fabs(largest))) + kExp2Error +
              sum_error(keys + 1);
  row.tile_error = row.error;
  row.cuda_error = row.error + 2.0 * cut_off_error(width) * largest_size;
  if (source.dtype == DType::bfloat16) row.tile_error += 3e-6;
  if (source.dtype == DType::float16) row.tile_error += 0x1p-15 * largest_size;
  return row;
}

bool visible(const Visibility& visibility, int64_t batch, int64_t head, int64_t query, int64_t key) {
  const int64_t query_slot = slot_of(visibility, batch, query), key_slot = visibility.key_offset + key;
  if (visibility.causal && key_slot > query_slot) return false;
  if (visibility.window > 0 && key_slot <= query_slot - visibility.window) return false;
  if (visibility.chunk > 0) {
    const int64_t origin = visibility.key_start != nullptr ? visibility.key_start[batch] : 0;
    const auto chunk = [&](int64_t slot) { return std::floor(double(slot - origin) / double(visibility.chunk)); };
    if (chunk(query_slot) != chunk(key_slot)) return false;
  }
  if (visibility.key_start != nullptr && key_slot < visibility.key_start[batch]) return false;
  if (visibility.key_end != nullptr && key_slot >= visibility.key_end[batch]) return false;
  if (visibility.mask == nullptr) return true;
  const int64_t* s = visibility.mask_strides;
  return visibility.mask[batch * s[0] + head * s[1] + query * s[2] + key * s[3]];
}

namespace {

// Sums over the keys that a row sees, for one column of its output: of the output itself, and of absolute values.
struct ColumnSums {
  double value = 0.0, size = 0.0;
  double strengthened = 0.0;  // of outliers that a gain changes
  double rest = 0.0;          // of what the others give or get under rule rest
  double unweighted = 0.0;    // of the values alone
};

}  // namespace

AttentionTruth attention_truth(const AttentionProblem& problem) {
  const Shape& shape = problem.shape;
  const RowSource source = row_source(problem);
  const Loaded values(problem.value, problem.dtype, {shape.batch, shape.key_heads, shape.keys, shape.value_width});
  AttentionTruth truth;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t i = 0; i < shape.queries; ++i) {
        const RowTruth row = row_truth(source, b, h, i);

        const RowEdit edited = row_edit(problem.edit, shape, problem.visibility, problem.scoring, row, b, h, i);
        const double divisor = edited.divisor;

        const double lse = row.lse + std::log(divisor), lse_rounding = 2.0 * kRounding * std::fabs(lse);
        // Tiles round probabilities; a normalized row divides by rounded ones.
        const double rounding = tile_probability_rounding(problem.dtype);
        const double divisor_rounding = problem.edit.rule == Rule::row ? rounding : 0.0;
        const double cuda_rounding = cuda_probability_rounding(problem.dtype);
        const double cuda_divisor_rounding = problem.edit.rule == Rule::row ? cuda_rounding : 0.0;
        truth.lse.push_back({lse, row.error + lse_rounding, row.tile_error + divisor_rounding + lse_rounding,
                             row.cuda_error + cuda_divisor_rounding + lse_rounding});
        for (int64_t j = 0; j < shape.keys; ++j) {
          truth.weights.push_back({row.weights[size_t(j)], row.error + lse_rounding, row.tile_error + lse_rounding,
                                   row.cuda_error + lse_rounding});
          truth.visible.push_back(row.visible[size_t(j)]);
        }
        std::vector<ColumnSums> columns(size_t(shape.value_width));
        for (int64_t j = 0; j < shape.keys; ++j) {
          if (!row.visible[size_t(j)]) continue;
          const bool marked = edited.marked[size_t(j)];
          const double weight = row.weights[size_t(j)];
          const double factor = (marked ? edited.of_marked : edited.of_others) * weight;
          const double size_factor = std::fabs(marked ? factor : weight / divisor);
          const double strengthened = marked && problem.edit.gain[h] != 0.0f ? std::fabs(factor) : 0.0;
          const double of_rest = marked ? 0.0 : std::fabs(edited.ratio * weight);
          const double* v = values.row(b, h / (shape.heads / shape.key_heads), j);
          for (ColumnSums& column : columns) {
            const double magnitude = std::fabs(*v);
            column.value += factor * *v++;
            column.size += size_factor * magnitude;
            column.strengthened += strengthened * magnitude;
            column.rest += of_rest * magnitude;
            column.unweighted += magnitude;
          }
        }
        for (const ColumnSums& column : columns) {
          // What the others get is a difference, and the ratio in it errs twice as a weight does.
          double size = column.size + 3.0 * column.rest;
          if (edited.hopeless) size = 1e30;  // any finite number does
          // Strengthening multiplies a probability that is rounded already, and rounds it again.
          const double tile_error =
              (row.tile_error + rounding + divisor_rounding) * size + rounding * column.strengthened;
          double cuda_error =
              (row.cuda_error + cuda_rounding + cuda_divisor_rounding + cut_off_error(shape.keys)) * size;
          if (problem.dtype == DType::float16) cuda_error += 0x1p-25 * column.unweighted / divisor;
          const auto within = [&](double error) { return stored(problem.dtype, column.value, error); };
          truth.output.push_back({column.value, within(row.error * size), within(tile_error), within(cuda_error)});
        }
      }
  return truth;
}

std::vector<Bounded> received_truth(const ReceivedProblem& problem) {
  const Shape& shape = problem.shape;
  const RowSource source = row_source(problem);
  std::vector<Bounded> received;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      std::vector<double> sums(size_t(shape.keys), 0.0), errors(size_t(shape.keys), 0.0);
      std::vector<double> tile_errors(size_t(shape.keys), 0.0), cuda_errors(size_t(shape.keys), 0.0);
      std::vector<int64_t> seen(size_t(shape.keys), 0);
      for (int64_t i = 0; i < shape.queries; ++i) {
        const RowTruth row = row_truth(source, b, h, i);
        for (int64_t j = 0; j < shape.keys; ++j) {
          if (!row.visible[size_t(j)]) continue;
          // The weight comes from a stored LSE, whose own rounding joins its error.
          const double error = 4.0 * kRounding * std::fabs(row.lse) + sum_error(shape.queries);
          sums[size_t(j)] += row.weights[size_t(j)];
          errors[size_t(j)] += row.weights[size_t(j)] * (2.0 * row.error + error);
          tile_errors[size_t(j)] += row.weights[size_t(j)] * (2.0 * row.tile_error + error);
          cuda_errors[size_t(j)] += row.weights[size_t(j)] * (2.0 * row.cuda_error + error);
          ++seen[size_t(j)];
        }
      }
      for (int64_t j = 0; j < shape.keys; ++j) {
        const double count = double(std::max<int64_t>(seen[size_t(j)], 1)), mean = sums[size_t(j)] / count;
        received.push_back({mean, stored(DType::float32, mean, errors[size_t(j)] / count),
                            stored(DType::float32, mean, tile_errors[size_t(j)] / count),
                            stored(DType::float32, mean, cuda_errors[size_t(j)] / count)});
      }
    }
  return received;
}

std::vector<Bounded> rebalance_truth(const RebalanceProblem& problem) {
  const Shape& shape = problem.shape;
  const int64_t* s = problem.mask.strides;
  std::vector<Bounded> out;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t i = 0; i < shape.queries; ++i) {
        std::vector<double> row;
        double sum = 0.0;
        for (int64_t j = 0; j < shape.keys; ++j) {
          const bool marked = static_cast<const bool*>(problem.mask.data)[b * s[0] + h * s[1] + i * s[2] + j * s[3]];
          const double weight = element(problem.weights, problem.dtype, b, h, i, j);
          row.push_back(marked ? weight * (1.0 + double(problem.gain[h])) : weight);
          sum += row.back();
        }
        const double divisor = problem.normalize && sum != 0.0 ? sum : 1.0;
        for (const double weight : row) {
          const double value = weight / divisor, error = (sum_error(shape.keys) + 4.0 * kRounding) * std::fabs(value);
          const double tolerance = stored(problem.dtype, value, error);
          out.push_back({value, tolerance, tolerance, tolerance});
        }
      }
  return out;
}

// By the quotient rule, entry by entry: with u_k = f_k w_k and z their sum, dy_k/du_j = [j = k]/z - u_k/z^2.
RebalanceGradientTruth rebalance_gradient_truth(const RebalanceGradientProblem& problem) {
  const Shape& shape = problem.shape;
  const int64_t* s = problem.mask.strides;
  RebalanceGradientTruth truth;
  std::vector<double> gains(size_t(shape.heads), 0.0), gain_sizes(size_t(shape.heads), 0.0);
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t i = 0; i < shape.queries; ++i) {
        const auto marked = [&](int64_t j) {
          return static_cast<const bool*>(problem.mask.data)[b * s[0] + h * s[1] + i * s[2] + j * s[3]];
        };
        std::vector<double> weights, upstream, boosted;
        for (int64_t j = 0; j < shape.keys; ++j) {
          weights.push_back(element(problem.weights, problem.dtype, b, h, i, j));
          upstream.push_back(element(problem.grad_output, problem.dtype, b, h, i, j));
          boosted.push_back(weights.back() * (marked(j) ? 1.0 + double(problem.gain[h]) : 1.0));
        }
        double z = 0.0;
        for (const double each : boosted) z += each;
        const bool divided = problem.normalize && z != 0.0;
        for (int64_t j = 0; j < shape.keys; ++j) {
          double slope = 0.0, size = 0.0;  // of the loss along u_j
          for (int64_t k = 0; k < shape.keys; ++k) {
            const double own = j == k ? (divided ? 1.0 / z : 1.0) : 0.0;
            const double others = divided ? boosted[size_t(k)] / (z * z) : 0.0;
            slope += upstream[size_t(k)] * (own - others);
            size += std::fabs(upstream[size_t(k)]) * (own + std::fabs(others));
          }
          const double factor = marked(j) ? 1.0 + double(problem.gain[h]) : 1.0;
          // The kernel works in double from 1 + gain in float32, which enters twice, and rounds once.
          const double tolerance = stored(problem.dtype, factor * slope, 4.0 * kRounding * std::fabs(factor) * size);
          truth.weights.push_back({factor * slope, tolerance, tolerance, tolerance});
          if (!marked(j)) continue;
          gains[size_t(h)] += weights[size_t(j)] * slope;
          gain_sizes[size_t(h)] += std::fabs(weights[size_t(j)]) * size;
        }
      }
  for (size_t h = 0; h < gains.size(); ++h) {
    const double tolerance = stored(DType::float32, gains[h], 4.0 * kRounding * gain_sizes[h]);
    truth.gain.push_back({gains[h], tolerance, tolerance, tolerance});
  }
  return truth;
}

}  // namespace attnrb::testing
