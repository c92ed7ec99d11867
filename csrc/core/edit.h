// How a layer's attention is edited, and what it is asked to find (docs/method.md derives both).
//
// Note: [Edited attention]
// Query i of sequence b stands at slot_i. With s_ij the score after scale and softcap, S_i the outliers of row i, g the
// gain of its head and beta the key bias:
//   t_ij = s_ij + [slot_i >= r_b] beta_j          r_b is first_query; beta is 0 for slots from bias_slots on
//   P    = softmax of t over the visible keys, sinks joining the sum; beta = -inf removes a key: it is not seen
//   u_i  = sum over S_i of P_ij v_j,   m_i = sum over S_i of P_ij
//   y_i  = a(m_i) sum_j P_ij v_j + b(m_i) u_i
//   rule none  a = 1                       b = g                  the row gains g m
//   rule row   a = 1 / (1 + g m)           b = g / (1 + g m)      adding ln(1 + g) to the scores of S
//   rule rest  a = (1 - (1+g) m) / (1-m)   b = (1 + g) - a        S gets (1 + g) times its share; the others share
//                                                                 the difference in proportion. A sink is one of the
//                                                                 others. Where they have no mass the row stays plain.
// The log-sum-exp is that of t; under rule row it includes what S gains. Outliers are emitted by P.
#pragma once

#include <cstdint>

#include "types.h"

namespace attnrb {

enum class Rule : int32_t { none = 0, row = 1, rest = 2 };

struct Edit {
  const int32_t* indices = nullptr;  // [B, H, M, capacity] contiguous: ascending key slots; null: no outliers
  const int32_t* counts = nullptr;   // [B, H, M] contiguous
  int64_t capacity = 0;
  bool shared_rows = false;     // indices are [B, H, 1, capacity], counts [B, H, 1]: one list for all queries of a head
  const float* gain = nullptr;  // [B, H]
  int64_t gain_stride = 0;      // from one sequence's gains to the next's; 0: [H] for all
  Rule rule = Rule::none;

  const float* key_bias = nullptr;       // [B, H, bias_slots] by strides (0 where broadcast), or null
  int64_t bias_strides[3] = {0, 0, 0};   // B, H, slot
  int64_t bias_slots = 0;                // keys at slots from here on have none
  const int64_t* first_query = nullptr;  // [B]: the bias holds for queries at this slot and later; null: for all

  // Which list of indices a row has.
  ATTNRB_INLINE int64_t list(int64_t heads, int64_t queries, int64_t batch, int64_t head, int64_t query) const {
    const int64_t of_head = batch * heads + head;
    return shared_rows ? of_head : of_head * queries + query;
  }
};

// Outliers that a layer is asked for.
struct Emit {
  int32_t* indices = nullptr;  // [B, H, M, capacity] contiguous: ascending key slots, then -1; null: none wanted
  int32_t* counts = nullptr;   // [B, H, M] contiguous
  int64_t capacity = 0;
  double threshold = 0.01;
};

}  // namespace attnrb
