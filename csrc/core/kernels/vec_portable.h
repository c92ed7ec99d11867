// Four floats in GCC's vector extension: SSE2 on x86-64, NEON on AArch64, scalars elsewhere. Every vec_*.h defines one
// type `Vec` with this vocabulary:
//   width, Mask; by_lane (whether a multiply-add may take a factor from a lane, fma_lane<i>(a, b, c) = a[i]*b+c, at the
//   price of fma: see lanes.h); zero, set, iota; load and store of float, bfloat16 and float16, whole or the first n
//   lanes; load_even_odd (two vectors' worth of bfloat16, the even elements and the odd ones);
//   + - * /, fma (a*b+c), fma_pair (a0*b0+a1*b1+c, with few roundings in a row), fms (a*b-c), max (a NaN in b
//   survives), abs, round, copy_sign, scale_exponent (x * 2^n); sum, max (over lanes), sums (of `width` vectors),
//   transpose (of as many); first, none, both, from_bytes, greater, greater_equal, select, bits; compress (the selected
//   lanes, packed); compress_indices (the same of indices in memory, but for one of them, each plus a number).
#pragma once

#include "../types.h"
#include "pack_indices.h"

namespace attnrb {
namespace ATTNRB_ISA {

struct Vec {
  static constexpr int width = 4;
  static constexpr bool by_lane = false;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  Floats v;

  static ATTNRB_INLINE Vec zero() { return set(0.0f); }
  static ATTNRB_INLINE Vec set(float x) { return {Floats{x, x, x, x}}; }
  static ATTNRB_INLINE Vec iota() { return {Floats{0, 1, 2, 3}}; }

  static ATTNRB_INLINE Vec load(const float* p) {
    Vec x;
    std::memcpy(&x.v, p, sizeof(x.v));
    return x;
  }
  template <class T>
  static ATTNRB_INLINE Vec load(const T* p) {
    return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <class T>
  static ATTNRB_INLINE Vec load(const T* p, int n) {
    Floats x = {0, 0, 0, 0};
    for (int i = 0; i < width && i < n; ++i) x[i] = to_float(p[i]);
    return {x};
  }

  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, Vec& even, Vec& odd) {
    load_even_odd(p, 2 * width, even, odd);
  }
  static ATTNRB_INLINE void load_even_odd(const bfloat16* p, int n, Vec& even, Vec& odd) {
    float parts[2][width] = {};
    for (int i = 0; i < 2 * width && i < n; ++i) parts[i % 2][i / 2] = to_float(p[i]);
    even = load(parts[0]);
    odd = load(parts[1]);
  }

  ATTNRB_INLINE void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  template <class T>
  ATTNRB_INLINE void store(T* p) const {
    for (int i = 0; i < width; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  ATTNRB_INLINE void store(T* p, int n) const {
    for (int i = 0; i < width && i < n; ++i) p[i] = from_float<T>(v[i]);
  }

  friend ATTNRB_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend ATTNRB_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend ATTNRB_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend ATTNRB_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  static ATTNRB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  template <int Lane>
  static ATTNRB_INLINE Vec fma_lane(Vec a, Vec b, Vec c) {
    return fma(set(a.v[Lane]), b, c);
  }
  static ATTNRB_INLINE Vec fma_pair(Vec a0, Vec b0, Vec a1, Vec b1, Vec c) { return c + (a0 * b0 + a1 * b1); }
  static ATTNRB_INLINE Vec fms(Vec a, Vec b, Vec c) { return {a.v * b.v - c.v}; }
  static ATTNRB_INLINE Vec max(Vec a, Vec b) { return select(a.v > b.v, a, b); }
  ATTNRB_INLINE Vec abs() const { return {Floats(Mask(v) & 0x7fffffff)}; }
  ATTNRB_INLINE Vec round() const {
    // Adding and taking away 1.5 * 2^23 drops the fraction, to nearest even; good for |x| < 2^22.
    const Floats magic = set(12582912.0f).v;
    return {(v + magic) - magic};
  }
  static ATTNRB_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
    const Mask bit = {INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
    return {Floats((Mask(magnitude.v) & ~bit) | (Mask(sign.v) & bit))};
  }
  static ATTNRB_INLINE Vec scale_exponent(Vec x, Vec n) {
    // Two factors, so that results below 2^-126 fade out instead of wrapping round. A NaN in n becomes one in the
    // result.
    const Vec low = max(set(-252.0f), n), half = select(greater(low, set(252.0f)), set(252.0f), low);
    Vec result = x;
    const Vec first = (half * set(0.5f)).round(), second = half - first;
    result = result * power_of_two(first) * power_of_two(second);
    return select(n.v == n.v, result, n);
  }

  ATTNRB_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  ATTNRB_INLINE float max() const {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }

  static ATTNRB_INLINE Mask first(int n) {
    const Mask lanes = {0, 1, 2, 3}, limit = {n, n, n, n};
    return lanes < limit;
  }
  static ATTNRB_INLINE Mask none() { return Mask{0, 0, 0, 0}; }
  static ATTNRB_INLINE Mask both(Mask a, Mask b) { return a & b; }
  static ATTNRB_INLINE Mask from_bytes(const bool* p) { return Mask{-p[0], -p[1], -p[2], -p[3]}; }
  static ATTNRB_INLINE Mask greater(Vec a, Vec b) { return a.v > b.v; }
  static ATTNRB_INLINE Mask greater_equal(Vec a, Vec b) { return a.v >= b.v; }
  static ATTNRB_INLINE Vec select(Mask m, Vec yes, Vec no) { return {Floats((m & Mask(yes.v)) | (~m & Mask(no.v)))}; }
  static ATTNRB_INLINE uint32_t bits(Mask m) {
    return uint32_t(m[0] & 1) | uint32_t(m[1] & 2) | uint32_t(m[2] & 4) | uint32_t(m[3] & 8);
  }

  static ATTNRB_INLINE Vec sums(const Vec* a) { return {Floats{a[0].sum(), a[1].sum(), a[2].sum(), a[3].sum()}}; }

  static ATTNRB_INLINE void transpose(Vec* rows) {
    for (int i = 0; i < width; ++i)
      for (int j = i + 1; j < width; ++j) {
        const float x = rows[i].v[j];
        rows[i].v[j] = rows[j].v[i];
        rows[j].v[i] = x;
      }
  }

  static ATTNRB_INLINE int compress(Mask m, Vec x, int32_t base, float* values, int32_t* indices) {
    int count = 0;
    for (int i = 0; i < width; ++i) {
      values[count] = x.v[i];
      indices[count] = base + i;
      count += m[i] & 1;
    }
    return count;
  }

  static ATTNRB_INLINE int compress_indices(Mask m, const int32_t* from, int32_t except, int32_t add, int32_t* to) {
    return pack_indices<width>(bits(m), from, except, add, to);
  }

 private:
  static ATTNRB_INLINE Vec power_of_two(Vec n) {
    const Mask exponent = __builtin_convertvector(n.v, Mask) + 127;
    return {Floats(exponent << 23)};
  }
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
