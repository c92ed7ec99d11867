// What the CUDA registrations share beyond the checks: the device that a tensor lies on, its stream, working memory.
//
// The build says which current_device.h is found, and which sources say what a device is: those of cuda/backend, or of
// the emulated device of tests/cuda_host, for which the same registrations serve CPU tensors.
#pragma once

#include "current_device.h"
#include "launch.h"
#include "ops/arguments.h"

namespace attnrb::ops {

// The limits of a device, asked for once.
const cuda::Device& cuda_device(int32_t index);
// A function of libtorch_cuda, which is not among the libraries that this one is linked with, so that it loads beside
// any torch; null where that has no such function.
void* find_in_torch_cuda(const char* name);
// The stream that torch uses on a device now.
void* current_stream(int32_t index);
// Copies bytes from a device address to the host, once all work on the stream is done.
void read_back(void* to, const void* address, int64_t bytes, void* stream);
// Whether the environment variable ATTNRB_CUDA_CHECKS asks for data to be checked that only the device has looked at.
bool checks_wanted();

// The device of `operand` for as long as this lives, torch's current stream on it, and memory that torch will not hand
// out again before the stream is done with it.
class DeviceScope {
 public:
  explicit DeviceScope(const Operand& operand)
      : current_(operand.device_index), operand_(operand), stream_(current_stream(operand.device_index)) {}

  const cuda::Device& device() const { return cuda_device(operand_.device_index); }
  void* stream() const { return stream_; }

  Tensor bytes(int64_t count) const { return empty<1>({count}, aoti_torch_dtype_uint8(), operand_); }

 private:
  CurrentDevice current_;
  const Operand& operand_;
  void* stream_;
};

// A gain for all heads or one each, or one for each sequence and head, on the device.
struct DeviceGain {
  DeviceGain(const Tensor& tensor, const Shape& shape, const Operand& reference) {
    const Operand gain = check_gain(tensor, shape, reference);
    stride = gain.rank == 1 && gain.sizes[0] == 1 ? 0 : 1;
    data = contiguous_data<float>(gain, tensor, dtype_codes().float32, copy);
  }
  DeviceGain(double gain, const Shape& /*shape*/, const Operand& /*reference*/)
      : stride(0), value(check_finite("gain", gain)) {}

  const float* data = nullptr;  // null: `value` for all heads
  int stride = 0;
  float value = 0.0f;
  OptionalTensor copy;
};

// Outlier rows that break the rules make their rows of a result NaN. Only a caller that waits for the device can be
// told; the environment variable ATTNRB_CUDA_CHECKS asks for that, and the refusal is then the CPU's.
class DeviceStatus {
 public:
  DeviceStatus(const Edit& edit, const Operand& like);
  int32_t* data() const;           // null where nobody asked
  void check(void* stream) const;  // after the kernels; waits where somebody asked

 private:
  int64_t capacity_;
  OptionalTensor tensor_;
};

}  // namespace attnrb::ops
