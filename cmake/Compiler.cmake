# What every target compiles with: `attnrb_options`.
include(CheckCXXSourceCompiles)

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "attnrb needs GCC 11 or newer, this is ${CMAKE_CXX_COMPILER_VERSION}: install a newer one and name "
                      "it in the environment variable CXX.")
elseif(CMAKE_CXX_COMPILER_ID MATCHES "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  message(FATAL_ERROR "attnrb needs Clang 13 or newer, this is ${CMAKE_CXX_COMPILER_VERSION}: install a newer one and "
                      "name it in the environment variable CXX.")
endif()

list(LENGTH CMAKE_OSX_ARCHITECTURES architectures)
if(architectures GREATER 1)
  message(FATAL_ERROR "attnrb is built for one architecture at a time, since each has sources and options of its own; "
                      "CMAKE_OSX_ARCHITECTURES names ${CMAKE_OSX_ARCHITECTURES}.")
endif()

# Asked of the compiler, which also knows the target when it compiles for another machine.
check_cxx_source_compiles("
#if !defined(__x86_64__)
#error
#endif
int main() {}" ATTNRB_TARGET_X86_64)
check_cxx_source_compiles("
#if !defined(__aarch64__)
#error
#endif
int main() {}" ATTNRB_TARGET_AARCH64)

add_library(attnrb_options INTERFACE)
# nvcc has names of its own for these: see Cuda.cmake.
target_compile_options(attnrb_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra>)
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  # GCC's names in pragmas are no mistake.
  target_compile_options(attnrb_options INTERFACE -Wno-unknown-warning-option)
endif()
if(ATTNRB_WERROR)
  target_compile_options(attnrb_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(ATTNRB_MANYLINUX)
  target_compile_options(attnrb_options INTERFACE
    "SHELL:$<$<COMPILE_LANGUAGE:CXX>:-include ${PROJECT_SOURCE_DIR}/csrc/glibc_2_28.h>")
  target_compile_definitions(attnrb_options INTERFACE ATTNRB_MANYLINUX)
endif()
if(ATTNRB_SANITIZE)
  # Both halve the time of compiling. -g1: lines for the stack traces, no variables. Of a null pointer or an access beyond
  # an object AddressSanitizer knows anyway.
  target_compile_options(attnrb_options INTERFACE -fsanitize=${ATTNRB_SANITIZE} -fno-sanitize-recover=all
                                                  -fno-omit-frame-pointer -g1
                                                  -fno-sanitize=null,object-size)
  target_link_options(attnrb_options INTERFACE -fsanitize=${ATTNRB_SANITIZE})
endif()
