// Whose tensors the ops serve, and that their device is the current one.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#define ATTNRB_CUDA_KEY CUDA

namespace attnrb::ops {

using CurrentDevice = torch::stable::accelerator::DeviceGuard;

}  // namespace attnrb::ops
