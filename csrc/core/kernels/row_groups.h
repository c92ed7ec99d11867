// The online softmax (Note: [Online softmax in base 2]) of 16 rows at once, with AVX-512: what a row carries from block
// to block is a lane of a register, and one comparison says which rows have anything to do.
#pragma once

#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// 16 rows. While they are absorbed as a group, what is here holds, and what their Rows say of it is out of date.
class alignas(64) RowGroup {
 public:
  static constexpr int kRows = 16;

  // From the rows, and back.
  void load(const Row* rows, int64_t key_offset) {
    key_offset_ = key_offset;
    seen = biased = unsorted_ = 0;
    for (int r = 0; r < kRows; ++r) {
      const Row& row = rows[r];
      const Marks& marks = row.marks;
      max[r] = row.max;
      sum[r] = row.sum;
      mass[r] = marks.mass;
      to_log2[r] = row.to_log2;
      seen |= uint32_t(row.seen) << r;
      biased |= uint32_t(row.bias != nullptr) << r;
      factor_[r] = 1.0f + marks.gain;
      const bool any = marks.key != kNoKey;
      slot_[r] = any ? marks.slots[marks.next] : kNoSlot;
      left_[r] = any ? marks.count - marks.next : 0;
      place_[r] = 0;
      if (any) read(r, marks.slots + marks.next, left_[r]);
    }
  }
  void store(Row* rows) const {
    for (int r = 0; r < kRows; ++r) {
      Row& row = rows[r];
      Marks& marks = row.marks;
      row.max = max[r];
      row.sum = sum[r];
      row.seen = seen >> r & 1;
      marks.mass = mass[r];
      marks.unsorted |= bool(unsorted_ >> r & 1);
      if (marks.key == kNoKey) continue;
      marks.next = marks.count - left_[r];
      marks.key = left_[r] > 0 ? slot_[r] - key_offset_ : kNoKey;
    }
  }

  // The next outlier of some row lies before this key.
  ATTNRB_INLINE bool reaches(int64_t end) const { return before(end) != 0; }

  // See Note: [Strengthened probabilities]. One outlier of every row that has some among the keys [key, end), as long
  // as there are any: which rows have how many is chance, and guessing it wrong costs more than the work.
  template <class Engine>
  ATTNRB_INLINE void strengthen(const Row* rows, typename Engine::Probability* probabilities, int64_t key, int64_t end,
                                bool adds_mass) {
    uint32_t live = before(end);
    if (live == 0) return;
    const __m512i first = _mm512_set1_epi32(slot_of(key)), last = _mm512_set1_epi32(slot_of(end));
    __m512i slot = _mm512_load_si512(slot_), left = _mm512_load_si512(left_), place = _mm512_load_si512(place_);
    const Vec factor = Vec::load(factor_);
    Vec gained = Vec::load(mass);
    do {
      // Slots of keys outside memory lie before all others.
      const __mmask16 here = _mm512_mask_cmpge_epi32_mask(__mmask16(live), slot, first);
      const Vec grown = Engine::scale_probabilities(probabilities, _mm512_sub_epi32(slot, first), here, factor);
      if (adds_mass) gained = gained + grown;
      const __m512i one = _mm512_set1_epi32(1);
      left = _mm512_mask_sub_epi32(left, __mmask16(live), left, one);
      place = _mm512_mask_add_epi32(place, __mmask16(live), place, one);
      const __mmask16 more = _mm512_mask_cmpgt_epi32_mask(__mmask16(live), left, _mm512_setzero_si512());
      if (const uint32_t read_up = _mm512_mask_cmpge_epi32_mask(more, place, _mm512_set1_epi32(kSlots))) {
        _mm512_store_si512(left_, left);
        for (uint32_t each = read_up; each != 0; each &= each - 1) {
          const int r = __builtin_ctz(each);
          read(r, rows[r].marks.slots + (rows[r].marks.count - left_[r]), left_[r]);
        }
        place = _mm512_mask_mov_epi32(place, __mmask16(read_up), _mm512_setzero_si512());
      }
      const __m512i of_row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i next = _mm512_mask_i32gather_epi32(
          _mm512_set1_epi32(kNoSlot), more, _mm512_add_epi32(_mm512_slli_epi32(of_row, kLogSlots), place), slots_, 4);
      unsorted_ |= _mm512_mask_cmple_epi32_mask(more, next, slot);
      slot = _mm512_mask_mov_epi32(slot, __mmask16(live), next);
      live = _mm512_cmplt_epi32_mask(slot, last);
    } while (live != 0);
    _mm512_store_si512(slot_, slot);
    _mm512_store_si512(left_, left);
    _mm512_store_si512(place_, place);
    gained.store(mass);
  }

  float max[kRows], sum[kRows], mass[kRows], to_log2[kRows];  // as a Row has them; mass: of its Marks
  uint32_t seen, biased;                                      // a bit of each row

 private:
  static constexpr int kLogSlots = 4, kSlots = 1 << kLogSlots;
  static constexpr int32_t kNoSlot = std::numeric_limits<int32_t>::max();

  // The slot of a key, or one behind all slots.
  ATTNRB_INLINE int32_t slot_of(int64_t key) const { return int32_t(smaller(key + key_offset_, int64_t(kNoSlot))); }
  ATTNRB_INLINE uint32_t before(int64_t end) const {
    return _mm512_cmplt_epi32_mask(_mm512_load_si512(slot_), _mm512_set1_epi32(slot_of(end)));
  }
  // The next slots of a row, of which `left` are left.
  ATTNRB_INLINE void read(int r, const int32_t* slots, int32_t left) {
    _mm512_store_si512(slots_ + r * kSlots, _mm512_maskz_loadu_epi32(Vec::first(left), slots));
  }

  // Outliers that are still to come: the slot of the next one of each row, how many are left with it, and its place
  // among those that were read ahead.
  alignas(64) int32_t slot_[kRows], left_[kRows], place_[kRows];
  float factor_[kRows];  // of what is strengthened
  int32_t slots_[kRows * kSlots];
  int64_t key_offset_;
  uint32_t unsorted_;
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
    const bool lifts = rules.marks.parts() && group.reaches(of.end());
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
        group.template strengthen<Engine>(rows, probabilities, of.key, of.end(), rules.marks.adds_mass());
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
    group.template strengthen<Engine>(rows, probabilities, of.key, of.end(), rules.marks.adds_mass());
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
