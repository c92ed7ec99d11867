// Conversions of the 16-bit types, exhaustively where that is possible.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/types.h"
#include "random.h"

namespace attnrb::testing {
namespace {

// The value that a float16's bits stand for, by the definition of the format.
double float16_value(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31u), fraction = int(bits & 1023u);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == 31)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

double bfloat16_value(uint32_t bits) {
  const int exponent = int(bits >> 7 & 255u), fraction = int(bits & 127u);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == 255)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent == 0 ? std::ldexp(fraction, -133) : std::ldexp(128 + fraction, exponent - 134));
}

template <class T>
constexpr uint32_t kInfinityBits = 0;
template <>
constexpr uint32_t kInfinityBits<float16> = 0x7c00u;
template <>
constexpr uint32_t kInfinityBits<bfloat16> = 0x7f80u;

template <class T>
double value_of(uint32_t bits) {
  return kInfinityBits<T> == 0x7c00u ? float16_value(bits) : bfloat16_value(bits);
}

template <class T>
class HalfTypes : public ::testing::Test {};
using Types = ::testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(HalfTypes, Types);

TYPED_TEST(HalfTypes, EveryNumberIsReadExactlyAndSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float got = to_float(TypeParam{uint16_t(bits)});
    const double expected = value_of<TypeParam>(bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
      ASSERT_TRUE(std::isnan(to_float(from_float<TypeParam>(got)))) << bits;
      continue;
    }
    ASSERT_EQ(double(got), expected) << bits;
    ASSERT_EQ(std::signbit(got), std::signbit(expected)) << bits;
    ASSERT_EQ(from_float<TypeParam>(got).bits, bits);
  }
}

// Between every two neighbours: just below, on and just above the middle, where ties go to the even one.
TYPED_TEST(HalfTypes, RoundsToNearestEvenBetweenAllNeighbours) {
  for (uint32_t bits = 0; bits < kInfinityBits<TypeParam>; ++bits) {
    const double low = value_of<TypeParam>(bits);
    // Infinity counts as the number that would follow the largest one.
    const double high =
        bits + 1 < kInfinityBits<TypeParam> ? value_of<TypeParam>(bits + 1) : 2.0 * low - value_of<TypeParam>(bits - 1);
    const double exact = (low + high) / 2.0;
    const float middle = float(exact);
    ASSERT_EQ(double(middle), exact) << bits;
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    ASSERT_EQ(from_float<TypeParam>(middle).bits, even) << bits;
    ASSERT_EQ(from_float<TypeParam>(-middle).bits, even | 0x8000u) << bits;
    ASSERT_EQ(from_float<TypeParam>(std::nextafter(middle, 0.0f)).bits, bits) << bits;
    ASSERT_EQ(from_float<TypeParam>(std::nextafter(middle, std::numeric_limits<float>::infinity())).bits, bits + 1)
        << bits;
  }
}

TYPED_TEST(HalfTypes, FarTooLargeNumbersBecomeInfinity) {
  const float largest = std::numeric_limits<float>::max(), infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(from_float<TypeParam>(largest).bits, kInfinityBits<TypeParam>);
  EXPECT_EQ(from_float<TypeParam>(infinity).bits, kInfinityBits<TypeParam>);
  EXPECT_EQ(from_float<TypeParam>(-infinity).bits, kInfinityBits<TypeParam> | 0x8000u);
}

TYPED_TEST(HalfTypes, EveryNaNStaysOne) {
  Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const uint32_t payload = uint32_t(random.integer(1, 0x7fffff)), sign = uint32_t(random.bits() & 1u) << 31;
    ASSERT_TRUE(std::isnan(to_float(from_float<TypeParam>(bit_cast<float>(sign | 0x7f800000u | payload))))) << payload;
  }
}

TEST(Types, ElementSizes) {
  EXPECT_EQ(element_size(DType::float32), 4);
  EXPECT_EQ(element_size(DType::bfloat16), 2);
  EXPECT_EQ(element_size(DType::float16), 2);
}

}  // namespace
}  // namespace attnrb::testing
