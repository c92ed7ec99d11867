// Large memory in huge pages, where the system leaves that to programs.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attnrb {

// Memory that was just taken from the system arrives page by page, as it is first written: 4 KB at a time that is a
// fifth of source_attention's time. Asks for 2 MB at a time. What lies outside whole huge pages is left alone, and a
// system that refuses only goes on as before.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace attnrb
