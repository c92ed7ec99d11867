// Elementary functions on vectors.
#pragma once

#include <cmath>
#include <limits>

namespace attnrb {
namespace ATTNRB_ISA {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The bits of a number, taken as an integer.
ATTNRB_INLINE float bits_as_number(float x) { return float(bit_cast<int32_t>(x)); }

// 2^x. With n = round(x) and r = x - n in [-1/2, 1/2], 2^x = 2^n * 2^r; 2^r is a polynomial of least relative error
// with p(0) = 1: 2.8e-6 at degree 4 (ample for bfloat16), 2e-9 at degree 6 (below float32 rounding). NaN gives NaN.
template <int Degree>
ATTNRB_INLINE Vec exp2(Vec x) {
  static_assert(Degree == 4 || Degree == 6, "coefficients are given for degrees 4 and 6");
  constexpr float kDegree4[] = {9.582853189e-3f, 5.590642647e-2f, 2.402409862e-1f, 6.931241932e-1f, 1.0f};
  constexpr float kDegree6[] = {
      1.535336204e-4f, 1.339887462e-3f, 9.618437359e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472029e-1f, 1.0f};
  const float* coefficients = Degree == 4 ? kDegree4 : kDegree6;
  const Vec n = x.round(), r = x - n;
  Vec p = Vec::set(coefficients[0]);
  for (int i = 1; i <= Degree; ++i) p = Vec::fma(p, r, Vec::set(coefficients[i]));
  return Vec::scale_exponent(p, n);
}

// Cephes' tanhf: an odd polynomial for |x| < 0.625, 1 - 2/(exp(2|x|) + 1) with x's sign beyond. Within 2 units in the
// last place; the subtraction alone would lose small arguments.
ATTNRB_INLINE Vec tanh(Vec x) {
  const Vec size = x.abs(), square = x * x;
  Vec p = Vec::fma(Vec::set(-5.70498872745e-3f), square, Vec::set(2.06390887954e-2f));
  p = Vec::fma(p, square, Vec::set(-5.37397155531e-2f));
  p = Vec::fma(p, square, Vec::set(1.33314422036e-1f));
  p = Vec::fma(p, square, Vec::set(-3.33332819422e-1f));
  const Vec small = Vec::fma(p * square, x, x);
  const Vec one = Vec::set(1.0f);
  // tanh is 1 to the last place from 9.01 on; the limit keeps 2^x finite. max() lets a NaN in its second argument pass.
  const Vec limited = Vec::set(0.0f) - Vec::max(Vec::set(-20.0f), Vec::set(0.0f) - size);
  const Vec large = one - Vec::set(2.0f) / (exp2<6>(limited * Vec::set(2.0f * kLog2E)) + one);
  return Vec::select(Vec::greater(Vec::set(0.625f), size), small, Vec::copy_sign(large, x));
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
