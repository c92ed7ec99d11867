// The outliers of 16 rows at once, with AVX-512.
//
// Note: [Outliers as bits]
// The outliers of a block of keys become bits first, a word for 32 keys of a row: slot by slot, a row in each lane. How
// many a row has there is chance, and guessing it wrong costs more than the work, so there is no branch on it. Then
// every word that is not zero strengthens its 32 probabilities in registers. To gather and scatter single
// probabilities, one of each row at a time, took longer.
#pragma once

#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Those of the rows' Marks that are still to come. While it is in use, what the Marks say of that is out of date.
class alignas(64) GroupMarks {
 public:
  static constexpr int kRows = 16;

  // From the rows, and back.
  void load(const Row* rows, int64_t key_offset) {
    key_offset_ = key_offset;
    unsorted_ = 0;
    first_place_ = 0;
    bool any = false;
    for (int r = 0; r < kRows; ++r) {
      const Marks& marks = rows[r].marks;
      left_[r] = marks.key != kNoKey ? marks.count - marks.next : 0;
      unread_[r] = left_[r] > 0 ? left_[r] - kPlaces : marks.count - 1;
      any |= left_[r] > 0;
      factor_[r] = 1.0f + marks.gain;
      end_[r] = marks.slots + marks.count;
    }
    _mm512_store_si512(next_, _mm512_set1_epi32(kNoSlot));
    any_ = any;
    if (!any) return;
    read();
    _mm512_store_si512(next_, _mm512_load_si512(slots_[0]));
  }
  void store(Row* rows) const {
    if (!any_) return;
    const __m512i next = _mm512_load_si512(next_);
    __m512i passed = _mm512_setzero_si512();
    for (int i = 0; i < kPlaces; ++i)
      passed = _mm512_mask_add_epi32(passed, _mm512_cmplt_epi32_mask(_mm512_load_si512(slots_[i]), next), passed,
                                     _mm512_set1_epi32(1));
    alignas(64) int32_t left[kRows];
    _mm512_store_si512(left, _mm512_sub_epi32(_mm512_load_si512(left_), passed));
    for (int r = 0; r < kRows; ++r) {
      Marks& marks = rows[r].marks;
      marks.unsorted |= unsorted_ != 0;
      if (marks.key == kNoKey) continue;
      marks.next = marks.count - left[r];
      marks.key = left[r] > 0 ? next_[r] - key_offset_ : kNoKey;
    }
  }

  // What is wrong with the outliers of the rows, once they have seen all their keys.
  Status finish() const {
    uint32_t unsorted = unsorted_;
    for (uint32_t each = _mm512_cmpgt_epi32_mask(_mm512_load_si512(unread_), _mm512_setzero_si512()); each != 0;
         each &= each - 1) {
      const int r = __builtin_ctz(each);
      for (const int32_t* slot = end_[r] - unread_[r]; slot < end_[r]; ++slot) unsorted |= slot[0] <= slot[-1];
    }
    return unsorted != 0 ? Status::unsorted_outliers : Status::ok;
  }

  // The next outlier of some row lies before this key.
  ATTNRB_INLINE bool reaches(int64_t end) const {
    return _mm512_cmplt_epi32_mask(_mm512_load_si512(next_), _mm512_set1_epi32(slot_of(end))) != 0;
  }

  // See Note: [Strengthened probabilities] and Note: [Outliers as bits]. Of the keys [key, end). Where a row is divided
  // by what its outliers gained, that is added to its lane of `mass`; else `mass` is null.
  template <class Engine>
  ATTNRB_INLINE void strengthen(typename Engine::Probability* probabilities, int64_t key, int64_t end, float* mass) {
    if (!reaches(end)) return;
    alignas(64) uint32_t words[kWords][kRows];
    const int64_t count = (end - key + 31) / 32;
    for (int w = 0; w < kWords; ++w) _mm512_store_si512(words[w], _mm512_setzero_si512());
    const int32_t first = slot_of(key), last = slot_of(end);
    while (count <= 2 ? mark<2>(words, first, last) : mark<kWords>(words, first, last)) {
    }
    // Words of four times 32 keys in one loop, since every end of a loop is guessed wrong.
    for (int64_t from = 0; from < count; from += 4) {
      uint64_t each = 0;
      for (int64_t w = from; w < smaller(from + 4, count); ++w) {
        const __m512i of_rows = _mm512_load_si512(words[w]);
        each |= uint64_t(_mm512_test_epi32_mask(of_rows, of_rows)) << (w - from) * kRows;
      }
      for (; each != 0; each &= each - 1) {
        const int64_t at = __builtin_ctzll(each), w = from + at / kRows, r = at % kRows;
        const Vec grown = Engine::scale_probabilities(probabilities + Engine::probability_row(r, 32 * w), words[w][r],
                                                      Vec::set(factor_[r]));
        if (mass != nullptr) mass[r] += grown.sum();
      }
    }
  }

 private:
  static constexpr int kPlaces = 16, kWords = kMostBlockKeys / 32;
  static constexpr int32_t kNoSlot = std::numeric_limits<int32_t>::max();

  // The slot of a key, or one behind all slots.
  ATTNRB_INLINE int32_t slot_of(int64_t key) const { return int32_t(smaller(key + key_offset_, int64_t(kNoSlot))); }

  // The next slots of all rows, followed by such as are behind all.
  ATTNRB_INLINE void read() {
    Vec slots[kRows];
    for (int r = 0; r < kRows; ++r) {
      const __mmask16 held = Vec::first(left_[r]);
      const __m512i of_row = _mm512_mask_loadu_epi32(_mm512_set1_epi32(kNoSlot), held, end_[r] - left_[r]);
      const __m512i before = _mm512_alignr_epi32(of_row, of_row, 15);
      unsorted_ |= _mm512_mask_cmple_epi32_mask(held & 0xfffe, of_row, before);
      slots[r].v = _mm512_castsi512_ps(of_row);
    }
    Vec::transpose(slots);
    for (int i = 0; i < kPlaces; ++i) _mm512_store_si512(slots_[i], _mm512_castps_si512(slots[i].v));
    first_place_ = 0;
  }

  // Sets the bits of the slots at hand that lie in [first, last), and finds the first one behind them. Reads on where
  // a row has passed all at hand and has more, or rows are far apart; whether it is to be done once more.
  template <int Words>
  ATTNRB_INLINE bool mark(uint32_t (*words)[kRows], int32_t first, int32_t last) {
    __m512i next = _mm512_set1_epi32(kNoSlot), all[Words];
    for (int w = 0; w < Words; ++w) all[w] = _mm512_load_si512(words[w]);
    __m512i taken = _mm512_set1_epi32(first_place_);
    int passed = first_place_, i = first_place_;
    for (; i < kPlaces; ++i) {
      const __m512i slot = _mm512_load_si512(slots_[i]);
      const __mmask16 behind = _mm512_cmpge_epi32_mask(slot, _mm512_set1_epi32(last));
      next = _mm512_mask_min_epi32(next, behind, next, slot);
      if (behind == 0xffff) break;
      passed += behind == 0;
      taken = _mm512_mask_add_epi32(taken, __mmask16(~behind), taken, _mm512_set1_epi32(1));
      // Slots of keys outside memory lie before all others.
      const __mmask16 here = _mm512_mask_cmpge_epi32_mask(__mmask16(~behind), slot, _mm512_set1_epi32(first));
      const __m512i at = _mm512_sub_epi32(slot, _mm512_set1_epi32(first)), word = _mm512_srli_epi32(at, 5);
      const __m512i bit = _mm512_maskz_rolv_epi32(here, _mm512_set1_epi32(1), at);
      for (int w = 0; w < Words; ++w)
        all[w] = _mm512_mask_or_epi32(all[w], _mm512_cmpeq_epi32_mask(word, _mm512_set1_epi32(w)), all[w], bit);
    }
    for (int w = 0; w < Words; ++w) _mm512_store_si512(words[w], all[w]);
    first_place_ = passed;
    _mm512_store_si512(next_, next);
    const __m512i left = _mm512_load_si512(left_), places = _mm512_set1_epi32(kPlaces);
    const __mmask16 ended = _mm512_cmpeq_epi32_mask(next, _mm512_set1_epi32(kNoSlot));
    const __mmask16 more = _mm512_mask_cmpgt_epi32_mask(_mm512_cmpeq_epi32_mask(taken, places), left, places);
    if (more == 0 && (i < kPlaces / 2 || ended == 0xffff)) return false;
    const __m512i now = _mm512_sub_epi32(left, taken);
    _mm512_store_si512(left_, now);
    _mm512_mask_store_epi32(unread_, _mm512_cmpgt_epi32_mask(left, _mm512_setzero_si512()),
                            _mm512_sub_epi32(now, places));
    for (uint32_t each = more; each != 0; each &= each - 1) {
      const int32_t* from = end_[__builtin_ctz(each)] - left_[__builtin_ctz(each)];
      unsorted_ |= from[0] <= from[-1];
    }
    read();
    return more != 0;
  }

  alignas(64) int32_t slots_[kPlaces][kRows];  // at hand of each row, ascending
  // Of each row the first slot behind the keys that were met, and how many slots are left from the first at hand on.
  int32_t next_[kRows], left_[kRows];
  int32_t unread_[kRows];      // how many were not looked at, or none: whether they ascend is still to be seen
  const int32_t* end_[kRows];  // of the slots of each row
  float factor_[kRows];        // of what is strengthened
  int first_place_;            // slots at hand before this are passed in all rows
  uint32_t unsorted_;          // some row was found not to ascend
  bool any_;                   // there were some to come
  int64_t key_offset_;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
