// What the backward pass knows of each row before it starts.
#pragma once

#include "gradient_engine.h"
#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr double kLog2EDouble = 1.44269504088896340736;

// Of a row whose outliers share with the others: the mass of those, that mass times their mean gradient of a weight,
// and the mass of its outliers.
struct RestSums {
  float mass = 0.0f, product = 0.0f, marked = 0.0f;
};

// The same, digested: see Note: [Gradients of shared rows].
struct SharedRow {
  float factor;        // a
  float strength;      // 1 + g
  float marked_delta;  // h + g q
  float mean;          // q
  bool shares;         // the others have some mass
};

template <class Input>
class GradientRows {
 public:
  enum : uint8_t { kActive = 1, kFinite = 2 };

  GradientRows(const GradientProblem& problem, const RowRules& rules)
      : problem_(problem), shape_(problem.shape), rules_(rules) {}

  float* references = nullptr;                // [rows, 2]: LSE * log2(e), and what one float cannot hold of it
  float* deltas = nullptr;                    // [rows]
  uint8_t* flags = nullptr;                   // [rows]
  int32_t *lows = nullptr, *highs = nullptr;  // [rows]: between which keys each sees any; none where it has no part
  float* shares = nullptr;      // [B, H, N], of received_attention: the gradient of each weight in a column
  RestSums* rests = nullptr;    // [rows], under rule rest, and
  SharedRow* shared = nullptr;  // [rows]

  bool received() const { return problem_.grad_received != nullptr; }
  bool parts() const { return problem_.edit.indices != nullptr && problem_.edit.rule == Rule::rest; }

  void carve(Carver& carver) {
    const int64_t heads = shape_.batch * shape_.heads, rows = heads * shape_.queries;
    references = carver.take<float>(2 * rows);
    deltas = carver.take<float>(rows);
    flags = carver.take<uint8_t>(rows);
    lows = carver.take<int32_t>(rows);
    highs = carver.take<int32_t>(rows);
    shares = carver.take<float>(received() ? heads * shape_.keys : 0);
    rests = carver.take<RestSums>(parts() ? rows : 0);
    shared = carver.take<SharedRow>(parts() ? rows : 0);
  }

  bool active(int64_t row) const { return flags[row] & kActive; }
  // True of a row without a part, whatever it holds.
  bool finite(int64_t first, int64_t end) const {
    uint8_t all = kFinite;
    for (int64_t row = first; row < end; ++row) all &= flags[row];
    return all != 0;
  }

  // A row that sees nothing, or whose output nothing depends on, has no part in any gradient: whatever it holds, NaN
  // included, is not read again.
  Status prepare(int64_t batch, int64_t head, int64_t first, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t query = first; query < end; ++query) {
      const int64_t row = (batch * shape_.heads + head) * shape_.queries + query;
      ask_for(batch, head, smaller(query + kAhead, end - 1));
      if (problem_.edit.indices != nullptr) {
        const Status status = check_outliers(batch, head, query);
        if (status != Status::ok) return status;
      }
      float delta = 0.0f;
      bool active = true, finite = row_is_finite(problem_.query, batch, head, query, shape_.width);
      if (!received()) {
        const float grad_lse = problem_.grad_lse != nullptr ? problem_.grad_lse[row] : 0.0f;
        active = dot_output(batch, head, query, delta) || grad_lse != 0.0f;
        delta -= grad_lse;
        finite = finite && row_is_finite(problem_.grad_output, batch, head, query, shape_.value_width);
      }
      if (problem_.lse[row] == -kInfinity) active = false;
      // In two floats: rounded to one, a log-sum-exp of 20 would cost every weight of its row 1e-6.
      const double reference = double(problem_.lse[row]) * kLog2EDouble;
      references[2 * row] = float(reference);
      references[2 * row + 1] = active ? float(reference - double(references[2 * row])) : 0.0f;
      deltas[row] = delta;
      flags[row] = uint8_t((active ? kActive : 0) | (finite || !active ? kFinite : 0));
      const Interval seen = visible_interval(problem_.visibility, batch, query, shape_.keys_of(batch));
      lows[row] = active ? int32_t(seen.low) : 0;
      highs[row] = active ? int32_t(seen.high) : 0;
      if (parts()) rests[row] = RestSums();
    }
    return Status::ok;
  }

  // shares[b, h, j] = grad_received_j / number of queries that see key j. `bias_values` has room for all keys.
  void share(int64_t batch, int64_t head, float* bias_values) {
    const int64_t keys = shape_.keys;
    float* share = shares + (batch * shape_.heads + head) * keys;
    const float* grad = problem_.grad_received + (batch * shape_.heads + head) * keys;
    BiasBlock bias;
    if (rules_.bias.any()) bias = rules_.bias.block(batch, head, 0, round_up(keys, Vec::width), bias_values);
    // Counts up to 2^24 are exact; with more queries the rounding is one of the quotient's.
    for (int64_t j = 0; j < keys; ++j) share[j] = 0.0f;
    for (int64_t query = 0; query < shape_.queries; ++query) {
      Row row;
      rules_.start(row, batch, head, query, &bias);
      if (counts_singly(bias)) {
        for (int64_t j = row.low; j < row.high; ++j) share[j] += rules_.visible(row, j) ? 1.0f : 0.0f;
      } else if (row.low < row.high) {  // differences, summed up below
        share[row.low] += 1.0f;
        if (row.high < keys) share[row.high] -= 1.0f;
      }
    }
    if (!counts_singly(bias))
      for (int64_t j = 1; j < keys; ++j) share[j] += share[j - 1];
    for (int64_t j = 0; j < keys; ++j) share[j] = share[j] > 0.0f ? grad[j] / share[j] : 0.0f;
  }

  // What the sums over all tiles say of the rows [first, end) of a head: deltas become those of the others.
  void settle(int64_t batch, int64_t head, int64_t first, int64_t end) {
    for (int64_t query = first; query < end; ++query) {
      const int64_t row = (batch * shape_.heads + head) * shape_.queries + query;
      if (!active(row)) continue;
      const float gain = problem_.edit.gain[head], delta = deltas[row];
      RestSums sums = rests[row];
      if (problem_.scoring.sinks != nullptr)
        sums.mass += float(std::exp(double(problem_.scoring.sinks[head]) - double(problem_.lse[row])));
      if (sums.mass == 0.0f) {
        shared[row] = {1.0f, 1.0f, delta, 0.0f, false};
        continue;
      }
      // A larger ratio would leave float32's range; weights it multiplies are as small.
      constexpr float kLargest = 1e34f;
      const float mean = sums.product / sums.mass, ratio = sums.marked / sums.mass;
      const float taken = gain * (ratio > kLargest ? kLargest : ratio);
      shared[row] = {1.0f - taken, 1.0f + gain, delta + gain * mean, mean, true};
      deltas[row] = delta - taken * mean;
    }
  }

 private:
  bool counts_singly(const BiasBlock& bias) const { return problem_.visibility.mask != nullptr || bias.removes; }

  // Asks for what prepare() is going to read: rows cross into a new page every few, where processors do not look ahead.
  static constexpr int64_t kAhead = 12;
  void ask_for(int64_t batch, int64_t head, int64_t row) const {
    const auto ask = [&](const View& view, int64_t width) {
      const char* at = reinterpret_cast<const char*>(row_of<Input>(view, batch, head, row));
      for (int64_t byte = 0; byte < width * int64_t(sizeof(Input)); byte += 64) __builtin_prefetch(at + byte);
    };
    ask(problem_.query, shape_.width);
    if (received()) return;
    ask(problem_.grad_output, shape_.value_width);
    ask(problem_.output, shape_.value_width);
  }

  static bool row_is_finite(const View& view, int64_t batch, int64_t head, int64_t row, int64_t width) {
    return all_finite(row_of<Input>(view, batch, head, row), 0, view.strides[3], 1, width);
  }

  // delta = dy . y; returns whether dy is anything but zeros.
  bool dot_output(int64_t batch, int64_t head, int64_t query, float& delta) const {
    const Input *grad = row_of<Input>(problem_.grad_output, batch, head, query),
                *output = row_of<Input>(problem_.output, batch, head, query);
    const int64_t grad_stride = problem_.grad_output.strides[3], stride = problem_.output.strides[3];
    Vec sum = Vec::zero();
    uint32_t zero = ~0u;
    for (int64_t d = 0; d < shape_.value_width; d += Vec::width) {
      const int n = int(shape_.value_width - d < Vec::width ? shape_.value_width - d : Vec::width);
      const Vec g = load_strided(grad + d * grad_stride, grad_stride, n);
      zero &= Vec::bits(Vec::both(Vec::greater_equal(g, Vec::zero()), Vec::greater_equal(Vec::zero(), g)));
      sum = Vec::fma(g, load_strided(output + d * stride, stride, n), sum);
    }
    const bool nonzero = (~zero & ((1u << Vec::width) - 1u)) != 0;
    delta = nonzero ? sum.sum() : 0.0f;
    return nonzero;
  }

  Status check_outliers(int64_t batch, int64_t head, int64_t query) const {
    const Edit& edit = problem_.edit;
    const int64_t list = edit.list(shape_.heads, shape_.queries, batch, head, query);
    const int32_t *slots = edit.indices + list * edit.capacity, count = edit.counts[list];
    if (count < 0 || count > edit.capacity) return Status::outlier_count;
    for (int32_t c = 1; c < count; ++c)
      if (slots[c] <= slots[c - 1]) return Status::unsorted_outliers;
    return Status::ok;
  }

  const GradientProblem& problem_;
  const Shape& shape_;
  const RowRules& rules_;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
