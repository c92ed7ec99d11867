// The sequences of a problem, one by one: all alike in a batch, each of its own size where they are ragged.
//
// A driver lists those that it serves, with what it derives from their sizes, and numbers its tasks through the whole
// list: threads share queries and keys, and not sequences.
#pragma once

#include "../problem.h"

namespace attnrb {
namespace ATTNRB_ISA {

// More rows of one key head than this are faster packed.
constexpr int64_t kMaxDecodeRows = 16;

ATTNRB_INLINE bool few_queries(const Shape& shape, int64_t queries) {
  return queries == 1 || queries * (shape.heads / shape.key_heads) <= kMaxDecodeRows;
}

// Calls visit(sequence, first query, queries, keys) for all sequences of a batch, or for those of ragged ones that have
// few queries or, if not `few`, more.
template <class Visit>
void each_sequence(const Shape& shape, bool few, Visit&& visit) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    if (!shape.ragged()) {
      visit(b, int64_t(0), shape.queries, shape.keys);
      continue;
    }
    const int64_t first = shape.query_starts[b], queries = shape.query_starts[b + 1] - first;
    const int64_t keys = shape.key_counts[b];
    if (queries > 0 && keys > 0 && few_queries(shape, queries) == few) visit(b, first, queries, keys);
  }
}

// Which of the `count` entries has the task: `end` of an entry is one past its last.
template <class Entry>
ATTNRB_INLINE const Entry& entry_of(const Entry* entries, int64_t count, int64_t Entry::* end, int64_t task) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (entries[middle].*end <= task)
      low = middle + 1;
    else
      high = middle;
  }
  return entries[low];
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
