# What the Python package loads: libattnrb.so, the ops, and attnrb._C, which tells about them.
include(cmake/Torch.cmake)

set(ops_dir ${PROJECT_SOURCE_DIR}/csrc/ops)
add_library(attnrb_ops SHARED
  ${ops_dir}/library.cpp
  ${ops_dir}/cpu.cpp
  ${PROJECT_SOURCE_DIR}/csrc/runtime.cpp)
# The suffix .so on every system: torch.ops.load_library and _native.py then know one name.
set_target_properties(attnrb_ops PROPERTIES OUTPUT_NAME attnrb SUFFIX ".so")
target_link_libraries(attnrb_ops PRIVATE attnrb_core attnrb_torch)
if(NOT APPLE)
  # A symbol that neither we nor torch define should stop the build, not the import.
  target_link_options(attnrb_ops PRIVATE -Wl,-z,defs)
endif()

include(cmake/Cuda.cmake)

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(attnrb_module ${PROJECT_SOURCE_DIR}/csrc/module.cpp)
set_target_properties(attnrb_module PROPERTIES OUTPUT_NAME _C INSTALL_RPATH "$<IF:$<BOOL:${APPLE}>,@loader_path,$ORIGIN>")
target_link_libraries(attnrb_module PRIVATE attnrb_ops attnrb_options)
string(REPLACE ";" " " instruction_sets "${ATTNRB_INSTRUCTION_SETS}")
string(REPLACE ";" " " cuda_targets "${ATTNRB_CUDA_TARGETS}")
target_compile_definitions(attnrb_module PRIVATE
  ATTNRB_VERSION="${SKBUILD_PROJECT_VERSION_FULL}"
  ATTNRB_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  ATTNRB_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
  ATTNRB_INSTRUCTION_SETS="${instruction_sets}"
  ATTNRB_CUDA_VERSION="${ATTNRB_CUDA_VERSION}"
  ATTNRB_CUDA_TARGETS="${cuda_targets}"
  ATTNRB_TORCH_HEADERS="${ATTNRB_TORCH_VERSION}"
  ATTNRB_TORCH_TARGET="${ATTNRB_TORCH_TARGET}")

# Not into lib/: both files stand beside the Python sources.
install(TARGETS attnrb_ops attnrb_module LIBRARY DESTINATION attnrb)
