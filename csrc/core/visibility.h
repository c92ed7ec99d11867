// Which keys a query sees, as an interval of key positions. The boolean mask, if any, applies on top of it.
#pragma once

#include "problem.h"

namespace attnrb {

struct Interval {
  int64_t low, high;  // [low, high), within [0, keys]; low == high when nothing is visible
};

ATTNRB_INLINE Interval visible_interval(const Visibility& visibility, int64_t batch, int64_t query, int64_t keys) {
  // Slots fit 32 bits; a bound far outside means "no bound", and clamping it keeps the differences from overflowing.
  constexpr int64_t kFar = int64_t(1) << 40;
  const auto position = [&](int64_t slot) {
    slot = slot < -kFar ? -kFar : slot > kFar ? kFar : slot;
    slot -= visibility.key_offset;
    return slot < 0 ? 0 : slot > keys ? keys : slot;
  };
  const int64_t slot = visibility.query_offset + query;
  int64_t low = 0, high = keys;
  const auto at_least = [&](int64_t bound) { low = bound > low ? bound : low; };
  const auto at_most = [&](int64_t bound) { high = bound < high ? bound : high; };
  if (visibility.causal) at_most(position(slot + 1));
  if (visibility.window > 0) at_least(position(slot - visibility.window + 1));
  if (visibility.key_start != nullptr) at_least(position(visibility.key_start[batch]));
  if (visibility.key_end != nullptr) at_most(position(visibility.key_end[batch]));
  return {low, high > low ? high : low};
}

// The keys that at least one of the queries [first, last) may see: both bounds grow with the query.
ATTNRB_INLINE Interval visible_interval(const Visibility& visibility, int64_t batch, int64_t first, int64_t last,
                                        int64_t keys) {
  const Interval begin = visible_interval(visibility, batch, first, keys);
  const Interval end = visible_interval(visibility, batch, last - 1, keys);
  return {begin.low, end.high > begin.low ? end.high : begin.low};
}

}  // namespace attnrb
