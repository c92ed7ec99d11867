// Gradients of outliers, added to a dense backward: see Note: [Sparse part of gradients]. As in correction.h, lanes in
// groups, as many as a row has units of 16 bytes, take an outlier each.
#pragma once

#include "correction.h"
#include "gradient_rows.h"
#include "sparse_gradient_parameters.h"

namespace attnrb::cuda {

template <class T>
struct UnitNumbers {
  float number[Unit<T>::size];

  ATTNRB_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Unit<T>::size; ++i) number[i] = 0.0f;
  }
  ATTNRB_DEVICE void read(const Unit<T>& unit, bool held) {
#pragma unroll
    for (int i = 0; i < Unit<T>::size; ++i) number[i] = held ? widen(unit.element[i]) : 0.0f;
  }
  ATTNRB_DEVICE float dot(const Unit<T>& unit, bool held) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Unit<T>::size; ++i) sum += number[i] * widen(unit.element[i]);
    return held ? sum : 0.0f;
  }
  ATTNRB_DEVICE void join(const UnitNumbers& other) {
#pragma unroll
    for (int i = 0; i < Unit<T>::size; ++i) number[i] += other.number[i];
  }
  ATTNRB_DEVICE void add(float factor, const Unit<T>& unit) {
#pragma unroll
    for (int i = 0; i < Unit<T>::size; ++i) number[i] += factor * widen(unit.element[i]);
  }
};

template <int Lanes>
ATTNRB_DEVICE float sum_of_group(float x) {
#pragma unroll
  for (int mask = 1; mask < Lanes; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

// Rows of `operand` from one head on.
template <class T>
ATTNRB_DEVICE const T* rows_of(const Operand& operand, int64_t batch, int64_t head) {
  return static_cast<const T*>(operand.data) + batch * operand.strides[0] + head * operand.strides[1];
}

// Writes dense + factor sum of one unit of a row; whether the dense part was finite.
template <class T>
ATTNRB_DEVICE bool write_sum(const Operand& dense, const GradientProblem::Target& target, int64_t batch, int64_t head,
                             int64_t row, int column, float factor, const UnitNumbers<T>& sum) {
  using U = Unit<T>;
  U unit = *reinterpret_cast<const U*>(rows_of<T>(dense, batch, head) + row * dense.strides[2] + column);
  const bool finite = is_finite(unit);
#pragma unroll
  for (int i = 0; i < U::size; ++i) unit.element[i] = narrow<T>(widen(unit.element[i]) + factor * sum.number[i]);
  T* out = static_cast<T*>(target.data) + batch * target.strides[0] + head * target.strides[1] +
           row * target.strides[2] + column;
  *reinterpret_cast<U*>(out) = unit;
  return finite;
}

// A warp for each row: the gradient of its query, and the row's share of the gain's.
template <class T, int Lanes>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 4)
    sparse_queries_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  using U = Unit<T>;
  constexpr int kItems = 32 / Lanes, kFlight = 2;
  const GradientParameters& g = parameters.all;
  const AttentionParameters& p = g.rows;
  const AttentionProblem& problem = p.problem;
  const Shape& shape = problem.shape;
  const int64_t index = block_index() * kWarps + thread_index() / 32, heads = index / p.rows, r = index % p.rows;
  if (heads >= shape.batch * shape.key_heads) return;
  const int lane = thread_index() % 32, column = lane % Lanes * U::size;
  const int64_t batch = heads / shape.key_heads, key_head = heads % shape.key_heads;
  const RowPlace place = row_place(p, key_head, r);
  GradientRow row;
  row.read(g.words + 8 * index, g.words + 8 * index + 4);

  const bool held = column < p.query.width;
  const int from = held ? column : 0;
  UnitNumbers<T> query, gradient, sums;
  query.read(
      *reinterpret_cast<const U*>(rows_of<T>(p.query, batch, place.head) + place.query * p.query.strides[2] + from),
      held);
  gradient.read(*reinterpret_cast<const U*>(rows_of<T>(g.grad_output, batch, place.head) +
                                            place.query * g.grad_output.strides[2] + from),
                held);
  sums.clear();
  float of_gain = 0.0f;
  OutlierList list{problem.edit.indices, 0};
  if (row.buckets != 0) list = outliers_of(p, batch, place);
  const int32_t* slots = list.slots;
  const int32_t count = list.count;
  const HeadRows<T> keys(p.key, batch, key_head, from), values(p.value, batch, key_head, from);
  for (int32_t first = 0; first < count; first += kItems * kFlight) {
    U key[kFlight], value[kFlight];
    bool taken[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const int32_t c = first + f * kItems + lane / Lanes;
      const int64_t slot = int64_t(slots[c < count ? c : 0]) - problem.visibility.key_offset;
      taken[f] = c < count && slot >= row.low && slot < row.high;
      const int64_t at = taken[f] ? slot : 0;
      key[f] = *reinterpret_cast<const U*>(keys.row(at));
      value[f] = *reinterpret_cast<const U*>(values.row(at));
    }
    keep_loads_apart();
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const float score = sum_of_group<Lanes>(query.dot(key[f], held));
      float of_weight = sum_of_group<Lanes>(gradient.dot(value[f], held));
      if (!taken[f]) continue;
      if (problem.edit.rule == Rule::row) of_weight -= row.delta;
      const float weight = fast_exp2(fmaf(score, p.factor, -row.reference) - row.rest);
      of_gain += weight * of_weight;
      sums.add(row.gain * weight * of_weight, key[f]);
    }
  }
  // Groups of lanes had different outliers.
#pragma unroll
  for (int mask = Lanes; mask < 32; mask *= 2) {
    of_gain += shuffle_xor(of_gain, mask);
#pragma unroll
    for (int i = 0; i < U::size; ++i) sums.number[i] += shuffle_xor(sums.number[i], mask);
  }
  if (g.gain_rows != nullptr && lane == 0) g.gain_rows[index] = of_gain;
  const bool broken = row.delta != row.delta;
  if (lane < Lanes && held) {
    const bool finite = write_sum(parameters.dense_query, g.grad_query, batch, place.head, place.query, column,
                                  problem.scoring.scale, sums);
    if (!finite || broken) parameters.doubtful_rows[heads * p.row_tiles + r / kTileRows] = 1;
  }
  if (!broken) return;
  // So are the gradients of all keys that the row sees.
  const int64_t key_tiles = (shape.keys + kTileRows - 1) / kTileRows;
  for (int64_t tile = row.low / kTileRows + lane; tile * kTileRows < row.high; tile += 32)
    parameters.doubtful_keys[heads * key_tiles + tile] = 1;
}

// The gradients of a key and its value, by a block: all of them, or those of a part of its rows.
template <class T, int Lanes>
class KeyBlock {
  using U = Unit<T>;
  static constexpr int kGroups = kThreads / Lanes, kFlight = 2;

 public:
  ATTNRB_DEVICE KeyBlock(const SparseGradientParameters& all, int64_t key) : parameters(all), g(all.all), index(key) {
    const AttentionProblem& problem = g.rows.problem;
    const Shape& shape = problem.shape;
    heads = index / shape.keys;
    batch = heads / shape.key_heads;
    key_head = heads % shape.key_heads;
    j = index % shape.keys;
    group = thread_index() / Lanes;
    column = thread_index() % Lanes * U::size;
    held = column < g.rows.key.width;
    if (problem.edit.indices == nullptr) return;
    count = parameters.counts[index];
    rows = parameters.entries + heads * g.rows.rows * problem.edit.capacity + parameters.starts[index];
  }

  ATTNRB_DEVICE void run() {
    // The parts of a long key have blocks of their own.
    if (is_long() && parameters.first_parts[index] >= 0) return;
    read_key();
    UnitNumbers<T> sum;
    sum.clear();
    const int32_t* ordered = is_long() ? rows : in_order();
    for (int32_t first = 0; first < count; first += kPart) sum.join(sum_of(ordered + first, count - first));
    write(sum);
  }

  ATTNRB_DEVICE void run_part(int32_t part) {
    read_key();
    const int32_t first = (part - parameters.first_parts[index]) * kPart;
    const UnitNumbers<T> sum = sum_of(rows + first, count - first);
    if (group > 1) return;
#pragma unroll
    for (int i = 0; i < U::size; ++i) place_of(part)[i] = sum.number[i];
  }

  ATTNRB_DEVICE void join_parts() {
    const int32_t first = parameters.first_parts[index], parts = (count + kPart - 1) / kPart;
    if (first < 0 || group > 1) return;
    UnitNumbers<T> sum;
    sum.clear();
    for (int32_t part = first; part < first + parts; ++part) {
      const float* numbers = place_of(part);
#pragma unroll
      for (int i = 0; i < U::size; ++i) sum.number[i] += numbers[i];
    }
    write(sum);
  }

 private:
  ATTNRB_DEVICE bool is_long() const { return count > kPart; }

  // Where this thread's unit of a part's sum is kept.
  ATTNRB_DEVICE float* place_of(int32_t part) const {
    return parameters.part_sums + ((int64_t(part) * 2 + group) * Lanes + thread_index() % Lanes) * U::size;
  }

  ATTNRB_DEVICE void read_key() {
    if (count == 0) {
      key.clear();
      value.clear();
      return;
    }
    const int from = held ? column : 0;
    key.read(*reinterpret_cast<const U*>(HeadRows<T>(g.rows.key, batch, key_head, from).row(j)), held);
    value.read(*reinterpret_cast<const U*>(HeadRows<T>(g.rows.value, batch, key_head, from).row(j)), held);
  }

  // The rows of a key that is not long, each behind as many as are smaller.
  ATTNRB_DEVICE const int32_t* in_order() const {
    int32_t* found = reinterpret_cast<int32_t*>(sums_of_groups() + 2 * kThreads * U::size);
    int32_t* ordered = found + kPart;
    for (int32_t c = thread_index(); c < count; c += kThreads) found[c] = rows[c];
    block_sync();
    for (int32_t c = thread_index(); c < count; c += kThreads) {
      int32_t smaller = 0;
      for (int32_t other = 0; other < count; ++other) smaller += found[other] < found[c] ? 1 : 0;
      ordered[smaller] = found[c];
    }
    block_sync();
    return ordered;
  }

  static ATTNRB_DEVICE float* sums_of_groups() { return reinterpret_cast<float*>(shared_memory()); }

  // What the first rows of `some` add, kPart of them or `left`: in the threads of the first two groups, a unit each of
  // the key's gradient and of its value's.
  ATTNRB_DEVICE UnitNumbers<T> sum_of(const int32_t* some, int32_t left) const {
    const AttentionParameters& p = g.rows;
    const int32_t number = left < kPart ? left : kPart;
    const int from = held ? column : 0;
    UnitNumbers<T> sums[2];
    sums[0].clear();
    sums[1].clear();
    for (int32_t first = 0; first < number; first += kGroups * kFlight) {
      U query[kFlight], gradient[kFlight];
      const uint32_t* words[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const int32_t c = first + f * kGroups + group;
        const int64_t r = some[c < number ? c : 0];
        const RowPlace place = row_place(p, key_head, r);
        query[f] = *reinterpret_cast<const U*>(rows_of<T>(p.query, batch, place.head) +
                                               place.query * p.query.strides[2] + from);
        gradient[f] = *reinterpret_cast<const U*>(rows_of<T>(g.grad_output, batch, place.head) +
                                                  place.query * g.grad_output.strides[2] + from);
        words[f] = g.words + 8 * (heads * p.rows + r);
      }
      keep_loads_apart();
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const float score = sum_of_group<Lanes>(key.dot(query[f], held));
        float of_weight = sum_of_group<Lanes>(value.dot(gradient[f], held));
        if (first + f * kGroups + group >= number) continue;
        GradientRow row;
        row.read(words[f], words[f] + 4);
        if (p.problem.edit.rule == Rule::row) of_weight -= row.delta;
        const float weight = row.gain * fast_exp2(fmaf(score, p.factor, -row.reference) - row.rest);
        sums[0].add(weight * of_weight, query[f]);
        sums[1].add(weight, gradient[f]);
      }
    }
    // One thread for each unit of the two gradients adds what the groups have, in one order.
    float* shared = sums_of_groups();
    const auto place = [&](int which, int of_group) {
      return shared + ((which * kGroups + of_group) * Lanes + thread_index() % Lanes) * U::size;
    };
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int i = 0; i < U::size; ++i) place(which, group)[i] = sums[which].number[i];
    block_sync();
    UnitNumbers<T> sum;
    sum.clear();
    for (int other = 0; group < 2 && other < kGroups; ++other)
#pragma unroll
      for (int i = 0; i < U::size; ++i) sum.number[i] += place(group, other)[i];
    // Another part may follow.
    block_sync();
    return sum;
  }

  ATTNRB_DEVICE void write(const UnitNumbers<T>& sum) const {
    if (group > 1 || !held) return;
    const AttentionProblem& problem = g.rows.problem;
    const bool finite =
        group == 0 ? write_sum(parameters.dense_key, g.grad_key, batch, key_head, j, column, problem.scoring.scale, sum)
                   : write_sum(parameters.dense_value, g.grad_value, batch, key_head, j, column, 1.0f, sum);
    const int64_t key_tiles = (problem.shape.keys + kTileRows - 1) / kTileRows;
    if (!finite) parameters.doubtful_keys[heads * key_tiles + j / kTileRows] = 1;
  }

  const SparseGradientParameters& parameters;
  const GradientParameters& g;
  int64_t index, heads, batch, key_head, j;
  int group, column;
  bool held;
  int32_t count = 0;
  const int32_t* rows = nullptr;
  UnitNumbers<T> key, value;
};

// A block for each part of a long key that there may be, then one for each key.
template <class T, int Lanes>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 4)
    sparse_keys_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  const int64_t block = block_index();
  if (block >= parameters.most_parts) {
    KeyBlock<T, Lanes>(parameters, block - parameters.most_parts).run();
    return;
  }
  const int64_t key = parameters.part_keys[block];
  if (key > 0) KeyBlock<T, Lanes>(parameters, key - 1).run_part(int32_t(block));
}

// Adds up the parts of long keys. A block for each in turn.
template <class T, int Lanes>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 4)
    sparse_parts_kernel(ATTNRB_PARAMETERS SparseGradientParameters parameters) {
  for (int64_t i = block_index(); i < parameters.totals[0]; i += parameters.sorters)
    KeyBlock<T, Lanes>(parameters, parameters.long_keys[i]).join_parts();
}

}  // namespace attnrb::cuda
