#include "launch_types.h"

namespace attnrb::cuda {

const Launches bfloat16_launches = TypeLaunches<bfloat16>::table;

}  // namespace attnrb::cuda
