// bfloat16 components two by two, as products of pairs want them (AVX512-BF16 and AMX).
#pragma once

#include <limits>

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

// The first n of 32 components; zeros follow, and nothing behind them is read.
ATTNRB_INLINE __m512i load_halves(const void* p, int n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(n <= 0 ? 0u : (1u << n) - 1u, p);
}

// The same where components do not follow each other.
template <class T>
ATTNRB_INLINE __m512i load_halves(const T* p, int64_t column_stride, int n) {
  static_assert(sizeof(T) == 2, "halves of 32 bits");
  if (column_stride == 1) return load_halves(p, n);
  T copy[32];
  for (int i = 0; i < n && i < 32; ++i) copy[i] = p[i * column_stride];
  return load_halves(copy, n);
}

ATTNRB_INLINE __m512i round_pair(Vec a, Vec b) { return (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v); }

// The first 16 halves and the last alternate: lane i becomes (half i, half 16 + i).
ATTNRB_INLINE __m512i alternate(__m512i halves) {
  alignas(64) static constexpr uint16_t kAlternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kAlternate), halves);
}

// Rounded to nearest, halves away from zero. By integer operations, beside which floating-point units are free: a NaN
// stays one if the last 16 bits of its payload are zeros, as they are of what arithmetic makes, and of what it passes
// on from bfloat16 and float16 numbers. short_nan() makes one such of any other.
ATTNRB_INLINE __m512i add_half(Vec x) { return _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000)); }
ATTNRB_INLINE Vec round_float(Vec x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(add_half(x), _mm512_set1_epi32(int(0xffff0000u))))};
}
// Lane i becomes (even[i], odd[i]): no permutation.
ATTNRB_INLINE __m512i round_alternate(Vec even, Vec odd) {
  constexpr int kFirstOrBothOthers = 0xf8;
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(add_half(even), 16), add_half(odd),
                                   _mm512_set1_epi32(int(0xffff0000u)), kFirstOrBothOthers);
}
ATTNRB_INLINE float short_nan(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }
ATTNRB_INLINE Vec short_nan(Vec x) {
  return Vec::select(Vec::greater_equal(x.abs(), Vec::zero()), x, Vec::set(std::numeric_limits<float>::quiet_NaN()));
}

// Components of two rows side by side: `low` holds the pairs of the first 16, `high` those of the last.
ATTNRB_INLINE void interleave(__m512i even, __m512i odd, __m512i& low, __m512i& high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                           37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kInterleave), last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  low = _mm512_permutex2var_epi16(even, first, odd);
  high = _mm512_permutex2var_epi16(even, last, odd);
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
