// Arithmetic of the kernels that is of their own making, and which kernels there are.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/fragments.h"
#include "kernels/parameters.h"

namespace attnrb::cuda {
namespace {

template <class T>
void tanh_is_near(double most) {
  for (double x = 1e-6; x < 200.0; x *= 1.01)
    for (const float at : {float(x), float(-x)})
      EXPECT_LE(std::fabs(double(Engine<T>::tanh(at)) - std::tanh(double(at))), most) << at;
  EXPECT_EQ(Engine<T>::tanh(0.0f), 0.0f);
  EXPECT_EQ(Engine<T>::tanh(INFINITY), 1.0f);
  EXPECT_EQ(Engine<T>::tanh(-INFINITY), -1.0f);
  EXPECT_TRUE(std::isnan(Engine<T>::tanh(NAN)));
}

TEST(Fragments, TanhIsThatOfTheStandardLibrary) {
  tanh_is_near<bfloat16>(0x1p-21);
  tanh_is_near<float16>(0x1p-21);
  tanh_is_near<float>(0x1p-23);
}

template <class T>
void finite_part_is_right() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits)
    for (const uint32_t other : {0x0000u, 0x0001u, 0x3c00u, 0x7bffu, 0x7c00u, 0x7f80u, 0x7fffu, 0xffffu}) {
      const auto kept = [](uint32_t half) { return std::isfinite(to_float(T{uint16_t(half)})) ? half : 0u; };
      ASSERT_EQ(Engine<T>::finite_part(bits | other << 16), kept(bits) | kept(other) << 16) << bits << " " << other;
      ASSERT_EQ(Engine<T>::finite_part(other | bits << 16), kept(other) | kept(bits) << 16) << bits << " " << other;
    }
}

TEST(Fragments, WhatIsNotFiniteCountsAsZero) {
  finite_part_is_right<bfloat16>();
  finite_part_is_right<float16>();
}

// The launches start the kernel of a class where the class is its own (launch.h).
TEST(Widths, EveryClassHasAKernel) {
  for (const Task task : {Task::source, Task::rebalance, Task::softmax, Task::edited, Task::biased_softmax, Task::rest})
    for (const int64_t element_bytes : {2, 4})
      for (const bool ragged : {false, true})
        for (int64_t width = 1; width <= 512; ++width) {
          const int of = width_class(task, width, element_bytes, ragged);
          EXPECT_TRUE(of == 64 || of == 128 || of == 256) << width;
          EXPECT_EQ(width_class(task, of, element_bytes, ragged), of) << width;
        }
}

}  // namespace
}  // namespace attnrb::cuda
