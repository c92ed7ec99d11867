// What the kernels are asked to do: plain pointers, sizes and strides. Callers have checked every argument.
//
// Axes: B batch, H query heads, Hk key/value heads (H a multiple of Hk), M queries, N keys, D query/key width, Dv value
// width. Strides count elements. Query i sits at slot query_offset + i, key j at slot key_offset + j; every sequence
// may have a query_offset of its own.
#pragma once

#include <cstdint>

#include "edit.h"
#include "keys.h"
#include "types.h"
#include "visibility.h"

namespace attnrb {

struct Shape {
  int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, width = 0, value_width = 0;

  // Ragged: the queries of all sequences follow each other, `queries` of them, and count from the first of all; those
  // of sequence b are [query_starts[b], query_starts[b + 1]), and it has key_counts[b] <= keys keys. One without keys
  // is skipped. What a row has of its own lies in [queries, heads] then; else in [batch, heads, queries].
  const int64_t* query_starts = nullptr;  // [B + 1], or null
  const int64_t* key_counts = nullptr;    // [B], or null

  ATTNRB_INLINE bool ragged() const { return query_starts != nullptr; }
  ATTNRB_INLINE int64_t keys_of(int64_t b) const { return ragged() ? key_counts[b] : keys; }
  // Where the numbers of a row lie.
  ATTNRB_INLINE int64_t row(int64_t b, int64_t head, int64_t query) const {
    return ragged() ? query * heads + head : (b * heads + head) * queries + query;
  }
};

// What turns query·key into a score: score = cap·tanh(scale·query·key / cap), or scale·query·key where softcap is 0.
struct Scoring {
  float scale = 1.0f;
  float softcap = 0.0f;
  const float* sinks = nullptr;  // [H], join the softmax denominator only, or null
};

// Fused attention: the three axes are where keys lie, what a query sees, and how its weights are edited. Ragged, query
// and output have a batch stride of 0, and visibility.query_offsets[b] + query is the slot of a query.
struct AttentionProblem {
  Shape shape;
  DType dtype = DType::float32;
  View query;
  KeyRows key, value;
  Visibility visibility;
  Scoring scoring;
  Edit edit;
  Emit emit;

  void* output = nullptr;                 // [B, H, M, Dv] by strides, innermost stride 1, same dtype as query
  int64_t output_strides[3] = {0, 0, 0};  // B, H, M
  float* lse = nullptr;                   // [B, H, M] contiguous, or null
  float* softmax = nullptr;  // [B, H, M, 2] contiguous: (m, l) of Note: [Online softmax in base 2], or null
};

// New keys and values, row t of each into row slots[t] mod block_rows of block slots[t] / block_rows; a slot below 0 is
// nowhere.
struct WrittenRows {
  const char* from = nullptr;
  char* to = nullptr;
  int64_t from_strides[2] = {0, 0}, to_strides[3] = {0, 0, 0};  // bytes: row, head; block, head, row
  int64_t row_bytes = 0;
};
struct WriteProblem {
  WrittenRows pools[2];            // keys and values
  const int64_t* slots = nullptr;  // [rows] contiguous
  int64_t rows = 0, heads = 0, blocks = 0, block_rows = 0;
};

// received[b, h, j] = mean over the queries that can see key j of the weight they give it; 0 where no query can.
struct ReceivedProblem {
  Shape shape;  // value_width unused
  DType dtype = DType::float32;
  View query;
  KeyRows key;
  Visibility visibility;
  Scoring scoring;
  Edit edit;                  // of which the key bias counts; weights are those before outliers are strengthened
  float* received = nullptr;  // [B, H, N] contiguous
  float* lse = nullptr;       // [B, H, M] contiguous, or null
};

// The gradients of fused attention, or of received_attention where `grad_received` is set: there are no values then,
// and value_width is 0. docs/method.md derives the formulas.
struct GradientProblem {
  Shape shape;
  DType dtype = DType::float32;
  View query;
  KeyRows key, value;
  Visibility visibility;
  Scoring scoring;
  Edit edit;                             // as the forward had it
  const float* lse = nullptr;            // [B, H, M] contiguous, as the forward wrote it
  View output, grad_output;              // [B, H, M, Dv], dtype of query
  const float* grad_lse = nullptr;       // [B, H, M] contiguous, or null
  const float* grad_received = nullptr;  // [B, H, N] contiguous, or null

  // Where a gradient goes: same dtype as query, innermost stride 1; strides of the three axes before it.
  struct Target {
    void* data = nullptr;
    int64_t strides[3] = {0, 0, 0};
  };
  Target grad_query, grad_key, grad_value;
  float* grad_gain = nullptr;   // [H], or null
  float* grad_sinks = nullptr;  // [H], or null
  // [B, H, bias_slots] by strides (0 where broadcast: those add up), all of it written, or null
  float* grad_bias = nullptr;
  int64_t grad_bias_strides[3] = {0, 0, 0};
};

// mask[b, h, i, j] = weights > threshold and j != query_offset + i.
struct OutlierMaskProblem {
  Shape shape;  // batch, heads, queries, keys
  DType dtype = DType::float32;
  View weights;
  double threshold = 0.01;
  int64_t query_offset = 0;
  bool* mask = nullptr;  // contiguous
};

// out = weights·(1 + gain[h]) where mask, weights elsewhere; rows divided by their new sum when normalize.
struct RebalanceProblem {
  Shape shape;  // batch, heads, queries, keys
  DType dtype = DType::float32;
  View weights;
  View mask;                    // bool
  const float* gain = nullptr;  // [H]
  bool normalize = false;
  void* output = nullptr;  // contiguous, dtype of weights
};

// The gradients of the same: grad_weights[b, h, i, j], and of the gain of each head.
struct RebalanceGradientProblem {
  Shape shape;  // batch, heads, queries, keys
  DType dtype = DType::float32;
  View weights, grad_output;
  View mask;                    // bool
  const float* gain = nullptr;  // [H]
  bool normalize = false;
  void* grad_weights = nullptr;  // contiguous, dtype of weights
  double* gain_rows = nullptr;   // [B, H, M] contiguous: what each row adds to grad_gain
  float* grad_gain = nullptr;    // [H]
};

// What a kernel found wrong in data that only it reads.
enum class Status : int32_t {
  ok = 0,
  unsorted_outliers = 1,  // a row of outlier indices does not ascend strictly
  outlier_count = 2,      // a count is negative or above the capacity
};

}  // namespace attnrb
