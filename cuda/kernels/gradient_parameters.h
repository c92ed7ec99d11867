// What the kernels of the backward are started with. The host fills it in (cuda/gradient_plan.cpp).
//
// Note: [Gradients in two walks]
// With w_ij = 1 + gain [j in S_i], P_ij = exp(s_ij - LSE_i), dW_ij = dy_i . v_j and delta_i = dy_i . y_i - dLSE_i:
//   dV = (w P)^T dY,   dS = P (w dW - delta), or w P (dW - delta) when normalised,   dQ = scale dS K,
//   dK = scale dS^T Q,   dgain = sum over outliers of P dW, or P (dW - delta),   dsink = - sum_i exp(sink - LSE_i)
//   delta_i
// (docs/method.md, Gradients). One kernel has blocks that own 64 rows of queries and walk over the keys, another blocks
// that own 64 keys and walk over the rows of all heads that share them. Each computes P and dS anew. Every element of a
// gradient then has one owner, which adds in one order: no atomics, no partial sums in memory, equal bits from equal
// inputs, for seven products of a tile instead of five.
//
// Note: [Gradients of an edit]
// A key bias joins the scores behind the softcap, so the gradient of t_ij is that of s_ij before the softcap's slope,
// and a bias gets its sum over the rows that take it. A block that owns keys sees the rows of all heads that share
// them, among which sums of each head would need room that grows with the heads: a walk of its own has one head a
// block, and leaves a number for each key and head, which another kernel adds up where the bias is broadcast. Under
// rule rest (csrc/core/edit.h), with r = 1 - m the mass of the others and e = dy . their mean value,
//   dt = P ((1 + g) dW - D - g e) for outliers,   dt = P (a dW - D + g m e / r) for all others and sinks,   D = dy . y
//   - dLSE a = 1 - g m / r,   dgain = sum over outliers of P dW, minus m e
// where nothing cancels for r near zero. A walk over the keys finds r, m and both sums from the rows' own weights.
//
// Note: [Words of a row]
// A first kernel leaves eight words for each row: LSE log2(e) in two floats, delta, gain; the interval of keys that it
// sees (empty where nothing depends on the row), and 64 bits that say in which of 64 ranges of keys it has outliers.
// Rows of a tile lie 16 bytes further apart than their columns need (Note: [Tiles in shared memory]): there the words
// travel with the rows, four behind the query and four behind the gradient of the output.
#pragma once

#include "parameters.h"

namespace attnrb::cuda {

struct GradientParameters {
  AttentionParameters rows;  // queries, keys, values; what is seen, scored and strengthened
  Operand output, grad_output;
  const float *lse = nullptr, *grad_lse = nullptr, *grad_received = nullptr;
  GradientProblem::Target grad_query, grad_key, grad_value;
  float *grad_gain = nullptr, *grad_sinks = nullptr;
  uint32_t* words = nullptr;   // [B, Hk, G M, 8]
  float* gain_rows = nullptr;  // [B, Hk, G M], or null
  float* shares = nullptr;     // [B, H, N], of received attention: the gradient of each weight in a column
  // [B, Hk, G M, 2], or null: under rule rest a, and what delta is for outliers (Note: [Gradients of an edit]).
  float* rest_rows = nullptr;
  float* bias_keys = nullptr;  // [B, H, N], or null: the gradient of the bias for each key and head
  float* grad_bias = nullptr;  // [B, H, slots] by strides, 0 where broadcast
  int64_t grad_bias_strides[3] = {0, 0, 0};
  int32_t chunks = 1;        // of the wider of both widths
  int32_t bucket_shift = 0;  // keys in a range of Note: [Words of a row], as a power of two
  // [B, Hk, tiles]: 0 where a tile of rows, or of keys, is to be left as it is; null: none is.
  const int32_t *wanted_rows = nullptr, *wanted_keys = nullptr;
};

// Whose gradients a kernel computes. `received_deltas`: the deltas of received attention, which has no output; `rest`:
// what a row's gradients need under rule rest; `bias`: the key bias of one head, of either attention.
enum class GradientTask { queries, keys, received_deltas, received_queries, received_keys, rest, bias };

template <class T>
struct GradientTile {
  static constexpr int own = kTileRows;              // rows or keys that a block owns
  static constexpr int inner = 64 / int(sizeof(T));  // keys or rows that it meets at a time
};

}  // namespace attnrb::cuda
