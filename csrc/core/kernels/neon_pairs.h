// bfloat16 components two by two and four by four, as FEAT_BF16 multiplies them.
#pragma once

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

// The first n of 8 components; zeros follow, and nothing behind them is read.
ATTNRB_INLINE uint16x8_t load_halves(const bfloat16* p, int n) {
  if (n >= 8) return vld1q_u16(reinterpret_cast<const uint16_t*>(p));
  uint16_t copy[8] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i].bits;
  return vld1q_u16(copy);
}

// The same where components do not follow each other.
ATTNRB_INLINE uint16x8_t load_halves(const bfloat16* p, int64_t column_stride, int n) {
  if (column_stride == 1) return load_halves(p, n);
  uint16_t copy[8] = {};
  for (int i = 0; i < n && i < 8; ++i) copy[i] = p[i * column_stride].bits;
  return vld1q_u16(copy);
}

ATTNRB_INLINE void store_halves(bfloat16* p, uint16x8_t halves) { vst1q_u16(reinterpret_cast<uint16_t*>(p), halves); }

ATTNRB_INLINE uint16x8_t round_pair(Vec a, Vec b) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a.v), b.v));
}

// Components of two rows four by four: `low` holds the first four of each, `high` the last four.
ATTNRB_INLINE void join_quads(uint16x8_t a, uint16x8_t b, uint16x8_t& low, uint16x8_t& high) {
  low = vreinterpretq_u16_u64(vzip1q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
  high = vreinterpretq_u16_u64(vzip2q_u64(vreinterpretq_u64_u16(a), vreinterpretq_u64_u16(b)));
}

// sum + a * b over each pair.
ATTNRB_INLINE Vec add_pairs(uint16x8_t a, uint16x8_t b, Vec sum) {
  return {vbfdotq_f32(sum.v, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b))};
}
// The same with pair Lane of `factors` for every pair of a column.
template <int Lane>
ATTNRB_INLINE Vec add_pairs_by_lane(uint16x8_t factors, uint16x8_t column, Vec sum) {
  return {vbfdotq_laneq_f32(sum.v, vreinterpretq_bf16_u16(column), vreinterpretq_bf16_u16(factors), Lane)};
}

// Components times a factor of 1, 0 or -1, which is exact.
ATTNRB_INLINE uint16x8_t times(uint16x8_t halves, float factor) {
  if (factor == 1.0f) return halves;
  const Vec by = Vec::set(factor);
  const uint32x4_t pairs = vreinterpretq_u32_u16(halves), upper = vdupq_n_u32(0xffff0000u);
  const Vec low = Vec{vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16))} * by;
  const Vec high = Vec{vreinterpretq_f32_u32(vandq_u32(pairs, upper))} * by;
  return vreinterpretq_u16_u32(
      vbslq_u32(upper, vreinterpretq_u32_f32(high.v), vshrq_n_u32(vreinterpretq_u32_f32(low.v), 16)));
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
