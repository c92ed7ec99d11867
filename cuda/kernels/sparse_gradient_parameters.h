// What is added to a dense backward of another library, which was given the re-balanced output and log-sum-exp.
//
// Note: [Sparse part of gradients]
// With that output and log-sum-exp the dense part is the backward of plain attention (docs/method.md, Gradients). What
// is left touches outliers alone: with e_ij = gain P_ij dW_ij, or gain P_ij (dW_ij - delta_i) when normalised,
//   dQ_i += scale sum_j e_ij k_j,   dK_j += scale sum_i e_ij q_i,   dV_j += gain sum_i P_ij dy_i.
// A warp has a row and its gradient of a query, a block a key and its two gradients: each has one owner, which adds in
// one order. Which rows have a key as an outlier says an index, built by counting: rows are cut into kIndexChunks
// chunks, a warp walks down a chunk and counts how often it meets each key, the counts are summed to places, and a
// second walk puts each row where the counts say. One warp takes the rows of a chunk one after the other, so a key's
// rows lie in ascending order, whatever the order of the warps.
//
// Doubtful tiles are those with a gradient that is not finite, as in Note: [Doubtful rows]: our own kernels do them
// anew.
#pragma once

#include "gradient_parameters.h"

namespace attnrb::cuda {

constexpr int kIndexChunks = 64;

struct SparseGradientParameters {
  GradientParameters all;                       // its gradients are where the sums of both parts go
  Operand dense_query, dense_key, dense_value;  // the dense part of each
  int64_t chunk_rows = 0;                       // of a group, in a chunk
  int32_t* places = nullptr;                    // [B, Hk, N, kIndexChunks]: counts, then places; zeros before
  int32_t* starts = nullptr;                    // [B, Hk, N + 1]: where a key's rows begin
  int32_t* entries = nullptr;                   // [B, Hk, G M C]: rows of the group, key by key
  int32_t *doubtful_rows = nullptr, *doubtful_keys = nullptr;  // [B, Hk, tiles], zeros before: 1 for a doubtful one
};

}  // namespace attnrb::cuda
