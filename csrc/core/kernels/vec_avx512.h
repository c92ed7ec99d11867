// Sixteen floats in an AVX-512 register. The vocabulary that every vec_*.h offers is listed in vec_portable.h.
#pragma once

// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Vec {
  static constexpr int width = 16;
  static constexpr bool by_lane = false;
  using Mask = __mmask16;
  __m512 v;

  static ATTNRB_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static ATTNRB_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static ATTNRB_INLINE Vec iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

  static ATTNRB_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static ATTNRB_INLINE Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static ATTNRB_INLINE Vec load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static ATTNRB_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static ATTNRB_INLINE Vec load(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static ATTNRB_INLINE Vec load(const float16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }

  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, Vec& even, Vec& odd) {
    deal(_mm512_loadu_si512(p), even, odd);
  }
  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, int n, Vec& even, Vec& odd) {
    deal(_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1u, p), even, odd);
  }

  ATTNRB_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  ATTNRB_INLINE void store(bfloat16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16()); }
  ATTNRB_INLINE void store(float16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_f16()); }
  ATTNRB_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  ATTNRB_INLINE void store(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16()); }
  ATTNRB_INLINE void store(float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_f16()); }

  friend ATTNRB_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend ATTNRB_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static ATTNRB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  template <int Lane>
  static ATTNRB_INLINE Vec fma_lane(Vec a, Vec b, Vec c) {
    return fma(set(a.v[Lane]), b, c);
  }
  static ATTNRB_INLINE Vec fma_pair(Vec a0, Vec b0, Vec a1, Vec b1, Vec c) { return fma(a0, b0, fma(a1, b1, c)); }
  static ATTNRB_INLINE Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  static ATTNRB_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  ATTNRB_INLINE Vec abs() const { return {_mm512_abs_ps(v)}; }
  ATTNRB_INLINE Vec round() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static ATTNRB_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
    return {_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xca))};
  }
  // The bits of each lane, taken as an integer.
  friend ATTNRB_INLINE Vec bits_as_number(Vec x) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(x.v))}; }
  static ATTNRB_INLINE Vec scale_exponent(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

  ATTNRB_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  ATTNRB_INLINE float max() const { return _mm512_reduce_max_ps(v); }

  static ATTNRB_INLINE Mask first(int n) { return Mask(n >= 16 ? 0xffffu : (1u << n) - 1u); }
  static ATTNRB_INLINE Mask none() { return 0; }
  static ATTNRB_INLINE Mask both(Mask a, Mask b) { return Mask(a & b); }
  static ATTNRB_INLINE Mask from_bytes(const bool* p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static ATTNRB_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static ATTNRB_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
  static ATTNRB_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
  static ATTNRB_INLINE uint32_t bits(Mask m) { return m; }

  // Sums of `width` accumulators, lane i holding the sum of accumulator i: a tree of shuffles and additions.
  static ATTNRB_INLINE Vec sums(const Vec* a) {
    __m512 pair[8], quad[4];
    for (int i = 0; i < 8; ++i)
      pair[i] =
          _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
    for (int i = 0; i < 4; ++i) {
      const __m512d x = _mm512_castps_pd(pair[2 * i]), y = _mm512_castps_pd(pair[2 * i + 1]);
      quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const __m512 low =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    const __m512 high =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
  }

  // Maxima of `width` vectors, lane i holding that of vector i; where one holds a NaN it may be any of its numbers.
  static ATTNRB_INLINE Vec maxima(const Vec* a) {
    __m512 pair[8], quad[4];
    for (int i = 0; i < 8; ++i)
      pair[i] =
          _mm512_max_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
    for (int i = 0; i < 4; ++i) {
      const __m512d x = _mm512_castps_pd(pair[2 * i]), y = _mm512_castps_pd(pair[2 * i + 1]);
      quad[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const __m512 low =
        _mm512_max_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    const __m512 high =
        _mm512_max_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return {_mm512_max_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
  }

  // rows[i] lane j becomes rows[j] lane i.
  static ATTNRB_INLINE void transpose(Vec* rows) {
    __m512 a[16], b[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
      a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    }
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h) {
        const __m512d x = _mm512_castps_pd(a[4 * i + h]), y = _mm512_castps_pd(a[4 * i + h + 2]);
        b[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        b[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    // 128-bit lane l of b[4i + c] now holds lane 4l + c of rows 4i .. 4i+3.
    for (int c = 0; c < 4; ++c) {
      const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
      rows[c].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      rows[4 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      rows[8 + c].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      rows[12 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }

  // Writes the selected lanes of `x` one after the other, and base + lane for each to `indices`; returns how many.
  // Whole registers are stored, up to `width` elements beyond: compressing straight to memory is microcoded on AMD.
  static ATTNRB_INLINE int compress(Mask m, Vec x, int32_t base, float* values, int32_t* indices) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(m, x.v));
    _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lanes, _mm512_set1_epi32(base))));
    return __builtin_popcount(m);
  }

  // Of 16 indices those of the chosen lanes, but for `except`, each plus `add`.
  static ATTNRB_INLINE int compress_indices(Mask m, const int32_t* from, int32_t except, int32_t add, int32_t* to) {
    const __m512i indices = _mm512_loadu_si512(from);
    m = _mm512_mask_cmpneq_epi32_mask(m, indices, _mm512_set1_epi32(except));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(indices, _mm512_set1_epi32(add))));
    return __builtin_popcount(m);
  }

 private:
  static ATTNRB_INLINE void deal(__m512i pairs, Vec& even, Vec& odd) {
    even = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    odd = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  static ATTNRB_INLINE Vec widen(__m256i halves) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
  }
  ATTNRB_INLINE __m256i narrow_bf16() const {
#if defined(__AVX512BF16__)
    // vcvtneps2bf16 flushes subnormals, which bfloat16 outputs may legitimately hold only far below float32 rounding.
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
  }
  ATTNRB_INLINE __m256i narrow_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
