// Attention of many queries: keys and values are packed once per key head, then blocks of query rows walk over them.
//
// Note: [Strips in step]
// A tile unit that has nothing to do for half a microsecond takes 0.3 to start again, and softmax of a strip of a few
// keys lasts as long as that. So strips whose scores fit the room of one go step by step: all their products, all their
// softmax, all their sums. Each is finished as soon as its sums are, which are in the first-level cache then. A
// re-balanced call of 64 queries gains 4 % by it.
#pragma once

#include <new>

#include "driver.h"
#include "prefill_plan.h"
#include "rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

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
    const int64_t block_bytes = engine_.key_block_bytes() + engine_.value_block_bytes();
    plan_ = list_sequences(engine_, shape_, pool_.workers, nullptr);
    if (plan_.count == 0) return Status::ok;
    this->reserve_shared([&](Carver& carver) {
      sequences_ = carver.take<Sequence>(plan_.count);
      // Behind what is packed beforehand, a block of each worker for what it packs in passing.
      const int64_t blocks = plan_.most_packed + (plan_.in_passing ? pool_.workers : 0);
      packed_ = carver.take<char>(blocks * block_bytes);
      finite_ = carver.take<uint8_t>(blocks);
    });
    list_sequences(engine_, shape_, pool_.workers, sequences_);
    Carver count(nullptr);
    carve_state(count);
    state_bytes_ = count.taken();
    this->reserve_workers();

    for (int64_t first = 0, last; first < plan_.count; first = last) {
      for (last = first + 1; last < plan_.count && sequences_[last].group == sequences_[first].group;) ++last;
      const Sequence* group = sequences_ + first;
      const auto of_task = [&](int64_t Sequence::* end, int64_t task) -> const Sequence& {
        return entry_of(group, last - first, end, task);
      };
      for_each_task_by_shares(pool_, group[last - first - 1].packing_end, [&](int64_t worker, int64_t task) {
        const Sequence& sequence = of_task(&Sequence::packing_end, task);
        const int64_t own = task - sequence.packed;
        const int64_t key_head = own / sequence.key_blocks, block = own % sequence.key_blocks;
        pack(sequence, key_head, block, packed_block(sequence, key_head, block, worker), this->worker(worker));
      });
      for_each_task_by_shares(pool_, group[last - first - 1].attending_end, [&](int64_t worker, int64_t task) {
        attend(of_task(&Sequence::attending_end, task), worker, task);
      });
    }
    return this->status();
  }

 private:
  // What a block of rows carries through all keys.
  struct State {
    RowBlock of;
    Interval seen;  // keys that any of its rows sees
    void* queries;
    float* sums;
    float* marked;  // sums of outliers, where they have their own
    bool* fresh;    // of each strip: nothing is added up yet
    Row* rows;
    Group* groups;    // of rows
    BiasBlock* bias;  // of each head
    float* bias_values;
    float* candidate_scores;
    int32_t* candidates;
  };
  struct Worker {
    State* states;  // of as many blocks of rows as a task has
    char* state_room;
    float* scores;
    Probability* probabilities;
    Input* finite_values;
    const Input** places;  // of keys, then of values, that lie in blocks
  };

  State carve_state(Carver& carver) const {
    State state;
    state.queries = carver.take<char>(engine_.query_block_bytes());
    state.sums = carver.take<float>(Engine::block_rows * engine_.value_columns);
    state.marked = carver.take<float>(rules_.marks.parts() ? Engine::block_rows * engine_.value_columns : 0);
    state.fresh = carver.take<bool>(Engine::block_rows / Engine::strip);
    state.rows = carver.take<Row>(Engine::block_rows);
    state.groups = carver.take<Group>(kGrouped ? Engine::block_rows / Group::kRows : 0);
    state.bias = carver.take<BiasBlock>(plan_.most_heads);
    state.bias_values = carver.take<float>(rules_.bias.any() ? plan_.most_heads * Engine::block_keys : 0);
    const int64_t candidates = Engine::block_rows * rules_.marks.candidate_capacity(Engine::block_keys);
    state.candidate_scores = carver.take<float>(candidates);
    state.candidates = carver.take<int32_t>(candidates);
    return state;
  }
  Worker carve(Carver& carver) const {
    Worker worker;
    worker.states = carver.take<State>(plan_.most_together);
    worker.state_room = carver.take<char>(plan_.most_together * state_bytes_);
    worker.scores = carver.take<float>(Engine::strip * Engine::block_keys);
    worker.probabilities = reinterpret_cast<Probability*>(carver.take<char>(Engine::probability_bytes()));
    worker.finite_values = carver.take<Input>(Engine::block_keys * shape_.value_width);
    worker.places = carver.take<const Input*>(problem_.key.in_blocks() ? 2 * Engine::block_keys : 0);
    return worker;
  }

  // Where a block of keys lies packed for a worker.
  int64_t packed_block(const Sequence& sequence, int64_t key_head, int64_t block, int64_t worker) const {
    return sequence.in_passing ? plan_.most_packed + worker : sequence.packed + key_head * sequence.key_blocks + block;
  }
  char* packed_keys(int64_t packed_block) const {
    return packed_ + packed_block * (engine_.key_block_bytes() + engine_.value_block_bytes());
  }

  // Of a key head, a block of keys to the packed block `packed`.
  void pack(const Sequence& sequence, int64_t key_head, int64_t block, int64_t packed, const Worker& worker) {
    const int64_t batch = sequence.batch, key = block * Engine::block_keys;
    const int64_t count = smaller(sequence.keys - key, int64_t(Engine::block_keys));
    const Interval seen = visible_interval(problem_.visibility, batch, sequence.first_query,
                                           sequence.first_query + sequence.queries, sequence.keys);
    if (key >= seen.high || key + count <= seen.low) return;

    const KeyRows &keys = problem_.key, &values = problem_.value;
    if (!keys.in_blocks()) {
      pack_keys(packed, keys.template rows<Input>(batch, key_head, key), count);
      if (shape_.value_width > 0)
        pack_values(packed, worker, batch, key_head, key, values.template rows<Input>(batch, key_head, key), count);
      return;
    }
    const Input **key_rows = worker.places, **value_rows = worker.places + Engine::block_keys;
    list_rows(keys, batch, key_head, key, count, key_rows);
    pack_keys(packed, key_rows, count);
    if (shape_.value_width == 0) return;
    list_rows(values, batch, key_head, key, count, value_rows);
    pack_values(packed, worker, batch, key_head, key, value_rows, count);
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

  // One block of rows, or all of a key head: see Note: [Keys packed in passing].
  void attend(const Sequence& sequence, int64_t worker_index, int64_t task) {
    const FlushSubnormals flush;
    engine_.start_worker();
    const int64_t first = first_row_block(shape_, sequence, task);
    int64_t blocks_packed = 0;
    for (int64_t i = 0; i < sequence.of_task(); i += sequence.together())
      attend_together(sequence, worker_index, first + i, blocks_packed);
    engine_.stop_worker();
  }

  // The blocks of rows that are under way together, from `first` on. The first so many blocks of keys, of what is
  // packed in passing, are packed already.
  void attend_together(const Sequence& sequence, int64_t worker_index, int64_t first, int64_t& blocks_packed) {
    const Worker worker = this->worker(worker_index);
    const int64_t count = sequence.together();
    int64_t low = sequence.keys, high = 0;
    for (int64_t i = 0; i < count; ++i) {
      Carver carver(worker.state_room + i * state_bytes_);
      State& state = *new (&worker.states[i]) State(carve_state(carver));
      state.of = row_block(shape_, sequence, first + i);
      start(state, sequence.keys);
      if (state.seen.low >= state.seen.high) continue;
      low = smaller(low, state.seen.low);
      high = larger(high, state.seen.high);
    }
    const int64_t key_head = worker.states->of.key_head;
    for (int64_t block = low / Engine::block_keys; block * Engine::block_keys < high; ++block) {
      const int64_t packed = packed_block(sequence, key_head, block, worker_index);
      if (sequence.in_passing && block >= blocks_packed) {
        pack(sequence, key_head, block, packed, worker);
        blocks_packed = block + 1;
      }
      for (int64_t i = 0; i < count; ++i) attend_block(worker, worker.states[i], block, packed);
    }
  }

  // Rows that see no key are finished at once.
  void start(State& state, int64_t keys) {
    const RowBlock& of = state.of;
    const int64_t rows = of.rows();
    state.seen = visible_interval(problem_.visibility, of.batch, of.first_query, of.first_query + of.queries, keys);
    start_rows(state);
    for (int64_t r = 0; r < rows; r += Engine::strip) {
      state.fresh[r / Engine::strip] = true;
      if (!Engine::starts_fresh) clear_sums(state, r);
    }
    if (rules_.marks.parts())
      for (int64_t i = 0; i < round_up(rows, Engine::strip) * engine_.value_columns; ++i) state.marked[i] = 0.0f;
    if (state.seen.low >= state.seen.high)
      for (int64_t r = 0; r < rows; r += Engine::strip) finish_strip(state, r);
  }

  void attend_block(const Worker& worker, const State& state, int64_t block, int64_t packed) {
    const RowBlock& of = state.of;
    const int64_t key = block * Engine::block_keys, end = key + Engine::block_keys;
    if (key >= state.seen.high || end <= state.seen.low) return;
    if (rules_.bias.any())
      for (int64_t h = 0; h < of.heads; ++h)
        state.bias[h] = rules_.bias.block(of.batch, of.first_head + h, key, Engine::block_keys,
                                          state.bias_values + h * Engine::block_keys);
    for (int64_t r = 0; r < of.rows();)
      r = attend_strips(worker, state, block, packed, r, [&](int64_t row) {
        if (end >= state.seen.high) finish_strip(state, row);
      });
  }

  void start_rows(const State& state) {
    const RowBlock& of = state.of;
    const int64_t rows = of.rows(), padded_rows = round_up(rows, Engine::strip);
    const int64_t query_stride = problem_.query.strides[3];
    of.each_row(0, rows, [&](int64_t, int64_t head, int64_t query) { rules_.marks.prefetch(of.batch, head, query); });
    pack_queries(state);
    const int64_t candidate_capacity = rules_.marks.candidate_capacity(Engine::block_keys);
    of.each_row(0, rows, [&](int64_t r, int64_t head, int64_t query) {
      // In place: a copy would read what was just written in parts.
      Row& row = *new (&state.rows[r]) Row();
      note(rules_.start(row, of.batch, head, query, state.bias + (head - of.first_head)));
      if (rules_.marks.emits()) {
        row.found.scores = state.candidate_scores + r * candidate_capacity;
        row.found.positions = state.candidates + r * candidate_capacity;
      }
    });
    for (int64_t r = rows; r < padded_rows; ++r) {
      new (&state.rows[r]) Row();
      engine_.pack_query_row(state.queries, r, nullptr, query_stride, rules_.query_factor());
    }
    if constexpr (kGrouped)
      for (int64_t r = 0; r + Group::kRows <= rows; r += Group::kRows)
        state.groups[r / Group::kRows].load(state.rows + r, problem_.visibility.key_offset);
  }

  void pack_queries(const State& state) const {
    const RowBlock& of = state.of;
    const int64_t* strides = problem_.query.strides;
    const int64_t rows = of.rows();
    for (int64_t r = 0; r < rows;) {
      const int64_t left = of.queries - r % of.queries;  // of the head
      const Input* row =
          row_of<Input>(problem_.query, of.batch, of.first_head + r / of.queries, of.first_query + r % of.queries);
      for (int64_t ahead = kAhead; ahead < smaller(left, 2 * kAhead); ++ahead) prefetch_row(row + ahead * strides[2]);
      if constexpr (kGrouped)
        if (r % Group::kRows == 0 && left >= Group::kRows) {
          engine_.pack_query_rows(state.queries, r, row, strides[2], strides[3], rules_.query_factor());
          r += Group::kRows;
          continue;
        }
      for (int64_t end = r + smaller(left, kAhead); r < end; ++r, row += strides[2])
        engine_.pack_query_row(state.queries, r, row, strides[3], rules_.query_factor());
    }
  }

  // A row of queries is asked for so many rows before its turn: blocks begin anywhere, where nothing foresees them.
  static constexpr int64_t kAhead = 16;
  ATTNRB_INLINE void prefetch_row(const Input* row) const {
    for (int64_t d = 0; d < shape_.width; d += 64 / int64_t(sizeof(Input))) __builtin_prefetch(row + d);
  }

  // Of the strip that `row` begins.
  void clear_sums(const State& state, int64_t row) const {
    float* sums = state.sums + row * engine_.value_columns;
    for (int64_t i = 0; i < Engine::strip * engine_.value_columns; ++i) sums[i] = 0.0f;
  }

  // Stands apart so that the loop over whole rows stays small.
  [[gnu::noinline]] void absorb_other(const State& state, int64_t r, const BlockOfRow& of, float* scores,
                                      Probability* probabilities) const {
    rules_.template absorb_other<Engine>(
        state.rows[r], of, scores, probabilities, [&](float factor) { rescale(state, r, factor); },
        [&](int64_t j, float weight) { take(state, r, of.key + j, weight); });
  }

  // An outlier joins the sums of its own.
  void take(const State& state, int64_t r, int64_t key, float weight) const {
    add_scaled(state.marked + r * engine_.value_columns, weight,
               problem_.value.template row<Input>(state.of.batch, state.of.key_head, key),
               problem_.value.column_stride(), shape_.value_width);
  }

  [[gnu::noinline]] void rescale(const State& state, int64_t r, float factor) const {
    scale_sums<Places>(state.sums + engine_.sum_row(r), engine_.value_columns, factor);
    if (rules_.marks.parts()) scale_sums(state.marked + r * engine_.value_columns, engine_.value_columns, factor);
  }

  // A strip of rows as it meets a block of keys: the keys [first, last) of it, none where no row sees any. Its scores
  // and probabilities lie `shift` keys further than those of a strip alone.
  struct Meeting {
    int64_t row, rows, first = 0, last = 0, shift = 0;
    bool partial = false;
  };

  Meeting meeting(const State& state, int64_t key, int64_t first_row, int64_t rows) const {
    const Row* row = state.rows + first_row;
    int64_t low = row[0].low, high = row[0].high, all_low = low, all_high = high;
    for (int64_t r = 1; r < rows; ++r) {
      low = row[r].low < low ? row[r].low : low;
      all_low = row[r].low > all_low ? row[r].low : all_low;
      high = row[r].high > high ? row[r].high : high;
      all_high = row[r].high < all_high ? row[r].high : all_high;
    }
    Meeting met{first_row, rows};
    const int64_t first = low > key ? (low - key) / Engine::key_granule * Engine::key_granule : 0;
    const int64_t last =
        high - key < Engine::block_keys ? round_up(high - key, Engine::key_granule) : Engine::block_keys;
    // Where no row sees anything, the block may never have been packed.
    if (low >= high || first >= last || high <= key) return met;
    met.first = first;
    met.last = last;
    met.partial = all_low > key + first || all_high < key + last || problem_.visibility.mask != nullptr;
    return met;
  }

  // Some strips from a row on; returns the row behind them. See Note: [Strips in step]. Calls done(row) for each.
  template <class Done>
  ATTNRB_INLINE int64_t attend_strips(const Worker& worker, const State& state, int64_t block, int64_t packed,
                                      int64_t first_row, Done&& done) {
    const RowBlock& of = state.of;
    constexpr int64_t kMost = kGrouped ? Engine::block_rows / Engine::strip : 1;
    Meeting met[kMost];
    int64_t count = 0, used = 0, row = first_row;
    for (; row < of.rows() && count < kMost; row += Engine::strip) {
      Meeting each = meeting(state, block * Engine::block_keys, row, smaller(of.rows() - row, int64_t(Engine::strip)));
      each.shift = larger(used - each.first, int64_t(0));
      if (each.last + each.shift > Engine::block_keys) break;
      if (each.last > 0) used = each.last + each.shift;
      met[count++] = each;
    }
    const char* keys = packed_keys(packed);
    for (const Meeting* each = met; each < met + count; ++each)
      if (each->last > 0)
        engine_.scores(state.queries, each->row, each->rows, keys, each->first, each->last,
                       worker.scores + Engine::score_row(0, each->shift));
    for (const Meeting* each = met; each < met + count; ++each)
      if (each->last > 0) absorb_strip(worker, state, *each, block * Engine::block_keys);
    for (const Meeting* each = met; each < met + count; ++each) {
      if (each->last > 0 && shape_.value_width > 0) {
        bool& none = state.fresh[each->row / Engine::strip];
        engine_.accumulate(worker.probabilities + Engine::probability_row(0, each->shift), each->rows,
                           keys + engine_.key_block_bytes(), each->first, each->last,
                           state.sums + each->row * engine_.value_columns, none);
        none = false;
        if (!finite_[packed]) add_not_finite(worker, state, *each, block * Engine::block_keys);
      }
      done(each->row);
    }
    return row;
  }

  void absorb_strip(const Worker& worker, const State& state, const Meeting& met, int64_t key) {
    const int64_t first_row = met.row, rows = met.rows, first = met.first, last = met.last;
    Row* row = state.rows + first_row;
    const BlockOfRow of{key + first, last - first, last - first, met.partial};
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = worker.scores + Engine::score_row(r, first + met.shift);
      Probability* probabilities = worker.probabilities + Engine::probability_row(r, first + met.shift);
      if constexpr (kGrouped)
        if (rows - r >= Group::kRows) {
          Engine::absorb_group(
              rules_, state.groups[(first_row + r) / Group::kRows], row + r, of, scores, probabilities,
              [&](int64_t each, float factor) { rescale(state, first_row + r + each, factor); },
              [&](int64_t each, int64_t j, float weight) { take(state, first_row + r + each, of.key + j, weight); });
          r += Group::kRows - 1;
          continue;
        }
      if (rules_.whole(row[r], of))
        rules_.template absorb_whole<Engine>(row[r], of, scores, probabilities,
                                             [&](float factor) { rescale(state, first_row + r, factor); });
      else
        absorb_other(state, first_row + r, of, scores, probabilities);
    }
  }

  void add_not_finite(const Worker& worker, const State& state, const Meeting& met, int64_t key) const {
    for (int64_t r = 0; r < met.rows; ++r)
      for (int64_t j = met.first; j < met.last; ++j) {
        if (!rules_.visible(state.rows[met.row + r], key + j)) continue;
        const Probability* row = worker.probabilities + Engine::probability_row(r, 0);
        add_not_finite(state, met.row + r, Engine::load_probability(row, met.shift + j), key + j);
      }
  }

  void add_not_finite(const State& state, int64_t r, float weight, int64_t key) const {
    const Input* row = problem_.value.template row<Input>(state.of.batch, state.of.key_head, key);
    float* sums = state.sums + engine_.sum_row(r);
    for (int64_t d = 0; d < shape_.value_width; ++d) {
      const float value = to_float(row[d * problem_.value.column_stride()]);
      if (!is_finite(value)) sums[Places::place(d)] += weight * value;
    }
  }

  // The strip that `first_row` begins has met all its keys.
  void finish_strip(const State& state, int64_t first_row) {
    const RowBlock& of = state.of;
    if (Engine::starts_fresh && state.fresh[first_row / Engine::strip]) clear_sums(state, first_row);
    const int64_t end = smaller(first_row + Engine::strip, of.rows());
    int64_t r = first_row;
    if constexpr (kGrouped)
      for (; r + Group::kRows <= end; r += Group::kRows) {
        // Of one head, rows follow each other in all that is written.
        if (!rules_.marks.parts() && r % of.queries + Group::kRows <= of.queries) {
          finish_group(state, r, of.batch, of.first_head + r / of.queries, of.first_query + r % of.queries);
          continue;
        }
        state.groups[r / Group::kRows].store(state.rows + r);
        finish_rows(state, r, r + Group::kRows);
      }
    finish_rows(state, r, end);
  }

  void finish_rows(const State& state, int64_t first, int64_t end) {
    const RowBlock& of = state.of;
    of.each_row(first, end, [&](int64_t r, int64_t head, int64_t query) { finish(state, r, of.batch, head, query); });
  }

  void finish_group(const State& state, int64_t first_row, int64_t batch, int64_t head, int64_t query) {
    const Group& group = state.groups[first_row / Group::kRows];
    const Row* rows = state.rows + first_row;
    note(group.marks.finish());
    const int64_t index = shape_.row(batch, head, query), step = shape_.row(batch, head, query + 1) - index;
    group.report(problem_, index, step);
    if (rules_.marks.emits()) {
      float threshold[Group::kRows];
      group.final_threshold(rules_.marks).store(threshold);
      for (int r = 0; r < Group::kRows; ++r) emit(rows[r], threshold[r], index + r * step);
    }
    if (shape_.value_width == 0) return;
    Input* out = static_cast<Input*>(problem_.output) + batch * problem_.output_strides[0] +
                 head * problem_.output_strides[1] + query * problem_.output_strides[2];
    engine_.write_rows(out, problem_.output_strides[2], state.sums + engine_.sum_row(first_row),
                       group.output_factors());
  }

  void emit(const Row& row, float threshold, int64_t index) const {
    rules_.marks.emit(row.found.scores, row.found.positions, row.found.count, threshold, row.own, index);
  }

  void finish(const State& state, int64_t r, int64_t batch, int64_t head, int64_t query) {
    const Row& row = state.rows[r];
    note(MarkRules::finish(row.marks));
    const int64_t index = shape_.row(batch, head, query);
    rules_.report(row, index);
    if (rules_.marks.emits()) emit(row, rules_.marks.final_threshold(row.max, std::log2(rules_.mass(row))), index);
    if (shape_.value_width == 0) return;
    write_output<Input, Places>(problem_, rules_, row, state.sums + engine_.sum_row(r),
                                rules_.marks.parts() ? state.marked + r * engine_.value_columns : nullptr, batch, head,
                                query);
  }

  const AttentionProblem& problem_;
  const Shape& shape_;
  const Engine engine_;
  const RowRules rules_;
  Sequence* sequences_ = nullptr;
  Plan plan_;
  int64_t state_bytes_ = 0;
  char* packed_ = nullptr;
  uint8_t* finite_ = nullptr;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
