// Strengthens the outliers of rows whose plain attention is known: y + g sum of A_ij v_j over the row's outliers,
// divided by z = 1 + g sum of A_ij where rows are normalised (docs/method.md).
//
// A group of lanes has a row, as many as a row of keys has units of 16 bytes. It takes its outliers one after the
// other, but asks for several before the first arrives. Neighbours have the heads of one group, whose rows of keys and
// values are the same: the second reads them from the cache.
#pragma once

#include "elementwise.h"
#include "marks.h"
#include "sparse_parameters.h"

namespace attnrb::cuda {

template <class T>
ATTNRB_DEVICE bool is_finite(const Unit<T>& unit) {
  // Zero times what is not finite is NaN.
  float zero = 0.0f;
#pragma unroll
  for (int i = 0; i < Unit<T>::size; ++i) zero = fmaf(widen(unit.element[i]), 0.0f, zero);
  return zero == 0.0f;
}

// See Note: [Doubtful rows].
ATTNRB_DEVICE void note_doubt(const SparseParameters& parameters, int64_t batch, int64_t key_head, int64_t row) {
  const AttentionParameters& p = parameters.rows;
  const int64_t heads = batch * p.problem.shape.key_heads + key_head;
  parameters.doubtful_rows[heads * p.rows + row] = 1;
  parameters.doubtful_tiles[heads * p.row_tiles + row / kTileRows] = 1;
}

template <class T>
ATTNRB_DEVICE const T* dense_row(const SparseParameters& parameters, int64_t batch, const RowPlace& place) {
  const int64_t* strides = parameters.dense_strides;
  return static_cast<const T*>(parameters.dense_output) + batch * strides[0] + place.head * strides[1] +
         place.query * strides[2];
}

// Rows of a group of heads, as many as a warp has groups of lanes. There are fewer than 2^31 of them: so are keys, and
// heads of all batch elements.
template <class T, int Lanes>
class CorrectionRows {
  using U = Unit<T>;

 public:
  ATTNRB_DEVICE CorrectionRows(const SparseParameters& all, uint32_t heads, uint32_t first_row)
      : parameters(all), p(all.rows) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % Lanes;
    column = lane * U::size;
    row = first_row + thread_index() % 32 / Lanes;
    // Groups of lanes without a row look at the last one, and do nothing with it.
    valid = row < uint32_t(p.rows);
    if (!valid) row = uint32_t(p.rows) - 1;
    const uint32_t query = row / uint32_t(p.group);
    batch = heads / uint32_t(shape.key_heads);
    key_head = heads - batch * uint32_t(shape.key_heads);
    place = {int64_t(query), int(key_head * uint32_t(p.group) + (row - query * uint32_t(p.group)))};
  }

  ATTNRB_DEVICE void run() {
    const int64_t* strides = parameters.lse_strides;
    const float lse = parameters.dense_lse[batch * strides[0] + place.head * strides[1] + place.query * strides[2]];
    OutlierList list = outliers_of(p, batch, place);
    const float gain = gain_of(p, batch, place.head);
    const bool broken = breaks_rules(list);
    if (!valid || broken || gain == 0.0f) list.count = 0;
    float sums[U::size], mass = 0.0f;
#pragma unroll
    for (int i = 0; i < U::size; ++i) sums[i] = 0.0f;
    if (any(list.count > 0)) add_outliers(list, lse * kLog2E, sums, mass);
    if (!valid) return;
    // One division, and not one for each element.
    const float z = p.problem.edit.rule == Rule::row ? 1.0f + gain * mass : 1.0f;
    if (p.problem.lse != nullptr && lane == 0) {
      const Shape& shape = p.problem.shape;
      const int64_t index = (int64_t(batch) * shape.heads + place.head) * shape.queries + place.query;
      p.problem.lse[index] = lse + logf(z);
    }
    if (column < p.value.width) write(sums, gain, broken ? bit_cast<float>(uint32_t(0x7fc00000u)) : 1.0f / z);
  }

 private:
  // As breaks_rules() of marks.h, by the lanes of a group.
  ATTNRB_DEVICE bool breaks_rules(const OutlierList& list) const {
    const bool outside = list.count < 0 || list.count > p.problem.edit.capacity;
    bool unsorted = false;
    if (!outside)
      for (int32_t c = lane + 1; c < list.count; c += Lanes)
        unsorted = unsorted || list.slots[uint32_t(c)] <= list.slots[uint32_t(c - 1)];
    const bool broken = in_group(outside || unsorted);
    if (broken && lane == 0)
      report_status(p.status, int32_t(outside ? Status::outlier_count : Status::unsorted_outliers));
    return broken;
  }
  // Whether it is so for any lane of the group.
  static ATTNRB_DEVICE bool in_group(bool x) {
    const unsigned group = (~0u >> (32 - Lanes)) << (thread_index() % 32 / Lanes * Lanes);
    return (ballot(x) & group) != 0;
  }

  ATTNRB_DEVICE void add_outliers(const OutlierList& list, float reference, float (&sums)[U::size], float& mass) const {
    const T* query = static_cast<const T*>(p.query.data) + batch * p.query.strides[0] +
                     place.head * p.query.strides[1] + place.query * p.query.strides[2];
    // Lanes beyond the width read the first unit, which counts for nothing.
    const bool held = column < p.query.width;
    const int from = held ? column : 0;
    const char* keys = reinterpret_cast<const char*>(HeadRows<T>(p.key, batch, key_head, from).row(0));
    const char* values = reinterpret_cast<const char*>(HeadRows<T>(p.value, batch, key_head, from).row(0));
    const U unit = *reinterpret_cast<const U*>(query + from);
    float q[U::size];
#pragma unroll
    for (int i = 0; i < U::size; ++i) q[i] = held ? widen(unit.element[i]) : 0.0f;
    // Four at a time, or two where no more are left.
    int32_t first = 0;
    for (; any(list.count - first > 2); first += 4) add<4>(list, first, keys, values, q, held, reference, sums, mass);
    if (any(first < list.count)) add<2>(list, first, keys, values, q, held, reference, sums, mass);
  }

  // `Flight` outliers of each row, from its outlier `first` on.
  template <int Flight>
  ATTNRB_DEVICE void add(const OutlierList& list, int32_t first, const char* keys, const char* values,
                         const float (&q)[U::size], bool held, float reference, float (&sums)[U::size],
                         float& mass) const {
    // See sparse_suits(): a row sees all keys, or those up to its own; slots and distances of rows have 32 bits.
    const uint32_t seen = uint32_t(p.problem.visibility.causal ? place.query + 1 : p.problem.shape.keys);
    const int32_t key_offset = int32_t(p.problem.visibility.key_offset);
    U key[Flight], value[Flight];
    bool taken[Flight];
#pragma unroll
    for (int f = 0; f < Flight; ++f) {
      const bool there = first + f < list.count;
      const int32_t slot = list.slots[uint32_t(there ? first + f : 0)];
      const uint32_t position = uint32_t(slot) - uint32_t(key_offset);
      taken[f] = there && slot >= key_offset && position < seen;
      // Loads without conditions: those of one turn are under way together.
      const uint64_t at = taken[f] ? position : 0;
      key[f] = *reinterpret_cast<const U*>(keys + at * parameters.key_bytes);
      value[f] = *reinterpret_cast<const U*>(values + at * parameters.value_bytes);
    }
    keep_loads_apart();
    // All scores before the first sum over lanes: the assembler would ask for some rows only after it.
    float score[Flight];
#pragma unroll
    for (int f = 0; f < Flight; ++f) {
      score[f] = 0.0f;
#pragma unroll
      for (int i = 0; i < U::size; ++i) score[f] += q[i] * widen(key[f].element[i]);
      score[f] = held ? score[f] : 0.0f;
    }
#pragma unroll
    for (int mask = 1; mask < Lanes; mask *= 2)
#pragma unroll
      for (int f = 0; f < Flight; ++f) score[f] += shuffle_xor(score[f], mask);
#pragma unroll
    for (int f = 0; f < Flight; ++f) {
      if (!taken[f]) continue;
      const float weight = fast_exp2(fmaf(score[f], p.factor, -reference));
      mass += weight;
#pragma unroll
      for (int i = 0; i < U::size; ++i) sums[i] += weight * widen(value[f].element[i]);
    }
  }

  ATTNRB_DEVICE void write(const float (&sums)[U::size], float gain, float by) const {
    T* out = static_cast<T*>(p.problem.output) + batch * p.problem.output_strides[0] +
             place.head * p.problem.output_strides[1] + place.query * p.problem.output_strides[2] + column;
    U unit = *reinterpret_cast<const U*>(dense_row<T>(parameters, batch, place) + column);
    if (!is_finite(unit)) note_doubt(parameters, batch, key_head, row);
#pragma unroll
    for (int i = 0; i < U::size; ++i) unit.element[i] = narrow<T>((widen(unit.element[i]) + gain * sums[i]) * by);
    *reinterpret_cast<U*>(out) = unit;
  }

  const SparseParameters& parameters;
  const AttentionParameters& p;
  int lane, column;  // of a group
  uint32_t row, batch, key_head;
  bool valid;
  RowPlace place;
};

// Rows of a block, which are of one group of heads.
template <int Lanes>
constexpr int kCorrectionRows = kThreads / Lanes;

// `Lanes`: of a group.
template <class T, int Lanes>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 4) correction_kernel(ATTNRB_PARAMETERS SparseParameters parameters) {
  const uint32_t rows = uint32_t(parameters.rows.rows),
                 blocks = (rows + kCorrectionRows<Lanes> - 1) / kCorrectionRows<Lanes>;
  const uint32_t block = uint32_t(block_index()), heads = block / blocks;
  const uint32_t first = (block - heads * blocks) * kCorrectionRows<Lanes> + thread_index() / 32 * (32 / Lanes);
  if (first < rows) CorrectionRows<T, Lanes>(parameters, heads, first).run();
}

}  // namespace attnrb::cuda
