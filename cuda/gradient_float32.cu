#include "gradient_types.h"

namespace attnrb::cuda {

const GradientLaunches float32_gradients = TypeGradients<float>::table;

}  // namespace attnrb::cuda
