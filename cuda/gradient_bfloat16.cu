#include "gradient_types.h"

namespace attnrb::cuda {

const GradientLaunches bfloat16_gradients = TypeGradients<bfloat16>::table;

}  // namespace attnrb::cuda
