#define ATTNRB_ISA portable
#include "vec_portable.h"

#include "table.h"

namespace attnrb {

extern const Kernels portable_kernels;
const Kernels portable_kernels = portable::make_table<portable::FloatChoice>("portable");

}  // namespace attnrb
