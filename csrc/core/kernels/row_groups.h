// The online softmax (Note: [Online softmax in base 2]) of 16 rows at once, with AVX-512: maxima, sums and thresholds
// of 16 rows are a register each, which trees of shuffles fill, and one comparison says which rows have anything to do.
#pragma once

#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// The base of an engine that absorbs rows in groups. The engine says where rows of scores and of probabilities lie.
template <class Engine>
class RowGroups {
  static constexpr int kRows = 16, kStep = 2 * Vec::width;
  struct alignas(64) Numbers {
    float of[kRows];  // of each row
    ATTNRB_INLINE Vec load() const { return Vec::load(of); }
  };

 public:
  // Products of 16 rows with a block of keys become probabilities, as by absorb_whole() or absorb_other(): `rescale`
  // and `take` get the row of the group first.
  template <class Probability, class Rescale, class Take>
  [[gnu::noinline]] static void absorb_group(const RowRules& rules, Row* rows, const BlockOfRow& of, float* scores,
                                             Probability* probabilities, Rescale&& rescale, Take&& take) {
    using Places = typename Engine::Places;
    bool whole = true, lifts = false;
    for (int r = 0; r < kRows; ++r) {
      whole = whole && rules.whole(rows[r], of);
      lifts = lifts || rules.lifts(rows[r], of);
    }
    if (whole) {
      for (int r = 0; r < kRows; ++r) rules.template cap<Places>(scores + Engine::score_row(r, 0), of.count);
      absorb<false>(rules, rows, of, scores, probabilities, rescale);
      return;
    }
    for (int r = 0; r < kRows; ++r)
      rules.template finish_scores<Places>(rows[r], scores + Engine::score_row(r, 0), of.key, of.count, of.held,
                                           of.partial);
    if (!lifts && absorb<true>(rules, rows, of, scores, probabilities, rescale)) return;
    for (int r = 0; r < kRows; ++r)
      rules.template absorb_scores<Engine, true, false>(
          rows[r], of, scores + Engine::score_row(r, 0), probabilities + Engine::probability_row(r, 0),
          [&](float factor) { rescale(r, factor); }, [&](int64_t j, float weight) { take(r, j, weight); });
  }

 private:
  // False, with nothing done, where a row sees keys but no number above minus infinity.
  template <bool Partial, class Probability, class Rescale>
  static ATTNRB_INLINE bool absorb(const RowRules& rules, Row* rows, const BlockOfRow& of, float* scores,
                                   Probability* probabilities, Rescale&& rescale) {
    Numbers max, sum, to_log2;
    for (int r = 0; r < kRows; ++r) {
      max.of[r] = rows[r].max;
      sum.of[r] = rows[r].sum;
      to_log2.of[r] = rows[r].to_log2;
    }
    const Vec nothing = Vec::set(-kInfinity), largest = row_maxima(scores, of.count) * to_log2.load();
    const uint32_t blank = Partial ? Vec::bits(Vec::greater_equal(nothing, largest)) : 0;
    if (Partial && blank != 0)
      for (int r = 0; r < kRows; ++r)
        if ((blank >> r & 1) && rules.sees_any(rows[r], of.key, of.held)) return false;

    Vec m = max.load(), l = sum.load();
    const uint32_t first = Vec::bits(Vec::greater_equal(nothing, m));
    const uint32_t grown = (Vec::bits(Vec::greater(largest, m + Vec::set(8.0f))) | first) & ~blank;
    if (grown != 0) {
      Numbers factor;
      const Vec by = exp2<6>(Vec::max(Vec::set(-200.0f), m - largest));
      by.store(factor.of);
      // A sink of minus infinity adds nothing.
      l = Vec::select(mask(grown), Vec::select(mask(first), Vec::zero(), l * by), l);
      m = Vec::select(mask(grown), largest, m);
      for (int r = 0; r < kRows; ++r) {
        if (!((grown & ~first) >> r & 1)) continue;
        rows[r].marks.mass *= factor.of[r];
        rescale(r, factor.of[r]);
      }
    }

    // A row without any of these keys gets zeros for any reference.
    Vec::select(mask(blank), Vec::zero(), m).store(max.of);
    Vec sums[kRows];
    for (int r = 0; r < kRows; ++r)
      sums[r] = add_row<Partial>(scores + Engine::score_row(r, 0), of.count, to_log2.of[r], max.of[r],
                                 [&](int64_t j, Vec a, Vec b) {
                                   Engine::store_probabilities(probabilities + Engine::probability_row(r, 0), j, a, b);
                                 });
    l = l + Vec::sums(sums);
    m.store(max.of);
    l.store(sum.of);
    for (int r = 0; r < kRows; ++r) {
      rows[r].max = max.of[r];
      rows[r].sum = sum.of[r];
      rows[r].seen = rows[r].seen || !(blank >> r & 1);
    }
    if (rows[0].found.scores != nullptr) collect(rules, rows, of, scores, to_log2, max, largest, blank);
    for (int r = 0; r < kRows; ++r)
      if (rows[r].marks.key < of.end() && !(blank >> r & 1))
        rules.marks.template strengthen<Engine>(rows[r].marks, probabilities + Engine::probability_row(r, 0), of.key,
                                                of.end());
    return true;
  }

  static ATTNRB_INLINE typename Vec::Mask mask(uint32_t rows) { return typename Vec::Mask(rows); }

  static ATTNRB_INLINE Vec row_maxima(const float* scores, int64_t count) {
    using Places = typename Engine::Places;
    Vec each[kRows];
    for (int r = 0; r < kRows; ++r) {
      const float* row = scores + Engine::score_row(r, 0);
      Vec a = Vec::load(row), b = Vec::load(row + Places::second);
      for (int64_t j = kStep; j < count; j += kStep) {
        a = Vec::max(a, Vec::load(row + Places::pair(j)));
        b = Vec::max(b, Vec::load(row + Places::pair(j) + Places::second));
      }
      each[r] = Vec::max(a, b);
    }
    return Vec::maxima(each);
  }

  template <bool Partial, class Store>
  static ATTNRB_INLINE Vec add_row(const float* row, int64_t count, float to_log2, float reference, Store&& store) {
    using Places = typename Engine::Places;
    const Vec by = Vec::set(to_log2), from = Vec::set(reference);
    Vec sum0 = Vec::zero(), sum1 = Vec::zero();
    for (int64_t j = 0; j < count; j += kStep) {
      const float* const at = row + Places::pair(j);
      const Vec p0 = RowRules::probability<Engine, Partial>(Vec::load(at), by, from);
      const Vec p1 = RowRules::probability<Engine, Partial>(Vec::load(at + Places::second), by, from);
      sum0 = sum0 + p0;
      sum1 = sum1 + p1;
      store(j, p0, p1);
    }
    return sum0 + sum1;
  }

  // See Note: [One-pass outliers].
  static ATTNRB_INLINE void collect(const RowRules& rules, Row* rows, const BlockOfRow& of, const float* scores,
                                    const Numbers& to_log2, const Numbers& max, Vec largest, uint32_t blank) {
    using Places = typename Engine::Places;
    Numbers threshold;
    for (int r = 0; r < kRows; ++r) threshold.of[r] = rules.marks.running_threshold(max.of[r], rules.mass(rows[r]));
    const uint32_t above = Vec::bits(Vec::greater(largest, threshold.load())) & ~blank;
    for (int r = 0; r < kRows; ++r)
      if (above >> r & 1)
        rules.marks.template collect_above<Places, true>(rows[r].found, scores + Engine::score_row(r, 0), of.key,
                                                         of.count, to_log2.of[r], threshold.of[r]);
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
