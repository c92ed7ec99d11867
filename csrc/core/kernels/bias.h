// The key bias of an Edit, block of keys by block of keys.
#pragma once

#include "driver.h"
#include "math.h"

namespace attnrb {
namespace ATTNRB_ISA {

// What one head adds to the scores of a block of keys.
struct BiasBlock {
  const float* values = nullptr;  // of the keys from `key` on
  int64_t key = 0;
  bool removes = false;  // one of them is minus infinity
};

class KeyBias {
 public:
  KeyBias(const Edit& edit, const Visibility& visibility) : edit_(edit), visibility_(visibility) {}

  bool any() const { return edit_.key_bias != nullptr; }
  bool reaches(int64_t batch, int64_t query) const {
    return any() && (edit_.first_query == nullptr || query_slot(visibility_, batch, query) >= edit_.first_query[batch]);
  }

  // Of `count` keys, a multiple of the vector width: where they lie, or in `copy`. Keys behind the last may be among
  // them: a row that sees all of a block is not told what theirs are.
  BiasBlock block(int64_t batch, int64_t head, int64_t key, int64_t count, float* copy) const {
    const int64_t* strides = edit_.bias_strides;
    const float* row = edit_.key_bias + batch * strides[0] + head * strides[1];
    const int64_t slot = visibility_.key_offset + key, held = edit_.bias_slots - slot;
    if (strides[2] == 1 && held >= count && ordinary(row + slot, count)) return {row + slot, key, false};
    BiasBlock block{copy, key, false};
    for (int64_t j = 0; j < count; ++j) {
      const float value = j < held ? row[(slot + j) * strides[2]] : 0.0f;
      block.removes = block.removes || value == -kInfinity;
      copy[j] = value == -kInfinity || value == kInfinity ? value : value < -kFar ? -kFar : value > kFar ? kFar : value;
    }
    return block;
  }

 private:
  // A score's distance from the row's reference is exact up to the rounding of the reference, which beyond this is
  // larger than what 2^x bears. Weights of 1 and 0 come of it either way.
  static constexpr float kFar = 5e8f;

  static bool ordinary(const float* values, int64_t count) {
    constexpr uint32_t kAll = (1u << Vec::width) - 1u;
    uint32_t inside = kAll;
    for (int64_t j = 0; j < count; j += Vec::width) {
      const Vec value = Vec::load(values + j);
      inside &=
          Vec::bits(Vec::both(Vec::greater_equal(value, Vec::set(-kFar)), Vec::greater_equal(Vec::set(kFar), value)));
    }
    return inside == kAll;
  }

  const Edit& edit_;
  const Visibility& visibility_;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
