// The online softmax (Note: [Online softmax in base 2]) of 16 rows at once, with AVX-512: what a row carries from block
// to block is a lane of a register, and one comparison says which rows have anything to do.
#pragma once

#include "group_marks.h"

namespace attnrb {
namespace ATTNRB_ISA {

// log2 of numbers that are not negative, within 2 units in the last place: the exponent plus r Q(r), with 1 + r in
// [3/4, 3/2) and a polynomial of least relative error, 4e-9. As std::log2 at zero, at infinity and of NaN.
ATTNRB_INLINE Vec log2(Vec x) {
  constexpr float kQ[] = {-0.0643434599f, 0.150666177f,  -0.190278307f, 0.209101081f,  -0.240148231f,
                          0.28838402f,    -0.360674858f, 0.480900764f,  -0.721347511f, 1.44269502f};
  const Vec one = Vec::set(1.0f);
  const Vec m{_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan)}, e{_mm512_getexp_ps(x.v)};
  const Vec exponent = Vec::select(Vec::greater(one, m), e + one, e), r = m - one;
  Vec q = Vec::set(kQ[0]);
  for (int i = 1; i < 10; ++i) q = Vec::fma(q, r, Vec::set(kQ[i]));
  return Vec::fma(q, r, exponent);
}

// 16 rows. While they are absorbed as a group, what is here holds, and what their Rows say of it is out of date.
struct alignas(64) RowGroup {
  static constexpr int kRows = GroupMarks::kRows;

  // From the rows, and back.
  void load(const Row* rows, int64_t key_offset) {
    seen = biased = 0;
    for (int r = 0; r < kRows; ++r) {
      const Row& row = rows[r];
      max[r] = row.max;
      sum[r] = row.sum;
      mass[r] = row.marks.mass;
      to_log2[r] = row.to_log2;
      seen |= uint32_t(row.seen) << r;
      biased |= uint32_t(row.bias != nullptr) << r;
    }
    marks.load(rows, key_offset);
  }
  void store(Row* rows) const {
    for (int r = 0; r < kRows; ++r) {
      Row& row = rows[r];
      row.max = max[r];
      row.sum = sum[r];
      row.seen = seen >> r & 1;
      row.marks.mass = mass[r];
    }
    marks.store(rows);
  }

  // What RowRules and write_output() say of a row at its end, of all of them. Not under rule rest.
  void report(const AttentionProblem& problem, int64_t index, int64_t step) const {
    if (problem.lse != nullptr) {
      alignas(64) float lse[kRows];
      const Vec sums = Vec::load(sum) + Vec::load(mass);
      only_seen((Vec::load(max) + log2(sums)) * Vec::set(kLn2), -kInfinity).store(lse);
      for (int r = 0; r < kRows; ++r) problem.lse[index + r * step] = lse[r];
    }
    if (problem.softmax != nullptr)
      for (int r = 0; r < kRows; ++r) {
        float* pair = problem.softmax + 2 * (index + r * step);
        pair[0] = max[r];
        pair[1] = seen >> r & 1 ? sum[r] : 0.0f;
      }
  }
  Vec final_threshold(const MarkRules& rules) const {
    return rules.final_threshold(Vec::load(max), log2(Vec::load(sum)));
  }
  // By which sums are multiplied: zero where a row saw no key.
  Vec output_factors() const {
    const Vec by = only_seen(Vec::load(sum) + Vec::load(mass), 0.0f), zero = Vec::zero();
    const auto none = Vec::both(Vec::greater_equal(by, zero), Vec::greater_equal(zero, by));
    return Vec::select(none, zero, Vec::set(1.0f) / by);
  }

  float max[kRows], sum[kRows], mass[kRows], to_log2[kRows];  // as a Row has them; mass: of its Marks
  uint32_t seen, biased;                                      // a bit of each row
  GroupMarks marks;

 private:
  ATTNRB_INLINE Vec only_seen(Vec x, float otherwise) const {
    return Vec::select(typename Vec::Mask(seen), x, Vec::set(otherwise));
  }
};

// The base of an engine that absorbs rows in groups. The engine says where rows of scores and of probabilities lie.
template <class Engine>
class RowGroups {
  static constexpr int kRows = RowGroup::kRows, kStep = 2 * Vec::width;
  static constexpr uint32_t kAll = (1u << kRows) - 1u;
  static constexpr int64_t kPart = 64, kParts = kMostBlockKeys / kPart;  // keys of a block that are searched at once

 public:
  // Products of 16 rows with a block of keys become probabilities, as by absorb_whole() or absorb_other(): `rescale`
  // and `take` get the row of the group first.
  template <class Probability, class Rescale, class Take>
  [[gnu::noinline]] static void absorb_group(const RowRules& rules, RowGroup& group, Row* rows, const BlockOfRow& of,
                                             float* scores, Probability* probabilities, Rescale&& rescale,
                                             Take&& take) {
    using Places = typename Engine::Places;
    const bool lifts = rules.marks.parts() && group.marks.reaches(of.end());
    if (!of.partial && group.biased == 0 && !lifts) {
      for (int r = 0; r < kRows; ++r) rules.template cap<Places>(scores + Engine::score_row(r, 0), of.count);
      absorb<false>(rules, group, rows, of, scores, probabilities, rescale);
      return;
    }
    for (int r = 0; r < kRows; ++r)
      rules.template finish_scores<Places>(rows[r], scores + Engine::score_row(r, 0), of.key, of.count, of.held,
                                           of.partial);
    if (!lifts) {
      absorb<true>(rules, group, rows, of, scores, probabilities, rescale);
      return;
    }
    group.store(rows);
    for (int r = 0; r < kRows; ++r)
      rules.template absorb_scores<Engine, true, false>(
          rows[r], of, scores + Engine::score_row(r, 0), probabilities + Engine::probability_row(r, 0),
          [&](float factor) { rescale(r, factor); }, [&](int64_t j, float weight) { take(r, j, weight); });
    group.load(rows, rules.marks.key_offset());
  }

 private:
  template <bool Partial, class Probability, class Rescale>
  static ATTNRB_INLINE void absorb(const RowRules& rules, RowGroup& group, Row* rows, const BlockOfRow& of,
                                   float* scores, Probability* probabilities, Rescale&& rescale) {
    const Vec nothing = Vec::set(-kInfinity), to_log2 = Vec::load(group.to_log2);
    Vec slack = Vec::set(8.0f);  // by which a maximum may lie above the reference
    if (!Partial && !rules.marks.emits() && Vec::bits(Vec::greater_equal(nothing, Vec::load(group.max))) == 0) {
      // Where the sum of a row is at most 2^8 so is each of its weights, and its maximum need not be known. A row of
      // more gets a reference that spares it this in the next block.
      const Vec sums = add_rows<Partial>(group, of, group.max, scores, probabilities);
      const auto small = Vec::greater_equal(Vec::set(256.0f), sums);
      if (Vec::bits(small) == kAll) {
        (Vec::load(group.sum) + sums).store(group.sum);
        group.seen = kAll;
        strengthen(rules, group, of, probabilities);
        return;
      }
      slack = Vec::select(small, slack, Vec::zero());
    }
    Vec largest = nothing, largest_of[kParts];
    if (rules.marks.emits())
      for (int64_t part = 0; part * kPart < of.count; ++part) {
        largest_of[part] = row_maxima(scores, part * kPart, smaller(of.count, (part + 1) * kPart)) * to_log2;
        largest = Vec::max(largest, largest_of[part]);
      }
    else
      largest = row_maxima(scores, 0, of.count) * to_log2;
    // A maximum does not tell "sees none of these keys" from "sees only NaN", which must not end as zeros.
    uint32_t blank = Partial ? Vec::bits(Vec::greater_equal(nothing, largest)) : 0;
    for (uint32_t each = blank; each != 0; each &= each - 1) {
      const int r = __builtin_ctz(each);
      if (rules.sees_any(rows[r], of.key, of.held)) blank &= ~(1u << r);
    }

    Vec m = Vec::load(group.max), l = Vec::load(group.sum);
    const uint32_t first = Vec::bits(Vec::greater_equal(nothing, m));
    const uint32_t grown = (Vec::bits(Vec::greater(largest, m + slack)) | first) & ~blank;
    if (grown != 0) {
      const Vec by = exp2<6>(Vec::max(Vec::set(-200.0f), m - largest));
      // A sink of minus infinity adds nothing.
      l = Vec::select(mask(grown), Vec::select(mask(first), Vec::zero(), l * by), l);
      m = Vec::select(mask(grown), largest, m);
      const uint32_t moved = grown & ~first;
      const Vec mass = Vec::load(group.mass);
      Vec::select(mask(moved), mass * by, mass).store(group.mass);
      alignas(64) float factor[kRows];
      by.store(factor);
      for (uint32_t each = moved; each != 0; each &= each - 1) {
        const int r = __builtin_ctz(each);
        rescale(r, factor[r]);
      }
    }

    // A row without any of these keys gets zeros for any reference.
    alignas(64) float reference[kRows];
    Vec::select(mask(blank), Vec::zero(), m).store(reference);
    l = l + add_rows<Partial>(group, of, reference, scores, probabilities);
    m.store(group.max);
    l.store(group.sum);
    group.seen |= ~blank & kAll;
    if (rules.marks.emits()) collect(rules, group, rows, of, scores, largest_of, blank);
    strengthen(rules, group, of, probabilities);
  }

  template <class Probability>
  static ATTNRB_INLINE void strengthen(const RowRules& rules, RowGroup& group, const BlockOfRow& of,
                                       Probability* probabilities) {
    group.marks.template strengthen<Engine>(probabilities, of.key, of.end(),
                                            rules.marks.adds_mass() ? group.mass : nullptr);
  }

  // Weights of 16 rows, relative to the references, and their sums.
  template <bool Partial, class Probability>
  static ATTNRB_INLINE Vec add_rows(const RowGroup& group, const BlockOfRow& of, const float* reference,
                                    const float* scores, Probability* probabilities) {
    Vec sums[kRows];
    for (int r = 0; r < kRows; ++r)
      sums[r] = add_row<Partial>(scores + Engine::score_row(r, 0), of.count, group.to_log2[r], reference[r],
                                 [&](int64_t j, Vec a, Vec b) {
                                   Engine::store_probabilities(probabilities + Engine::probability_row(r, 0), j, a, b);
                                 });
    return Vec::sums(sums);
  }

  static ATTNRB_INLINE typename Vec::Mask mask(uint32_t rows) { return typename Vec::Mask(rows); }

  // Over the keys [first, last).
  static ATTNRB_INLINE Vec row_maxima(const float* scores, int64_t first, int64_t last) {
    using Places = typename Engine::Places;
    Vec each[kRows];
    for (int r = 0; r < kRows; ++r) {
      const float* row = scores + Engine::score_row(r, 0);
      Vec a = Vec::load(row + Places::pair(first)), b = Vec::load(row + Places::pair(first) + Places::second);
      for (int64_t j = first + kStep; j < last; j += kStep) {
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

  // See Note: [One-pass outliers]. Part by part of the block: most parts of most rows have none.
  static ATTNRB_INLINE void collect(const RowRules& rules, const RowGroup& group, Row* rows, const BlockOfRow& of,
                                    const float* scores, const Vec* largest_of, uint32_t blank) {
    using Places = typename Engine::Places;
    Vec mass = Vec::load(group.sum);
    if (rules.marks.parts()) mass = mass + Vec::load(group.mass);
    const Vec bound = rules.marks.running_threshold(Vec::load(group.max), mass);
    alignas(64) float threshold[kRows];
    bound.store(threshold);
    for (int64_t j = 0; j < of.count; j += kPart) {
      uint32_t above = Vec::bits(Vec::greater(largest_of[j / kPart], bound)) & ~blank;
      for (; above != 0; above &= above - 1) {
        const int r = __builtin_ctz(above);
        const float* const at = scores + Engine::score_row(r, j);
        if (of.count - j >= kPart)
          rules.marks.template collect_above<Places, true>(rows[r].found, at, of.key + j, kPart, group.to_log2[r],
                                                           threshold[r]);
        else
          rules.marks.template collect_above<Places, true>(rows[r].found, at, of.key + j, of.count - j,
                                                           group.to_log2[r], threshold[r]);
      }
    }
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
