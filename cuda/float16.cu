#include "launch_types.h"

namespace attnrb::cuda {

const Launches float16_launches = TypeLaunches<float16>::table;

}  // namespace attnrb::cuda
