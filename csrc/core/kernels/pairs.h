// Rows of any element type, read two vectors at a time.
//
// bfloat16 comes out as even and odd elements: one operation on whole registers for each, where widening in order takes
// two. Whoever reads pairs keeps what they meet (packed queries, output sums) in the order that `pair_place` gives.
#pragma once

#include "../types.h"

namespace attnrb {
namespace ATTNRB_ISA {

template <class T>
ATTNRB_INLINE void load_pair(const T* p, Vec& low, Vec& high) {
  low = Vec::load(p);
  high = Vec::load(p + Vec::width);
}
ATTNRB_INLINE void load_pair(const bfloat16* p, Vec& even, Vec& odd) { Vec::load_even_odd(p, even, odd); }

// The first n of them; zeros follow.
template <class T>
ATTNRB_INLINE void load_pair(const T* p, int n, Vec& low, Vec& high) {
  low = Vec::load(p, n);
  high = n > Vec::width ? Vec::load(p + Vec::width, n - Vec::width) : Vec::zero();
}
ATTNRB_INLINE void load_pair(const bfloat16* p, int n, Vec& even, Vec& odd) { Vec::load_even_odd(p, n, even, odd); }

// Where element i of a pair ends up, counted through both vectors.
template <class T>
ATTNRB_INLINE int pair_place(T, int i) {
  return i;
}
ATTNRB_INLINE int pair_place(bfloat16, int i) { return i % 2 * Vec::width + i / 2; }

}  // namespace ATTNRB_ISA
}  // namespace attnrb
