#define ATTNRB_ISA avx512_bf16
#include "vec_avx512.h"

#include "bf16_engine.h"
#include "bf16_gradient_engine.h"
#include "table.h"

namespace attnrb {

namespace avx512_bf16 {

// float16 stays in float32: in two exact halves it would take three products at twice the speed.
template <class T>
struct PairChoice : FloatChoice<T> {};

template <>
struct PairChoice<bfloat16> {
  using Engine = Bf16Engine;
  using Dot = Bf16Dot;
  using GradientEngine = Bf16GradientEngine;
};

}  // namespace avx512_bf16

extern const Kernels avx512_bf16_kernels;
const Kernels avx512_bf16_kernels = avx512_bf16::make_table<avx512_bf16::PairChoice>("avx512_bf16");

}  // namespace attnrb
