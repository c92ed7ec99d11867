// What is added to a dense backward of another library, which was given the re-balanced output and log-sum-exp.
//
// Note: [Sparse part of gradients]
// With that output and log-sum-exp the dense part is the backward of plain attention (docs/method.md, Gradients). What
// is left touches outliers alone: with e_ij = gain P_ij dW_ij, or gain P_ij (dW_ij - delta_i) when normalised,
//   dQ_i += scale sum_j e_ij k_j,   dK_j += scale sum_i e_ij q_i,   dV_j += gain sum_i P_ij dy_i.
// A warp has a row and its gradient of a query, a block a key and its two gradients: each has one owner, which adds in
// one order. Doubtful tiles are those with a gradient that is not finite, as in Note: [Doubtful rows]: our own kernels
// do them anew.
//
// Note: [Index of outliers]
// Which rows have a key as an outlier says an index. Rows are counted key by key, keys are given room for as many, and
// a second walk over the rows puts each where it belongs. A lane has a row, so that many loads are under way together;
// lanes whose rows have the same key, as most have the first, count it with one atomic addition. In what order the
// rows of a key then lie, and where its room is, depends on chance. So before they are added they are put in order:
// each behind as many as are smaller, or, where a key is long, by a bit for each row of the group. Sums are thus the
// same every time.
//
// A long key has more than kPart rows. It is cut into parts of so many, which have a block each, and a last kernel adds
// what the parts left. There is memory for kMostParts parts: where a key's found none, its own block adds one after the
// other, with the same bits.
#pragma once

#include "gradient_parameters.h"

namespace attnrb::cuda {

constexpr int kPart = 512, kMostParts = 4096, kMostSorters = 64;

struct SparseGradientParameters {
  GradientParameters all;                       // its gradients are where the sums of both parts go
  Operand dense_query, dense_key, dense_value;  // the dense part of each
  // [B, Hk, N], of each key: its number of rows, zeros before; where they begin in its head's entries; where they end.
  int32_t *counts = nullptr, *starts = nullptr, *ends = nullptr;
  int32_t* entries = nullptr;    // [B, Hk, G M C]: rows of the group, key by key
  int32_t* taken = nullptr;      // [B, Hk], zeros before: entries given away
  int32_t* totals = nullptr;     // zeros before: numbers of long keys and of their parts
  int32_t* long_keys = nullptr;  // [totals[0]]: which they are, in the order of `counts`
  // [B, Hk, N]: the first part of a long key, or -1 where its own block adds them; not set for others.
  int32_t* first_parts = nullptr;
  int32_t* part_keys = nullptr;  // [most_parts], zeros before: the key of each, counted from 1
  float* part_sums = nullptr;    // [most_parts, 2, columns]
  uint32_t* bits = nullptr;      // [sorters, ceil(G M / 32)]
  int32_t most_parts = 0, sorters = 0;
  int32_t *doubtful_rows = nullptr, *doubtful_keys = nullptr;  // [B, Hk, tiles], zeros before: 1 for a doubtful one
};

}  // namespace attnrb::cuda
