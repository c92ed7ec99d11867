// Attention of many queries: keys and values are packed once per key head, then blocks of query rows walk over them.
#pragma once

#include <new>

#include "driver.h"
#include "rows.h"
#include "sequences.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Packed keys and values of a batch element take at most this much at a time, unless one element alone needs more.
constexpr int64_t kPackedBudget = int64_t(64) << 20;

template <class Engine>
class Prefill : Driver<Prefill<Engine>> {
  using Base = Driver<Prefill>;
  friend Base;
  using Base::note, Base::pool_;
  using Input = typename Engine::Input;
  using Probability = typename Engine::Probability;
  using Places = typename Engine::Places;
  using Group = typename Engine::Group;
  static constexpr bool kGrouped = Group::kRows > 1;
  static_assert(Engine::block_keys <= kMostBlockKeys, "outliers of a block are lifted into arrays of this length");

 public:
  Prefill(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : Base(pool, scratch), problem_(problem), shape_(problem.shape), engine_(problem.shape), rules_(problem) {}

  // Of a ragged problem: the sequences that decode leaves.
  Status run() {
    list_sequences(nullptr);
    if (count_ == 0) return Status::ok;
    const int64_t block_bytes = engine_.key_block_bytes() + engine_.value_block_bytes();
    this->reserve_shared([&](Carver& carver) {
      sequences_ = carver.take<Sequence>(count_);
      packed_ = carver.take<char>(most_packed_ * block_bytes);
      finite_ = carver.take<uint8_t>(most_packed_);
    });
    list_sequences(sequences_);
    this->reserve_workers();

    for (int64_t first = 0, last; first < count_; first = last) {
      for (last = first + 1; last < count_ && sequences_[last].group == sequences_[first].group;) ++last;
      const Sequence* group = sequences_ + first;
      const auto of_task = [&](int64_t Sequence::* end, int64_t task) -> const Sequence& {
        return entry_of(group, last - first, end, task);
      };
      for_each_task(pool_, group[last - first - 1].packing_end,
                    [&](int64_t worker, int64_t task) { pack(of_task(&Sequence::packing_end, task), worker, task); });
      for_each_task(pool_, group[last - first - 1].attending_end, [&](int64_t worker, int64_t task) {
        attend(of_task(&Sequence::attending_end, task), worker, task);
      });
    }
    return this->status();
  }

 private:
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

  // Fills `sequences`, or only counts them and what they need.
  void list_sequences(Sequence* sequences) {
    const int64_t group_heads = shape_.heads / shape_.key_heads;
    const int64_t block_bytes = engine_.key_block_bytes() + engine_.value_block_bytes();
    int64_t count = 0, group = 0, packed = 0, attending = 0;
    most_packed_ = 0;
    most_heads_ = 1;
    each_sequence(shape_, false, [&](int64_t batch, int64_t first_query, int64_t queries, int64_t keys) {
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
      const int64_t own = shape_.key_heads * each.key_blocks;
      if (packed > 0 && (packed + own) * block_bytes > kPackedBudget) {
        ++group;
        packed = attending = 0;
      }
      each.group = group;
      each.packed = packed;
      each.packing_end = packed += own;
      each.attending_end = attending += each.attending(shape_.key_heads);
      most_packed_ = larger(most_packed_, packed);
      most_heads_ = larger(most_heads_, each.heads_per_block);
      if (sequences != nullptr) sequences[count] = each;
      ++count;
    });
    count_ = count;
  }

  struct Worker {
    void* queries;
    float* scores;
    Probability* probabilities;
    float* sums;
    float* marked;  // sums of outliers, where they have their own
    Row* rows;
    Group* groups;    // of rows
    BiasBlock* bias;  // of each head
    float* bias_values;
    float* candidate_scores;
    int32_t* candidates;
    Input* finite_values;
    const Input** places;  // of keys, then of values, that lie in blocks
  };

  Worker carve(Carver& carver) const {
    Worker worker;
    worker.queries = carver.take<char>(engine_.query_block_bytes());
    worker.scores = carver.take<float>(Engine::strip * Engine::block_keys);
    worker.probabilities = reinterpret_cast<Probability*>(carver.take<char>(Engine::probability_bytes()));
    worker.sums = carver.take<float>(Engine::block_rows * engine_.value_columns);
    worker.marked = carver.take<float>(rules_.marks.parts() ? Engine::block_rows * engine_.value_columns : 0);
    worker.rows = carver.take<Row>(Engine::block_rows);
    worker.groups = carver.take<Group>(kGrouped ? Engine::block_rows / Group::kRows : 0);
    worker.bias = carver.take<BiasBlock>(most_heads_);
    worker.bias_values = carver.take<float>(rules_.bias.any() ? most_heads_ * Engine::block_keys : 0);
    const int64_t candidates = Engine::block_rows * rules_.marks.candidate_capacity(Engine::block_keys);
    worker.candidate_scores = carver.take<float>(candidates);
    worker.candidates = carver.take<int32_t>(candidates);
    worker.finite_values = carver.take<Input>(Engine::block_keys * shape_.value_width);
    worker.places = carver.take<const Input*>(problem_.key.in_blocks() ? 2 * Engine::block_keys : 0);
    return worker;
  }

  int64_t packed_block(const Sequence& sequence, int64_t key_head, int64_t block) const {
    return sequence.packed + key_head * sequence.key_blocks + block;
  }
  char* packed_keys(int64_t packed_block) const {
    return packed_ + packed_block * (engine_.key_block_bytes() + engine_.value_block_bytes());
  }

  void pack(const Sequence& sequence, int64_t worker_index, int64_t task) {
    const int64_t own = task - sequence.packed, batch = sequence.batch;
    const int64_t block = own % sequence.key_blocks, key_head = own / sequence.key_blocks;
    const int64_t key = block * Engine::block_keys;
    const int64_t count = smaller(sequence.keys - key, int64_t(Engine::block_keys));
    const Interval seen = visible_interval(problem_.visibility, batch, sequence.first_query,
                                           sequence.first_query + sequence.queries, sequence.keys);
    if (key >= seen.high || key + count <= seen.low) return;

    const KeyRows &keys = problem_.key, &values = problem_.value;
    const Worker worker = this->worker(worker_index);
    if (!keys.in_blocks()) {
      pack_keys(task, keys.template rows<Input>(batch, key_head, key), count);
      if (shape_.value_width > 0)
        pack_values(task, worker, batch, key_head, key, values.template rows<Input>(batch, key_head, key), count);
      return;
    }
    const Input **key_rows = worker.places, **value_rows = worker.places + Engine::block_keys;
    list_rows(keys, batch, key_head, key, count, key_rows);
    pack_keys(task, key_rows, count);
    if (shape_.value_width == 0) return;
    list_rows(values, batch, key_head, key, count, value_rows);
    pack_values(task, worker, batch, key_head, key, value_rows, count);
  }

  static void list_rows(const KeyRows& operand, int64_t batch, int64_t key_head, int64_t key, int64_t count,
                        const Input** rows) {
    for (int64_t at = 0, run; at < count; at += run) {
      run = operand.run(key + at, count - at);
      const EvenRows<Input> even = operand.template rows<Input>(batch, key_head, key + at);
      for (int64_t j = 0; j < run; ++j) rows[at + j] = even[j];
    }
  }

  template <class Rows>
  void pack_keys(int64_t packed_block, const Rows& keys, int64_t count) const {
    engine_.pack_keys(packed_keys(packed_block), keys, problem_.key.column_stride(), count);
  }

  template <class Rows>
  void pack_values(int64_t packed_block, const Worker& worker, int64_t batch, int64_t key_head, int64_t key,
                   const Rows& values, int64_t count) {
    const int64_t column_stride = problem_.value.column_stride();
    char* packed = packed_keys(packed_block) + engine_.key_block_bytes();
    finite_[packed_block] = all_finite<Input>(problem_.value, batch, key_head, key, count, shape_.value_width);
    if (finite_[packed_block]) {
      engine_.pack_values(packed, values, column_stride, count);
      return;
    }
    // A masked value of NaN or infinity must not meet a probability of zero, since their product is NaN: such values
    // are packed as zeros, and added where they are seen.
    Input* copy = worker.finite_values;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < shape_.value_width; ++d) {
        const Input value = values[r][d * column_stride];
        copy[r * shape_.value_width + d] = is_finite(to_float(value)) ? value : from_float<Input>(0.0f);
      }
    engine_.pack_values(packed, EvenRows<Input>{copy, shape_.value_width}, 1, count);
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
  RowBlock row_block(const Sequence& sequence, int64_t task) const {
    const int64_t own = task - (sequence.attending_end - sequence.attending(shape_.key_heads));
    const int64_t head_block = own % sequence.head_blocks,
                  query_block = sequence.query_blocks - 1 - own / sequence.head_blocks % sequence.query_blocks;
    const int64_t group = shape_.heads / shape_.key_heads, passed = query_block * sequence.queries_per_block;
    RowBlock block;
    block.batch = sequence.batch;
    block.key_head = own / sequence.head_blocks / sequence.query_blocks;
    block.first_head = block.key_head * group + head_block * sequence.heads_per_block;
    block.heads = smaller(group - head_block * sequence.heads_per_block, sequence.heads_per_block);
    block.first_query = sequence.first_query + passed;
    block.queries = smaller(sequence.queries - passed, sequence.queries_per_block);
    return block;
  }

  void attend(const Sequence& sequence, int64_t worker_index, int64_t task) {
    const Worker worker = this->worker(worker_index);
    const RowBlock of = row_block(sequence, task);
    const FlushSubnormals flush;
    engine_.start_worker();
    start_rows(worker, of);
    const int64_t rows = of.rows();
    bool fresh[Engine::block_rows / Engine::strip];
    for (int64_t r = 0; r < rows; r += Engine::strip) {
      fresh[r / Engine::strip] = true;
      if (!Engine::starts_fresh) clear_sums(worker, r);
    }
    if (rules_.marks.parts())
      for (int64_t i = 0; i < round_up(rows, Engine::strip) * engine_.value_columns; ++i) worker.marked[i] = 0.0f;

    const auto finish = [&](int64_t r) {
      if (Engine::starts_fresh && fresh[r / Engine::strip]) clear_sums(worker, r);
      finish_strip(worker, of, r);
    };
    const Interval seen =
        visible_interval(problem_.visibility, of.batch, of.first_query, of.first_query + of.queries, sequence.keys);
    if (seen.low >= seen.high)
      for (int64_t r = 0; r < rows; r += Engine::strip) finish(r);
    for (int64_t block = seen.low / Engine::block_keys; block * Engine::block_keys < seen.high; ++block) {
      if (rules_.bias.any())
        for (int64_t h = 0; h < of.heads; ++h)
          worker.bias[h] = rules_.bias.block(of.batch, of.first_head + h, block * Engine::block_keys,
                                             Engine::block_keys, worker.bias_values + h * Engine::block_keys);
      const bool last = (block + 1) * Engine::block_keys >= seen.high;
      for (int64_t r = 0; r < rows; r += Engine::strip) {
        attend_strip(worker, sequence, of.key_head, block, r, smaller(rows - r, int64_t(Engine::strip)),
                     fresh[r / Engine::strip]);
        if (last) finish(r);
      }
    }
    engine_.stop_worker();
  }

  void start_rows(const Worker& worker, const RowBlock& of) {
    const int64_t rows = of.rows(), padded_rows = round_up(rows, Engine::strip);
    const int64_t query_stride = problem_.query.strides[3];
    of.each_row(0, rows, [&](int64_t, int64_t head, int64_t query) { rules_.marks.prefetch(of.batch, head, query); });
    of.each_row(0, rows, [&](int64_t r, int64_t head, int64_t query) {
      const Input* row = row_of<Input>(problem_.query, of.batch, head, query);
      if (query + kAhead < of.first_query + of.queries) prefetch_row(row + kAhead * problem_.query.strides[2]);
      engine_.pack_query_row(worker.queries, r, row, query_stride, rules_.query_factor());
    });
    const int64_t candidate_capacity = rules_.marks.candidate_capacity(Engine::block_keys);
    of.each_row(0, rows, [&](int64_t r, int64_t head, int64_t query) {
      // In place: a copy would read what was just written in parts.
      Row& row = *new (&worker.rows[r]) Row();
      note(rules_.start(row, of.batch, head, query, worker.bias + (head - of.first_head)));
      if (rules_.marks.emits()) {
        row.found.scores = worker.candidate_scores + r * candidate_capacity;
        row.found.positions = worker.candidates + r * candidate_capacity;
      }
    });
    for (int64_t r = rows; r < padded_rows; ++r) {
      new (&worker.rows[r]) Row();
      engine_.pack_query_row(worker.queries, r, nullptr, query_stride, rules_.query_factor());
    }
    if constexpr (kGrouped)
      for (int64_t r = 0; r + Group::kRows <= rows; r += Group::kRows)
        worker.groups[r / Group::kRows].load(worker.rows + r, problem_.visibility.key_offset);
  }

  // A row of queries is asked for so many rows before its turn: blocks begin anywhere, where nothing foresees them.
  static constexpr int64_t kAhead = 16;
  ATTNRB_INLINE void prefetch_row(const Input* row) const {
    for (int64_t d = 0; d < shape_.width; d += 64 / int64_t(sizeof(Input))) __builtin_prefetch(row + d);
  }

  // Of the strip that `row` begins.
  void clear_sums(const Worker& worker, int64_t row) const {
    float* sums = worker.sums + row * engine_.value_columns;
    for (int64_t i = 0; i < Engine::strip * engine_.value_columns; ++i) sums[i] = 0.0f;
  }

  // Stands apart so that the loop over whole rows stays small.
  [[gnu::noinline]] void absorb_other(const Worker& worker, int64_t r, const BlockOfRow& of, float* scores,
                                      Probability* probabilities, int64_t batch, int64_t key_head) const {
    rules_.template absorb_other<Engine>(
        worker.rows[r], of, scores, probabilities, [&](float factor) { rescale(worker, r, factor); },
        [&](int64_t j, float weight) { take(worker, r, of.key + j, weight, batch, key_head); });
  }

  // An outlier joins the sums of its own.
  void take(const Worker& worker, int64_t r, int64_t key, float weight, int64_t batch, int64_t key_head) const {
    add_scaled(worker.marked + r * engine_.value_columns, weight,
               problem_.value.template row<Input>(batch, key_head, key), problem_.value.column_stride(),
               shape_.value_width);
  }

  [[gnu::noinline]] void rescale(const Worker& worker, int64_t r, float factor) const {
    scale_sums<Places>(worker.sums + engine_.sum_row(r), engine_.value_columns, factor);
    if (rules_.marks.parts()) scale_sums(worker.marked + r * engine_.value_columns, engine_.value_columns, factor);
  }

  void attend_strip(const Worker& worker, const Sequence& sequence, int64_t key_head, int64_t block, int64_t first_row,
                    int64_t rows, bool& fresh) {
    const int64_t key = block * Engine::block_keys, batch = sequence.batch;
    Row* row = worker.rows + first_row;
    int64_t low = row[0].low, high = row[0].high, all_low = low, all_high = high;
    for (int64_t r = 1; r < rows; ++r) {
      low = row[r].low < low ? row[r].low : low;
      all_low = row[r].low > all_low ? row[r].low : all_low;
      high = row[r].high > high ? row[r].high : high;
      all_high = row[r].high < all_high ? row[r].high : all_high;
    }
    const int64_t first = low > key ? (low - key) / Engine::key_granule * Engine::key_granule : 0;
    const int64_t last =
        high - key < Engine::block_keys ? round_up(high - key, Engine::key_granule) : Engine::block_keys;
    // Where no row sees anything, the block may never have been packed.
    if (low >= high || first >= last || high <= key) return;

    char* keys = packed_keys(packed_block(sequence, key_head, block));
    engine_.scores(worker.queries, first_row, rows, keys, first, last, worker.scores);
    const bool partial = all_low > key + first || all_high < key + last || problem_.visibility.mask != nullptr;
    const BlockOfRow of{key + first, last - first, last - first, partial};
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = worker.scores + Engine::score_row(r, first);
      Probability* probabilities = worker.probabilities + Engine::probability_row(r, first);
      if constexpr (kGrouped)
        if (rows - r >= Group::kRows) {
          Engine::absorb_group(
              rules_, worker.groups[(first_row + r) / Group::kRows], row + r, of, scores, probabilities,
              [&](int64_t each, float factor) { rescale(worker, first_row + r + each, factor); },
              [&](int64_t each, int64_t j, float weight) {
                take(worker, first_row + r + each, of.key + j, weight, batch, key_head);
              });
          r += Group::kRows - 1;
          continue;
        }
      if (rules_.whole(row[r], of))
        rules_.template absorb_whole<Engine>(row[r], of, scores, probabilities,
                                             [&](float factor) { rescale(worker, first_row + r, factor); });
      else
        absorb_other(worker, first_row + r, of, scores, probabilities, batch, key_head);
    }
    if (shape_.value_width == 0) return;
    engine_.accumulate(worker.probabilities, rows, keys + engine_.key_block_bytes(), first, last,
                       worker.sums + first_row * engine_.value_columns, fresh);
    fresh = false;
    if (finite_[packed_block(sequence, key_head, block)]) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = first; j < last; ++j) {
        if (!rules_.visible(row[r], key + j)) continue;
        const float weight = Engine::load_probability(worker.probabilities + Engine::probability_row(r, 0), j);
        add_not_finite(worker.sums + engine_.sum_row(first_row + r), weight, batch, key_head, key + j);
      }
  }

  void add_not_finite(float* sums, float weight, int64_t batch, int64_t key_head, int64_t key) const {
    const Input* row = problem_.value.template row<Input>(batch, key_head, key);
    for (int64_t d = 0; d < shape_.value_width; ++d) {
      const float value = to_float(row[d * problem_.value.column_stride()]);
      if (!is_finite(value)) sums[Places::place(d)] += weight * value;
    }
  }

  // The strip that `first_row` begins has met all its keys.
  void finish_strip(const Worker& worker, const RowBlock& of, int64_t first_row) {
    const int64_t end = smaller(first_row + Engine::strip, of.rows());
    if constexpr (kGrouped)
      for (int64_t r = first_row; r + Group::kRows <= end; r += Group::kRows)
        worker.groups[r / Group::kRows].store(worker.rows + r);
    of.each_row(first_row, end,
                [&](int64_t r, int64_t head, int64_t query) { finish(worker, r, of.batch, head, query); });
  }

  void finish(const Worker& worker, int64_t r, int64_t batch, int64_t head, int64_t query) {
    const Row& row = worker.rows[r];
    note(MarkRules::finish(row.marks));
    const int64_t index = shape_.row(batch, head, query);
    rules_.report(row, index);
    if (rules_.marks.emits())
      rules_.marks.emit(row.found.scores, row.found.positions, row.found.count, row.max, rules_.mass(row), row.own,
                        index);
    if (shape_.value_width == 0) return;
    write_output<Input, Places>(problem_, rules_, row, worker.sums + engine_.sum_row(r),
                                rules_.marks.parts() ? worker.marked + r * engine_.value_columns : nullptr, batch, head,
                                query);
  }

  const AttentionProblem& problem_;
  const Shape& shape_;
  const Engine engine_;
  const RowRules rules_;
  Sequence* sequences_ = nullptr;
  int64_t count_ = 0, most_packed_ = 0, most_heads_ = 1;
  char* packed_ = nullptr;
  uint8_t* finite_ = nullptr;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
