#include "device.h"

#include <cstdlib>
#include <cstring>

namespace attnrb::ops {

bool checks_wanted() {
  const char* text = std::getenv("ATTNRB_CUDA_CHECKS");
  return text != nullptr && std::strcmp(text, "1") == 0;
}

DeviceStatus::DeviceStatus(const Edit& edit, const Operand& like) : capacity_(edit.capacity) {
  if (edit.indices == nullptr || !checks_wanted()) return;
  tensor_ = empty<1>({1}, dtype_codes().int32, like);
  torch::stable::zero_(*tensor_);
}

int32_t* DeviceStatus::data() const { return tensor_ ? static_cast<int32_t*>(tensor_->mutable_data_ptr()) : nullptr; }

void DeviceStatus::check(void* stream) const {
  if (!tensor_) return;
  int32_t status = 0;
  read_back(&status, data(), sizeof(status), stream);
  check_status(Status(status), capacity_);
}

}  // namespace attnrb::ops
