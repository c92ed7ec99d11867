// What the library tells Python of itself: how it was built, what it runs on, and the memory that it keeps. These are C
// functions, which python/attnrb/ops/library.py calls by ctypes, so that one build serves every Python. With the ops,
// which are torch.ops.attnrb.*, they are all that the library shows.
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/kernels.h"
#include "core/outliers.h"
#include "core/scratch.h"

#ifdef ATTNRB_MANYLINUX
// The standard library's headers ask this variable of glibc 2.32 whether counts need no atomics. Here they always do.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
// Newer libraries have constructors of these that older ones had in the header. So they are compiled here, all of them.
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
#endif

#define ATTNRB_EXPORT extern "C" __attribute__((visibility("default")))

// How the library was built: lines of a name, a space and its value. Lists are separated by spaces.
ATTNRB_EXPORT const char* attnrb_build_options() {
  return "version " ATTNRB_VERSION "\ncompiler " ATTNRB_COMPILER "\nbuild_type " ATTNRB_BUILD_TYPE
         "\ninstruction_sets " ATTNRB_INSTRUCTION_SETS "\ncuda " ATTNRB_CUDA_VERSION
         "\ncuda_targets " ATTNRB_CUDA_TARGETS "\ntorch_headers " ATTNRB_TORCH_HEADERS
         "\ntorch_target " ATTNRB_TORCH_TARGET;
}

// The instruction set that the kernels run on. Null where ATTNRB_CPU names an unknown one; `error` then points to a
// sentence, which stays until the next call of this thread.
ATTNRB_EXPORT const char* attnrb_instruction_set(const char** error) {
  static thread_local std::string sentence;
  try {
    return attnrb::kernels().name;
  } catch (const std::exception& refused) {
    sentence = refused.what();
    *error = sentence.c_str();
    return nullptr;
  }
}

// Those that this build and this processor both have, lowest first; null after the last.
ATTNRB_EXPORT const char* const* attnrb_instruction_sets() { return attnrb::available_kernels(); }

// `threshold` is in (0, 1).
ATTNRB_EXPORT int64_t attnrb_outlier_capacity(double threshold) { return attnrb::outlier_capacity(threshold); }

// Bytes of working memory kept for the next call.
ATTNRB_EXPORT size_t attnrb_scratch_bytes() { return attnrb::scratch_bytes(); }
ATTNRB_EXPORT void attnrb_release_scratch() { attnrb::release_scratch(); }
