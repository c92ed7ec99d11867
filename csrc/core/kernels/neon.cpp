#define ATTNRB_ISA neon
#include "vec_neon.h"

#include "neon_engine.h"
#include "table.h"

namespace attnrb {

extern const Kernels neon_kernels;
const Kernels neon_kernels = neon::make_table<neon::NeonChoice>("neon");

}  // namespace attnrb
