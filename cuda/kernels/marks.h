// Outlier lists of rows: where they lie, whether they keep the rules, and walking down sixteen of them at a time.
#pragma once

#include "rows.h"

namespace attnrb::cuda {

struct OutlierList {
  const int32_t* slots = nullptr;
  int32_t count = 0;
};
template <class Sequences = EvenSequences>
ATTNRB_DEVICE OutlierList outliers_of(const AttentionParameters& p, int64_t batch, const RowPlace& place) {
  const Edit& edit = p.problem.edit;
  const int64_t list = Sequences::list(p, batch, place);
  return {edit.indices + list * edit.capacity, edit.counts[list]};
}

// Whether a list breaks the rules: a count outside [0, C], slots that do not ascend. A warp looks together and reports.
ATTNRB_DEVICE bool breaks_rules(const AttentionParameters& p, const OutlierList& list) {
  const int lane = thread_index() % 32;
  const bool outside = list.count < 0 || list.count > p.problem.edit.capacity;
  bool unsorted = false;
  if (!outside)
    for (int c = lane + 1; c < list.count; c += 32) unsorted = unsorted || list.slots[c] <= list.slots[c - 1];
  const bool broken = outside || any(unsorted);
  if (broken && lane == 0)
    report_status(p.status, int32_t(outside ? Status::outlier_count : Status::unsorted_outliers));
  return broken;
}

template <class Sequences = EvenSequences>
ATTNRB_DEVICE float gain_of(const AttentionParameters& p, int64_t batch, int head) {
  return Sequences::gain(p, batch)[head * p.gain_stride];
}

// The sixteen rows' outliers still to come: lanes 0 to 15 walk down a row's list each.
struct BoostCursor {
  const int32_t* slots = nullptr;
  int32_t count = 0, next = 0;
  int position = 0;  // of the next outlier, or beyond all keys; -1 for any before them

  // Rows that break the rules are reported and become NaN: the result has a bit for each.
  template <class Sequences = EvenSequences>
  ATTNRB_DEVICE unsigned start(const AttentionParameters& p, int64_t batch, int64_t key_head, int64_t warp_row) {
    const int lane = thread_index() % 32;
    position = kNone;
    if (p.problem.edit.indices == nullptr) return 0;
    // Two lanes look at a row's list, and at all rows together: no load waits for that of another row.
    const int64_t row = warp_row + lane % 16;
    OutlierList list;
    float gain = 0.0f;
    bool outside = false, unsorted = false;
    if (row < Sequences::rows(p)) {
      const RowPlace place = row_place<Sequences>(p, key_head, row);
      list = outliers_of<Sequences>(p, batch, place);
      gain = gain_of<Sequences>(p, batch, place.head);
      outside = list.count < 0 || list.count > p.problem.edit.capacity;
      const int32_t last = outside ? 0 : list.count;
#pragma unroll 4
      for (int32_t c = 1 + lane / 16; c < last; c += 2) unsorted |= list.slots[c] <= list.slots[c - 1];
    }
    if (outside || unsorted)
      report_status(p.status, int32_t(outside ? Status::outlier_count : Status::unsorted_outliers));
    const unsigned bad = ballot(outside || unsorted), broken = (bad | bad >> 16) & 0xffffu;
    if (lane < 16 && !((broken >> lane) & 1u) && gain != 0.0f) {
      slots = list.slots;
      count = list.count;
    }
    advance(p);
    return broken;
  }

  // To the first outliers again.
  ATTNRB_DEVICE void restart(const AttentionParameters& p) {
    next = 0;
    advance(p);
  }

  // Whether some row has an outlier before `last`.
  ATTNRB_DEVICE bool any_before(int last) const { return any(position < last); }

  // The row's outliers among the `keys` <= 64 keys from `first` on, one bit each. Slots before them are not held here.
  ATTNRB_DEVICE uint64_t take(const AttentionParameters& p, int first, int keys) {
    uint64_t bits = 0;
    while (position < first + keys) {
      if (position >= first) bits |= uint64_t(1) << (position - first);
      ++next;
      advance(p);
    }
    return bits;
  }

 private:
  static constexpr int kNone = 0x7fffffff;

  ATTNRB_DEVICE void advance(const AttentionParameters& p) {
    position = kNone;
    if (next >= count) return;
    const int64_t at = int64_t(slots[next]) - p.problem.visibility.key_offset;
    position = at < 0 ? -1 : int(at);
  }
};

}  // namespace attnrb::cuda
