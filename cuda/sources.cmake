# What the CUDA ops are made of, for the real device (cmake/Cuda.cmake) and the emulated one (tests/cuda_host).
set(ATTNRB_CUDA_KERNELS ${CMAKE_CURRENT_LIST_DIR}/float32.cu ${CMAKE_CURRENT_LIST_DIR}/bfloat16.cu
                        ${CMAKE_CURRENT_LIST_DIR}/float16.cu)
set(ATTNRB_CUDA_HOST ${CMAKE_CURRENT_LIST_DIR}/plan.cpp)
set(ATTNRB_CUDA_OPS
  ${CMAKE_CURRENT_LIST_DIR}/ops/device.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops/outlier_mask.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops/rebalance.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops/rebalanced_attention.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops/received_attention.cpp
  ${CMAKE_CURRENT_LIST_DIR}/ops/source_attention.cpp)
