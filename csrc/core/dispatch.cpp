// Chooses the kernel table for the processor the program runs on.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifndef ATTNRB_ONLY
#define ATTNRB_ONLY ""  // a developer's build may name the one instruction set that it has kernels for
#endif

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__) && defined(__aarch64__)
#include <sys/sysctl.h>
#endif

namespace attnrb {

// Each defined by its translation unit under kernels/.
extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
extern const Kernels neon_bf16_kernels;
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)

void cpuid(unsigned leaf, unsigned subleaf, unsigned registers[4]) {
  __asm__ volatile("cpuid"
                   : "=a"(registers[0]), "=b"(registers[1]), "=c"(registers[2]), "=d"(registers[3])
                   : "a"(leaf), "c"(subleaf));
}

constexpr int kEax = 0, kEbx = 1, kEcx = 2, kEdx = 3;

bool has_bit(unsigned leaf, unsigned subleaf, int index, int bit) {
  unsigned registers[4];
  cpuid(0, 0, registers);
  if (registers[kEax] < leaf) return false;
  cpuid(leaf, subleaf, registers);
  return (registers[index] >> bit) & 1u;
}

// Clang's __builtin_cpu_supports() knows no "f16c".
bool has_f16c() { return has_bit(1, 0, kEcx, 29); }

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && has_bit(7, 1, kEax, 5); }

// Whether a pair product (VDPBF16PS) takes no longer than a float32 multiply-add: AMD's processors have two units for
// it, where Intel's have one that takes two cycles, which is slower than widening to float32.
bool has_fast_avx512_bf16() {
  unsigned registers[4];
  cpuid(0, 0, registers);
  const unsigned vendor[3] = {registers[kEbx], registers[kEdx], registers[kEcx]};
  return std::memcmp(vendor, "AuthenticAMD", sizeof(vendor)) == 0 && has_avx512_bf16();
}

// Linux gives the 8 KB of tile registers only to a process that asks for them.
bool kernel_permits_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  return has_avx512_bf16() && has_bit(7, 0, kEdx, 24) && has_bit(7, 0, kEdx, 22) && kernel_permits_tiles();
}

#elif defined(__aarch64__)

// FEAT_BF16: BFDOT and BFMMLA. NEON itself is part of every 64-bit ARM processor that these systems run on.
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

#endif

constexpr bool is_built(const char* set) {
  const char* only = ATTNRB_ONLY;
  if (*only == '\0') return true;
  while (*only != '\0' && *only == *set) ++only, ++set;
  return *only == *set;
}

// The table of an instruction set; null where it was not built, and then nothing refers to it.
#define ATTNRB_TABLE(set)                                \
  []() -> const Kernels* {                               \
    if constexpr (is_built(#set)) return &set##_kernels; \
    return nullptr;                                      \
  }()

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
  bool (*faster)() = always;  // than the ones before it, where supported
};

constexpr Candidate kCandidates[] = {
    {ATTNRB_TABLE(portable), always},
#if defined(__x86_64__)
    {ATTNRB_TABLE(avx2), has_avx2},
    {ATTNRB_TABLE(avx512), has_avx512},
    {ATTNRB_TABLE(avx512_bf16), has_avx512_bf16, has_fast_avx512_bf16},
    {ATTNRB_TABLE(amx), has_amx},
#elif defined(__aarch64__)
    {ATTNRB_TABLE(neon), always},
    {ATTNRB_TABLE(neon_bf16), has_neon_bf16},
#endif
};
constexpr int kCandidateCount = int(sizeof(kCandidates) / sizeof(kCandidates[0]));

struct Available {
  const Kernels* tables[kCandidateCount] = {};
  const char* names[kCandidateCount + 1] = {};
  int count = 0;
  const Kernels* best = nullptr;

  Available() {
    for (const Candidate& candidate : kCandidates) {
      if (candidate.kernels == nullptr || !candidate.supported()) continue;
      tables[count] = candidate.kernels;
      names[count++] = candidate.kernels->name;
      if (best == nullptr || candidate.faster()) best = candidate.kernels;
    }
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Kernels& choose() {
  if (available().best == nullptr)
    throw std::runtime_error("attnrb was built with ATTNRB_ONLY=" ATTNRB_ONLY ", which this processor does not have");
  const char* wanted = std::getenv("ATTNRB_CPU");
  if (wanted == nullptr || *wanted == '\0') return *available().best;
  if (const Kernels* table = find_kernels(wanted)) return *table;
  std::string names;
  for (int i = 0; i < available().count; ++i) names += (i ? ", " : "") + std::string(available().names[i]);
  throw std::invalid_argument("ATTNRB_CPU: expected one of " + names + ", got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels* find_kernels(const char* name) {
  for (int i = 0; i < available().count; ++i)
    if (std::strcmp(available().names[i], name) == 0) return available().tables[i];
  return nullptr;
}

const char* const* available_kernels() { return available().names; }

}  // namespace attnrb
