// The emulated device in the place of cuda/backend/current_device.h: it takes CPU tensors.
#pragma once

#include <cstdint>

#define ATTNRB_CUDA_KEY CPU

namespace attnrb::ops {

struct CurrentDevice {
  explicit CurrentDevice(int32_t /*index*/) {}
};

}  // namespace attnrb::ops
