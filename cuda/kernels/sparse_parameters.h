// What is added to a dense kernel of another library, which left the output and the log-sum-exp of plain attention: the
// outliers are selected from them, or strengthened.
//
// Note: [Doubtful rows]
// Other libraries let a value of NaN or infinity reach rows that do not see it, through a product with zero. Rows whose
// dense output is not finite throughout are noted, and their tiles, and our own kernel does those anew, which says what
// they really are. Where there are none, as nearly always, its blocks end at once.
#pragma once

#include "parameters.h"

namespace attnrb::cuda {

struct SparseParameters {
  // problem.emit and problem.edit say what; problem.output is where a corrected output goes, in its own layout, and
  // problem.lse where the log-sum-exp goes, corrected, or null.
  AttentionParameters rows;
  uint32_t key_bytes = 0, value_bytes = 0;  // from a row of keys, or of values, to the next
  const void* dense_output = nullptr;       // [B, H, M, D] by strides: problem.output itself, or elsewhere
  int64_t dense_strides[3] = {0, 0, 0};
  const float* dense_lse = nullptr;  // [B, H, M] by strides
  int64_t lse_strides[3] = {0, 0, 0};
  // [B, Hk, row tiles] and [B, Hk, G M], zeros before: 1 for what is doubtful.
  int32_t *doubtful_tiles = nullptr, *doubtful_rows = nullptr;
};

}  // namespace attnrb::cuda
