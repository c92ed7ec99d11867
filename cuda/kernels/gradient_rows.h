// What the backward knows of each row before it starts: see Note: [Words of a row].
#pragma once

#include "elementwise.h"
#include "gradient_parameters.h"
#include "marks.h"

namespace attnrb::cuda {

constexpr float kLog2ERest = 1.92596299e-8f;  // log2(e) is kLog2E and this

struct alignas(16) Words {
  uint32_t word[4];
};

// A row's words, taken apart.
struct GradientRow {
  float reference = 0.0f, rest = 0.0f;  // LSE log2(e) and what one float cannot hold of it
  float delta = 0.0f, gain = 0.0f;
  int low = 0, high = 0;
  uint64_t buckets = 0;
  // Under rule rest, what weights of others are multiplied by, and delta for outliers.
  float of_others = 1.0f, outlier_delta = 0.0f;

  ATTNRB_DEVICE void read(const void* first_half, const void* second_half) {
    const Words first = *static_cast<const Words*>(first_half), second = *static_cast<const Words*>(second_half);
    reference = bit_cast<float>(first.word[0]);
    rest = bit_cast<float>(first.word[1]);
    delta = bit_cast<float>(first.word[2]);
    gain = bit_cast<float>(first.word[3]);
    low = int(second.word[0]);
    high = int(second.word[1]);
    buckets = uint64_t(second.word[2]) | uint64_t(second.word[3]) << 32;
  }
  ATTNRB_DEVICE void read_rest(const GradientParameters& parameters, int64_t index) {
    of_others = parameters.rest_rows[2 * index];
    outlier_delta = parameters.rest_rows[2 * index + 1];
  }
};

// dy . y of one row by a warp; `nonzero` says whether dy is anything but zeros.
template <class T>
ATTNRB_DEVICE float dot_output(const GradientParameters& parameters, int64_t batch, const RowPlace& place,
                               bool& nonzero) {
  using U = Unit<T>;
  const Operand &grad = parameters.grad_output, &output = parameters.output;
  const auto row = [&](const Operand& operand) {
    return static_cast<const T*>(operand.data) + batch * operand.strides[0] + place.head * operand.strides[1] +
           place.query * operand.strides[2];
  };
  const T *grad_row = row(grad), *output_row = row(output);
  float sum = 0.0f;
  bool found = false;
  for (int column = thread_index() % 32 * U::size; column < grad.width; column += 32 * U::size) {
    const U g = load_unit(grad_row, column, grad.strides[3], grad.width, grad.aligned);
    const U y = load_unit(output_row, column, output.strides[3], output.width, output.aligned);
#pragma unroll
    for (int i = 0; i < U::size; ++i) {
      const float x = widen(g.element[i]);
      sum += x * widen(y.element[i]);
      found = found || x != 0.0f;
    }
  }
  nonzero = any(found);
  return warp_sum(sum);
}

// The ranges in which a row has outliers. Rows that break the rules have none and are reported.
ATTNRB_DEVICE uint64_t outlier_buckets(const GradientParameters& parameters, const OutlierList& list, bool& broken) {
  const AttentionParameters& p = parameters.rows;
  broken = breaks_rules(p, list);
  uint64_t buckets = 0;
  if (!broken)
    for (int c = thread_index() % 32; c < list.count; c += 32) {
      const int64_t key = int64_t(list.slots[c]) - p.problem.visibility.key_offset;
      if (key >= 0 && key < p.problem.shape.keys) buckets |= uint64_t(1) << (key >> parameters.bucket_shift);
    }
  for (int mask = 1; mask < 32; mask *= 2) buckets |= shuffle_xor(buckets, mask);
  return buckets;
}

// A warp for each row.
template <class T>
ATTNRB_KERNEL void ATTNRB_BLOCK_THREADS(kThreads)
    gradient_rows_kernel(ATTNRB_PARAMETERS GradientParameters parameters) {
  const AttentionParameters& p = parameters.rows;
  const AttentionProblem& problem = p.problem;
  const int64_t index = block_index() * kWarps + thread_index() / 32, heads = index / p.rows;
  if (heads >= problem.shape.batch * problem.shape.key_heads) return;
  const int64_t batch = heads / problem.shape.key_heads;
  const RowPlace place = row_place(p, heads % problem.shape.key_heads, index % p.rows);
  const int64_t row = (batch * problem.shape.heads + place.head) * problem.shape.queries + place.query;

  // A row that sees nothing, or whose output nothing depends on, has no part in any gradient.
  const float lse = parameters.lse[row];
  bool active = true;
  float delta = 0.0f;
  if (parameters.grad_received == nullptr) {
    const float dot = dot_output<T>(parameters, batch, place, active);
    const float grad_lse = parameters.grad_lse != nullptr ? parameters.grad_lse[row] : 0.0f;
    delta = (active ? dot : 0.0f) - grad_lse;
    active = active || grad_lse != 0.0f;
  }
  active = active && lse != minus_infinity();

  float gain = 0.0f;
  uint64_t buckets = 0;
  if (problem.edit.indices != nullptr) {
    bool broken = false;
    buckets = outlier_buckets(parameters, outliers_of(p, batch, place), broken);
    gain = gain_of(p, batch, place.head);
    if (broken) delta = bit_cast<float>(uint32_t(0x7fc00000u));
  }
  if (thread_index() % 32 != 0) return;
  // In two floats: rounded to one, a log-sum-exp of 20 would cost every weight of its row 1e-6.
  const float reference = lse * kLog2E, rest = fmaf(lse, kLog2E, -reference) + lse * kLog2ERest;
  const Interval seen = visible_interval(problem.visibility, batch, place.query, problem.shape.keys);
  const Words first = {bit_cast<uint32_t>(active ? reference : 0.0f), bit_cast<uint32_t>(active ? rest : 0.0f),
                       bit_cast<uint32_t>(active ? delta : 0.0f), bit_cast<uint32_t>(gain)};
  const Words second = {active ? uint32_t(seen.low) : 0u, active ? uint32_t(seen.high) : 0u, uint32_t(buckets),
                        uint32_t(buckets >> 32)};
  Words* words = reinterpret_cast<Words*>(parameters.words + 8 * index);
  words[0] = first;
  words[1] = second;
}

}  // namespace attnrb::cuda
