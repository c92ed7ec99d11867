# The oracle and the generator of cases, which tests and benches share: `attnrb_truth`.
include_guard(GLOBAL)
find_package(Threads REQUIRED)
set(truth_dir ${PROJECT_SOURCE_DIR}/tests/cpp)
set(truth_sources ${truth_dir}/array.cpp ${truth_dir}/cases.cpp ${truth_dir}/gradient_case.cpp
  ${truth_dir}/gradient_oracle.cpp ${truth_dir}/oracle.cpp)
add_library(attnrb_truth STATIC ${truth_sources})
if(ATTNRB_SANITIZE)
  # Sanitizers watch the kernels; under them the oracle would take most of the time.
  set_source_files_properties(${truth_sources} PROPERTIES COMPILE_OPTIONS "-O2;-fno-sanitize=all")
endif()
target_include_directories(attnrb_truth PUBLIC ${truth_dir})
target_link_libraries(attnrb_truth PUBLIC attnrb_core Threads::Threads)
