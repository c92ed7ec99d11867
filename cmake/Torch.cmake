# Torch's stable ABI: `attnrb_torch`. find_package(Torch) is avoided on purpose: it drags in the CUDA toolkit of a CUDA
# build and the unstable C++ interface.
set(ATTNRB_TORCH "" CACHE PATH "The torch package to build against, the folder that holds its include/ and lib/")
set(torch_folder "${ATTNRB_TORCH}")
if(NOT torch_folder)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/build_backend/find_torch.py
    OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE torch_error
    ERROR_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_status)
  if(NOT torch_status EQUAL 0)
    message(FATAL_ERROR "${torch_error}")
  endif()
endif()

file(STRINGS ${torch_folder}/include/torch/headeronly/version.h version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" version_numbers "${version_lines}")
list(JOIN version_numbers "." ATTNRB_TORCH_VERSION)
message(STATUS "attnrb: torch ${ATTNRB_TORCH_VERSION} at ${torch_folder}")

# The oldest torch that the library will load into. One build serves it and every later one.
set(ATTNRB_TORCH_TARGET 2.10)
add_library(attnrb_torch INTERFACE)
target_include_directories(attnrb_torch SYSTEM INTERFACE ${torch_folder}/include)
target_compile_definitions(attnrb_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
find_library(ATTNRB_TORCH_CPU torch_cpu PATHS ${torch_folder}/lib NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE REQUIRED)
target_link_libraries(attnrb_torch INTERFACE ${ATTNRB_TORCH_CPU})
