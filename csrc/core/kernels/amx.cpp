#define ATTNRB_ISA amx
#include "vec_avx512.h"

#include "amx_engine.h"
#include "amx_gradient_strips.h"
#include "table.h"

namespace attnrb {

namespace amx {

template <class T>
struct AmxChoice : FloatChoice<T> {};

template <>
struct AmxChoice<bfloat16> {
  using Engine = AmxEngine<bfloat16>;
  using Dot = FloatDot<bfloat16>;
  using GradientEngine = AmxGradientEngine<bfloat16>;
};

template <>
struct AmxChoice<float16> {
  using Engine = AmxEngine<float16>;
  using Dot = FloatDot<float16>;
  using GradientEngine = AmxGradientEngine<float16>;
};

}  // namespace amx

extern const Kernels amx_kernels;
const Kernels amx_kernels = amx::make_table<amx::AmxChoice>("amx");

}  // namespace attnrb
