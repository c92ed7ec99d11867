// Gradients of attention: weights are computed anew, tile by tile, from the log-sum-exp that the forward left.
//
// With w_ij = 1 + gain [j in S_i], P_ij = exp(s_ij - LSE_i), dW_ij = dy_i . v_j and delta_i = dy_i . y_i - dLSE_i:
//   dV = (w P)^T dY,   dS = P (w dW - delta), or w P (dW - delta) when normalised,   dQ = scale dS K,  dK = scale dS^T
//   Q, dgain = sum over outliers of P dW, or P (dW - delta),   dsink = - sum_i exp(sink - LSE_i) delta_i
// (docs/method.md, Gradients). received_attention is attention with dW_ij = grad_received_j / (queries that see j) and
// delta_i = sum_j P_ij dW_ij, for which a pass of its own goes before.
//
// Note: [Turns]
// A task is a block of keys of one key head: it owns their dK and dV, and walks over the rows of all heads that share
// them. A block of rows of dQ gets a contribution from each of its blocks of keys, in the order of the keys: a task
// waits until those before have added theirs. Results then do not depend on the number of threads, no product is
// computed twice, and threads rarely wait, since all walk over the rows in the same direction.
#pragma once

#include <new>

#include "gradient_products.h"
#include "gradient_rows.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Float sums of dQ take at most this much at a time, unless one batch element alone needs more.
constexpr int64_t kGradientBudget = int64_t(128) << 20;

template <class Engine>
class Gradient {
  using Input = typename Engine::Input;
  static constexpr int64_t kRows = Engine::block_rows, kKeys = Engine::block_keys, kStrip = Engine::strip;
  static constexpr int64_t kStrips = kRows / kStrip;
  using Products = GradientProducts<Engine>;

 public:
  Gradient(const GradientProblem& problem, const ThreadPool& pool, Scratch& scratch)
      : problem_(problem),
        shape_(problem.shape),
        pool_(pool),
        scratch_(scratch),
        rows_(row_problem(problem)),
        rules_(rows_),
        data_(problem, rules_),
        group_(shape_.heads / shape_.key_heads),
        row_blocks_((shape_.queries + kRows - 1) / kRows),
        key_blocks_((shape_.keys + kKeys - 1) / kKeys),
        query_columns_(Engine::columns(shape_.width)),
        value_columns_(Engine::columns(shape_.value_width)) {}

  Status run() {
    const int64_t heads = shape_.batch * shape_.heads,
                  element_bytes = shape_.heads * shape_.queries * query_columns_ * 4;
    int64_t elements = kGradientBudget / (element_bytes > 0 ? element_bytes : 1);
    elements = elements < 1 ? 1 : elements > shape_.batch ? shape_.batch : elements;
    carve_shared(elements);
    reserve_workers();

    for_each_task(pool_, heads * row_blocks_, [&](int64_t, int64_t task) {
      const int64_t first = task % row_blocks_ * kRows, head = task / row_blocks_;
      const Status status = data_.prepare(head / shape_.heads, head % shape_.heads, first, row_end(first));
      if (status != Status::ok) status_.store(int32_t(status), std::memory_order_relaxed);
    });
    if (status_.load() != int32_t(Status::ok)) return Status(status_.load());
    if (received())
      for_each_task(pool_, heads,
                    [&](int64_t, int64_t task) { data_.share(task / shape_.heads, task % shape_.heads); });
    for (int64_t first = 0; first < shape_.batch; first += elements) {
      const int64_t count = shape_.batch - first < elements ? shape_.batch - first : elements;
      for_each_task(pool_, count * shape_.heads * row_blocks_, [&](int64_t, int64_t task) { clear(task); });
      if (received()) {
        walk<Pass::deltas>(first, count);
        for (int64_t i = 0; i < count * shape_.heads * row_blocks_; ++i) turns_[i].store(0, std::memory_order_relaxed);
      }
      walk<Pass::gradients>(first, count);
      for_each_task(pool_, count * shape_.heads * row_blocks_,
                    [&](int64_t, int64_t task) { write_query_gradient(first, task); });
    }
    if (problem_.grad_sinks != nullptr)
      for_each_task(pool_, shape_.heads, [&](int64_t, int64_t head) { write_sink_gradient(head); });
    if (problem_.grad_gain != nullptr)
      for (int64_t head = 0; head < shape_.heads; ++head) write_gain_gradient(head);
    return Status::ok;
  }

 private:
  enum class Pass { deltas, gradients };

  struct Worker {
    float *keys_across, *keys_along, *values_across;
    float *query_rows, *query_along, *output_rows, *output_along;
    float *scores, *products;
    float* weights;
    float *key_sums, *value_sums;
    float* deltas;
    float* shares;
    Row* rows;
    const Input **queries, **outputs;  // rows of the tile; null where they have no part in it
    // Outliers of one row in the tile.
    int32_t* places;
    float *weight_gradients, *slopes;
  };

  struct Block {
    int64_t index, batch, key_head, key, count;
    bool finite;
  };

  static AttentionProblem row_problem(const GradientProblem& problem) {
    AttentionProblem rows;
    rows.shape = problem.shape;
    rows.dtype = problem.dtype;
    rows.query = problem.query;
    rows.key = problem.key;
    rows.visibility = problem.visibility;
    rows.scoring = problem.scoring;
    return rows;
  }

  bool received() const { return problem_.grad_received != nullptr; }
  bool boosts() const { return problem_.edit.indices != nullptr; }

  void carve_shared(int64_t elements) {
    for (void* base = nullptr;;) {
      Carver carver(base);
      sums_ = carver.take<float>(elements * shape_.heads * shape_.queries * query_columns_);
      turns_ = carver.take<std::atomic<int32_t>>(elements * shape_.heads * row_blocks_);
      data_.carve(carver);
      gains_ = carver.take<double>(boosts() ? key_blocks_ * shape_.batch * shape_.heads : 0);
      if (base != nullptr) return;
      base = scratch_.shared.reserve(size_t(carver.taken(nullptr) + 64));
    }
  }

  Worker carve_worker(void* base, int64_t* bytes) const {
    const int64_t width = shape_.width, value_width = shape_.value_width;
    Carver carver(base);
    Worker worker;
    worker.keys_across = carver.take<float>(Engine::across_lanes(kKeys, width));
    worker.keys_along = carver.take<float>(Engine::along_lanes(kKeys, width));
    worker.values_across = carver.take<float>(Engine::across_lanes(kKeys, value_width));
    worker.query_rows = carver.take<float>(kRows * Engine::row_lanes(width));
    worker.query_along = carver.take<float>(Engine::along_lanes(kRows, width));
    worker.output_rows = carver.take<float>(kRows * Engine::row_lanes(value_width));
    worker.output_along = carver.take<float>(Engine::along_lanes(kRows, value_width));
    worker.scores = carver.take<float>(kRows * kKeys);
    worker.products = carver.take<float>(kRows * kKeys);
    worker.weights = carver.take<float>(Engine::Weights::lanes());
    worker.key_sums = carver.take<float>(kKeys * query_columns_);
    worker.value_sums = carver.take<float>(kKeys * value_columns_);
    worker.deltas = carver.take<float>(kRows);
    worker.shares = carver.take<float>(kKeys);
    worker.rows = carver.take<Row>(kRows);
    worker.queries = carver.take<const Input*>(kKeys > kRows ? kKeys : kRows);
    worker.outputs = carver.take<const Input*>(kKeys > kRows ? kKeys : kRows);
    worker.places = carver.take<int32_t>(kKeys);
    worker.weight_gradients = carver.take<float>(kKeys);
    worker.slopes = carver.take<float>(kKeys);
    if (bytes != nullptr) *bytes = carver.taken(base);
    return worker;
  }

  void reserve_workers() {
    int64_t bytes = 0;
    carve_worker(nullptr, &bytes);
    if (int64_t(scratch_.workers.size()) < pool_.workers) scratch_.workers.resize(size_t(pool_.workers));
    for (int64_t w = 0; w < pool_.workers; ++w) scratch_.workers[size_t(w)].reserve(size_t(bytes));
  }

  static const Input* row_of(const View& view, int64_t batch, int64_t head, int64_t row) {
    return gradient_row<Input>(view, batch, head, row);
  }

  int64_t row_end(int64_t first) const { return first + kRows < shape_.queries ? first + kRows : shape_.queries; }

  void clear(int64_t task) {
    new (&turns_[task]) std::atomic<int32_t>(0);
    const int64_t first = task % row_blocks_ * kRows, left = shape_.queries - first, rows = left < kRows ? left : kRows;
    float* sums = sums_ + (task / row_blocks_ * shape_.queries + first) * query_columns_;
    for (int64_t i = 0; i < rows * query_columns_; ++i) sums[i] = 0.0f;
  }

  // ------------------------------------------------------------------------------------------------ blocks of keys

  template <Pass pass>
  void walk(int64_t first_batch, int64_t count) {
    // Under a causal mask the first keys are seen by the most queries: their blocks come first.
    const int64_t heads = count * shape_.key_heads;
    for_each_task(pool_, key_blocks_ * heads, [&](int64_t worker, int64_t task) {
      Block block;
      block.index = task / heads;
      block.batch = first_batch + task % heads / shape_.key_heads;
      block.key_head = task % shape_.key_heads;
      block.key = block.index * kKeys;
      block.count = shape_.keys - block.key < kKeys ? shape_.keys - block.key : kKeys;
      walk_block<pass>(first_batch, worker, block);
    });
  }

  template <Pass pass>
  void walk_block(int64_t first_batch, int64_t worker_index, Block& block) {
    const FlushSubnormals flush;
    Worker worker = carve_worker(scratch_.workers[size_t(worker_index)].reserve(0), nullptr);
    pack_block<pass>(worker, block);
    for (int64_t i = 0; i < kKeys * query_columns_; ++i) worker.key_sums[i] = 0.0f;
    for (int64_t i = 0; i < kKeys * value_columns_; ++i) worker.value_sums[i] = 0.0f;
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = block.key_head * group_ + g;
      if (received())
        for (int64_t j = 0; j < kKeys; ++j)
          worker.shares[j] =
              j < block.count ? data_.shares[(block.batch * shape_.heads + head) * shape_.keys + block.key + j] : 0.0f;
      double gain = 0.0;
      for (int64_t row_block = row_blocks_ - 1; row_block >= 0; --row_block) {
        const int64_t first = row_block * kRows, left = shape_.queries - first, rows = left < kRows ? left : kRows;
        const Interval seen = visible_interval(problem_.visibility, block.batch, first, first + rows, shape_.keys);
        if (block.key >= seen.high || block.key + block.count <= seen.low) continue;
        const int64_t turn = ((block.batch - first_batch) * shape_.heads + head) * row_blocks_ + row_block;
        float* sums =
            sums_ + (((block.batch - first_batch) * shape_.heads + head) * shape_.queries + first) * query_columns_;
        tile<pass>(worker, block, head, first, rows, turns_[turn], int32_t(block.index - seen.low / kKeys), sums, gain);
      }
      if (pass == Pass::gradients && boosts())
        gains_[(block.index * shape_.batch + block.batch) * shape_.heads + head] = gain;
    }
    if (pass == Pass::deltas) return;
    write_block(problem_.grad_key, block, worker.key_sums, query_columns_, shape_.width, problem_.scoring.scale);
    if (!received())
      write_block(problem_.grad_value, block, worker.value_sums, value_columns_, shape_.value_width, 1.0f);
  }

  // Keys that no query sees are zeros here, whatever they hold.
  template <Pass pass>
  void pack_block(const Worker& worker, Block& block) const {
    const Interval seen = visible_interval(problem_.visibility, block.batch, 0, shape_.queries, shape_.keys);
    const int64_t key_stride = problem_.key.strides[3], value_stride = problem_.value.strides[3];
    block.finite = true;
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t key = block.key + j;
      const bool held = j < block.count && key >= seen.low && key < seen.high;
      worker.queries[j] = held ? row_of(problem_.key, block.batch, block.key_head, key) : nullptr;
      worker.outputs[j] = held && !received() ? row_of(problem_.value, block.batch, block.key_head, key) : nullptr;
      if (held)
        block.finite =
            block.finite && GradientRows<Input>::is_finite(worker.queries[j], key_stride, shape_.width) &&
            (received() || GradientRows<Input>::is_finite(worker.outputs[j], value_stride, shape_.value_width));
    }
    Engine::pack_across(worker.keys_across, worker.queries, kKeys, key_stride, shape_.width);
    if (pass == Pass::deltas) return;
    Engine::template pack_along<kKeys>(worker.keys_along, worker.queries, kKeys, key_stride, shape_.width);
    if (!received()) Engine::pack_across(worker.values_across, worker.outputs, kKeys, value_stride, shape_.value_width);
  }

  void write_block(const GradientProblem::Target& target, const Block& block, const float* sums, int64_t columns,
                   int64_t width, float factor) const {
    const int64_t* s = target.strides;
    Input* out = static_cast<Input*>(target.data) + block.batch * s[0] + block.key_head * s[1] + block.key * s[2];
    for (int64_t j = 0; j < block.count; ++j) write_scaled(out + j * s[2], sums + j * columns, width, factor);
  }

  static void write_scaled(Input* out, const float* sums, int64_t width, float factor) {
    const Vec by = Vec::set(factor);
    int64_t d = 0;
    for (; d + Vec::width <= width; d += Vec::width) (Vec::load(sums + d) * by).store(out + d);
    if (d < width) (Vec::load(sums + d, int(width - d)) * by).store(out + d, int(width - d));
  }

  // ------------------------------------------------------------------------------------------------ tiles

  template <Pass pass>
  void tile(const Worker& worker, const Block& block, int64_t head, int64_t first_query, int64_t rows,
            std::atomic<int32_t>& turn, int32_t my_turn, float* query_sums, double& gain) {
    const int64_t strips = (rows + kStrip - 1) / kStrip;
    const int64_t first_row = (block.batch * shape_.heads + head) * shape_.queries + first_query;
    bool finite = block.finite;
    for (int64_t r = 0; r < strips * kStrip; ++r) {
      Row& row = worker.rows[r] = Row();
      worker.queries[r] = worker.outputs[r] = nullptr;
      worker.deltas[r] = 0.0f;
      if (r >= rows || !data_.active(first_row + r)) continue;
      rules_.start(row, block.batch, head, first_query + r);
      worker.queries[r] = row_of(problem_.query, block.batch, head, first_query + r);
      if (!received()) worker.outputs[r] = row_of(problem_.grad_output, block.batch, head, first_query + r);
      finite = finite && data_.finite(first_row + r);
    }
    KeyRange ranges[kStrips];
    bool any = false, partial = false;
    for (int64_t s = 0; s < strips; ++s) {
      ranges[s] = strip_range(worker.rows + s * kStrip, block);
      any = any || !ranges[s].empty();
      partial = partial || ranges[s].partial;
    }
    const bool careful = partial && !finite;
    const typename Engine::Weights weights(worker.weights);
    if (any) {
      Engine::pack_rows(worker.query_rows, worker.queries, strips * kStrip, problem_.query.strides[3], shape_.width,
                        rules_.query_factor());
      Products::multiply_rows(worker.query_rows, worker.keys_across, shape_.width, ranges, strips, worker.scores);
      if (!received()) {
        Engine::pack_rows(worker.output_rows, worker.outputs, strips * kStrip, problem_.grad_output.strides[3],
                          shape_.value_width, 1.0f);
        Products::multiply_rows(worker.output_rows, worker.values_across, shape_.value_width, ranges, strips,
                                worker.products);
      }
      for (int64_t s = 0; s < strips; ++s) {
        if (ranges[s].empty()) continue;
        for (int64_t r = s * kStrip; r < (s + 1) * kStrip; ++r)
          differentiate<pass>(worker, block, r, head, first_row + r, ranges[s], gain);
        if (pass == Pass::gradients && !careful)
          weights.convert(worker.scores, worker.products, s * kStrip, kStrip, ranges[s].first, ranges[s].last);
      }
    }
    if (pass == Pass::gradients && any && !careful) {
      if (!received()) {
        Engine::template pack_along<kRows>(worker.output_along, worker.outputs, strips * kStrip,
                                           problem_.grad_output.strides[3], shape_.value_width);
        Products::multiply_down([&](int64_t row, int64_t key) { return weights.weights_down(worker.scores, row, key); },
                                worker.output_along, value_columns_, ranges, strips, worker.value_sums);
      }
      Engine::template pack_along<kRows>(worker.query_along, worker.queries, strips * kStrip, problem_.query.strides[3],
                                         shape_.width);
      Products::multiply_down(
          [&](int64_t row, int64_t key) { return weights.gradients_down(worker.products, row, key); },
          worker.query_along, query_columns_, ranges, strips, worker.key_sums);
    }
    wait_for(turn, my_turn);  // see Note: [Turns]
    if (any && pass == Pass::deltas)
      for (int64_t r = 0; r < rows; ++r) data_.deltas[first_row + r] += worker.deltas[r];
    if (any && pass == Pass::gradients) {
      if (careful)
        multiply_visible(worker, block, rows, ranges, query_sums);
      else
        Products::multiply_gradients(worker.products, weights, worker.keys_along, query_columns_, ranges, rows,
                                     query_sums);
    }
    turn.store(my_turn + 1, std::memory_order_release);
  }

  KeyRange strip_range(const Row* rows, const Block& block) const {
    KeyRange range;
    int64_t low = shape_.keys, high = 0, all_low = 0, all_high = shape_.keys;
    for (int64_t r = 0; r < kStrip; ++r) {
      all_low = rows[r].low > all_low ? rows[r].low : all_low;
      all_high = rows[r].high < all_high ? rows[r].high : all_high;
      if (rows[r].low >= rows[r].high) continue;
      low = rows[r].low < low ? rows[r].low : low;
      high = rows[r].high > high ? rows[r].high : high;
    }
    if (low >= high || high <= block.key || low >= block.key + block.count) return range;
    range.first = low > block.key ? (low - block.key) / Engine::key_granule * Engine::key_granule : 0;
    range.last = high - block.key < kKeys ? round_up(high - block.key, Engine::key_granule) : kKeys;
    range.partial =
        all_low > block.key + range.first || all_high < block.key + range.last || problem_.visibility.mask != nullptr;
    return range;
  }

  // The last three products pair by pair: a NaN or infinity that a row does not see must not meet its zeros, since
  // their product is NaN.
  void multiply_visible(const Worker& worker, const Block& block, int64_t rows, const KeyRange* ranges,
                        float* query_sums) const {
    const auto add = [](float* sums, float factor, const Input* row, int64_t stride, int64_t width) {
      for (int64_t d = 0; d < width; ++d) sums[d] += factor * to_float(row[d * stride]);
    };
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange& range = ranges[r / kStrip];
      for (int64_t j = range.first; j < range.last && j < block.count; ++j) {
        if (worker.queries[r] == nullptr || !rules_.visible(worker.rows[r], block.key + j)) continue;
        const float weight = worker.scores[r * kKeys + j], gradient = worker.products[r * kKeys + j];
        if (!received())
          add(worker.value_sums + j * value_columns_, weight, worker.outputs[r], problem_.grad_output.strides[3],
              shape_.value_width);
        add(worker.key_sums + j * query_columns_, gradient, worker.queries[r], problem_.query.strides[3], shape_.width);
        add(query_sums + r * query_columns_, gradient, row_of(problem_.key, block.batch, block.key_head, block.key + j),
            problem_.key.strides[3], shape_.width);
      }
    }
  }

  // Scores become weights and gradients of weights become gradients of scores, in place.
  template <Pass pass>
  void differentiate(const Worker& worker, const Block& block, int64_t r, int64_t head, int64_t index,
                     const KeyRange& range, double& gain) const {
    const Row& row = worker.rows[r];
    float *scores = worker.scores + r * kKeys, *products = worker.products + r * kKeys;
    if (worker.queries[r] == nullptr) {
      for (int64_t j = range.first; j < range.last; ++j) scores[j] = products[j] = 0.0f;
      return;
    }
    rules_.finish_scores(row, scores + range.first, block.key + range.first, range.last - range.first, range.partial);
    if (pass == Pass::deltas) {
      worker.deltas[r] = row_delta(worker, scores, index, range);
      return;
    }
    const float* weight_gradients = received() ? worker.shares : products;
    const int32_t outliers = boosts() ? gather(worker, block, row, scores, weight_gradients, index, range) : 0;
    if (problem_.scoring.softcap > 0)
      differentiate_row<true, true>(scores, products, weight_gradients, index, range);
    else if (range.partial)
      differentiate_row<true, false>(scores, products, weight_gradients, index, range);
    else
      differentiate_row<false, false>(scores, products, weight_gradients, index, range);
    if (outliers > 0)
      gain += strengthen(worker, scores, products, outliers, problem_.edit.gain[head], data_.deltas[index]);
  }

  template <bool Partial, bool Capped>
  ATTNRB_INLINE void differentiate_row(float* scores, float* products, const float* weight_gradients, int64_t index,
                                       const KeyRange& range) const {
    const Vec to_log2 = Vec::set(rules_.to_log2()), reference = Vec::set(data_.references[2 * index]);
    const Vec rest = Vec::set(data_.references[2 * index + 1]);
    const Vec delta = Vec::set(data_.deltas[index]);
    const Vec by_cap = Vec::set(Capped ? 1.0f / problem_.scoring.softcap : 0.0f), one = Vec::set(1.0f);
    for (int64_t j = range.first; j < range.last; j += Vec::width) {
      const Vec score = Vec::load(scores + j), exponent = Vec::fms(score, to_log2, reference) - rest;
      Vec weight = exp2<Engine::exp2_degree>(Partial ? Vec::max(Vec::set(-200.0f), exponent) : exponent);
      Vec gradient = weight * (Vec::load(weight_gradients + j) - delta);
      if (Capped) {
        const Vec tanh = score * by_cap;
        gradient = gradient * (one - tanh * tanh);
      }
      if (Partial) {
        const typename Vec::Mask hidden = Vec::greater_equal(Vec::set(-kInfinity), score);
        weight = Vec::select(hidden, Vec::zero(), weight);
        gradient = Vec::select(hidden, Vec::zero(), gradient);
      }
      weight.store(scores + j);
      gradient.store(products + j);
    }
  }

  // The part of sum_j P_ij dW_ij that this tile holds.
  float row_delta(const Worker& worker, const float* scores, int64_t index, const KeyRange& range) const {
    const Vec to_log2 = Vec::set(rules_.to_log2()), reference = Vec::set(data_.references[2 * index]);
    const Vec rest = Vec::set(data_.references[2 * index + 1]);
    Vec sum = Vec::zero();
    for (int64_t j = range.first; j < range.last; j += Vec::width) {
      const Vec score = Vec::load(scores + j), exponent = Vec::fms(score, to_log2, reference) - rest;
      const Vec weight = exp2<Engine::exp2_degree>(Vec::max(Vec::set(-200.0f), exponent));
      const typename Vec::Mask hidden = Vec::greater_equal(Vec::set(-kInfinity), score);
      sum = sum + Vec::select(hidden, Vec::zero(), weight * Vec::load(worker.shares + j));
    }
    return sum.sum();
  }

  // Notes the row's outliers in this tile, with what the dense pass overwrites; returns how many.
  int32_t gather(const Worker& worker, const Block& block, const Row& row, const float* scores,
                 const float* weight_gradients, int64_t index, const KeyRange& range) const {
    const Edit& edit = problem_.edit;
    const int32_t* slots = edit.indices + index * edit.capacity;
    const int64_t base = block.key + problem_.visibility.key_offset;
    int32_t low = 0, high = edit.counts[index];
    const int32_t count = high;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (int64_t(slots[middle]) < base + range.first)
        low = middle + 1;
      else
        high = middle;
    }
    int32_t found = 0;
    for (; low < count; ++low) {
      const int64_t j = int64_t(slots[low]) - base;
      if (j >= range.last) break;
      if (!rules_.visible(row, block.key + j)) continue;
      const float tanh = problem_.scoring.softcap > 0 ? scores[j] / problem_.scoring.softcap : 0.0f;
      worker.places[found] = int32_t(j);
      worker.weight_gradients[found] = weight_gradients[j];
      worker.slopes[found++] = 1.0f - tanh * tanh;
    }
    return found;
  }

  // The sparse part; returns the row's share of the gain's gradient.
  double strengthen(const Worker& worker, float* weights, float* gradients, int32_t outliers, float gain,
                    float delta) const {
    double sum = 0.0;
    for (int32_t c = 0; c < outliers; ++c) {
      const int32_t j = worker.places[c];
      const float weight = weights[j], weight_gradient = worker.weight_gradients[c];
      if (problem_.edit.rule == Rule::row) {
        sum += double(weight) * (double(weight_gradient) - double(delta));
        gradients[j] *= 1.0f + gain;
      } else {
        sum += double(weight) * double(weight_gradient);
        gradients[j] += gain * weight * weight_gradient * worker.slopes[c];
      }
      weights[j] = weight * (1.0f + gain);
    }
    return sum;
  }

  // ------------------------------------------------------------------------------------------------ results

  void write_query_gradient(int64_t first_batch, int64_t task) const {
    const FlushSubnormals flush;
    const int64_t head = task / row_blocks_ % shape_.heads, element = task / row_blocks_ / shape_.heads;
    const int64_t first = task % row_blocks_ * kRows, left = shape_.queries - first, rows = left < kRows ? left : kRows;
    const float* sums = sums_ + (task / row_blocks_ * shape_.queries + first) * query_columns_;
    const int64_t* s = problem_.grad_query.strides;
    Input* out =
        static_cast<Input*>(problem_.grad_query.data) + (first_batch + element) * s[0] + head * s[1] + first * s[2];
    for (int64_t r = 0; r < rows; ++r)
      write_scaled(out + r * s[2], sums + r * query_columns_, shape_.width, problem_.scoring.scale);
  }

  void write_sink_gradient(int64_t head) const {
    const double sink = problem_.scoring.sinks != nullptr ? double(problem_.scoring.sinks[head]) : -double(kInfinity);
    double sum = 0.0;
    if (sink != -double(kInfinity))
      for (int64_t batch = 0; batch < shape_.batch; ++batch)
        for (int64_t query = 0; query < shape_.queries; ++query) {
          const int64_t row = (batch * shape_.heads + head) * shape_.queries + query;
          if (data_.active(row)) sum -= std::exp(sink - double(problem_.lse[row])) * double(data_.deltas[row]);
        }
    problem_.grad_sinks[head] = float(sum);
  }

  void write_gain_gradient(int64_t head) const {
    double sum = 0.0;
    if (boosts())
      for (int64_t block = 0; block < key_blocks_ * shape_.batch; ++block) sum += gains_[block * shape_.heads + head];
    problem_.grad_gain[head] = float(sum);
  }

  const GradientProblem& problem_;
  const Shape& shape_;
  const ThreadPool& pool_;
  Scratch& scratch_;
  const AttentionProblem rows_;
  const RowRules rules_;
  GradientRows<Input> data_;
  const int64_t group_, row_blocks_, key_blocks_, query_columns_, value_columns_;
  float* sums_ = nullptr;
  std::atomic<int32_t>* turns_ = nullptr;
  double* gains_ = nullptr;
  std::atomic<int32_t> status_{0};
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
