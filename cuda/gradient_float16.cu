#include "gradient_types.h"

namespace attnrb::cuda {

const GradientLaunches float16_gradients = TypeGradients<float16>::table;

}  // namespace attnrb::cuda
