// One row of a tile of the backward: its scores become weights, gradients of weights become gradients of scores.
//
// Note: [Gradients of shared rows]
// Rule rest (Note: [Edited attention] in edit.h) in its stable form: with h_i = dy_i . y_i - dLSE_i, m' = 1 - m the
// mass of the others (a sink among them), q_i = sum over the others of P dp / m', a_i = 1 - g m / m',
//   others    dt_ij = P_ij (a_i dp_ij - (h_i - (1 - a_i) q_i))        dV_j += a_i P_ij dy_i
//   outliers  dt_ij = P_ij ((1 + g) dp_ij - (h_i + g q_i))            dV_j += (1 + g) P_ij dy_i
//   dg = sum over outliers of P_ij (dp_ij - q_i)
// where nothing is divided by a difference of masses. A pass of its own adds up m', m and m' q before. A sink moves as
// one of the others whose dp is 0.
#pragma once

#include "gradient_products.h"
#include "gradient_rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Outliers of one row in a tile, with what the dense pass overwrites.
struct TileMarks {
  int32_t* keys;
  float *weight_gradients, *slopes, *scores;
  int32_t count;

  static TileMarks carve(Carver& carver, int64_t keys) {
    TileMarks marks{};
    marks.keys = carver.take<int32_t>(keys);
    marks.weight_gradients = carver.take<float>(keys);
    marks.slopes = carver.take<float>(keys);
    marks.scores = carver.take<float>(keys);
    return marks;
  }
};

// A row of a tile. Numbers of keys are counted from the first key of the tile; scores lie where Engine::Places says, a
// vector of them in order, and whole groups of key_granule keys one behind the other.
struct TileRow {
  const Row& row;
  int64_t batch, head, query;
  int64_t index;  // of the row among all rows
  int64_t key;    // position of the tile's first key
  KeyRange range;
  float *scores, *products;       // products: gradients of weights, then of scores
  const float* weight_gradients;  // the same, but for received_attention
  float* bias_sums;               // of the tile's keys, where the row has a bias
};

template <class Engine>
class GradientScores {
  using Input = typename Engine::Input;
  using Places = typename Engine::Places;

 public:
  GradientScores(const GradientProblem& problem, const RowRules& rules, const GradientRows<Input>& data)
      : problem_(problem), rules_(rules), data_(data) {}

  // Asks for the outliers that a row's tile is going to read.
  ATTNRB_INLINE void prefetch(int64_t batch, int64_t head, int64_t query) const {
    const Edit& edit = problem_.edit;
    if (edit.indices != nullptr) __builtin_prefetch(edit.indices + list_of(batch, head, query) * edit.capacity);
  }

  // Returns the row's share of the gain's gradient.
  double differentiate(const TileRow& tile, TileMarks& marks) const {
    const bool shares = data_.parts();
    hide(tile);
    marks.count = 0;
    if (problem_.edit.indices != nullptr) gather(tile, marks, shares);
    if (tile.row.bias == nullptr)
      choose<false>(tile, shares);
    else
      choose<true>(tile, shares);
    if (marks.count == 0) return 0.0;
    return shares ? share(tile, marks) : strengthen(tile, marks);
  }

  // The part of sum_j P_ij dW_ij that this tile holds.
  float row_delta(const TileRow& tile) const {
    hide(tile);
    Vec sum = Vec::zero();
    for_weights(tile, [&](int64_t j, Vec weight, typename Vec::Mask hidden) {
      sum = sum + Vec::select(hidden, Vec::zero(), weight * Vec::load(tile.weight_gradients + Places::place(j)));
    });
    return sum.sum();
  }

  // The tile's part of what Note: [Gradients of shared rows] wants to know of a row.
  RestSums rest_sums(const TileRow& tile, TileMarks& marks) const {
    hide(tile);
    marks.count = 0;
    gather(tile, marks, true);
    Vec mass = Vec::zero(), product = Vec::zero();
    for_weights(tile, [&](int64_t j, Vec weight, typename Vec::Mask hidden) {
      mass = mass + Vec::select(hidden, Vec::zero(), weight);
      const Vec upstream = Vec::load(tile.weight_gradients + Places::place(j));
      product = product + Vec::select(hidden, Vec::zero(), weight * upstream);
    });
    float marked = 0.0f;
    for (int32_t c = 0; c < marks.count; ++c) marked += marked_weight(tile, marks.scores[c]);
    return {mass.sum(), product.sum(), marked};
  }

 private:
  int64_t list_of(int64_t batch, int64_t head, int64_t query) const {
    return problem_.edit.list(problem_.shape.heads, problem_.shape.queries, batch, head, query);
  }

  void hide(const TileRow& tile) const {
    const int64_t first = tile.range.first, count = tile.range.last - first;
    float* const scores = tile.scores + Places::place(first);
    rules_.template cap<Places>(scores, count);
    if (tile.range.partial || RowRules::removes(tile.row))
      rules_.template hide<Places>(tile.row, scores, tile.key + first, count, count);
  }

  // Calls each(j, weights, mask of those that the row does not see).
  template <class Each>
  ATTNRB_INLINE void for_weights(const TileRow& tile, Each&& each) const {
    const Vec to_log2 = Vec::set(tile.row.to_log2), reference = Vec::set(data_.references[2 * tile.index]);
    const Vec rest = Vec::set(data_.references[2 * tile.index + 1]), factor = Vec::set(rules_.score_factor());
    const float* bias = tile.row.bias != nullptr ? tile.row.bias->values : nullptr;
    for (int64_t j = tile.range.first; j < tile.range.last; j += Vec::width) {
      const Vec score = Vec::load(tile.scores + Places::place(j));
      const Vec biased = bias != nullptr ? Vec::fma(score, factor, Vec::load(bias + j)) : score;
      const Vec exponent = Vec::fms(biased, to_log2, reference) - rest;
      each(j, exp2<Engine::exp2_degree>(Vec::max(Vec::set(-200.0f), exponent)),
           Vec::greater_equal(Vec::set(-kInfinity), score));
    }
  }

  template <bool Biased>
  ATTNRB_INLINE void choose(const TileRow& tile, bool shares) const {
    if (shares)
      differentiate_row<true, true, Biased, true>(tile);
    else if (problem_.scoring.softcap > 0)
      differentiate_row<true, true, Biased, false>(tile);
    else if (tile.range.partial || RowRules::removes(tile.row))
      differentiate_row<true, false, Biased, false>(tile);
    else
      differentiate_row<false, false, Biased, false>(tile);
  }

  template <bool Partial, bool Capped, bool Biased, bool Shares>
  ATTNRB_INLINE void differentiate_row(const TileRow& tile) const {
    float *scores = tile.scores, *products = tile.products;
    const int64_t index = tile.index;
    const Vec to_log2 = Vec::set(tile.row.to_log2), reference = Vec::set(data_.references[2 * index]);
    const Vec rest = Vec::set(data_.references[2 * index + 1]);
    const Vec delta = Vec::set(data_.deltas[index]);
    const float softcap = problem_.scoring.softcap;
    const Vec by_cap = Vec::set(Capped && softcap > 0 ? 1.0f / softcap : 0.0f), one = Vec::set(1.0f);
    const Vec factor = Vec::set(Biased ? rules_.score_factor() : 1.0f);
    const Vec share = Vec::set(Shares ? data_.shared[index].factor : 1.0f);
    for (int64_t j = tile.range.first; j < tile.range.last; j += Vec::width) {
      const int64_t at = Places::place(j);
      const Vec score = Vec::load(scores + at);
      Vec biased = score;
      if constexpr (Biased) biased = Vec::fma(score, factor, Vec::load(tile.row.bias->values + j));
      const Vec exponent = Vec::fms(biased, to_log2, reference) - rest;
      Vec weight = exp2<Engine::exp2_degree>(Partial ? Vec::max(Vec::set(-200.0f), exponent) : exponent);
      const Vec upstream = Vec::load(tile.weight_gradients + at);
      Vec gradient = weight * (Shares ? Vec::fms(upstream, share, delta) : upstream - delta);
      if (Shares) weight = weight * share;
      const typename Vec::Mask hidden = Vec::greater_equal(Vec::set(-kInfinity), score);
      if constexpr (Biased) {
        const Vec shown = Partial ? Vec::select(hidden, Vec::zero(), gradient) : gradient;
        (Vec::load(tile.bias_sums + j) + shown).store(tile.bias_sums + j);
      }
      if (Capped) {
        const Vec tanh = score * by_cap;
        gradient = gradient * (one - tanh * tanh);
      }
      if (Partial) {
        weight = Vec::select(hidden, Vec::zero(), weight);
        gradient = Vec::select(hidden, Vec::zero(), gradient);
      }
      weight.store(scores + at);
      gradient.store(products + at);
    }
  }

  // Notes the row's outliers in this tile. `lifts`: they are none of the others then, and their scores are hidden.
  void gather(const TileRow& tile, TileMarks& marks, bool lifts) const {
    const Edit& edit = problem_.edit;
    const int64_t list = list_of(tile.batch, tile.head, tile.query);
    const int32_t* slots = edit.indices + list * edit.capacity;
    const int64_t base = tile.key + problem_.visibility.key_offset;
    int32_t low = 0, high = edit.counts[list];
    const int32_t count = high;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (int64_t(slots[middle]) < base + tile.range.first)
        low = middle + 1;
      else
        high = middle;
    }
    for (; low < count; ++low) {
      const int64_t j = int64_t(slots[low]) - base;
      if (j >= tile.range.last) break;
      if (!rules_.visible(tile.row, tile.key + j)) continue;
      const int64_t at = Places::place(j);
      const float score = tile.scores[at];
      const float tanh = problem_.scoring.softcap > 0 ? score / problem_.scoring.softcap : 0.0f;
      const int32_t c = marks.count++;
      marks.keys[c] = int32_t(j);
      marks.weight_gradients[c] = tile.weight_gradients[at];
      marks.slopes[c] = 1.0f - tanh * tanh;
      if (!lifts) continue;
      marks.scores[c] = tile.row.bias == nullptr ? score : score * rules_.score_factor() + tile.row.bias->values[j];
      tile.scores[at] = -kInfinity;
    }
  }

  float marked_weight(const TileRow& tile, float score) const {
    const double exponent = double(score) * double(tile.row.to_log2) - double(data_.references[2 * tile.index]) -
                            double(data_.references[2 * tile.index + 1]);
    return float(std::exp2(exponent));
  }

  // The sparse part of rules none and row.
  double strengthen(const TileRow& tile, const TileMarks& marks) const {
    const float gain = problem_.edit.gain[tile.head], delta = data_.deltas[tile.index];
    double sum = 0.0;
    for (int32_t c = 0; c < marks.count; ++c) {
      const int64_t j = marks.keys[c], at = Places::place(j);
      const float weight = tile.scores[at], weight_gradient = marks.weight_gradients[c];
      if (problem_.edit.rule == Rule::row) {
        sum += double(weight) * (double(weight_gradient) - double(delta));
        if (tile.row.bias != nullptr) tile.bias_sums[j] += gain * weight * (weight_gradient - delta);
        tile.products[at] *= 1.0f + gain;
      } else {
        sum += double(weight) * double(weight_gradient);
        if (tile.row.bias != nullptr) tile.bias_sums[j] += gain * weight * weight_gradient;
        tile.products[at] += gain * weight * weight_gradient * marks.slopes[c];
      }
      tile.scores[at] = weight * (1.0f + gain);
    }
    return sum;
  }

  // The sparse part of rule rest.
  double share(const TileRow& tile, const TileMarks& marks) const {
    const SharedRow& shared = data_.shared[tile.index];
    double sum = 0.0;
    for (int32_t c = 0; c < marks.count; ++c) {
      const int64_t j = marks.keys[c], at = Places::place(j);
      const float weight = marked_weight(tile, marks.scores[c]), weight_gradient = marks.weight_gradients[c];
      const float gradient = weight * (shared.strength * weight_gradient - shared.marked_delta);
      if (shared.shares) sum += double(weight) * (double(weight_gradient) - double(shared.mean));
      if (tile.row.bias != nullptr) tile.bias_sums[j] += gradient;
      tile.products[at] = gradient * marks.slopes[c];
      tile.scores[at] = weight * shared.strength;
    }
    return sum;
  }

  const GradientProblem& problem_;
  const RowRules& rules_;
  const GradientRows<Input>& data_;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
