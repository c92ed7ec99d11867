// How the work of prefill.h is cut into tasks: sequences into packed blocks of keys, and into blocks of query rows.
//
// Note: [Keys packed in passing]
// Packed keys and values are as large as the caller's, and go to memory and back where they outgrow the caches. Where
// all query rows of a key head find room in the second-level cache, and there are key heads enough for all threads, a
// task takes all of them instead: it packs one block of keys after the other, and all its rows meet it at once. 256
// queries on 8,192 keys (H 32/8, D 128, AMX) gain 14 % by it. The blocks of rows are the same either way, so that
// results do not depend on the number of threads.
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
  bool in_passing;  // see Note: [Keys packed in passing]
  int64_t group;    // sequences whose packed keys and values are in memory together
  int64_t packed;   // blocks that those before it in its group have packed: its own follow
  // One past its last task in its group.
  int64_t packing_end, attending_end;

  int64_t row_blocks() const { return query_blocks * head_blocks; }  // of a key head
  int64_t of_task() const { return in_passing ? row_blocks() : 1; }  // of these
  // And of those under way at a time: where there is one block of keys, they meet it one after the other.
  int64_t together() const { return key_blocks == 1 ? 1 : of_task(); }
  int64_t attending(int64_t key_heads) const { return key_heads * (row_blocks() / of_task()); }
};

struct Plan {
  int64_t count = 0;        // of sequences
  bool in_passing = false;  // some are
  // Packed blocks that are in memory together, heads of a block of rows, and such blocks under way together, at most.
  int64_t most_packed = 0, most_heads = 1, most_together = 1;
};

template <class Engine>
Sequence cut_into_blocks(const Shape& shape, int64_t batch, int64_t first_query, int64_t queries, int64_t keys) {
  const int64_t group_heads = shape.heads / shape.key_heads, rows = Engine::rows_at_once(queries, keys);
  Sequence each{};
  each.batch = batch;
  each.first_query = first_query;
  each.queries = queries;
  each.keys = keys;
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
  return each;
}

// Whether all threads have as much to do where tasks are key heads, or nearly so.
inline bool tasks_fill(int64_t tasks, int64_t workers) {
  const int64_t turns = (tasks + workers - 1) / workers;
  return tasks > 0 && 16 * turns * workers <= 17 * tasks;
}

// Fills `sequences`, or only counts them and what they need.
template <class Engine>
Plan list_sequences(const Engine& engine, const Shape& shape, int64_t workers, Sequence* sequences) {
  const int64_t block_bytes = engine.key_block_bytes() + engine.value_block_bytes();
  const int64_t rows_together = engine.rows_together();
  const auto find_room = [&](int64_t queries) { return queries * (shape.heads / shape.key_heads) <= rows_together; };
  int64_t heads_in_passing = 0;
  each_sequence(shape, false, [&](int64_t, int64_t, int64_t queries, int64_t) {
    heads_in_passing += find_room(queries) ? shape.key_heads : 0;
  });
  Plan plan;
  plan.in_passing = tasks_fill(heads_in_passing, workers);
  int64_t group = 0, packed = 0, attending = 0;
  each_sequence(shape, false, [&](int64_t batch, int64_t first_query, int64_t queries, int64_t keys) {
    Sequence each = cut_into_blocks<Engine>(shape, batch, first_query, queries, keys);
    each.in_passing = plan.in_passing && find_room(queries);
    const int64_t own = each.in_passing ? 0 : shape.key_heads * each.key_blocks;
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
    plan.most_together = larger(plan.most_together, each.together());
    if (sequences != nullptr) sequences[plan.count] = each;
    ++plan.count;
  });
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

// Which of a sequence's blocks of rows comes first in one of its tasks, which has of_task() of them.
inline int64_t first_row_block(const Shape& shape, const Sequence& sequence, int64_t task) {
  return (task - (sequence.attending_end - sequence.attending(shape.key_heads))) * sequence.of_task();
}

// Heads of one key head follow each other and share its packed keys; within it, long (late) queries come first.
inline RowBlock row_block(const Shape& shape, const Sequence& sequence, int64_t index) {
  const int64_t head_block = index % sequence.head_blocks,
                query_block = sequence.query_blocks - 1 - index / sequence.head_blocks % sequence.query_blocks;
  const int64_t group = shape.heads / shape.key_heads, passed = query_block * sequence.queries_per_block;
  RowBlock block;
  block.batch = sequence.batch;
  block.key_head = index / sequence.row_blocks();
  block.first_head = block.key_head * group + head_block * sequence.heads_per_block;
  block.heads = smaller(group - head_block * sequence.heads_per_block, sequence.heads_per_block);
  block.first_query = sequence.first_query + passed;
  block.queries = smaller(sequence.queries - passed, sequence.queries_per_block);
  return block;
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
