#include "launch_types.h"

namespace attnrb::cuda {

const Launches float32_launches = TypeLaunches<float>::table;

}  // namespace attnrb::cuda
