// Element types of the core. Nothing under csrc/core includes torch.
#pragma once

#include <cstdint>
#include <cstring>

// Kernels are compiled once per instruction set. A helper that two of them share must never become a symbol of its own:
// the linker would keep one copy, perhaps the one that the processor at hand cannot run.
// nvcc compiles the same mathematics for both sides.
#if defined(__CUDACC__)
#define ATTNRB_INLINE inline __attribute__((always_inline)) __host__ __device__
#else
#define ATTNRB_INLINE inline __attribute__((always_inline))
#endif

namespace attnrb {

enum class DType : int32_t { float32, bfloat16, float16 };

// Storage-only types: arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

ATTNRB_INLINE int64_t element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// std::min and std::max may become symbols of their own.
template <class T>
ATTNRB_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
ATTNRB_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

template <class To, class From>
ATTNRB_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

ATTNRB_INLINE float to_float(float x) { return x; }

ATTNRB_INLINE float to_float(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

ATTNRB_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // infinity and NaN keep their payload
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // A multiplication by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
  const float value = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(127 + 112) << 23);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

template <class T>
T from_float(float x);

template <>
ATTNRB_INLINE float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
ATTNRB_INLINE bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {uint16_t(bits >> 16)};
}

template <>
ATTNRB_INLINE float16 from_float<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 65536 and more, infinity too
  if (magnitude < 0x38800000u) {                                    // below 2^-14: subnormal in float16
    // Adding 0.5 aligns the last float16 bit with the last float32 bit; the hardware rounds to nearest even.
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (uint32_t(127 - 15) << 23);
  return {uint16_t(sign | (rounded >> 13))};
}

}  // namespace attnrb
