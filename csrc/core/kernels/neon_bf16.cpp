#define ATTNRB_ISA neon_bf16
#include "vec_neon.h"

#include "neon_bf16_engine.h"
#include "neon_bf16_gradient_engine.h"
#include "neon_engine.h"
#include "table.h"

namespace attnrb {

namespace neon_bf16 {

// float16 stays in float32: in two exact halves it would take three products at four times the speed.
template <class T>
struct NeonPairChoice : NeonChoice<T> {};

template <>
struct NeonPairChoice<bfloat16> {
  using Engine = NeonBf16Engine;
  using Dot = NeonBf16Dot;
  using GradientEngine = NeonBf16GradientEngine;
};

}  // namespace neon_bf16

extern const Kernels neon_bf16_kernels;
const Kernels neon_bf16_kernels = neon_bf16::make_table<neon_bf16::NeonPairChoice>("neon_bf16");

}  // namespace attnrb
