// The state of one query row while it walks over its keys: an online softmax in base 2 (and its outliers, marks.h).
//
// Note: [Online softmax in base 2]
// Scores are kept as t = score * log2(e), so that weights are 2^(t - m) / l with m a reference near the largest t so
// far and l = sum of 2^(t - m). m moves only when the maximum outgrows it by more than 8 (a factor of 256, harmless in
// float32 sums and bfloat16 products), which spares nearly all rescaling of the output row. log-sum-exp = ln(2)(m +
// log2 l).
//
// Note: [Scores with a bias]
// Without a bias, products stay as the engine left them, and the scale joins log2(e) in the exponent. A row that a bias
// reaches has its scores scaled as the bias is added, in the pass that looks for their maximum: one multiply-add. Its
// to_log2 is then log2(e) alone.
#pragma once

#include "../outliers.h"
#include "bias.h"
#include "marks.h"
#include "math.h"

namespace attnrb {
namespace ATTNRB_ISA {

// On cache lines of its own: threads work at neighbouring rows.
struct alignas(64) Row {
  float max = -kInfinity;  // m
  float sum = 0.0f;        // l; under rule rest without the outliers
  bool seen = false;       // some key was visible
  int32_t low = 0, high = 0;
  int64_t own = -1;                 // position of the query's own key
  const bool* mask = nullptr;       // its row of the boolean mask, or null
  const BiasBlock* bias = nullptr;  // of the block of keys at hand, or null where no bias reaches the row
  float to_log2 = kLog2E;           // of its finished scores
  Marks marks;
  Candidates found;
};

// A block of keys as a row meets it: its products with the keys from `key` on, of which `held` are keys and the rest,
// up to `count`, padding. Partial: the row may not see all of them.
struct BlockOfRow {
  int64_t key, count, held;
  bool partial;
  int64_t end() const { return key + held; }
};

// What every row of a problem has in common.
class RowRules {
 public:
  explicit RowRules(const AttentionProblem& problem)
      : marks(problem),
        bias(problem.edit, problem.visibility),
        problem_(problem),
        capped_(problem.scoring.softcap > 0),
        // A negative or zero scale cannot be applied after the maximum was taken: it goes into the query instead.
        query_factor_(problem.scoring.scale > 0   ? 1.0f
                      : problem.scoring.scale < 0 ? -1.0f
                                                  : 0.0f),
        scale_(problem.scoring.scale == 0 ? 1.0f : std::fabs(problem.scoring.scale)) {}

  const MarkRules marks;
  const KeyBias bias;

  float query_factor() const { return query_factor_; }
  // What takes a product, capped where there is a cap, to a score.
  float score_factor() const { return capped_ ? 1.0f : scale_; }

  // `block` is where the bias of the row's head will stand, block by block.
  Status start(Row& row, int64_t batch, int64_t head, int64_t query, const BiasBlock* block) const {
    const Visibility& visibility = problem_.visibility;
    const Interval interval = visible_interval(visibility, batch, query, problem_.shape.keys_of(batch));
    row.low = int32_t(interval.low);
    row.high = int32_t(interval.high);
    row.own = query_slot(visibility, batch, query) - visibility.key_offset;
    if (visibility.mask != nullptr)
      row.mask = visibility.mask + batch * visibility.mask_strides[0] + head * visibility.mask_strides[1] +
                 query * visibility.mask_strides[2];
    if (bias.reaches(batch, query))
      row.bias = block;
    else
      row.to_log2 = capped_ ? kLog2E : scale_ * kLog2E;
    if (problem_.scoring.sinks != nullptr) {
      row.max = problem_.scoring.sinks[head] * kLog2E;
      row.sum = 1.0f;
    }
    return marks.start(row.marks, batch, head, query);
  }

  // A key that the bias removes is not seen.
  bool visible(const Row& row, int64_t key) const {
    return key >= row.low && key < row.high &&
           (row.mask == nullptr || row.mask[key * problem_.visibility.mask_strides[3]]) &&
           !(removes(row) && row.bias->values[key - row.bias->key] == -kInfinity);
  }

  static bool removes(const Row& row) { return row.bias != nullptr && row.bias->removes; }

  // Products of a block of keys become scores, minus infinity where the row sees none: of the keys [key, key + count),
  // none behind the first `held`. Not partial: it sees all of them, unless the bias removes some.
  template <class Places = InOrder>
  ATTNRB_INLINE void finish_scores(const Row& row, float* scores, int64_t key, int64_t count, int64_t held,
                                   bool partial) const {
    cap<Places>(scores, count);
    if (row.bias != nullptr) add_bias<Places>(row, scores, key, count);
    if (partial || removes(row)) hide<Places>(row, scores, key, count, held);
  }

  // Of scores that lie as Places says: a vector of them is in order anywhere.
  template <class Places = InOrder>
  ATTNRB_INLINE void cap(float* scores, int64_t count) const {
    if (!capped_) return;
    const Vec inner = Vec::set(scale_ / problem_.scoring.softcap), outer = Vec::set(problem_.scoring.softcap);
    for (int64_t j = 0; j < count; j += Vec::width) {
      float* const at = scores + Places::place(j);
      (outer * tanh(Vec::load(at) * inner)).store(at);
    }
  }

  template <class Places = InOrder>
  ATTNRB_INLINE void hide(const Row& row, float* scores, int64_t key, int64_t count, int64_t held) const {
    const int64_t first = row.low - key, end = smaller(row.high - key, held);
    const Vec low = Vec::set(float(first)), high = Vec::set(float(end));
    const bool interval = row.mask == nullptr && !removes(row);
    for (int64_t j = 0; j < count; j += Vec::width) {
      if (interval && j >= first && j + Vec::width <= end) continue;
      const Vec lane = Vec::iota() + Vec::set(float(j));
      typename Vec::Mask shown = Vec::both(Vec::greater_equal(lane, low), Vec::greater(high, lane));
      if (row.mask != nullptr) shown = Vec::both(shown, mask_lanes(row, key + j));
      if (removes(row))
        shown = Vec::both(shown,
                          Vec::greater(Vec::load(row.bias->values + (key - row.bias->key) + j), Vec::set(-kInfinity)));
      float* const at = scores + Places::place(j);
      Vec::select(shown, Vec::load(at), Vec::set(-kInfinity)).store(at);
    }
  }

  // Whether a row sees all keys of a block as the engine left them, and no outlier is to be taken out of it, which is
  // true of nearly all rows of nearly all blocks.
  ATTNRB_INLINE bool whole(const Row& row, const BlockOfRow& of) const {
    return !of.partial && row.bias == nullptr && !lifts(row, of);
  }

  // One block of the online softmax: products become probabilities relative to row.max. `rescale` multiplies what the
  // row accumulated so far when row.max moves.
  template <class Engine, class Rescale>
  ATTNRB_INLINE void absorb_whole(Row& row, const BlockOfRow& of, float* scores,
                                  typename Engine::Probability* probabilities, Rescale&& rescale) const {
    cap<typename Engine::Places>(scores, of.count);
    absorb_scores<Engine, false, false>(row, of, scores, probabilities, rescale, [](int64_t, float) {});
  }

  // The same for rows that are not whole. Under rule rest take(place, weight) gets each outlier in place of the
  // probabilities.
  template <class Engine, class Rescale, class Take>
  ATTNRB_INLINE void absorb_other(Row& row, const BlockOfRow& of, float* scores,
                                  typename Engine::Probability* probabilities, Rescale&& rescale, Take&& take) const {
    if (!of.partial && !removes(row) && !lifts(row, of)) {
      cap<typename Engine::Places>(scores, of.count);
      absorb_scores<Engine, false, true>(row, of, scores, probabilities, rescale, take);
      return;
    }
    finish_scores<typename Engine::Places>(row, scores, of.key, of.count, of.held, of.partial);
    absorb_scores<Engine, true, false>(row, of, scores, probabilities, rescale, take);
  }

  // The sum over all weights of a row, before any is strengthened.
  float mass(const Row& row) const { return marks.parts() ? row.sum + row.marks.mass : row.sum; }

  // What the output row is divided by; 0 when the row saw no key.
  float denominator(const Row& row) const { return row.seen ? row.sum + row.marks.mass : 0.0f; }

  // What the caller asked to know of a row's softmax: the natural log-sum-exp, of the strengthened scores under rule
  // row; the reference and the sum, 0 where the row saw no key.
  void report(const Row& row, int64_t index) const {
    if (problem_.lse != nullptr)
      problem_.lse[index] = row.seen ? (row.max + std::log2(row.sum + row.marks.mass)) * kLn2 : -kInfinity;
    if (problem_.softmax != nullptr) {
      problem_.softmax[2 * index] = row.max;
      problem_.softmax[2 * index + 1] = row.seen ? row.sum : 0.0f;
    }
  }

  // Whether an outlier is to be taken out of a block.
  ATTNRB_INLINE bool lifts(const Row& row, const BlockOfRow& of) const {
    return row.marks.key < of.end() && marks.parts();
  }

  bool sees_any(const Row& row, int64_t key, int64_t count) const {
    for (int64_t j = key; j < key + count; ++j)
      if (visible(row, j)) return true;
    return false;
  }

  // Of finished scores. Partial: some are minus infinity. Biased: the bias is still to be added.
  template <class Engine, bool Partial, bool Biased, class Rescale, class Take>
  ATTNRB_INLINE void absorb_scores(Row& row, const BlockOfRow& of, float* scores,
                                   typename Engine::Probability* probabilities, Rescale&& rescale, Take&& take) const {
    using Places = typename Engine::Places;
    const int64_t key = of.key, count = of.count;
    constexpr int kStep = 2 * Vec::width;
    const Vec factor = Vec::set(Biased ? score_factor() : 1.0f);
    const float* values = Biased ? row.bias->values + (key - row.bias->key) : nullptr;
    const auto score = [&](float* at, int64_t j) {
      Vec each = Vec::load(at);
      if constexpr (Biased) {
        each = Vec::fma(each, factor, Vec::load(values + j));
        each.store(at);
      }
      return each;
    };
    Vec largest0 = score(scores, 0), largest1 = score(scores + Places::second, Vec::width);
    for (int64_t j = kStep; j < count; j += kStep) {
      float* const at = scores + Places::pair(j);
      largest0 = Vec::max(largest0, score(at, j));
      largest1 = Vec::max(largest1, score(at + Places::second, j + Vec::width));
    }
    const float block_max = Vec::max(largest0, largest1).max() * row.to_log2;
    // A maximum does not tell "sees none of these keys" from "sees only NaN", which must not end as zeros.
    if (Partial && block_max == -kInfinity && !sees_any(row, key, of.held)) {
      for (int64_t j = 0; j < count; j += kStep)
        Engine::store_probabilities(probabilities, j, Vec::zero(), Vec::zero());
      return;
    }
    row.seen = true;
    if (block_max > row.max + 8.0f || row.max == -kInfinity) {
      if (row.max != -kInfinity) {
        const float by = std::exp2(row.max - block_max);
        row.sum *= by;
        row.marks.mass *= by;
        rescale(by);
      } else {
        row.sum = 0.0f;  // a sink of minus infinity adds nothing
      }
      row.max = block_max;
    }
    if (Partial && lifts(row, of)) {
      MarkRules::Lifted lifted;
      marks.template lift<Places>(row.marks, scores, key, of.end(), lifted);
      add_probabilities<Engine, Partial>(row, scores, count, probabilities);
      marks.template weigh<Engine>(row.marks, lifted, row.to_log2, row.max, take);
      if (row.found.scores != nullptr) MarkRules::put_back<Places>(lifted, scores);
    } else {
      add_probabilities<Engine, Partial>(row, scores, count, probabilities);
    }
    if (row.found.scores != nullptr)
      marks.template collect<Places>(row.found, scores, key, count, row.to_log2, row.max, mass(row), block_max);
    if (row.marks.key < of.end()) marks.template strengthen<Engine>(row.marks, probabilities, key, of.end());
  }

  template <class Engine, bool Partial>
  static ATTNRB_INLINE Vec probability(Vec score, Vec to_log2, Vec reference) {
    const Vec exponent = Vec::fms(score, to_log2, reference);
    // -infinity minus its own rounding is NaN inside exp2; anything below -200 gives 0 just as well
    // (see Note: [Subnormal results]).
    return exp2<Engine::exp2_degree>(Partial ? Vec::max(Vec::set(-200.0f), exponent) : exponent);
  }

 private:
  template <class Places>
  ATTNRB_INLINE void add_bias(const Row& row, float* scores, int64_t key, int64_t count) const {
    const Vec factor = Vec::set(score_factor());
    const float* values = row.bias->values + (key - row.bias->key);
    for (int64_t j = 0; j < count; j += Vec::width) {
      float* const at = scores + Places::place(j);
      Vec::fma(Vec::load(at), factor, Vec::load(values + j)).store(at);
    }
  }

  template <class Engine, bool Partial>
  ATTNRB_INLINE void add_probabilities(Row& row, const float* scores, int64_t count,
                                       typename Engine::Probability* probabilities) const {
    using Places = typename Engine::Places;
    constexpr int kStep = 2 * Vec::width;
    const Vec to_log2 = Vec::set(row.to_log2), reference = Vec::set(row.max);
    Vec sum0 = Vec::zero(), sum1 = Vec::zero();
    for (int64_t j = 0; j < count; j += kStep) {
      const float* const at = scores + Places::pair(j);
      const Vec p0 = probability<Engine, Partial>(Vec::load(at), to_log2, reference);
      const Vec p1 = probability<Engine, Partial>(Vec::load(at + Places::second), to_log2, reference);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
      Engine::store_probabilities(probabilities, j, p0, p1);
    }
    row.sum += (sum0 + sum1).sum();
  }

  ATTNRB_INLINE typename Vec::Mask mask_lanes(const Row& row, int64_t key) const {
    const int64_t stride = problem_.visibility.mask_strides[3], left = problem_.shape.keys - key;
    if (stride == 1 && left >= Vec::width) return Vec::from_bytes(row.mask + key);
    bool lanes[16] = {};
    for (int64_t lane = 0; lane < Vec::width && lane < left; ++lane) lanes[lane] = row.mask[(key + lane) * stride];
    return Vec::from_bytes(lanes);
  }

  const AttentionProblem& problem_;
  const bool capped_;
  const float query_factor_, scale_;
};

// output row = sums / denominator; zeros when the row saw no key. The sums lie as Places says. Under rule rest `marked`
// are the sums of outliers: see Note: [Sharing with the rest].
template <class Output, class Places = InOrder>
void write_output(const AttentionProblem& problem, const RowRules& rules, const Row& row, const float* sums,
                  const float* marked, int64_t batch, int64_t head, int64_t query) {
  const int64_t* strides = problem.output_strides;
  Output* out = static_cast<Output*>(problem.output) + batch * strides[0] + head * strides[1] + query * strides[2];
  const float denominator = rules.denominator(row);
  const float factor = denominator == 0.0f ? 0.0f : 1.0f / denominator;
  if (marked == nullptr) return write_scaled<Places>(out, sums, problem.shape.value_width, factor);
  // Where the others have no mass, the row stays plain.
  const bool shares = row.seen && row.sum != 0.0f;
  const Vec strength = Vec::set(shares ? 1.0f + row.marks.gain : 1.0f), by = Vec::set(factor);
  const Vec taken = Vec::set(shares ? row.marks.gain * row.marks.mass : 0.0f),
            mean = Vec::set(shares ? 1.0f / row.sum : 0.0f);
  for (int64_t d = 0; d < problem.shape.value_width; d += Vec::width) {
    const int n = int(smaller(problem.shape.value_width - d, int64_t(Vec::width)));
    const Vec rest = Vec::load(sums + Places::place(d), n);
    const Vec shared = rest - taken * (rest * mean);
    const Vec y = Vec::fma(strength, Vec::load(marked + d, n), shared) * by;
    if (n == Vec::width)
      y.store(out + d);
    else
      y.store(out + d, n);
  }
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
