// The contents page: every op of the library. Each has a file of its own name.
//
//   B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, Dv value width,
//   C = min(ceil(1/threshold) - 1, N) outliers a row at most.
#include "ops/stable_abi.h"

// Which keys a query may see: see core/problem.h, Visibility. key_start, key_end: int64 [B]; mask: bool, broadcastable
// to [B, H, M, N]; window 0: no limit.
#define ATTNRB_VISIBILITY                                                                                            \
  "bool causal, SymInt query_offset, SymInt key_offset, SymInt window, Tensor? key_start, Tensor? key_end, Tensor? " \
  "mask"
// How query·key becomes a score: see core/problem.h, Scoring. softcap 0: none; sinks: [H].
#define ATTNRB_SCORING "float scale, float softcap, Tensor? sinks"

STABLE_TORCH_LIBRARY(attnrb, library) {
  // weights [B, H, M, N] -> bool [B, H, M, N]
  library.def("outlier_mask(Tensor weights, float threshold, SymInt query_offset) -> Tensor");

  // weights [B, H, M, N], mask bool broadcastable to it, gain one number or float32 [1] or [H] -> weights' shape and
  // dtype
  library.def("rebalance(Tensor weights, Tensor mask, float gain, bool normalize) -> Tensor");
  library.def("rebalance.per_head(Tensor weights, Tensor mask, Tensor gain, bool normalize) -> Tensor");

  // grad_output of the dtype and shape of weights, gain float32 [1] or [H] -> grad_weights like weights, grad_gain
  // float32 [H]
  library.def(
      "rebalance_backward(Tensor grad_output, Tensor weights, Tensor mask, Tensor gain, bool normalize) -> "
      "(Tensor grad_weights, Tensor grad_gain)");

  // query [B, H, M, D], key [B, Hk, N, D], value [B, Hk, N, Dv]
  //   -> output [B, H, M, Dv], lse float32 [B, H, M], indices int32 [B, H, M, C], counts int32 [B, H, M]
  library.def("source_attention(Tensor query, Tensor key, Tensor value, float threshold, " ATTNRB_VISIBILITY
              ", " ATTNRB_SCORING ") -> (Tensor output, Tensor lse, Tensor indices, Tensor counts)");

  // query, key, value as above, indices int32 [B, H, M, C], counts int32 [B, H, M], gain float32 [1] or [H]
  //   -> output [B, H, M, Dv]
  library.def(
      "rebalanced_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, Tensor gain, "
      "bool normalize, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING ") -> Tensor");

  // query [B, H, M, D], key [B, Hk, N, D] -> float32 [B, H, N]
  library.def("received_attention(Tensor query, Tensor key, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING ") -> Tensor");

  // The same three for training: they also return what their backward needs, and have a gradient registered (in
  // Python), which costs every call some microseconds that decoding should not pay.
  library.def("source_attention_training(Tensor query, Tensor key, Tensor value, float threshold, " ATTNRB_VISIBILITY
              ", " ATTNRB_SCORING ") -> (Tensor output, Tensor lse, Tensor indices, Tensor counts)");
  library.def(
      "rebalanced_attention_training(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, "
      "Tensor gain, bool normalize, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING ") -> (Tensor output, Tensor lse)");
  library.def("received_attention_training(Tensor query, Tensor key, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING
              ") -> (Tensor received, Tensor lse)");

  // Gradients have the shape and dtype of what they belong to; grad_gain and grad_sinks are float32 [H].
  library.def(
      "source_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sinks)");
  library.def(
      "rebalanced_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
      "Tensor lse, Tensor indices, Tensor counts, Tensor gain, bool normalize, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_gain, Tensor grad_sinks)");
  library.def(
      "received_attention_backward(Tensor grad_received, Tensor query, Tensor key, Tensor lse, " ATTNRB_VISIBILITY
      ", " ATTNRB_SCORING ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_sinks)");
}
