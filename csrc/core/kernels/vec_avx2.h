// Eight floats in an AVX2 register. The vocabulary that every vec_*.h offers is listed in vec_portable.h.
#pragma once

#include <immintrin.h>

#include "../types.h"
#include "pack_indices.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Vec {
  static constexpr int width = 8;
  static constexpr bool by_lane = false;
  using Mask = __m256;
  __m256 v;

  static ATTNRB_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static ATTNRB_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static ATTNRB_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }

  static ATTNRB_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static ATTNRB_INLINE Vec load(const bfloat16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static ATTNRB_INLINE Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static ATTNRB_INLINE Vec load(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(first(n)))};
  }
  template <class Half>
  static ATTNRB_INLINE Vec load(const Half* p, int n) {
    Half lanes[width] = {};
    for (int i = 0; i < width && i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }

  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, Vec& even, Vec& odd) {
    deal(_mm256_loadu_si256((const __m256i*)p), even, odd);
  }
  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, int n, Vec& even, Vec& odd) {
    bfloat16 lanes[2 * width] = {};
    for (int i = 0; i < 2 * width && i < n; ++i) lanes[i] = p[i];
    load_even_odd(lanes, even, odd);
  }

  ATTNRB_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  ATTNRB_INLINE void store(bfloat16* p) const { _mm_storeu_si128((__m128i*)p, narrow_bf16()); }
  ATTNRB_INLINE void store(float16* p) const {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  ATTNRB_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, _mm256_castps_si256(first(n)), v); }
  template <class Half>
  ATTNRB_INLINE void store(Half* p, int n) const {
    Half lanes[width];
    store(lanes);
    for (int i = 0; i < width && i < n; ++i) p[i] = lanes[i];
  }

  friend ATTNRB_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static ATTNRB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  template <int Lane>
  static ATTNRB_INLINE Vec fma_lane(Vec a, Vec b, Vec c) {
    return fma(set(a.v[Lane]), b, c);
  }
  static ATTNRB_INLINE Vec fma_pair(Vec a0, Vec b0, Vec a1, Vec b1, Vec c) { return fma(a0, b0, fma(a1, b1, c)); }
  static ATTNRB_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
  static ATTNRB_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  ATTNRB_INLINE Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  ATTNRB_INLINE Vec round() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static ATTNRB_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
  }
  static ATTNRB_INLINE Vec scale_exponent(Vec x, Vec n) {
    // Two factors, so that results below 2^-126 fade out instead of wrapping round. A NaN in n becomes one in the
    // result.
    const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(252.0f), _mm256_max_ps(_mm256_set1_ps(-252.0f), n.v));
    const __m256i whole = _mm256_cvtps_epi32(clamped), half = _mm256_srai_epi32(whole, 1);
    const __m256 scaled =
        _mm256_mul_ps(_mm256_mul_ps(x.v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
    return {_mm256_blendv_ps(scaled, n.v, _mm256_cmp_ps(n.v, n.v, _CMP_UNORD_Q))};
  }

  ATTNRB_INLINE float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  ATTNRB_INLINE float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static ATTNRB_INLINE Mask first(int n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
  }
  static ATTNRB_INLINE Mask none() { return _mm256_setzero_ps(); }
  static ATTNRB_INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static ATTNRB_INLINE Mask from_bytes(const bool* p) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
  }
  static ATTNRB_INLINE Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static ATTNRB_INLINE Mask greater_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
  static ATTNRB_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m)}; }
  static ATTNRB_INLINE uint32_t bits(Mask m) { return uint32_t(_mm256_movemask_ps(m)); }

  static ATTNRB_INLINE Vec sums(const Vec* a) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
  }

  static ATTNRB_INLINE void transpose(Vec* rows) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 2; ++i)
      for (int h = 0; h < 2; ++h) {
        b[4 * i + 2 * h] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + h + 2], 0x44);
        b[4 * i + 2 * h + 1] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + h + 2], 0xee);
      }
    for (int c = 0; c < 4; ++c) {
      rows[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
      rows[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
  }

  static ATTNRB_INLINE int compress(Mask m, Vec x, int32_t base, float* values, int32_t* indices) {
    float lanes[width];
    x.store(lanes);
    int count = 0;
    for (uint32_t left = bits(m); left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      values[count] = lanes[lane];
      indices[count++] = base + lane;
    }
    return count;
  }

  static ATTNRB_INLINE int compress_indices(Mask m, const int32_t* from, int32_t except, int32_t add, int32_t* to) {
    return pack_indices<width>(bits(m), from, except, add, to);
  }

 private:
  static ATTNRB_INLINE void deal(__m256i pairs, Vec& even, Vec& odd) {
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))))};
  }
  static ATTNRB_INLINE __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static ATTNRB_INLINE Vec widen(__m128i halves) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  ATTNRB_INLINE __m128i narrow_bf16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i kept = _mm256_srli_epi32(
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan)), 16);
    const __m256i packed = _mm256_packus_epi32(kept, kept);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
