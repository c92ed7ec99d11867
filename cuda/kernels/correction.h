// Strengthens the outliers of rows whose plain attention is known: y + g sum of A_ij v_j over the row's outliers,
// divided by z = 1 + g sum of A_ij where rows are normalised (docs/method.md).
//
// A warp has a row. Lanes in groups, as many as a row of keys has units of 16 bytes, take an outlier each, and several
// of them before the first arrives. Neighbouring warps have the heads of one group, whose rows of keys and values are
// the same: the second reads them from the cache.
#pragma once

#include "elementwise.h"
#include "marks.h"
#include "sparse_parameters.h"

namespace attnrb::cuda {

template <class T>
ATTNRB_DEVICE bool is_finite(const Unit<T>& unit) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < Unit<T>::size; ++i) {
    const float x = widen(unit.element[i]);
    finite = finite && x - x == 0.0f;
  }
  return finite;
}

// See Note: [Doubtful rows].
ATTNRB_DEVICE void note_doubt(const SparseParameters& parameters, int64_t batch, int64_t key_head, int64_t row) {
  const AttentionParameters& p = parameters.rows;
  const int64_t heads = batch * p.problem.shape.key_heads + key_head;
  parameters.doubtful_rows[heads * p.rows + row] = 1;
  parameters.doubtful_tiles[heads * p.row_tiles + row / kTileRows] = 1;
}

template <class T, int Lanes>
class CorrectionRow {
  static constexpr int kItems = 32 / Lanes, kFlight = 4;
  using U = Unit<T>;

 public:
  ATTNRB_DEVICE CorrectionRow(const SparseParameters& all, int64_t heads, int64_t row_of_group)
      : parameters(all), p(all.rows), row(row_of_group) {
    const Shape& shape = p.problem.shape;
    lane = thread_index() % 32;
    column = lane % Lanes * U::size;
    batch = heads / shape.key_heads;
    key_head = heads % shape.key_heads;
    place = row_place(p, key_head, row);
    index = (batch * shape.heads + place.head) * shape.queries + place.query;
  }

  ATTNRB_DEVICE void run() {
    const Edit& edit = p.problem.edit;
    const int64_t* strides = parameters.lse_strides;
    const float lse = parameters.dense_lse[batch * strides[0] + place.head * strides[1] + place.query * strides[2]];
    const OutlierList list = outliers_of(p, batch, place);
    const float gain = gain_of(p, batch, place.head);
    const bool broken = breaks_rules(p, list);
    float sums[U::size], mass = 0.0f;
#pragma unroll
    for (int i = 0; i < U::size; ++i) sums[i] = 0.0f;
    if (!broken && gain != 0.0f) add_outliers(list, lse * kLog2E, sums, mass);
    // Groups of lanes had different outliers.
#pragma unroll
    for (int mask = Lanes; mask < 32; mask *= 2) {
      mass += shuffle_xor(mass, mask);
#pragma unroll
      for (int i = 0; i < U::size; ++i) sums[i] += shuffle_xor(sums[i], mask);
    }
    // One division, and not one for each element.
    const float z = edit.rule == Rule::row ? 1.0f + gain * mass : 1.0f;
    if (p.problem.lse != nullptr && lane == 0) p.problem.lse[index] = lse + logf(z);
    if (lane < Lanes && column < p.value.width)
      write(sums, gain, broken ? bit_cast<float>(uint32_t(0x7fc00000u)) : 1.0f / z);
  }

 private:
  ATTNRB_DEVICE void add_outliers(const OutlierList& list, float reference, float (&sums)[U::size], float& mass) const {
    const int32_t* slots = list.slots;
    const int32_t count = list.count;
    const T* query = static_cast<const T*>(p.query.data) + batch * p.query.strides[0] +
                     place.head * p.query.strides[1] + place.query * p.query.strides[2];
    // Lanes beyond the width read its first unit, which counts for nothing.
    const bool held = column < p.query.width;
    const int from = held ? column : 0;
    const HeadRows<T> keys(p.key, batch, key_head, from), values(p.value, batch, key_head, from);
    const Interval seen = visible_interval(p.problem.visibility, batch, place.query, p.problem.shape.keys);
    const int64_t key_offset = p.problem.visibility.key_offset;
    float q[U::size];
    U unit{};
    if (held) unit = *reinterpret_cast<const U*>(query + column);
#pragma unroll
    for (int i = 0; i < U::size; ++i) q[i] = widen(unit.element[i]);

    for (int32_t first = 0; first < count; first += kItems * kFlight) {
      U key[kFlight], value[kFlight];
      bool taken[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const int32_t c = first + f * kItems + lane / Lanes;
        const int64_t slot = int64_t(slots[c < count ? c : 0]) - key_offset;
        taken[f] = c < count && slot >= seen.low && slot < seen.high;
        // Loads without conditions: those of one turn are under way together.
        const int64_t at = taken[f] ? slot : 0;
        key[f] = *reinterpret_cast<const U*>(keys.row(at));
        value[f] = *reinterpret_cast<const U*>(values.row(at));
      }
      keep_loads_apart();
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < U::size; ++i) score += held ? q[i] * widen(key[f].element[i]) : 0.0f;
#pragma unroll
        for (int mask = 1; mask < Lanes; mask *= 2) score += shuffle_xor(score, mask);
        if (!taken[f]) continue;
        const float weight = fast_exp2(fmaf(score, p.factor, -reference));
        mass += weight;
#pragma unroll
        for (int i = 0; i < U::size; ++i) sums[i] += weight * widen(value[f].element[i]);
      }
    }
  }

  ATTNRB_DEVICE void write(const float (&sums)[U::size], float gain, float by) const {
    T* out = static_cast<T*>(p.problem.output) + batch * p.problem.output_strides[0] +
             place.head * p.problem.output_strides[1] + place.query * p.problem.output_strides[2] + column;
    U unit = *reinterpret_cast<const U*>(out);
    if (!is_finite(unit)) note_doubt(parameters, batch, key_head, row);
#pragma unroll
    for (int i = 0; i < U::size; ++i) unit.element[i] = narrow<T>((widen(unit.element[i]) + gain * sums[i]) * by);
    *reinterpret_cast<U*>(out) = unit;
  }

  const SparseParameters& parameters;
  const AttentionParameters& p;
  int lane, column;
  int64_t row, batch, key_head, index;
  RowPlace place;
};

// `Lanes`: of a group.
template <class T, int Lanes>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads, 4) correction_kernel(ATTNRB_PARAMETERS SparseParameters parameters) {
  const AttentionParameters& p = parameters.rows;
  const int64_t index = block_index() * kWarps + thread_index() / 32, heads = index / p.rows;
  if (heads >= p.problem.shape.batch * p.problem.shape.key_heads) return;
  CorrectionRow<T, Lanes> row(parameters, heads, index % p.rows);
  row.run();
}

}  // namespace attnrb::cuda
