# The torch-free core: `attnrb_core`. Each instruction set has one translation unit, and only that one is compiled for it.
set(core_dir ${PROJECT_SOURCE_DIR}/csrc/core)
set(core_sources ${core_dir}/dispatch.cpp ${core_dir}/scratch.cpp ${core_dir}/thread_pool.cpp
  ${core_dir}/kernels/portable.cpp)
set(ATTNRB_INSTRUCTION_SETS portable)

function(attnrb_add_instruction_set name)
  set(source ${core_dir}/kernels/${name}.cpp)
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${ARGN}")
  set(core_sources ${core_sources} ${source} PARENT_SCOPE)
  set(ATTNRB_INSTRUCTION_SETS ${ATTNRB_INSTRUCTION_SETS} ${name} PARENT_SCOPE)
endfunction()

if(ATTNRB_TARGET_X86_64)
  set(avx2_flags -mavx2 -mfma -mf16c)
  set(avx512_flags ${avx2_flags} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  set(avx512_bf16_flags ${avx512_flags} -mavx512bf16)
  set(ATTNRB_AMX_FLAGS ${avx512_bf16_flags} -mamx-tile -mamx-bf16)
  attnrb_add_instruction_set(avx2 ${avx2_flags})
  attnrb_add_instruction_set(avx512 ${avx512_flags})
  attnrb_add_instruction_set(avx512_bf16 ${avx512_bf16_flags})
  attnrb_add_instruction_set(amx ${ATTNRB_AMX_FLAGS})
endif()

add_library(attnrb_core STATIC ${core_sources})
target_include_directories(attnrb_core PUBLIC ${PROJECT_SOURCE_DIR}/csrc)
target_link_libraries(attnrb_core PUBLIC attnrb_options)
