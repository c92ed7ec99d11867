#define ATTNRB_ISA neon
#include "vec_neon.h"

#include "neon_engine.h"
#include "table.h"

namespace attnrb {

namespace neon {

template <class T>
struct NeonChoice {
  using Engine = FloatEngine<T>;
  using Dot = NeonDot<T>;
  using GradientEngine = NeonGradientEngine<T>;
};

}  // namespace neon

extern const Kernels neon_kernels;
const Kernels neon_kernels = neon::make_table<neon::NeonChoice>("neon");

}  // namespace attnrb
