#include "ragged_types.h"

namespace attnrb::cuda {

const RaggedLaunches ragged_bfloat16_launches = RaggedTypeLaunches<bfloat16>::table;

}  // namespace attnrb::cuda
