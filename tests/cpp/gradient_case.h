// Generated problems for the backward: an attention case, what comes in besides its operands, and where gradients go.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"

namespace attnrb::testing {

// Output and LSE are the oracle's, rounded.
struct GradientCase {
  AttentionCase& attention;
  bool received = false;
  Array grad_output, grad_query, grad_key, grad_value;
  std::vector<float> lse, grad_lse, grad_received, grad_gain, grad_sinks, grad_bias;

  GradientCase(AttentionCase& of, Random& random, bool of_received);

  // With results that hold sentinels again.
  GradientProblem problem();
  // All that a kernel writes, to be compared bit by bit.
  std::vector<unsigned char> written() const;
};

// What is rare in generate_case() and matters in a backward comes in turn, by the seed, so that the first few cases
// hold some of each: of every seven seeds one has rows wider than 128, of every three one is capped, of every four two
// have a window, of every five one is for received attention.
bool for_received_attention(uint64_t seed);
AttentionCase generate_gradient_case(uint64_t seed);
// The same with every option of an edit.
AttentionCase generate_edited_gradient_case(uint64_t seed);

}  // namespace attnrb::testing
