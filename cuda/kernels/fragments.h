// Products of a warp on tensor cores, for every element type; Note: [Fragments] (device.h) says which lane holds what.
//
// Note: [Float32 on tensor cores]
// Tensor cores multiply tf32, float32 with 10 of its 23 fraction bits. x = high + middle + low exactly, with 11, 11 and
// at most 2 significant bits, and x y = the sum of six of the nine products, up to 2^-33 |x y|. The products of one
// step are summed from the smallest, starting at zero, and the sum is added in float32: tensor cores cut additions off
// instead of rounding them, so chains in them are kept short.
#pragma once

#include <type_traits>

#include "device.h"

namespace attnrb::cuda {

// Sixteen-bit elements. Step = 16 columns.
template <class T>
struct HalfEngine {
  // Probabilities of 16 keys, score tiles 2 step and 2 step + 1, as they come out of the score product: their layout is
  // that of an `a` fragment already.
  template <int Tiles>
  static ATTNRB_DEVICE void probabilities(uint32_t (&a)[4], const float (&p)[Tiles][4], int step) {
    a[0] = pack<T>(p[2 * step][0], p[2 * step][1]);
    a[1] = pack<T>(p[2 * step][2], p[2 * step][3]);
    a[2] = pack<T>(p[2 * step + 1][0], p[2 * step + 1][1]);
    a[3] = pack<T>(p[2 * step + 1][2], p[2 * step + 1][3]);
  }

  // The `b` fragments of 16 keys from row `step` * 16 on and 16 value columns from `column` on.
  static ATTNRB_DEVICE void values(uint32_t (&b)[4], const T* tile, int stride, int step, int column, int lane) {
    load_matrices_transposed(b, tile + (step * 16 + lane % 16) * stride + column + lane / 16 * 8);
  }

  // A word of two values with 0 for what is NaN or infinity: one more than an exponent of ones carries into the sign.
  static ATTNRB_DEVICE uint32_t finite_part(uint32_t word) {
    const uint32_t broken = ((word & kExponents) + kLowest) & 0x80008000u;
    return word & ~((broken >> 15) * 0xffffu);
  }

  // tanh within 2^-21, absolutely: a score's error is that many times the cap, less than what rounding weights to 16
  // bits makes of it.
  static ATTNRB_DEVICE float tanh(float x) {
    constexpr float kTwoLog2E = 2.88539008177792681472f;
    return fmaf(-2.0f, fast_reciprocal(1.0f + fast_exp2(kTwoLog2E * x)), 1.0f);
  }

 private:
  // Of both values, all bits of the exponent and the lowest one: bfloat16 has eight, float16 five.
  static constexpr uint32_t kExponents = std::is_same<T, bfloat16>::value ? 0x7f807f80u : 0x7c007c00u;
  static constexpr uint32_t kLowest = std::is_same<T, bfloat16>::value ? 0x00800080u : 0x04000400u;
};

template <class T>
struct Engine;

template <>
struct Engine<bfloat16> : HalfEngine<bfloat16> {
  static ATTNRB_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bfloat16(c, a, b0, b1);
  }
};

template <>
struct Engine<float16> : HalfEngine<float16> {
  static ATTNRB_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_float16(c, a, b0, b1);
  }
};

// See Note: [Float32 on tensor cores]. Step = 8 columns.
template <>
struct Engine<float> {
  static ATTNRB_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t high[4], middle[4], low[4], b_high[2], b_middle[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], high[i], middle[i], low[i]);
    split(b0, b_high[0], b_middle[0], b_low[0]);
    split(b1, b_high[1], b_middle[1], b_low[1]);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_tf32(sum, low, b_high[0], b_high[1]);
    multiply_tf32(sum, high, b_low[0], b_low[1]);
    multiply_tf32(sum, middle, b_middle[0], b_middle[1]);
    multiply_tf32(sum, middle, b_high[0], b_high[1]);
    multiply_tf32(sum, high, b_middle[0], b_middle[1]);
    multiply_tf32(sum, high, b_high[0], b_high[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  }

  // Score tile `step`, 8 keys. A lane holds the probabilities of keys 2t and 2t + 1 and an `a` fragment wants those of
  // t and t + 4: a sum over keys may take them in any order, so `values` deals the rows out the same way.
  template <int Tiles>
  static ATTNRB_DEVICE void probabilities(uint32_t (&a)[4], const float (&p)[Tiles][4], int step) {
    a[0] = bit_cast<uint32_t>(p[step][0]);
    a[1] = bit_cast<uint32_t>(p[step][2]);
    a[2] = bit_cast<uint32_t>(p[step][1]);
    a[3] = bit_cast<uint32_t>(p[step][3]);
  }

  static ATTNRB_DEVICE void values(uint32_t (&b)[4], const float* tile, int stride, int step, int column, int lane) {
    const float* row = tile + (step * 8 + lane % 4 * 2) * stride + column + lane / 4;
    b[0] = bit_cast<uint32_t>(row[0]);
    b[1] = bit_cast<uint32_t>(row[stride]);
    b[2] = bit_cast<uint32_t>(row[8]);
    b[3] = bit_cast<uint32_t>(row[stride + 8]);
  }

  static ATTNRB_DEVICE uint32_t finite_part(uint32_t word) { return (word & 0x7fffffffu) < 0x7f800000u ? word : 0u; }

  static ATTNRB_DEVICE float tanh(float x) { return tanhf(x); }

 private:
  static ATTNRB_DEVICE void split(uint32_t x, uint32_t& high, uint32_t& middle, uint32_t& low) {
    constexpr uint32_t kTf32 = 0xffffe000u;
    high = x & kTf32;
    const float rest = bit_cast<float>(x) - bit_cast<float>(high);
    middle = bit_cast<uint32_t>(rest) & kTf32;
    low = bit_cast<uint32_t>(rest - bit_cast<float>(middle));
  }
};

}  // namespace attnrb::cuda
