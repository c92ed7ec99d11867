// One table in the place of all that a processor runs, for planted_core.py.
#include <cstring>

#include "core/kernels.h"

namespace attnrb {

extern const Kernels avx2_kernels;

const Kernels& kernels() { return avx2_kernels; }

const Kernels* find_kernels(const char* name) { return std::strcmp(name, "avx2") == 0 ? &avx2_kernels : nullptr; }

const char* const* available_kernels() {
  static const char* const names[] = {"avx2", nullptr};
  return names;
}

}  // namespace attnrb
