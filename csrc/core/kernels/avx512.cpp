#define ATTNRB_ISA avx512
#include "vec_avx512.h"

#include "table.h"

namespace attnrb {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = avx512::make_table<avx512::FloatChoice>("avx512");

}  // namespace attnrb
