#include "ragged_types.h"

namespace attnrb::cuda {

const RaggedLaunches ragged_float16_launches = RaggedTypeLaunches<float16>::table;

}  // namespace attnrb::cuda
