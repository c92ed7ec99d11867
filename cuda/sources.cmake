# What the CUDA ops are made of, for the real device (cmake/Cuda.cmake) and the emulated one (tests/cuda_host).
set(cuda ${CMAKE_CURRENT_LIST_DIR})
set(ATTNRB_CUDA_KERNELS
  ${cuda}/float32.cu ${cuda}/bfloat16.cu ${cuda}/float16.cu
  ${cuda}/gradient_float32.cu ${cuda}/gradient_bfloat16.cu ${cuda}/gradient_float16.cu ${cuda}/gradient_sums.cu
  ${cuda}/ragged_float32.cu ${cuda}/ragged_bfloat16.cu ${cuda}/ragged_float16.cu ${cuda}/blocks.cu
  ${cuda}/sparse.cu ${cuda}/sparse_gradient.cu)
set(ATTNRB_CUDA_HOST ${cuda}/plan.cpp ${cuda}/gradient_plan.cpp)
set(ATTNRB_CUDA_OPS
  ${cuda}/ops/cuda.cpp
  ${cuda}/ops/tables.cpp
  ${cuda}/ops/dense.cpp
  ${cuda}/ops/device.cpp
  ${cuda}/ops/library.cpp)
# What is the device's alone; tests/cuda_host has files of the same names for the emulated one.
set(ATTNRB_CUDA_BACKEND ${cuda}/backend/dense.cpp ${cuda}/backend/device.cpp)
set(ATTNRB_CUDA_BACKEND_HEADERS ${cuda}/backend)
