// What attnrb._C may ask of the core. The core lives in libattnrb.so, once, with its scratch memory and its choice of
// kernels; these are the only symbols that library shows.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#define ATTNRB_EXPORT __attribute__((visibility("default")))

namespace attnrb::runtime {

// The instruction set that the kernels run on. Throws std::invalid_argument when ATTNRB_CPU names an unknown one.
ATTNRB_EXPORT std::string instruction_set();
// Those that this build and this processor both have, lowest first.
ATTNRB_EXPORT std::vector<std::string> instruction_sets();
// Bytes of working memory kept for the next call.
ATTNRB_EXPORT size_t scratch_bytes();
ATTNRB_EXPORT void release_scratch();

}  // namespace attnrb::runtime
