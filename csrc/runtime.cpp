#include "runtime.h"

#include "core/kernels.h"
#include "core/scratch.h"

namespace attnrb::runtime {

std::string instruction_set() { return kernels().name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* const* name = available_kernels(); *name != nullptr; ++name) names.emplace_back(*name);
  return names;
}

size_t scratch_bytes() { return attnrb::scratch_bytes(); }

void release_scratch() { attnrb::release_scratch(); }

}  // namespace attnrb::runtime
