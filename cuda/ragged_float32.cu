#include "ragged_types.h"

namespace attnrb::cuda {

const RaggedLaunches ragged_float32_launches = RaggedTypeLaunches<float>::table;

}  // namespace attnrb::cuda
