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
  int32_t chunks = 1;          // of the wider of both widths
  int32_t bucket_shift = 0;    // keys in a range of Note: [Words of a row], as a power of two
  // [B, Hk, tiles]: 0 where a tile of rows, or of keys, is to be left as it is; null: none is.
  const int32_t *wanted_rows = nullptr, *wanted_keys = nullptr;
};

// Whose gradients a kernel computes. `received_deltas`: the deltas of received attention, which has no output.
enum class GradientTask { queries, keys, received_deltas, received_queries, received_keys };

template <class T>
struct GradientTile {
  static constexpr int own = kTileRows;              // rows or keys that a block owns
  static constexpr int inner = 64 / int(sizeof(T));  // keys or rows that it meets at a time
};

}  // namespace attnrb::cuda
