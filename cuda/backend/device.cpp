// The device of cuda/ops/device.h: its limits, torch's stream on it, and what its kernels reported.
#include "ops/device.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <mutex>

namespace attnrb::ops {

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
  TORCH_ERROR_CODE_CHECK(function(index, &stream));
  return stream;
}

void read_back(void* to, const void* address, int64_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, address, size_t(bytes), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)),
        "reading from the device");
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for the device");
}

}  // namespace attnrb::ops

// What keeps this library from running under the driver that is there, in one sentence for the user; null where nothing
// does, or where there is no driver. Asks without waking a device.
extern "C" __attribute__((visibility("default"))) const char* attnrb_driver_problem() {
  static const std::string problem = [] {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return std::string();
    // A runtime runs under every driver of its own generation, and under newer ones.
    constexpr int kBuilt = CUDART_VERSION;
    if (driver / 1000 >= kBuilt / 1000) return std::string();
    return "attnrb's CUDA ops need a driver for CUDA " + std::to_string(kBuilt / 1000) +
           " or newer, and this one is for " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ": update the driver, or build attnrb with an older nvcc.";
  }();
  return problem.empty() ? nullptr : problem.c_str();
}
