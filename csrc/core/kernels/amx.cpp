#define ATTNRB_ISA amx
#include "vec_avx512.h"
#include "table.h"

namespace attnrb {

extern const Kernels amx_kernels;
const Kernels amx_kernels = amx::make_table("amx");

}  // namespace attnrb
