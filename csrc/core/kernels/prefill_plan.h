// How the work of prefill.h is cut into tasks: sequences into packed blocks of keys, and into blocks of query rows.
#pragma once

#include "driver.h"
#include "sequences.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Packed keys and values of a batch element take at most this much at a time, unless one element alone needs more.
constexpr int64_t kPackedBudget = int64_t(64) << 20;

struct Sequence {
  int64_t batch, first_query, queries, keys;
  // A block of rows holds many queries of one head, or all queries of several heads where queries are few.
  int64_t queries_per_block, heads_per_block, query_blocks, head_blocks, key_blocks;
  int64_t group;   // sequences whose packed keys and values are in memory together
  int64_t packed;  // blocks that those before it in its group have packed: its own follow
  // One past its last task in its group.
  int64_t packing_end, attending_end;

  int64_t attending(int64_t key_heads) const { return key_heads * query_blocks * head_blocks; }
};

struct Plan {
  int64_t count = 0;  // of sequences
  // Packed blocks that are in memory together, and heads of a block of rows, at most.
  int64_t most_packed = 0, most_heads = 1;
};

// Fills `sequences`, or only counts them and what they need.
template <class Engine>
Plan list_sequences(const Shape& shape, int64_t block_bytes, Sequence* sequences) {
  Plan plan;
  const int64_t group_heads = shape.heads / shape.key_heads;
  int64_t count = 0, group = 0, packed = 0, attending = 0;
  each_sequence(shape, false, [&](int64_t batch, int64_t first_query, int64_t queries, int64_t keys) {
    Sequence each;
    each.batch = batch;
    each.first_query = first_query;
    each.queries = queries;
    each.keys = keys;
    const int64_t rows = Engine::rows_at_once(queries, keys);
    if (queries * 2 > rows) {
      each.queries_per_block = smaller(queries, rows);
      each.heads_per_block = 1;
    } else {
      each.queries_per_block = queries;
      each.heads_per_block = smaller(rows / queries, group_heads);
    }
    each.query_blocks = (queries + each.queries_per_block - 1) / each.queries_per_block;
    each.head_blocks = (group_heads + each.heads_per_block - 1) / each.heads_per_block;
    each.key_blocks = (keys + Engine::block_keys - 1) / Engine::block_keys;
    const int64_t own = shape.key_heads * each.key_blocks;
    if (packed > 0 && (packed + own) * block_bytes > kPackedBudget) {
      ++group;
      packed = attending = 0;
    }
    each.group = group;
    each.packed = packed;
    each.packing_end = packed += own;
    each.attending_end = attending += each.attending(shape.key_heads);
    plan.most_packed = larger(plan.most_packed, packed);
    plan.most_heads = larger(plan.most_heads, each.heads_per_block);
    if (sequences != nullptr) sequences[count] = each;
    ++count;
  });
  plan.count = count;
  return plan;
}

// Queries of one head, or all queries of several, whose rows follow each other.
struct RowBlock {
  int64_t batch, key_head, first_head, heads, first_query, queries;
  int64_t rows() const { return heads * queries; }

  // Calls each(row, head, query) for the rows [first, last).
  template <class Each>
  ATTNRB_INLINE void each_row(int64_t first, int64_t last, Each&& each) const {
    int64_t head = first_head + first / queries, query = first_query + first % queries;
    for (int64_t r = first; r < last; ++r) {
      each(r, head, query);
      if (++query < first_query + queries) continue;
      query = first_query;
      ++head;
    }
  }
};

// Heads of one key head follow each other and share its packed keys; within it, long (late) queries come first.
inline RowBlock row_block(const Shape& shape, const Sequence& sequence, int64_t task) {
  const int64_t own = task - (sequence.attending_end - sequence.attending(shape.key_heads));
  const int64_t head_block = own % sequence.head_blocks,
                query_block = sequence.query_blocks - 1 - own / sequence.head_blocks % sequence.query_blocks;
  const int64_t group = shape.heads / shape.key_heads, passed = query_block * sequence.queries_per_block;
  RowBlock block;
  block.batch = sequence.batch;
  block.key_head = own / sequence.head_blocks / sequence.query_blocks;
  block.first_head = block.key_head * group + head_block * sequence.heads_per_block;
  block.heads = smaller(group - head_block * sequence.heads_per_block, sequence.heads_per_block);
  block.first_query = sequence.first_query + passed;
  block.queries = smaller(sequence.queries - passed, sequence.queries_per_block);
  return block;
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
