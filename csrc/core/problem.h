// What the kernels are asked to do: plain pointers, sizes and strides. Callers have checked every argument.
//
// Axes: B batch, H query heads, Hk key/value heads (H a multiple of Hk), M queries, N keys, D query/key width, Dv value
// width. Strides count elements. Query i sits at slot query_offset + i, key j at slot key_offset + j.
#pragma once

#include <cstdint>

#include "types.h"

namespace attnrb {

// A read-only operand [batch, heads, rows, columns].
struct View {
  const void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
};

// Which keys a query may see. Every condition that is set must hold.
struct Visibility {
  bool causal = true;                  // key slot <= query slot
  int64_t query_offset = 0;            // slot of query 0
  int64_t key_offset = 0;              // slot of key 0
  int64_t window = 0;                  // key slot > query slot - window; 0: no limit
  const int64_t* key_start = nullptr;  // [B], first visible slot, or null
  const int64_t* key_end = nullptr;    // [B], one past the last visible slot, or null
  const bool* mask = nullptr;          // [B, H, M, N] by strides (0 where broadcast), true = visible, or null
  int64_t mask_strides[4] = {0, 0, 0, 0};
};

struct Shape {
  int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, width = 0, value_width = 0;
};

// What turns query·key into a score: score = cap·tanh(scale·query·key / cap), or scale·query·key where softcap is 0.
struct Scoring {
  float scale = 1.0f;
  float softcap = 0.0f;
  const float* sinks = nullptr;  // [H], join the softmax denominator only, or null
};

// Fused attention. Emits outlier rows when `emit.indices` is set (source layer), strengthens entries when
// `boost.indices` is set (layers below), plain attention when neither is.
struct AttentionProblem {
  Shape shape;
  DType dtype = DType::float32;
  View query, key, value;
  Visibility visibility;
  Scoring scoring;

  void* output = nullptr;                 // [B, H, M, Dv] by strides, innermost stride 1, same dtype as query
  int64_t output_strides[3] = {0, 0, 0};  // B, H, M
  float* lse = nullptr;                   // [B, H, M] contiguous, or null
  float* softmax = nullptr;  // [B, H, M, 2] contiguous: (m, l) of Note: [Online softmax in base 2], or null

  struct Emit {
    int32_t* indices = nullptr;  // [B, H, M, capacity] contiguous: ascending key slots, then -1
    int32_t* counts = nullptr;   // [B, H, M] contiguous
    int64_t capacity = 0;
    double threshold = 0.01;
  } emit;

  struct Boost {
    const int32_t* indices = nullptr;  // [B, H, M, capacity] contiguous: ascending key slots
    const int32_t* counts = nullptr;   // [B, H, M] contiguous
    int64_t capacity = 0;
    const float* gain = nullptr;  // [H]
    bool normalize = false;
  } boost;
};

// received[b, h, j] = mean over the queries that can see key j of the weight they give it; 0 where no query can.
struct ReceivedProblem {
  Shape shape;  // value_width unused
  DType dtype = DType::float32;
  View query, key;
  Visibility visibility;
  Scoring scoring;
  float* received = nullptr;  // [B, H, N] contiguous
  float* lse = nullptr;       // [B, H, M] contiguous, or null
};

// The gradients of fused attention, or of received_attention where `grad_received` is set: there are no values then,
// and value_width is 0. docs/method.md derives the formulas.
struct GradientProblem {
  Shape shape;
  DType dtype = DType::float32;
  View query, key, value;
  Visibility visibility;
  Scoring scoring;
  const float* lse = nullptr;            // [B, H, M] contiguous, as the forward wrote it
  View output, grad_output;              // [B, H, M, Dv], dtype of query
  const float* grad_lse = nullptr;       // [B, H, M] contiguous, or null
  AttentionProblem::Boost boost;         // as the forward had it
  const float* grad_received = nullptr;  // [B, H, N] contiguous, or null

  // Where a gradient goes: same dtype as query, innermost stride 1; strides of the three axes before it.
  struct Target {
    void* data = nullptr;
    int64_t strides[3] = {0, 0, 0};
  };
  Target grad_query, grad_key, grad_value;
  float* grad_gain = nullptr;   // [H], or null
  float* grad_sinks = nullptr;  // [H], or null
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
