// Generated attention problems: every dtype, odd sizes, every kind of visibility, any strides.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "array.h"
#include "core/problem.h"
#include "random.h"

namespace attnrb::testing {

// What outlier rows hold before a kernel writes them; one more element behind them keeps it.
constexpr int32_t kUnwritten = -77;

// What a case asks for: nothing, outliers, that some be strengthened, or both.
enum class Role { plain, source, rebalanced, both };

// A problem and everything its pointers lead into. The output lies in a sentinel buffer too.
struct AttentionCase {
  Role role = Role::plain;
  Shape shape;
  DType dtype = DType::float32;
  Visibility visibility;
  Scoring scoring;
  double threshold = 0.01;
  Rule rule = Rule::none;
  bool shared_rows = false;

  Array query, key, value, output;
  std::vector<int64_t> key_start, key_end, query_offsets, first_query;
  std::unique_ptr<bool[]> mask;
  std::vector<float> sinks, gain, bias;
  int64_t bias_sizes[3] = {0, 0, 0}, bias_strides[3] = {0, 0, 0};  // 1 and 0 where broadcast
  std::vector<int32_t> indices, counts;                            // of a case that strengthens
  int64_t capacity = 0;

  // What a kernel writes besides the output.
  std::vector<float> lse;
  std::vector<int32_t> found, found_counts;  // of a case that asks for outliers

  // The problem, with results that hold sentinels again.
  AttentionProblem problem();
  Edit edit() const;
  bool emits() const { return role == Role::source || role == Role::both; }
  bool edits() const { return role == Role::rebalanced || role == Role::both; }
  ReceivedProblem received_problem(std::vector<float>& received) const;
  std::string describe() const;

  int64_t rows() const { return shape.batch * shape.heads * shape.queries; }
};

// What a case has for certain; otherwise it is a matter of chance, and rows wider than 128 never come. Small: a few
// thousand products, for as many calls as possible.
struct Rarities {
  bool wide = false, capped = false, windowed = false, small = false;
};

// Sizes up to a few hundred keys; every feature is on in some cases and off in most.
AttentionCase generate_case(uint64_t seed, const Rarities& rarities = {});

// The same with the options that re-balancing does without: a key bias, first queries, rule rest, lists that all
// queries of a head share, outliers asked for beside, slots for each sequence, chunks.
AttentionCase generate_edited_case(uint64_t seed, const Rarities& rarities = {});

// A plain causal case of given sizes, float32 unless said otherwise, contiguous.
AttentionCase simple_case(const Shape& shape, DType dtype = DType::float32, uint64_t seed = 1);

// Gives a case random outlier rows: ascending slots, some of them beyond what is cached or visible.
void add_outliers(AttentionCase& attention, Random& random, int64_t capacity);

const char* dtype_name(DType dtype);

}  // namespace attnrb::testing
