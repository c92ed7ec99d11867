// What the attention kernels are started with. The host fills it in (cuda/plan.cpp).
//
// Note: [Rows of a group]
// The query heads that share a key head are rows of one problem: row r of batch element b and key head k is query r / G
// of head k G + r % G. A tile of 64 rows then reads each key once for all of them, and decoding, where a head has one
// query, fills its tile as far as it can.
//
// Note: [Split keys]
// Where there are too few row tiles to fill the device, several blocks share the keys of a tile. Each leaves a softmax
// over its keys alone (reference m, sum l, unscaled sums of values) and that softmax's own outliers, of which there are
// no more than of any other; the merge kernel puts the first together and filters the second with the final l.
#pragma once

#include "core/problem.h"

namespace attnrb::cuda {

// An operand [batch, heads, rows, width]. `aligned`: 16-byte copies fit, that is, columns are adjacent, and rows and
// their length come in whole units of 16 bytes.
struct Operand {
  const void* data;
  int64_t strides[4];
  int32_t width;
  bool aligned;
};

// How rows lie in shared memory: see Note: [Tiles in shared memory].
struct RowLayout {
  int32_t stride = 0;  // in elements
  int32_t turned = 0;  // 7 where units of 16 bytes are turned, 0 where they are not
};

// Find outliers; strengthen them; only the rows' softmax; all of that at once where there may be a key bias; the rows'
// softmax with a key bias; and whatever an edit may ask for, under rule rest.
enum class Task { source, rebalance, softmax, edited, biased_softmax, rest };

constexpr bool may_have_bias(Task task) {
  return task == Task::edited || task == Task::biased_softmax || task == Task::rest;
}
// Columns of values that a block of threads sums up, for which its kernel is compiled. Where registers are to spare
// (float32, whose tiles have half as many keys, keys in blocks, the softmax alone) the kernel for 128 takes narrow rows
// too, with no more work. Under rule rest both softmaxes and sums of 128 columns are too much for registers.
constexpr int width_class(Task task, int64_t width, int64_t element_bytes, bool ragged) {
  const bool half = element_bytes == 2;
  if (task == Task::rest) return width > 128 && half ? 256 : 64;
  if (width > 128) return 256;
  const bool softmax_alone = task == Task::softmax || task == Task::biased_softmax;
  return width <= 64 && half && !ragged && !softmax_alone ? 64 : 128;
}
// Whether whole tiles have code of their own, and keys a third buffer (Note: [Two stages]): what an edit keeps, sums of
// 256 columns, or the parts of float32 leave no registers for them.
constexpr bool has_third_buffer(Task task, int width, int64_t element_bytes) {
  return !may_have_bias(task) && width <= 128 && element_bytes == 2;
}

// Row (b, k, r) of split s has index ((b Hk + k) rows + r) splits + s.
struct Partials {
  float* state = nullptr;         // [index, 4]: m, l, strengthened mass, 1 where a key was seen
  float* sums = nullptr;          // [index, value_width]
  float* chosen_state = nullptr;  // under rule rest, the same of a row's outliers; `state` is of the others then
  float* chosen_sums = nullptr;
  float* candidate_scores = nullptr;    // [index, capacity]
  int32_t* candidates = nullptr;        // [index, capacity], key positions
  int32_t* candidate_counts = nullptr;  // [index]
};

// Where the blocks of each sequence are listed. Dividing a key by their rows is a multiplication: with l the least
// number for which rows <= 2^l, and factor the least integer that is not below 2^(31 + l) / rows, the quotient of any
// key below 2^31 is the product shifted down by 31 + l.
struct BlockTable {
  const int32_t* table = nullptr;
  int64_t stride = 0;  // entries from one sequence to the next
  uint32_t rows = 1, factor = 0;
  int32_t shift = 0;

  ATTNRB_INLINE uint32_t of(uint32_t key) const { return uint32_t((uint64_t(key) * factor) >> shift); }
};

// What becomes of the rows of a sequence without keys: nothing; -inf and empty lists; zeros besides.
enum class Skipped : int32_t { untouched, told, cleared };

struct AttentionParameters {
  AttentionProblem problem;
  Operand query, key, value;
  Partials partials;
  int64_t rows = 0;       // G M
  int64_t row_tiles = 0;  // of 64
  int32_t group = 1;      // G
  int32_t splits = 1;
  int32_t slices = 1;         // of the value width
  int32_t columns = 0;        // of a query or key row in shared memory
  int32_t value_columns = 0;  // of a value row
  int32_t gain_stride = 1;    // 0: one gain for all heads
  int32_t kept = 0;           // bytes of shared memory before Note: [Kept words]
  bool ahead = false;         // whether there are two buffers for keys: see Note: [Two stages]
  RowLayout layout;           // of query and key rows in shared memory
  float factor = 1.0f;        // scores are factor * product, or cap * tanh(inner * product), times log2(e)
  float inner = 0.0f, cap = 0.0f;
  float threshold_log2 = 0.0f;
  int32_t* status = nullptr;
  // [B, Hk, row tiles] and [B, Hk, G M]: 0 where a tile, or a row, is to be left as it is; null: none is.
  const int32_t *wanted_tiles = nullptr, *wanted_rows = nullptr;
  // Of ragged sequences: see Note: [Ragged rows].
  BlockTable blocks;
  int32_t of_sequence = 0;  // bytes of shared memory before what a block knows of its sequence
  Skipped skipped = Skipped::untouched;
};

// How many keys a sequence has whose tables lead nowhere: its rows become NaN.
constexpr int64_t kBrokenSequence = -1;

// The tables of ragged sequences as they came, and the numbers that the kernels read in their place.
struct TableParameters {
  const int32_t* table = nullptr;                                  // [batch, ...]
  int64_t table_stride = 0, blocks = 0, block_rows = 1, room = 0;  // room: for keys of a sequence
  const void *starts = nullptr, *lengths = nullptr;  // [batch + 1] and [batch], int32, or int64 where `wide_...`
  bool wide_starts = false, wide_lengths = false;
  int64_t batch = 0, queries = 0;
  int64_t *query_starts = nullptr, *key_counts = nullptr, *query_offsets = nullptr;  // [batch + 1], [batch], [batch]
};

struct ReceivedParameters {
  AttentionParameters rows;  // the same queries and keys; problem.softmax holds every row's m and l
  float* received = nullptr;
  int32_t stages = 2;  // of queries: one where two do not fit shared memory
};

// Note: [Kept words]
// What an edited row needs once a tile or less would press registers that sums of values need: each thread keeps these
// words behind the buffers in shared memory, the same word of all threads side by side.
constexpr int kKeptWords = 15;

// What a block knows of its sequence: see Note: [Ragged rows].
constexpr int kSequenceBytes = 5 * int(sizeof(int32_t));

constexpr int kWarps = 4, kThreads = 32 * kWarps, kTileRows = 16 * kWarps;

// `Width`: the class of widths, at most 64, 128 or 256 (wider queries and keys are possible, wider values are cut).
template <class T, int Width>
struct Tile {
  // As many as registers hold scores for beside the sums of values.
  static constexpr int keys = (Width <= 128 ? 128 : 64) / int(sizeof(T));
  static constexpr int score_tiles = keys / 8;
  static constexpr int value_tiles = Width / 8;
  static constexpr int unit = 16 / int(sizeof(T));  // columns in 16 bytes
  static constexpr int step = 2 * unit;             // columns, or keys, of one tensor-core step
};

}  // namespace attnrb::cuda
