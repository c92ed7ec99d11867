// The state of one query row while it walks over its keys: an online softmax in base 2, its outliers found so far, and
// its outliers still to be strengthened.
//
// Note: [Online softmax in base 2]
// Scores are kept as t = score * log2(e), so that weights are 2^(t - m) / l with m a reference near the largest t so
// far and l = sum of 2^(t - m). m moves only when the maximum outgrows it by more than 8 (a factor of 256, harmless in
// float32 sums and bfloat16 products), which spares nearly all rescaling of the output row. log-sum-exp = ln(2)(m +
// log2 l).
//
// Note: [One-pass outliers]
// The weight of key j exceeds the threshold tau when t_j > m + log2(tau * l) at the end. m + log2 l only grows, so the
// same test against the running value keeps a superset; it is cut down when its buffer fills and once more at the end.
// For the running test, log2 is bounded from below by the exponent plus the mantissa's fraction (2^e(1+f) <= 2^(e+f)),
// a subtraction on the bits; the superset grows by at most 6%.
//
// Note: [Strengthened probabilities]
// An outlier's probability is multiplied by 1 + gain after it joined the row sum l, so the other weights stay as they
// were. With normalize, the gained mass is collected in `boosted` and the row is divided by l + boosted instead of l.
// Whether the slots ascend is seen on the way, and for those behind the last block when the row is finished: a look of
// its own at every row cost 2% of a prefill.
#pragma once

#include "../outliers.h"
#include "../visibility.h"
#include "float_engine.h"
#include "math.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();  // behind all keys

struct Row {
  float max = -kInfinity;  // m
  float sum = 0.0f;        // l
  float boosted = 0.0f;
  bool seen = false;  // some key was visible
  int32_t low = 0, high = 0;
  int64_t own = -1;                // position of the query's own key
  const bool* mask = nullptr;      // its row of the boolean mask, or null
  const int32_t* boost = nullptr;  // outlier slots to strengthen
  int32_t boost_count = 0, boost_next = 0;
  int64_t boost_key = kNoKey;  // position of the next of them
  bool unsorted = false;       // they were found not to ascend
  float gain = 0.0f;
  float* candidate_scores = nullptr;
  int32_t* candidates = nullptr;  // positions
  int32_t candidate_count = 0;
};

// What every row of a problem has in common.
class RowRules {
 public:
  explicit RowRules(const AttentionProblem& problem)
      : problem_(problem),
        capped_(problem.scoring.softcap > 0),
        // A negative or zero scale cannot be applied after the maximum was taken: it goes into the query instead.
        query_factor_(problem.scoring.scale > 0   ? 1.0f
                      : problem.scoring.scale < 0 ? -1.0f
                                                  : 0.0f),
        scale_(problem.scoring.scale == 0 ? 1.0f : std::fabs(problem.scoring.scale)),
        to_log2_(capped_ ? kLog2E : scale_ * kLog2E),
        threshold_log2_(float(std::log2(problem.emit.threshold))),
        threshold_(float(problem.emit.threshold)) {}

  bool emits() const { return problem_.emit.indices != nullptr; }
  bool boosts() const { return problem_.edit.indices != nullptr; }
  float query_factor() const { return query_factor_; }
  float to_log2() const { return to_log2_; }

  // Candidates per row: the running test keeps at most 1.07/threshold of them, and one block more may come at once.
  int64_t candidate_capacity(int64_t block_keys) const {
    return emits() ? problem_.emit.capacity + problem_.emit.capacity / 8 + 2 * Vec::width + block_keys : 0;
  }

  // Asks for what start() is going to read: the outliers of a row lie far from the next row's, in a table of which
  // little is filled.
  ATTNRB_INLINE void prefetch(int64_t batch, int64_t head, int64_t query) const {
    if (!boosts()) return;
    const int64_t index = (batch * problem_.shape.heads + head) * problem_.shape.queries + query;
    const int32_t* row = problem_.edit.indices + index * problem_.edit.capacity;
    __builtin_prefetch(row);
    __builtin_prefetch(row + 15);
  }

  Status start(Row& row, int64_t batch, int64_t head, int64_t query) const {
    const Shape& shape = problem_.shape;
    const Visibility& visibility = problem_.visibility;
    const Interval interval = visible_interval(visibility, batch, query, shape.keys);
    row.low = int32_t(interval.low);
    row.high = int32_t(interval.high);
    row.own = visibility.query_offset + query - visibility.key_offset;
    if (visibility.mask != nullptr)
      row.mask = visibility.mask + batch * visibility.mask_strides[0] + head * visibility.mask_strides[1] +
                 query * visibility.mask_strides[2];
    if (problem_.scoring.sinks != nullptr) {
      row.max = problem_.scoring.sinks[head] * kLog2E;
      row.sum = 1.0f;
    }
    return boosts() ? start_boost(row, head, (batch * shape.heads + head) * shape.queries + query) : Status::ok;
  }

  bool visible(const Row& row, int64_t key) const {
    return key >= row.low && key < row.high &&
           (row.mask == nullptr || row.mask[key * problem_.visibility.mask_strides[3]]);
  }

  bool sees_any(const Row& row, int64_t key, int64_t count) const {
    for (int64_t j = key; j < key + count; ++j)
      if (visible(row, j)) return true;
    return false;
  }

  // Turns the raw products of the keys [key, key + count) into scores, minus infinity where the row sees none.
  ATTNRB_INLINE void finish_scores(const Row& row, float* scores, int64_t key, int64_t count, bool partial) const {
    if (capped_) cap(scores, count);
    if (!partial) return;
    const Vec low = Vec::set(float(row.low - key)), high = Vec::set(float(row.high - key));
    for (int64_t j = 0; j < count; j += Vec::width) {
      const Vec lane = Vec::iota() + Vec::set(float(j));
      typename Vec::Mask shown = Vec::both(Vec::greater_equal(lane, low), Vec::greater(high, lane));
      if (row.mask != nullptr) shown = Vec::both(shown, mask_lanes(row, key + j));
      Vec::select(shown, Vec::load(scores + j), Vec::set(-kInfinity)).store(scores + j);
    }
  }

  // One block of the online softmax: scores[0, count) of the keys from `key` on become probabilities relative to
  // row.max. `rescale` multiplies what the row accumulated so far when row.max moves.
  template <class Engine, bool Partial, class Rescale>
  ATTNRB_INLINE void absorb(Row& row, const float* scores, int64_t key, int64_t count,
                            typename Engine::Probability* probabilities, Rescale&& rescale) const {
    constexpr int kStep = 2 * Vec::width;
    Vec largest0 = Vec::load(scores), largest1 = Vec::load(scores + Vec::width);
    for (int64_t j = kStep; j < count; j += kStep) {
      largest0 = Vec::max(largest0, Vec::load(scores + j));
      largest1 = Vec::max(largest1, Vec::load(scores + j + Vec::width));
    }
    const float block_max = Vec::max(largest0, largest1).max() * to_log2_;
    // A maximum does not tell "sees none of these keys" from "sees only NaN", which must not end as zeros.
    if (Partial && block_max == -kInfinity && !sees_any(row, key, count)) {
      for (int64_t j = 0; j < count; j += kStep)
        Engine::store_probabilities(probabilities, j, Vec::zero(), Vec::zero());
      return;
    }
    row.seen = true;
    if (block_max > row.max + 8.0f || row.max == -kInfinity) {
      if (row.max != -kInfinity) {
        const float factor = std::exp2(row.max - block_max);
        row.sum *= factor;
        row.boosted *= factor;
        rescale(factor);
      } else {
        row.sum = 0.0f;  // a sink of minus infinity adds nothing
      }
      row.max = block_max;
    }
    const Vec to_log2 = Vec::set(to_log2_), reference = Vec::set(row.max);
    Vec sum0 = Vec::zero(), sum1 = Vec::zero();
    for (int64_t j = 0; j < count; j += kStep) {
      const Vec p0 = probability<Engine, Partial>(Vec::load(scores + j), to_log2, reference);
      const Vec p1 = probability<Engine, Partial>(Vec::load(scores + j + Vec::width), to_log2, reference);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
      Engine::store_probabilities(probabilities, j, p0, p1);
    }
    row.sum += (sum0 + sum1).sum();
    if (row.candidates != nullptr) collect(row, scores, key, count, block_max);
    if (row.boost_key < key + count) strengthen<Engine>(row, probabilities, key, key + count);
  }

  // What is wrong with the row's outliers, once it has seen all its keys.
  static Status finish_boost(const Row& row) {
    bool unsorted = row.unsorted;
    for (int32_t c = row.boost_next + 1; c < row.boost_count; ++c) unsorted |= row.boost[c] <= row.boost[c - 1];
    return unsorted ? Status::unsorted_outliers : Status::ok;
  }

  // What the output row is divided by; 0 when the row saw no key.
  float denominator(const Row& row) const { return row.seen ? row.sum + row.boosted : 0.0f; }

  // What the caller asked to know of a row's softmax: the natural log-sum-exp, of the strengthened scores when they are
  // normalized; the reference and the sum, 0 where the row saw no key.
  void report(const Row& row, int64_t index) const {
    if (problem_.lse != nullptr)
      problem_.lse[index] = row.seen ? (row.max + std::log2(row.sum + row.boosted)) * kLn2 : -kInfinity;
    if (problem_.softmax != nullptr) {
      problem_.softmax[2 * index] = row.max;
      problem_.softmax[2 * index + 1] = row.seen ? row.sum : 0.0f;
    }
  }

  // Writes the row's outliers: ascending slots, then -1.
  void emit(const Row& row, const float* scores, const int32_t* positions, int64_t count, int64_t index) const {
    const Emit& emit = problem_.emit;
    int32_t* out = emit.indices + index * emit.capacity;
    const float threshold = row.max + std::log2(row.sum) + threshold_log2_;
    int64_t kept = 0;
    for (int64_t c = 0; c < count && kept < emit.capacity; ++c)
      if (scores[c] > threshold && positions[c] != row.own)
        out[kept++] = int32_t(positions[c] + problem_.visibility.key_offset);
    emit.counts[index] = int32_t(kept);
    for (; kept < emit.capacity; ++kept) out[kept] = -1;
  }

 private:
  template <class Engine, bool Partial>
  static ATTNRB_INLINE Vec probability(Vec score, Vec to_log2, Vec reference) {
    const Vec exponent = Vec::fms(score, to_log2, reference);
    // -infinity minus its own rounding is NaN inside exp2; anything below -200 gives 0 just as well
    // (see Note: [Subnormal results]).
    return exp2<Engine::exp2_degree>(Partial ? Vec::max(Vec::set(-200.0f), exponent) : exponent);
  }

  ATTNRB_INLINE typename Vec::Mask mask_lanes(const Row& row, int64_t key) const {
    const int64_t stride = problem_.visibility.mask_strides[3], left = problem_.shape.keys - key;
    if (stride == 1 && left >= Vec::width) return Vec::from_bytes(row.mask + key);
    bool lanes[16] = {};
    for (int64_t lane = 0; lane < Vec::width && lane < left; ++lane) lanes[lane] = row.mask[(key + lane) * stride];
    return Vec::from_bytes(lanes);
  }

  void cap(float* scores, int64_t count) const {
    const Vec inner = Vec::set(scale_ / problem_.scoring.softcap), outer = Vec::set(problem_.scoring.softcap);
    for (int64_t j = 0; j < count; j += Vec::width) (outer * tanh(Vec::load(scores + j) * inner)).store(scores + j);
  }

  Status start_boost(Row& row, int64_t head, int64_t index) const {
    const Edit& edit = problem_.edit;
    row.gain = edit.gain[head];
    row.boost = edit.indices + index * edit.capacity;
    const int32_t count = edit.counts[index];
    if (count < 0 || count > edit.capacity) return Status::outlier_count;
    row.boost_count = count;
    if (row.gain != 0.0f && count > 0) row.boost_key = row.boost[0] - problem_.visibility.key_offset;
    return Status::ok;
  }

  // See Note: [Strengthened probabilities]. Of the keys [key, end); slots before them, hence outside memory or not
  // seen, are passed over.
  template <class Engine>
  ATTNRB_INLINE void strengthen(Row& row, typename Engine::Probability* probabilities, int64_t key, int64_t end) const {
    const int64_t offset = problem_.visibility.key_offset;
    const float factor = 1.0f + row.gain;
    int32_t next = row.boost_next;
    int64_t at = row.boost_key;
    bool unsorted = false;
    do {
      if (at >= key) {
        const float before = Engine::load_probability(probabilities, at - key);
        Engine::scale_probability(probabilities, at - key, factor);
        // What the output really gained: rounded probabilities must not be divided by exact ones.
        if (problem_.edit.rule == Rule::row) row.boosted += Engine::load_probability(probabilities, at - key) - before;
      }
      const int64_t last = at;
      at = ++next < row.boost_count ? row.boost[next] - offset : kNoKey;
      unsorted |= at <= last;
    } while (at < end);
    row.boost_next = next;
    row.boost_key = at;
    row.unsorted |= unsorted;
  }

  // See Note: [One-pass outliers].
  float running_threshold(const Row& row) const {
    constexpr float kMantissa = 1.0f / (1 << 23);
    return row.max + (float(bit_cast<int32_t>(threshold_ * row.sum)) * kMantissa - 127.0f) - 1e-4f;
  }

  void collect(Row& row, const float* scores, int64_t key, int64_t count, float block_max) const {
    const float threshold = running_threshold(row);
    if (!(block_max > threshold)) return;
    const Vec to_log2 = Vec::set(to_log2_), bound = Vec::set(threshold);
    int32_t found = row.candidate_count;
    for (int64_t j = 0; j < count; j += Vec::width) {
      const Vec score = Vec::load(scores + j) * to_log2;
      const typename Vec::Mask above = Vec::greater(score, bound);
      if (Vec::bits(above) != 0)
        found += Vec::compress(above, score, int32_t(key + j), row.candidate_scores + found, row.candidates + found);
    }
    // Rounding may let a few more pass than the bound says (see Note: [Outlier capacity]): the slack takes them, and
    // the buffer is cut back so that the next block fits again.
    const int32_t room = int32_t(candidate_capacity(0)) - Vec::width;
    if (found > room) {
      int32_t kept = 0;
      for (int32_t c = 0; c < found; ++c)
        if (row.candidate_scores[c] > threshold && kept < room) {
          row.candidate_scores[kept] = row.candidate_scores[c];
          row.candidates[kept++] = row.candidates[c];
        }
      found = kept;
    }
    row.candidate_count = found;
  }

  const AttentionProblem& problem_;
  const bool capped_;
  const float query_factor_, scale_, to_log2_, threshold_log2_, threshold_;
};

// output row = sums / denominator; zeros when the row saw no key.
template <class Output>
ATTNRB_INLINE void write_row(Output* out, const float* sums, int64_t width, float denominator) {
  const float factor = denominator == 0.0f ? 0.0f : 1.0f / denominator;
  const Vec by = Vec::set(factor);
  int64_t d = 0;
  for (; d + Vec::width <= width; d += Vec::width) (Vec::load(sums + d) * by).store(out + d);
  if (d < width) (Vec::load(sums + d, int(width - d)) * by).store(out + d, int(width - d));
}

template <class Output>
void write_output(const AttentionProblem& problem, const RowRules& rules, const Row& row, const float* sums,
                  int64_t batch, int64_t head, int64_t query) {
  const int64_t* strides = problem.output_strides;
  Output* out = static_cast<Output*>(problem.output) + batch * strides[0] + head * strides[1] + query * strides[2];
  write_row(out, sums, problem.shape.value_width, rules.denominator(row));
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
