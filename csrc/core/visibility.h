// Which keys a query sees, as an interval of key positions. The boolean mask, if any, applies on top of it.
#pragma once

#include <cstdint>

#include "types.h"

namespace attnrb {

// Which keys a query may see. Every condition that is set must hold.
struct Visibility {
  bool causal = true;                      // key slot <= query slot
  int64_t query_offset = 0;                // slot of query 0
  const int64_t* query_offsets = nullptr;  // [B]: slot of query 0 of each sequence, in place of the above, or null
  int64_t key_offset = 0;                  // slot of key 0
  int64_t window = 0;                      // key slot > query slot - window; 0: no limit
  // Query and key lie in one chunk: floor((slot - o) / chunk) is the same for both, o being key_start where there is
  // one and 0 elsewhere. 0: no chunks.
  int64_t chunk = 0;
  const int64_t* key_start = nullptr;  // [B], first visible slot, or null
  const int64_t* key_end = nullptr;    // [B], one past the last visible slot, or null
  const bool* mask = nullptr;          // [B, H, M, N] by strides (0 where broadcast), true = visible, or null
  int64_t mask_strides[4] = {0, 0, 0, 0};
};

struct Interval {
  int64_t low, high;  // [low, high), within [0, keys]; low == high when nothing is visible
};

// Slots fit 32 bits; a bound far outside means "no bound", and clamping it keeps differences from overflowing.
ATTNRB_INLINE int64_t clamp_slot(int64_t slot) {
  constexpr int64_t kFar = int64_t(1) << 40;
  return slot < -kFar ? -kFar : slot > kFar ? kFar : slot;
}

ATTNRB_INLINE int64_t query_slot(const Visibility& visibility, int64_t batch, int64_t query) {
  return (visibility.query_offsets != nullptr ? clamp_slot(visibility.query_offsets[batch]) : visibility.query_offset) +
         query;
}

ATTNRB_INLINE Interval visible_interval(const Visibility& visibility, int64_t batch, int64_t query, int64_t keys) {
  const auto position = [&](int64_t slot) {
    slot = clamp_slot(slot) - visibility.key_offset;
    return slot < 0 ? 0 : slot > keys ? keys : slot;
  };
  const int64_t slot = query_slot(visibility, batch, query);
  int64_t low = 0, high = keys;
  const auto at_least = [&](int64_t bound) { low = bound > low ? bound : low; };
  const auto at_most = [&](int64_t bound) { high = bound < high ? bound : high; };
  if (visibility.causal) at_most(position(slot + 1));
  if (visibility.window > 0) at_least(position(slot - visibility.window + 1));
  if (visibility.chunk > 0) {
    const int64_t origin = visibility.key_start != nullptr ? clamp_slot(visibility.key_start[batch]) : 0;
    const int64_t within = (slot - origin) % visibility.chunk;
    const int64_t first = slot - (within < 0 ? within + visibility.chunk : within);
    at_least(position(first));
    at_most(position(first + visibility.chunk));
  }
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
