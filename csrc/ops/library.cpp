// The contents page: every op of the library.
//
//   B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, Dv value width,
//   C = min(ceil(1/threshold) - 1, N) outliers a row at most.
//
// Note: [Schemas]
// Options of `attention` are keyword-only and have defaults, so that one can be added without breaking a caller.
// `attention_training` is the same op with the same options in the same order, but positional, and so are the backward
// ops: autograd formulas can be registered for no op that has keyword-only tensors. A rule is a number (0 none, 1 row,
// 2 rest), which costs a call less than a string. query_offset and scale may be None: the last query is on the last
// key, and 1/sqrt(D).
#include "ops/stable_abi.h"

// Which keys a query may see, and how query·key becomes a score, in the order of the older ops: see core/visibility.h
// and core/problem.h. key_start, key_end: int64 [B]; mask: bool, broadcastable to [B, H, M, N]; window 0: no limit;
// softcap 0: none; sinks: [H].
#define ATTNRB_VISIBILITY                                                                                            \
  "bool causal, SymInt query_offset, SymInt key_offset, SymInt window, Tensor? key_start, Tensor? key_end, Tensor? " \
  "mask"
#define ATTNRB_SCORING "float scale, float softcap, Tensor? sinks"

// How weights are edited (core/edit.h), what is emitted, what a query sees and how scores are made.
//   indices int32 [B, H, M, C], counts int32 [B, H, M], or [B, H, 1, C] and [B, H, 1] for all queries of a head;
//   gain float32 [1] or [H], given where indices are; rule 0 none, 1 row, 2 rest;
//   key_bias float32 [B or 1, H or 1, slots], by key slot, 0 for later slots, -inf removes; first_query int64 [B];
//   emit: threshold; query_offsets int64 [B] in place of query_offset; chunk 0: none.
#define ATTNRB_OPTIONS                                                                                         \
  "Tensor? indices=None, Tensor? counts=None, Tensor? gain=None, int rule=0, Tensor? key_bias=None, "          \
  "Tensor? first_query=None, float? emit=None, bool causal=True, SymInt? query_offset=None, "                  \
  "Tensor? query_offsets=None, SymInt key_offset=0, SymInt window=0, SymInt chunk=0, Tensor? key_start=None, " \
  "Tensor? key_end=None, Tensor? mask=None, float? scale=None, float softcap=0.0, Tensor? sinks=None"

// Keys and values in blocks: query [T, H, D] of all sequences, key [blocks, Hk, P, D], value [blocks, Hk, P, Dv], the
// last axis contiguous. block_table int32 [B, W], query_starts int32 or int64 [B + 1], seq_lens int32 or int64 [B]: key
// j of sequence b is row j mod P of block block_table[b][j / P], its m queries are the rows from query_starts[b] on,
// and query i of them stands at slot seq_lens[b] - m + i. A sequence with seq_lens 0 is skipped. Outliers are [T, H, C]
// and [T, H] then, a gain may be [B, H], and what says positions otherwise (offsets, key_start, key_end, mask) is
// refused.
#define ATTNRB_PAGING "Tensor? block_table=None, Tensor? query_starts=None, Tensor? seq_lens=None"

// What the overload `edited` of received_attention has besides; query_offsets takes the place of query_offset.
#define ATTNRB_RECEIVED "Tensor? key_bias=None, Tensor? first_query=None, Tensor? query_offsets=None, SymInt chunk=0"

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
  //   -> output [B, H, M, Dv], lse float32 [B, H, M], indices int32 [B, H, M, C], counts int32 [B, H, M]; C is 0, and
  //   counts are 0, without `emit`
  //   With a block_table output [T, H, Dv], lse [T, H], indices [T, H, C], counts [T, H]; C is at most W P. No
  //   gradient.
  library.def("attention(Tensor query, Tensor key, Tensor value, *, " ATTNRB_OPTIONS ", " ATTNRB_PAGING
              ") -> (Tensor output, Tensor lse, Tensor indices, Tensor counts)");
  // The output alone, [B, M, H, Dv] as a model's next projection takes it, for layers that decode a token at a time.
  // What nobody reads costs two microseconds to allocate, to look for options by name and to transpose one each, so
  // options may stand by position here.
  library.def("attention.output(Tensor query, Tensor key, Tensor value, " ATTNRB_OPTIONS ", *, " ATTNRB_PAGING
              ") -> Tensor");
  // The same as [B, H, M, Dv], without blocks: to transpose it costs a short call behind a large kernel 20
  // microseconds. (Overloads must differ in arguments or types: torch's registry forgets the name of an overload, and
  // reads a freed operator when the process ends.)
  library.def("attention.output_heads_first(Tensor query, Tensor key, Tensor value, " ATTNRB_OPTIONS ") -> Tensor");
  // Both with a block_table, into `out` [T, H, Dv], whose last axis is contiguous: rows of skipped sequences are left
  // as they are.
  library.def("attention.into(Tensor query, Tensor key, Tensor value, *, " ATTNRB_OPTIONS ", " ATTNRB_PAGING
              ", Tensor(a!) out) -> (Tensor lse, Tensor indices, Tensor counts)");
  library.def("attention.output_into(Tensor query, Tensor key, Tensor value, *, " ATTNRB_OPTIONS ", " ATTNRB_PAGING
              ", Tensor(a!) out) -> ()");
  // key [T, Hk, D], value [T, Hk, Dv] into pools as above; slot_mapping int64 [T]: block * P + row, -1: nowhere
  library.def(
      "write_keys(Tensor key, Tensor value, Tensor(a!) key_pool, Tensor(b!) value_pool, Tensor slot_mapping) -> ()");
  library.def("attention_training(Tensor query, Tensor key, Tensor value, " ATTNRB_OPTIONS
              ") -> (Tensor output, Tensor lse, Tensor indices, Tensor counts)");
  // grad_output and output like the output, grad_lse and lse float32 [B, H, M]
  //   -> gradients of the shape and dtype of what they belong to; grad_gain and grad_sinks are float32 [H], zeros where
  //   there is none; grad_key_bias is float32, [0] without a bias
  library.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, "
      "Tensor lse, " ATTNRB_OPTIONS
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_gain, Tensor grad_key_bias, "
      "Tensor grad_sinks)");

  // The same without an edit, and with one whose rule is none, or row where `normalize`.
  library.def("source_attention(Tensor query, Tensor key, Tensor value, float threshold, " ATTNRB_VISIBILITY
              ", " ATTNRB_SCORING ") -> (Tensor output, Tensor lse, Tensor indices, Tensor counts)");

  // query, key, value as above, indices int32 [B, H, M, C], counts int32 [B, H, M], gain float32 [1] or [H]
  //   -> output [B, H, M, Dv]
  library.def(
      "rebalanced_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, Tensor gain, "
      "bool normalize, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING ") -> Tensor");

  // query [B, H, M, D], key [B, Hk, N, D] -> float32 [B, H, N]
  library.def("received_attention(Tensor query, Tensor key, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING ") -> Tensor");
  library.def("received_attention.edited(Tensor query, Tensor key, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING
              ", *, " ATTNRB_RECEIVED ") -> Tensor");

  // For training: it also returns what its backward needs, and has a gradient registered (in Python), which costs every
  // call some microseconds that inference should not pay. As Note: [Schemas] says, all options are positional.
  library.def("received_attention_training(Tensor query, Tensor key, " ATTNRB_VISIBILITY ", " ATTNRB_SCORING
              ", " ATTNRB_RECEIVED ") -> (Tensor received, Tensor lse)");
  // Gradients have the shape and dtype of what they belong to; grad_sinks is float32 [H].
  library.def(
      "received_attention_backward(Tensor grad_received, Tensor query, Tensor key, Tensor lse, " ATTNRB_VISIBILITY
      ", " ATTNRB_SCORING ", " ATTNRB_RECEIVED
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_sinks, Tensor grad_key_bias)");
}
