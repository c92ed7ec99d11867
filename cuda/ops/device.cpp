#include "device.h"

#include <cstdlib>
#include <cstring>

#if !defined(ATTNRB_CUDA_EMULATED)
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

namespace attnrb::ops {

#if defined(ATTNRB_CUDA_EMULATED)

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

int32_t read_back(const int32_t* address, void* /*stream*/) { return *address; }

#else

namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attnrb: ") + what + " failed: " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for the limits of the device");
  return value;
}

}  // namespace

const cuda::Device& cuda_device(int32_t index) {
  constexpr int kDevices = 64;
  static cuda::Device devices[kDevices];
  static std::once_flag asked[kDevices];
  if (index < 0 || index >= kDevices) refuse("query", "expected on a CUDA device from 0 to 63, got ", index);
  std::call_once(asked[index], [&] {
    cuda::Device& device = devices[index];
    device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    device.capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  });
  return devices[index];
}

void* find_in_torch_cuda(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

void* current_stream(int32_t index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = reinterpret_cast<Function>(find_in_torch_cuda("aoti_torch_get_current_cuda_stream"));
  if (function == nullptr) throw std::runtime_error("attnrb: this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(index, &stream));
  return stream;
}

int32_t read_back(const int32_t* address, void* stream) {
  int32_t value = 0;
  check(cudaMemcpyAsync(&value, address, sizeof(value), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)),
        "reading the status");
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for the device");
  return value;
}

#endif

namespace {

bool checks_wanted() {
  const char* text = std::getenv("ATTNRB_CUDA_CHECKS");
  return text != nullptr && std::strcmp(text, "1") == 0;
}

}  // namespace

DeviceStatus::DeviceStatus(const Edit& edit, const Operand& like) : capacity_(edit.capacity) {
  if (edit.indices == nullptr || !checks_wanted()) return;
  tensor_ = empty<1>({1}, dtype_codes().int32, like);
  torch::stable::zero_(*tensor_);
}

int32_t* DeviceStatus::data() const { return tensor_ ? static_cast<int32_t*>(tensor_->mutable_data_ptr()) : nullptr; }

void DeviceStatus::check(void* stream) const {
  if (tensor_) check_status(Status(read_back(data(), stream)), capacity_);
}

}  // namespace attnrb::ops
