#define ATTNRB_ISA avx2
#include "vec_avx2.h"

#include "table.h"

namespace attnrb {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = avx2::make_table<avx2::FloatChoice>("avx2");

}  // namespace attnrb
