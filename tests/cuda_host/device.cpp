// The emulated device in the place of cuda/backend/device.cpp.
#include "ops/device.h"

#include <cstdlib>
#include <cstring>

namespace attnrb::ops {

// Of a device of capability 8.6 with 8 multiprocessors, unless ATTNRB_EMULATED_CAPABILITY (10 major + minor),
// ATTNRB_EMULATED_SHARED_BYTES or ATTNRB_EMULATED_MULTIPROCESSORS say otherwise. Many multiprocessors make the kernels
// split their keys, 0 never.
const cuda::Device& cuda_device(int32_t /*index*/) {
  static const cuda::Device device = [] {
    const auto number = [](const char* name, int otherwise) {
      const char* text = std::getenv(name);
      return text == nullptr ? otherwise : std::atoi(text);
    };
    cuda::Device found;
    found.multiprocessors = number("ATTNRB_EMULATED_MULTIPROCESSORS", 8);
    found.shared_bytes = number("ATTNRB_EMULATED_SHARED_BYTES", 99 * 1024);
    found.capability = number("ATTNRB_EMULATED_CAPABILITY", 86);
    return found;
  }();
  return device;
}

void* current_stream(int32_t /*index*/) { return nullptr; }

void read_back(void* to, const void* address, int64_t bytes, void* /*stream*/) {
  std::memcpy(to, address, size_t(bytes));
}

}  // namespace attnrb::ops
