// Four floats in a NEON register. The vocabulary that every vec_*.h offers is listed in vec_portable.h.
#pragma once

#include <arm_neon.h>

#include "../types.h"
#include "pack_indices.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Vec {
  static constexpr int width = 4;
  static constexpr bool by_lane = true;
  using Mask = uint32x4_t;
  float32x4_t v;

  static ATTNRB_INLINE Vec zero() { return set(0.0f); }
  static ATTNRB_INLINE Vec set(float x) { return {vdupq_n_f32(x)}; }
  static ATTNRB_INLINE Vec iota() { return {float32x4_t{0, 1, 2, 3}}; }

  static ATTNRB_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static ATTNRB_INLINE Vec load(const bfloat16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(halves(p)), 16))};
  }
  static ATTNRB_INLINE Vec load(const float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves(p))))}; }
  template <class T>
  static ATTNRB_INLINE Vec load(const T* p, int n) {
    T lanes[width] = {};
    for (int i = 0; i < width && i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }

  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, Vec& even, Vec& odd) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(halves(p)));
    even = {vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16))};
    odd = {vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)))};
  }
  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, int n, Vec& even, Vec& odd) {
    bfloat16 lanes[2 * width] = {};
    for (int i = 0; i < 2 * width && i < n; ++i) lanes[i] = p[i];
    load_even_odd(lanes, even, odd);
  }

  ATTNRB_INLINE void store(float* p) const { vst1q_f32(p, v); }
  ATTNRB_INLINE void store(bfloat16* p) const { vst1_u16(halves(p), narrow_bf16()); }
  ATTNRB_INLINE void store(float16* p) const { vst1_u16(halves(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <class T>
  ATTNRB_INLINE void store(T* p, int n) const {
    T lanes[width];
    store(lanes);
    for (int i = 0; i < width && i < n; ++i) p[i] = lanes[i];
  }

  friend ATTNRB_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static ATTNRB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  template <int Lane>
  static ATTNRB_INLINE Vec fma_lane(Vec a, Vec b, Vec c) {
    return {vfmaq_laneq_f32(c.v, b.v, a.v, Lane)};
  }
  static ATTNRB_INLINE Vec fma_pair(Vec a0, Vec b0, Vec a1, Vec b1, Vec c) { return fma(a0, b0, fma(a1, b1, c)); }
  static ATTNRB_INLINE Vec fms(Vec a, Vec b, Vec c) { return {vfmaq_f32(vnegq_f32(c.v), a.v, b.v)}; }
  static ATTNRB_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
  ATTNRB_INLINE Vec abs() const { return {vabsq_f32(v)}; }
  ATTNRB_INLINE Vec round() const { return {vrndnq_f32(v)}; }
  static ATTNRB_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)};
  }
  static ATTNRB_INLINE Vec scale_exponent(Vec x, Vec n) {
    // One factor, whose exponent bits are those of 2^n from -126 to 127, of 0 below (see Note: [Subnormal results])
    // and of infinity above. A NaN in n would convert to 0, and came of one in x.
    const float32x4_t held = vminq_f32(vmaxq_f32(n.v, vdupq_n_f32(-127.0f)), vdupq_n_f32(128.0f));
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(held), vdupq_n_s32(127));
    return {vmulq_f32(x.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
  }

  ATTNRB_INLINE float sum() const { return vaddvq_f32(v); }
  ATTNRB_INLINE float max() const { return vmaxvq_f32(v); }

  static ATTNRB_INLINE Mask first(int n) { return vcgtq_s32(vdupq_n_s32(n), int32x4_t{0, 1, 2, 3}); }
  static ATTNRB_INLINE Mask none() { return vdupq_n_u32(0); }
  static ATTNRB_INLINE Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
  static ATTNRB_INLINE Mask from_bytes(const bool* p) {
    uint32_t bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)))));
    return vtstq_u32(wide, wide);
  }
  static ATTNRB_INLINE Mask greater(Vec a, Vec b) { return vcgtq_f32(a.v, b.v); }
  static ATTNRB_INLINE Mask greater_equal(Vec a, Vec b) { return vcgeq_f32(a.v, b.v); }
  static ATTNRB_INLINE Vec select(Mask m, Vec yes, Vec no) { return {vbslq_f32(m, yes.v, no.v)}; }
  static ATTNRB_INLINE uint32_t bits(Mask m) { return vaddvq_u32(vandq_u32(m, uint32x4_t{1, 2, 4, 8})); }

  static ATTNRB_INLINE Vec sums(const Vec* a) { return sums(a[0], a[1], a[2], a[3]); }
  static ATTNRB_INLINE Vec sums(Vec a, Vec b, Vec c, Vec d) {
    return {vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))};
  }

  static ATTNRB_INLINE void transpose(Vec* rows) {
    const float32x4_t a = vtrn1q_f32(rows[0].v, rows[1].v), b = vtrn2q_f32(rows[0].v, rows[1].v);
    const float32x4_t c = vtrn1q_f32(rows[2].v, rows[3].v), d = vtrn2q_f32(rows[2].v, rows[3].v);
    rows[0].v = low_halves(a, c);
    rows[1].v = low_halves(b, d);
    rows[2].v = high_halves(a, c);
    rows[3].v = high_halves(b, d);
  }

  static ATTNRB_INLINE int compress(Mask m, Vec x, int32_t base, float* values, int32_t* indices) {
    float lanes[width];
    x.store(lanes);
    const uint32_t chosen = bits(m);
    int count = 0;
    for (int i = 0; i < width; ++i) {
      values[count] = lanes[i];
      indices[count] = base + i;
      count += int(chosen >> i & 1u);
    }
    return count;
  }

  static ATTNRB_INLINE int compress_indices(Mask m, const int32_t* from, int32_t except, int32_t add, int32_t* to) {
    return pack_indices<width>(bits(m), from, except, add, to);
  }

  // The first two lanes of each, and the last two.
  static ATTNRB_INLINE float32x4_t low_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
  static ATTNRB_INLINE float32x4_t high_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }

 private:
  template <class Half>
  static ATTNRB_INLINE const uint16_t* halves(const Half* p) {
    return reinterpret_cast<const uint16_t*>(p);
  }
  template <class Half>
  static ATTNRB_INLINE uint16_t* halves(Half* p) {
    return reinterpret_cast<uint16_t*>(p);
  }
  ATTNRB_INLINE uint16x4_t narrow_bf16() const {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
#endif
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
