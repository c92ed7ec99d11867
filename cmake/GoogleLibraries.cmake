# GoogleTest and Google Benchmark: the installed ones, else built from the sources that Debian's package brings or from
# pinned archives, else not at all.
include(FetchContent)

# Declares the archive and builds it, unless the machine cannot reach it: FetchContent stops the whole configuration then,
# so the archive is tried first.
function(attnrb_fetch name url hash)
  set(archive ${CMAKE_BINARY_DIR}/archives/${name}.tar.gz)
  if(NOT EXISTS ${archive})
    message(STATUS "attnrb: fetching ${name}")
    file(DOWNLOAD ${url} ${archive}.part STATUS status TIMEOUT 120)
    list(GET status 0 code)
    if(NOT code EQUAL 0)
      message(STATUS "attnrb: ${name} could not be downloaded: ${status}")
      file(REMOVE ${archive}.part)
      return()
    endif()
    file(RENAME ${archive}.part ${archive})
  endif()
  FetchContent_Declare(${name} URL ${archive} URL_HASH SHA256=${hash} DOWNLOAD_EXTRACT_TIMESTAMP ON)
  FetchContent_MakeAvailable(${name})
endfunction()

macro(attnrb_find_googletest)
  find_package(GTest QUIET)
  if(NOT TARGET GTest::gtest_main)
    set(INSTALL_GTEST OFF)
    set(BUILD_GMOCK OFF)
    if(EXISTS /usr/src/googletest/CMakeLists.txt)
      add_subdirectory(/usr/src/googletest ${CMAKE_BINARY_DIR}/googletest EXCLUDE_FROM_ALL)
    else()
      attnrb_fetch(googletest https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
                   8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7)
    endif()
    if(TARGET gtest_main AND NOT TARGET GTest::gtest_main)
      add_library(GTest::gtest_main ALIAS gtest_main)
    endif()
  endif()
endmacro()

macro(attnrb_find_benchmark)
  find_package(benchmark QUIET)
  if(NOT TARGET benchmark::benchmark)
    set(BENCHMARK_ENABLE_TESTING OFF)
    set(BENCHMARK_ENABLE_INSTALL OFF)
    attnrb_fetch(benchmark https://github.com/google/benchmark/archive/refs/tags/v1.8.3.tar.gz
                 6bc180a57d23d4d9515519f92b0c83d61b05b5bab188961f36ac7b06b0d9e9ce)
  endif()
endmacro()
