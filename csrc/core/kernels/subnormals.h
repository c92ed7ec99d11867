// Note: [Subnormal results]
// A product or a 2^n below 2^-126 is subnormal, and x86 processors compute such results in microcode, some 200 cycles
// each instead of one. Masked keys (2^-200) and sharp attention produce them by the thousand, and nothing depends on
// weights below 1e-38, so kernels have the processor flush them to zero. Inputs are taken as they are.
#pragma once

#include "../types.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace attnrb {
namespace ATTNRB_ISA {

// While one lives, this thread's subnormal float results become zero.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  ATTNRB_INLINE FlushSubnormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ | kFlushToZero); }
  ATTNRB_INLINE ~FlushSubnormals() { _mm_setcsr(control_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  const unsigned control_;
#else
  ATTNRB_INLINE FlushSubnormals() {}
  ATTNRB_INLINE ~FlushSubnormals() {}

 public:
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
