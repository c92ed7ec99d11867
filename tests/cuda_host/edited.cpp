#include "edited.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "core/outliers.h"
#include "oracle_rows.h"

namespace attnrb::testing {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double bias_of(const Edit& edit, int64_t b, int64_t h, int64_t slot) {
  if (edit.key_bias == nullptr || slot >= edit.bias_slots) return 0.0;
  return edit.key_bias[b * edit.bias_strides[0] + h * edit.bias_strides[1] + slot * edit.bias_strides[2]];
}

int64_t slot_of(const Visibility& visibility, int64_t b, int64_t query) {
  return (visibility.query_offsets != nullptr ? visibility.query_offsets[b] : visibility.query_offset) + query;
}

bool sees(const Visibility& visibility, int64_t b, int64_t h, int64_t query, int64_t key) {
  Visibility of_sequence = visibility;
  of_sequence.query_offset = slot_of(visibility, b, 0);
  if (!visible(of_sequence, b, h, query, key)) return false;
  if (visibility.chunk == 0) return true;
  const int64_t origin = visibility.key_start != nullptr ? visibility.key_start[b] : 0;
  const auto chunk = [&](int64_t slot) { return std::floor(double(slot - origin) / double(visibility.chunk)); };
  return chunk(slot_of(visibility, b, query)) == chunk(visibility.key_offset + key);
}

// A sum with the error of its terms and what its own rounding scales with.
struct Sum {
  double value = 0.0, size = 0.0, error = 0.0;
  void add(double term, double of_term) {
    value += term;
    size += std::fabs(term);
    error += of_term;
  }
  Near near(DType dtype, double factor, int64_t terms) const {
    const double rounding = (sum_error(terms) + cut_off_error(terms) + 4.0 * kRounding) * size + 1e-35;
    return {factor * value, stored(dtype, factor * value, std::fabs(factor) * (error + rounding))};
  }
};

}  // namespace

bool Near::holds(double got) const { return std::isinf(value) ? got == value : std::fabs(got - value) <= tolerance; }

EditedCase::EditedCase(uint64_t seed) : attention(generate_case(seed)) {
  Random random(seed + 5000000);
  const Shape& shape = attention.shape;
  boosts = random.chance(0.7);
  emits = random.chance(0.5);
  rule = random.pick({Rule::none, Rule::row, Rule::rest, Rule::rest});
  attention.indices.clear();
  attention.counts.clear();
  attention.gain.clear();
  if (boosts) add_outliers(attention, random, random.pick<int64_t>({1, 3, 20}));
  shared_rows = boosts && shape.queries > 1 && random.chance(0.4);
  attention.role = emits ? Role::source : Role::plain;
  Visibility& visibility = attention.visibility;
  if (random.chance(0.4))
    for (int64_t b = 0; b < shape.batch; ++b)
      query_offsets.push_back(visibility.query_offset + random.integer(-shape.keys / 2, 10));
  if (random.chance(0.25)) visibility.chunk = random.integer(1, shape.keys + 3);
  if (random.chance(0.25)) return;
  bias_slots = std::max<int64_t>(1, visibility.key_offset + shape.keys + random.pick<int64_t>({0, 0, -3, 7}));
  const int64_t sizes[3] = {random.chance(0.5) ? 1 : shape.batch, random.chance(0.5) ? 1 : shape.heads, bias_slots};
  int64_t stride = random.chance(0.2) ? 2 : 1;
  for (int axis = 2; axis >= 0; --axis) {
    bias_sizes[axis] = sizes[axis];
    bias_strides[axis] = sizes[axis] == 1 && axis < 2 ? 0 : stride;
    stride *= sizes[axis];
  }
  const double rare = random.pick({0.0, 0.02, 0.6});
  for (int64_t i = 0; i < stride; ++i)
    bias.push_back(random.chance(rare)   ? (random.chance(0.8) ? -float(kInfinity) : -300.0f)
                   : random.chance(0.05) ? float(random.uniform(-9.0, 9.0))
                                         : float(random.uniform(-1.5, 1.5)));
  if (random.chance(0.5))
    for (int64_t b = 0; b < shape.batch; ++b)
      first_query.push_back(visibility.query_offset + random.integer(-3, shape.queries + 1));
}

void EditedCase::place(Visibility& visibility, Edit& edit) const {
  visibility.chunk = attention.visibility.chunk;
  visibility.query_offsets = query_offsets.empty() ? nullptr : query_offsets.data();
  if (bias.empty()) return;
  edit.key_bias = bias.data();
  std::copy_n(bias_strides, 3, edit.bias_strides);
  edit.bias_slots = bias_slots;
  edit.first_query = first_query.empty() ? nullptr : first_query.data();
}

AttentionProblem EditedCase::problem() {
  AttentionProblem problem = attention.problem();
  problem.edit = {};
  if (boosts) {
    problem.edit = attention.edit();
    problem.edit.shared_rows = shared_rows;
    problem.edit.rule = rule;
  }
  place(problem.visibility, problem.edit);
  return problem;
}

ReceivedProblem EditedCase::received_problem(std::vector<float>& received) const {
  ReceivedProblem problem = attention.received_problem(received);
  place(problem.visibility, problem.edit);
  return problem;
}

std::string EditedCase::describe() const {
  std::ostringstream text;
  text << attention.describe() << (boosts ? " rule " : " no rule ") << int(rule) << (shared_rows ? " shared" : "")
       << " capacity " << attention.capacity << (query_offsets.empty() ? "" : " query_offsets") << " chunk "
       << attention.visibility.chunk;
  if (!bias.empty())
    text << " bias [" << bias_sizes[0] << ", " << bias_sizes[1] << ", " << bias_slots << "]"
         << (first_query.empty() ? "" : " first_query");
  return text.str();
}

EditedRow edited_row(const AttentionProblem& problem, int64_t b, int64_t h, int64_t i) {
  const Shape& shape = problem.shape;
  const Edit& edit = problem.edit;
  const int64_t keys = shape.keys, key_head = h / (shape.heads / shape.key_heads);
  const double scale = problem.scoring.scale, cap = problem.scoring.softcap;
  const bool reached = edit.first_query == nullptr || slot_of(problem.visibility, b, i) >= edit.first_query[b];
  EditedRow row;
  row.scores.assign(size_t(keys), 0.0);
  row.weights.assign(size_t(keys), 0.0);
  row.seen.assign(size_t(keys), false);
  row.marked.assign(size_t(keys), false);
  row.biased.assign(size_t(keys), false);
  std::vector<double> biased(size_t(keys), -kInfinity);
  double largest_error = 0.0, largest_size = 0.0;
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t slot = problem.visibility.key_offset + j;
    row.biased[size_t(j)] = reached && edit.key_bias != nullptr && slot < edit.bias_slots;
    const double bias = row.biased[size_t(j)] ? bias_of(edit, b, h, slot) : 0.0;
    row.seen[size_t(j)] = sees(problem.visibility, b, h, i, j) && bias != -kInfinity;
    if (edit.indices != nullptr) {
      const int64_t list = (b * shape.heads + h) * (edit.shared_rows ? 1 : shape.queries) + (edit.shared_rows ? 0 : i);
      const int32_t* slots = edit.indices + list * edit.capacity;
      row.marked[size_t(j)] = std::find(slots, slots + edit.counts[list], slot) != slots + edit.counts[list];
    }
    if (!row.seen[size_t(j)]) continue;
    row.any = true;
    double product = 0.0, size = 0.0;
    for (int64_t d = 0; d < shape.width; ++d) {
      const double term =
          element(problem.query, problem.dtype, b, h, i, d) * element(problem.key, problem.dtype, b, key_head, j, d);
      product += term;
      size += std::fabs(term);
    }
    const double score = cap > 0.0 ? cap * std::tanh(scale * product / cap) : scale * product;
    size *= std::fabs(scale);
    row.scores[size_t(j)] = score;
    biased[size_t(j)] = score + bias;
    // What is far below the others weighs nothing, however it is rounded.
    const double of_bias = bias < -100.0 ? 0.0 : 4.0 * kRounding * std::fabs(bias);
    largest_error = std::max(largest_error, sum_error(shape.width) * size + 2.0 * cut_off_error(shape.width) * size +
                                                8.0 * kRounding * (std::fabs(score) + cap) + of_bias);
    largest_size = std::max(largest_size, std::fabs(score) + (bias < -100.0 ? 0.0 : std::fabs(bias)));
  }
  row.lse = row.returned_lse = -kInfinity;
  if (!row.any) return row;
  const double sink = problem.scoring.sinks != nullptr ? double(problem.scoring.sinks[h]) : -kInfinity;
  const double top = std::max(sink, *std::max_element(biased.begin(), biased.end()));
  double sum = std::exp(sink - top);
  for (const double score : biased) sum += std::exp(score - top);
  row.lse = top + std::log(sum);
  row.rest = std::exp(sink - row.lse);
  for (int64_t j = 0; j < keys; ++j) {
    const double weight = std::exp(biased[size_t(j)] - row.lse);
    row.weights[size_t(j)] = weight;
    (row.marked[size_t(j)] ? row.mass : row.rest) += weight;
  }
  row.error = 2.0 * (largest_error + 4.0 * kRounding * std::max(largest_size, std::fabs(top))) + 8.0 * kRounding +
              sum_error(keys + 1);
  row.returned_lse = row.lse;
  if (edit.indices == nullptr) return row;
  const double gain = double(edit.gain[h]);
  switch (edit.rule) {
    case Rule::none:
      row.of_marked = 1.0 + gain;
      break;
    case Rule::row:
      row.of_others = 1.0 / (1.0 + gain * row.mass);
      row.of_marked = (1.0 + gain) * row.of_others;
      row.returned_lse += std::log(1.0 + gain * row.mass);
      break;
    case Rule::rest:
      if (row.rest < 1e-37) break;
      row.of_marked = 1.0 + gain;
      row.of_others = (row.rest - gain * row.mass) / row.rest;
      break;
  }
  return row;
}

EditedTruth edited_truth(const AttentionProblem& problem) {
  const Shape& shape = problem.shape;
  const double rounding = cuda_probability_rounding(problem.dtype);
  const double least = problem.dtype == DType::float16 ? 0x1p-25 : 0.0;
  EditedTruth truth;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t i = 0; i < shape.queries; ++i) {
        EditedRow row = edited_row(problem, b, h, i);
        const Edit& edit = problem.edit;
        const double gain = edit.indices != nullptr ? double(edit.gain[h]) : 0.0;
        const bool row_rule = edit.indices != nullptr && edit.rule == Rule::row, rest = edit.rule == Rule::rest;
        // A normalised row is divided by rounded probabilities.
        const double of_divisor =
            row_rule ? (1.0 + 2.0 * std::fabs(gain)) * row.mass * row.of_others * (rounding + row.error) : 0.0;
        truth.lse.push_back({row.returned_lse, row.error + of_divisor + 4.0 * kRounding * std::fabs(row.returned_lse)});
        for (int64_t d = 0; d < shape.value_width; ++d) {
          double value = 0.0, size = 0.0, of_rest = 0.0, unweighted = 0.0;
          for (int64_t j = 0; j < shape.keys; ++j) {
            if (!row.seen[size_t(j)]) continue;
            const double v = element(problem.value, problem.dtype, b, h / (shape.heads / shape.key_heads), j, d);
            const double plain = row.weights[size_t(j)] * v;
            value += plain * (row.marked[size_t(j)] ? row.of_marked : row.of_others);
            // Strengthening rounds once more.
            size += std::fabs(plain * (row.marked[size_t(j)] ? 2.0 * row.of_marked : row.of_others));
            if (!row.marked[size_t(j)]) of_rest += std::fabs(plain);
            unweighted += std::fabs(v);
          }
          double error = (row.error + rounding + of_divisor + cut_off_error(shape.keys)) * size + least * unweighted;
          // What the others share moves with the mass of the outliers.
          if (rest && row.rest > 0.0)
            error += std::fabs(1.0 + gain) * row.mass * 2.0 * (row.error + 8.0 * kRounding) * of_rest +
                     std::fabs(gain) * row.mass / row.rest * (row.error + rounding) * of_rest;
          truth.output.push_back({value, stored(problem.dtype, value, error)});
        }
        truth.rows.push_back(std::move(row));
      }
  return truth;
}

std::vector<Near> edited_received(const ReceivedProblem& problem) {
  AttentionProblem rows;
  rows.shape = problem.shape;
  rows.dtype = problem.dtype;
  rows.query = problem.query;
  rows.key = problem.key;
  rows.visibility = problem.visibility;
  rows.scoring = problem.scoring;
  rows.edit = problem.edit;
  const Shape& shape = problem.shape;
  std::vector<Near> received;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      std::vector<double> sums(size_t(shape.keys), 0.0), errors(size_t(shape.keys), 0.0), seen(size_t(shape.keys), 0.0);
      for (int64_t i = 0; i < shape.queries; ++i) {
        const EditedRow row = edited_row(rows, b, h, i);
        for (int64_t j = 0; j < shape.keys; ++j) {
          if (!row.seen[size_t(j)]) continue;
          const double weight = row.weights[size_t(j)];
          sums[size_t(j)] += weight;
          errors[size_t(j)] +=
              weight * (2.0 * row.error + 4.0 * kRounding * std::fabs(row.lse) + sum_error(shape.queries)) + 1e-37;
          seen[size_t(j)] += 1.0;
        }
      }
      for (size_t j = 0; j < size_t(shape.keys); ++j) {
        const double mean = sums[j] / std::max(seen[j], 1.0);
        received.push_back({mean, stored(DType::float32, mean, errors[j] / std::max(seen[j], 1.0))});
      }
    }
  return received;
}

EditedGradients edited_gradients(const GradientProblem& problem, const int64_t (&bias_sizes)[3]) {
  AttentionProblem rows;
  rows.shape = problem.shape;
  rows.dtype = problem.dtype;
  rows.query = problem.query;
  rows.key = problem.key;
  rows.value = problem.value;
  rows.visibility = problem.visibility;
  rows.scoring = problem.scoring;
  rows.edit = problem.edit;
  const Shape& shape = problem.shape;
  const Edit& edit = problem.edit;
  const DType dtype = problem.dtype;
  const bool received = problem.grad_received != nullptr;
  const int64_t group = shape.heads / shape.key_heads, keys = shape.keys, width = shape.width,
                value_width = received ? 0 : shape.value_width;
  const double rounding = cuda_probability_rounding(dtype), least = dtype == DType::float16 ? 0x1p-25 : 0.0;
  const double cap = problem.scoring.softcap;
  std::vector<Sum> query(size_t(shape.batch * shape.heads * shape.queries * width));
  std::vector<Sum> key(size_t(shape.batch * shape.key_heads * keys * width));
  std::vector<Sum> value(size_t(shape.batch * shape.key_heads * keys * value_width));
  std::vector<Sum> gains(size_t(shape.heads)), sinks(size_t(shape.heads));
  std::vector<Sum> bias(size_t(bias_sizes[0] * bias_sizes[1] * bias_sizes[2]));

  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t h = 0; h < shape.heads; ++h) {
      std::vector<EditedRow> all;
      std::vector<double> seen_by(size_t(keys), 0.0);
      for (int64_t i = 0; i < shape.queries; ++i) {
        all.push_back(edited_row(rows, b, h, i));
        for (size_t j = 0; j < size_t(keys); ++j) seen_by[j] += all.back().seen[j];
      }
      for (int64_t i = 0; i < shape.queries; ++i) {
        const EditedRow& row = all[size_t(i)];
        if (!row.any) continue;
        const int64_t index = (b * shape.heads + h) * shape.queries + i, key_head = h / group;
        const double gain = edit.indices != nullptr ? double(edit.gain[h]) : 0.0, m = row.mass, r = row.rest;
        const bool plain = edit.indices == nullptr, rest = !plain && edit.rule == Rule::rest && r >= 1e-37;
        const bool row_rule = !plain && edit.rule == Rule::row;
        const double upstream_lse = problem.grad_lse != nullptr ? double(problem.grad_lse[index]) : 0.0;
        const double a = row.of_others;
        // Gradients of the weights by values, their errors, and sums along the row.
        std::vector<double> dp(size_t(keys), 0.0), dp_error(size_t(keys), 0.0), dp_size(size_t(keys), 0.0);
        double along = 0.0, along_marked = 0.0, others_size = 0.0, others_error = 0.0, along_size = 0.0;
        for (int64_t j = 0; j < keys; ++j) {
          if (!row.seen[size_t(j)]) continue;
          double size = 0.0;
          if (received) {
            dp[size_t(j)] = double(problem.grad_received[(b * shape.heads + h) * keys + j]) / seen_by[size_t(j)];
            size = std::fabs(dp[size_t(j)]);
          }
          for (int64_t d = 0; d < value_width; ++d) {
            const double term =
                element(problem.grad_output, dtype, b, h, i, d) * element(problem.value, dtype, b, key_head, j, d);
            dp[size_t(j)] += term;
            size += std::fabs(term);
          }
          dp_size[size_t(j)] = size;
          dp_error[size_t(j)] = (sum_error(value_width + 1) + cut_off_error(value_width)) * size;
          const double p = row.weights[size_t(j)];
          along += p * dp[size_t(j)];
          along_size += p * size;
          if (row.marked[size_t(j)]) {
            along_marked += p * dp[size_t(j)];
          } else {
            others_size += p * size;
            others_error += p * dp_error[size_t(j)];
          }
        }
        // c of the chain rule: of the marked entries' mass, which a and b depend on.
        double c = 0.0, of_gain = 0.0;
        if (row_rule) {
          c = -gain * a * a * (along + gain * along_marked) + upstream_lse * gain * a;
          of_gain = a * along_marked - m * a * a * (along + gain * along_marked) + upstream_lse * m * a;
        } else if (rest) {
          c = -gain / r * ((along - along_marked) / r);
          of_gain = along_marked - m * (along - along_marked) / r;
        } else if (!plain && edit.rule == Rule::none) {
          of_gain = along_marked;
        }
        const auto of_weight = [&](size_t j) {
          return (row.marked[j] ? row.of_marked : a) * dp[j] + (row.marked[j] ? c : 0.0);
        };
        double mean = 0.0;
        for (size_t j = 0; j < size_t(keys); ++j)
          if (row.seen[j]) mean += row.weights[j] * of_weight(j);
        // How far delta may be: it comes of the output as it was stored.
        double delta = 0.0, delta_error = 0.0;
        for (int64_t d = 0; d < value_width; ++d) {
          const double dy = element(problem.grad_output, dtype, b, h, i, d),
                       y = element(problem.output, dtype, b, h, i, d);
          delta += dy * y;
          delta_error += std::fabs(dy) * (2.0 * stored(dtype, y, 0.0) + sum_error(value_width) * std::fabs(y));
        }
        const double error = 2.0 * row.error + 8.0 * kRounding * (1.0 + std::fabs(row.returned_lse));
        if (received) delta = along, delta_error = along_size * (error + sum_error(keys));
        delta -= upstream_lse;
        delta_error += 4.0 * kRounding * std::fabs(delta);
        const double others = r > 0.0 ? others_size / r : 0.0;
        const double others_mean_error =
            r > 0.0 ? others_error / r + others * (2.0 * error + sum_error(keys) + cut_off_error(keys)) : 0.0;

        for (int64_t j = 0; j < keys; ++j) {
          const size_t at = size_t(j);
          if (!row.seen[at]) continue;
          const double p = row.weights[at];
          const double of_score = p * (of_weight(at) - mean + upstream_lse);
          const double share = rest ? std::fabs(gain) * (row.marked[at] ? 1.0 : m / r) : 0.0;
          const double factor = rest && !row.marked[at] ? 1.0 + share : std::fabs(row.marked[at] ? row.of_marked : a);
          const double delta_factor = row_rule ? factor : 1.0;
          const double size = factor * dp_size[at] + delta_factor * std::fabs(delta) + share * others;
          const double of_error = p * (factor * dp_error[at] + delta_factor * delta_error + share * others_mean_error +
                                       2.0 * (error + 8.0 * kRounding) * size) +
                                  1e-36;
          const double tanh = cap > 0.0 ? row.scores[at] / cap : 0.0, slope = 1.0 - tanh * tanh;
          const double slope_error =
              cap > 0.0 ? 2.0 * std::fabs(tanh) * (row.error / cap + 4.0 * kRounding) + 4.0 * kRounding : 0.0;
          const double gradient = of_score * slope;
          const double gradient_error =
              of_error * slope + p * size * slope_error + rounding * std::fabs(gradient) + least;
          for (int64_t d = 0; d < width; ++d) {
            const double k = element(problem.key, dtype, b, key_head, j, d),
                         q = element(problem.query, dtype, b, h, i, d);
            query[size_t(index * width + d)].add(gradient * k, gradient_error * std::fabs(k));
            key[size_t(((b * shape.key_heads + key_head) * keys + j) * width + d)].add(gradient * q,
                                                                                       gradient_error * std::fabs(q));
          }
          const double weight = p * (row.marked[at] ? row.of_marked : a);
          for (int64_t d = 0; d < value_width; ++d) {
            const double dy = element(problem.grad_output, dtype, b, h, i, d);
            value[size_t(((b * shape.key_heads + key_head) * keys + j) * value_width + d)].add(
                weight * dy,
                (p * factor * 2.0 * (error + 8.0 * kRounding) + rounding * std::fabs(weight) + least) * std::fabs(dy));
          }
          if (row.biased[at] && !bias.empty()) {
            const int64_t slot = problem.visibility.key_offset + j;
            const int64_t of_batch = bias_sizes[0] == 1 ? 0 : b, of_head = bias_sizes[1] == 1 ? 0 : h;
            bias[size_t((of_batch * bias_sizes[1] + of_head) * bias_sizes[2] + slot)].add(of_score, of_error);
          }
        }
        double marked_size = 0.0, marked_error = 0.0;
        for (size_t j = 0; j < size_t(keys); ++j)
          if (row.marked[j] && row.seen[j]) {
            const double of_delta = row_rule ? a : 0.0;
            marked_size += row.weights[j] * (dp_size[j] + of_delta * std::fabs(delta));
            marked_error += row.weights[j] * (dp_error[j] + of_delta * delta_error);
          }
        if (rest) {
          marked_size += m * others;
          marked_error += m * others_mean_error;
        }
        gains[size_t(h)].add(
            of_gain,
            marked_error + marked_size * 2.0 * (error + 8.0 * kRounding + sum_error(keys) + cut_off_error(keys)));
        if (problem.scoring.sinks != nullptr) {
          const double share = std::exp(double(problem.scoring.sinks[h]) - row.lse);
          const double of_sink = share * (upstream_lse - mean);
          const double moved = rest ? std::fabs(gain) * m / r : 0.0;
          sinks[size_t(h)].add(of_sink, share * (delta_error + moved * others_mean_error +
                                                 2.0 * error * (std::fabs(delta) + moved * others)));
        }
      }
    }
  const auto all = [](const std::vector<Sum>& sums, DType of, double factor, int64_t terms) {
    std::vector<Near> out;
    for (const Sum& sum : sums) out.push_back(sum.near(of, factor, terms));
    return out;
  };
  const double scale = problem.scoring.scale;
  const int64_t rows_of_key = shape.queries * group, rows_of_head = shape.batch * shape.queries;
  return {all(query, dtype, scale, keys),      all(key, dtype, scale, rows_of_key),
          all(value, dtype, 1.0, rows_of_key), all(gains, DType::float32, 1.0, 1),
          all(sinks, DType::float32, 1.0, 1),  all(bias, DType::float32, 1.0, rows_of_head)};
}

}  // namespace attnrb::testing
