// The emulated device as tables of kernels, so that every test of the core runs on it.
#pragma once

#include "core/kernels.h"

namespace attnrb {

// A device with so few multiprocessors that keys are never split, and one with so many that they always are.
extern const Kernels emulated_cuda_kernels, emulated_cuda_split_kernels;

}  // namespace attnrb
