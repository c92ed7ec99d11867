# What the Python package loads: libattnrb.so, the ops. It calls no function of Python's, so that one wheel serves every
# version of it; what the library tells of itself are C functions (csrc/about.cpp).
include(cmake/Torch.cmake)

set(ops_dir ${PROJECT_SOURCE_DIR}/csrc/ops)
add_library(attnrb_ops SHARED
  ${ops_dir}/library.cpp
  ${ops_dir}/cpu.cpp
  ${PROJECT_SOURCE_DIR}/csrc/about.cpp)
# The suffix .so on every system: torch.ops.load_library and _native.py then know one name.
set_target_properties(attnrb_ops PROPERTIES OUTPUT_NAME attnrb SUFFIX ".so")
target_link_libraries(attnrb_ops PRIVATE attnrb_core attnrb_torch)
if(NOT APPLE)
  # A symbol that neither we nor torch define should stop the build, not the import; and only what csrc/about.cpp exports
  # is shown, not what templates of the standard library leave here.
  set(shown ${PROJECT_SOURCE_DIR}/cmake/shown.map)
  target_link_options(attnrb_ops PRIVATE -Wl,-z,defs -Wl,--version-script=${shown})
  set_property(TARGET attnrb_ops APPEND PROPERTY LINK_DEPENDS ${shown})
endif()

include(cmake/Cuda.cmake)

string(REPLACE ";" " " instruction_sets "${ATTNRB_INSTRUCTION_SETS}")
string(REPLACE ";" " " cuda_targets "${ATTNRB_CUDA_TARGETS}")
set_property(SOURCE ${PROJECT_SOURCE_DIR}/csrc/about.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  ATTNRB_VERSION="${SKBUILD_PROJECT_VERSION_FULL}"
  ATTNRB_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  ATTNRB_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
  ATTNRB_INSTRUCTION_SETS="${instruction_sets}"
  ATTNRB_CUDA_VERSION="${ATTNRB_CUDA_VERSION}"
  ATTNRB_CUDA_TARGETS="${cuda_targets}"
  ATTNRB_TORCH_HEADERS="${ATTNRB_TORCH_VERSION}"
  ATTNRB_TORCH_TARGET="${ATTNRB_TORCH_TARGET}")

# Not into lib/: it stands beside the Python sources.
install(TARGETS attnrb_ops LIBRARY DESTINATION attnrb)
