// Keys and values in blocks, and ragged queries: every sequence of a generated call has the results of a call of its
// own on rows that lie side by side. Rows that no table names are NaN; the oracle knows the strided kernels already.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "core/outliers.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {
namespace {

int64_t case_count() {
  const char* text = std::getenv("ATTNRB_TEST_CASES");
  return text == nullptr ? 800 : std::min<int64_t>(800, std::atoll(text));
}

struct Results {
  Array output;  // [queries, H, 1, Dv]
  std::vector<float> lse;
  std::vector<int32_t> found, counts;

  Results(const Shape& shape, DType dtype, int64_t capacity)
      : output(dtype, {shape.queries, shape.heads, 1, shape.value_width}),
        lse(size_t(shape.queries * shape.heads), -77.0f),
        found(size_t(shape.queries * shape.heads * capacity), kUnwritten),
        counts(size_t(shape.queries * shape.heads), kUnwritten) {
    output.fill_sentinel();
  }
};

struct PagedCase {
  Shape shape;
  DType dtype = DType::float32;
  int64_t blocks = 0, block_rows = 0, table_width = 0, capacity = 0, held = 0;  // of emitted and of given outliers
  std::vector<int64_t> starts, lengths, offsets, first_query;
  std::vector<int32_t> table, indices, counts;
  std::vector<float> gain, bias, sinks;
  bool gain_of_sequences = false;
  Array query, key, value;
  Visibility visibility;
  Scoring scoring;
  Rule rule = Rule::none;

  explicit PagedCase(uint64_t seed);

  AttentionProblem problem(Results& results) const;
  // Of one sequence, with rows side by side in `keys` and `values`.
  AttentionProblem alone(int64_t b, Results& results, Array& keys, Array& values) const;

 private:
  void add_sequences(Random& random);
  void add_table(Random& random);
  void add_edit(Random& random);
  void set_options(AttentionProblem& problem, Results& results) const;
};

PagedCase::PagedCase(uint64_t seed) {
  Random random(seed);
  shape.key_heads = random.integer(1, 3);
  shape.heads = shape.key_heads * random.pick<int64_t>({1, 1, 2, 3, 8});
  shape.width = random.pick<int64_t>({8, 16, 33, 64, 80});
  shape.value_width = random.pick<int64_t>({8, 16, 24, 64, 65});
  dtype = random.pick({DType::float32, DType::bfloat16, DType::float16});
  block_rows = random.pick<int64_t>({1, 3, 5, 8, 16, 20, 24, 32, 64, 128});
  add_sequences(random);
  add_table(random);
  visibility.causal = random.chance(0.9);
  visibility.window = random.chance(0.3) ? random.integer(1, 60) : 0;
  visibility.chunk = random.chance(0.2) ? random.integer(1, 60) : 0;
  scoring.scale = random.pick({0.3f, 0.3f, 0.3f, -0.2f, 0.0f});
  scoring.softcap = random.chance(0.2) ? 3.0f : 0.0f;
  if (random.chance(0.3))
    for (int64_t h = 0; h < shape.heads; ++h) sinks.push_back(float(random.uniform(-2, 2)));
  if (random.chance(0.6)) capacity = outlier_capacity(0.02, table_width * block_rows);
  add_edit(random);
}

void PagedCase::add_sequences(Random& random) {
  shape.batch = random.integer(1, 4);
  starts.push_back(0);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t keys = random.chance(0.15) ? 0 : random.integer(1, random.chance(0.1) ? 600 : 120);
    int64_t queries = random.pick<int64_t>({1, 1, 1, 2, keys / 2, keys, 0});
    if (keys > 0) queries = std::min(queries, keys);
    starts.push_back(starts.back() + queries);
    lengths.push_back(keys);
    offsets.push_back(keys - queries - starts[size_t(b)]);
    shape.keys = std::max(shape.keys, keys);
  }
  shape.queries = starts.back();
  query = Array(dtype, {shape.queries, shape.heads, 1, shape.width});
  query.fill_uniform(random, -2.0, 2.0);
}

void PagedCase::add_table(Random& random) {
  std::vector<int64_t> needed;
  for (const int64_t keys : lengths) needed.push_back((keys + block_rows - 1) / block_rows);
  table_width = *std::max_element(needed.begin(), needed.end()) + random.integer(0, 1);
  blocks = std::accumulate(needed.begin(), needed.end(), int64_t(1));
  std::vector<int32_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[size_t(random.integer(0, int64_t(i)))]);
  const Layout layout = {random.pick<std::array<int, 4>>({{0, 1, 2, 3}, {0, 2, 1, 3}, {1, 0, 2, 3}}), 1,
                         random.pick<int64_t>({0, 0, 5}), random.integer(0, 3)};
  key = Array(dtype, {blocks, shape.key_heads, block_rows, shape.width}, layout);
  value = Array(dtype, {blocks, shape.key_heads, block_rows, shape.value_width}, layout);
  key.fill_sentinel();
  value.fill_sentinel();
  table.assign(size_t(shape.batch * table_width), -5);
  size_t taken = 0;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t j = 0; j < lengths[size_t(b)]; ++j) {
      int32_t& block = table[size_t(b * table_width + j / block_rows)];
      if (j % block_rows == 0) block = order[taken++];
      for (int64_t h = 0; h < shape.key_heads; ++h) {
        for (int64_t d = 0; d < shape.width; ++d) key.set(block, h, j % block_rows, d, random.uniform(-1, 1));
        for (int64_t d = 0; d < shape.value_width; ++d) value.set(block, h, j % block_rows, d, random.uniform(-1, 1));
      }
    }
}

void PagedCase::add_edit(Random& random) {
  const int64_t rows = shape.queries * shape.heads;
  rule = random.pick({Rule::none, Rule::row, Rule::rest});
  if (random.chance(0.7)) {
    held = random.pick<int64_t>({1, 6, 30});
    gain_of_sequences = random.chance(0.5);
    for (int64_t i = 0; i < shape.heads * (gain_of_sequences ? shape.batch : 1); ++i)
      gain.push_back(float(random.uniform(-0.9, 2.0)));
    for (int64_t row = 0; row < rows; ++row) {
      int32_t slot = -1;
      for (int64_t c = 0; c < held; ++c) indices.push_back(slot += int32_t(random.integer(1, shape.keys / held + 2)));
      counts.push_back(int32_t(random.integer(0, held)));
    }
  }
  if (random.chance(0.4)) {
    for (int64_t i = 0; i < shape.batch * (shape.keys + 3); ++i)
      bias.push_back(random.chance(0.1) ? -std::numeric_limits<float>::infinity() : float(random.uniform(-2, 2)));
    if (random.chance(0.5))
      for (const int64_t keys : lengths) first_query.push_back(random.integer(0, keys));
  }
}

void PagedCase::set_options(AttentionProblem& problem, Results& results) const {
  problem.dtype = dtype;
  problem.visibility = visibility;
  problem.scoring = scoring;
  problem.scoring.sinks = sinks.empty() ? nullptr : sinks.data();
  problem.edit.rule = rule;
  problem.edit.capacity = held;
  problem.output = results.output.data();
  problem.lse = results.lse.data();
  if (capacity == 0) return;
  problem.emit = {results.found.data(), results.counts.data(), capacity, 0.02};
}

AttentionProblem PagedCase::problem(Results& results) const {
  AttentionProblem problem;
  problem.shape = shape;
  problem.shape.query_starts = starts.data();
  problem.shape.key_counts = lengths.data();
  set_options(problem, results);
  problem.query = {query.data(), {0, query.strides()[1], query.strides()[0], 1}};
  for (const auto& [rows, pool] : {std::pair<KeyRows*, const Array*>{&problem.key, &key}, {&problem.value, &value}}) {
    *rows = pool->view();
    rows->table = table.data();
    rows->table_stride = table_width;
    rows->block_rows = uint32_t(block_rows);
  }
  problem.visibility.query_offsets = offsets.data();
  problem.output_strides[1] = results.output.strides()[1];
  problem.output_strides[2] = results.output.strides()[0];
  if (held > 0) {
    problem.edit.indices = indices.data();
    problem.edit.counts = counts.data();
    problem.edit.gain = gain.data();
    problem.edit.gain_stride = gain_of_sequences ? shape.heads : 0;
  }
  if (!bias.empty()) {
    problem.edit.key_bias = bias.data();
    problem.edit.bias_slots = shape.keys + 3;
    problem.edit.bias_strides[0] = shape.keys + 3;
    problem.edit.bias_strides[2] = 1;
    problem.edit.first_query = first_query.empty() ? nullptr : first_query.data();
  }
  return problem;
}

AttentionProblem PagedCase::alone(int64_t b, Results& results, Array& keys, Array& values) const {
  AttentionProblem problem;
  const size_t i = size_t(b);
  const int64_t first = starts[i], count = starts[i + 1] - first, length = lengths[i];
  problem.shape = shape;
  problem.shape.batch = 1;
  problem.shape.queries = count;
  problem.shape.keys = length;
  set_options(problem, results);
  keys = Array(dtype, {1, shape.key_heads, length, shape.width});
  values = Array(dtype, {1, shape.key_heads, length, shape.value_width});
  for (int64_t h = 0; h < shape.key_heads; ++h)
    for (int64_t j = 0; j < length; ++j) {
      const int32_t block = table[size_t(b * table_width + j / block_rows)];
      for (int64_t d = 0; d < shape.width; ++d) keys.set(0, h, j, d, key.at(block, h, j % block_rows, d));
      for (int64_t d = 0; d < shape.value_width; ++d) values.set(0, h, j, d, value.at(block, h, j % block_rows, d));
    }
  problem.key = keys.view();
  problem.value = values.view();
  const int64_t row = query.strides()[0] * element_size(dtype);
  problem.query = {static_cast<const char*>(query.data()) + first * row,
                   {0, query.strides()[1], query.strides()[0], 1}};
  problem.visibility.query_offset = length - count;
  problem.output_strides[1] = results.output.strides()[1];
  problem.output_strides[2] = results.output.strides()[0];
  if (!bias.empty()) {
    problem.edit.key_bias = bias.data() + b * (shape.keys + 3);
    problem.edit.bias_slots = shape.keys + 3;
    problem.edit.bias_strides[2] = 1;
    problem.edit.first_query = first_query.empty() ? nullptr : first_query.data() + b;
  }
  return problem;
}

// A row's numbers lie in [H, M] where sequences are rectangular, in [M, H] where they are ragged.
template <class T>
std::vector<T> by_head(const std::vector<T>& rows, int64_t first, int64_t queries, int64_t heads, int64_t width) {
  std::vector<T> turned;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t m = 0; m < queries; ++m) {
      const auto row = rows.begin() + ((first + m) * heads + h) * width;
      turned.insert(turned.end(), row, row + width);
    }
  return turned;
}

class Paging : public KernelTest {
 protected:
  const Kernels& kernels() const { return *GetParam(); }

  Results run(const PagedCase& paged, int64_t threads) {
    Results results(paged.shape, paged.dtype, paged.capacity);
    ScratchLease scratch;
    EXPECT_EQ(kernels().attention(paged.problem(results), test_pool(threads), *scratch), Status::ok);
    return results;
  }

  // Whether blocks leave the order of additions alone: pair products of bfloat16 add two keys of one block at a time,
  // and a long decode is cut into other spans. On a device, how many blocks share the keys depends on the other rows.
  bool adds_in_order(const PagedCase& paged, int64_t b) const {
    const int64_t queries = paged.starts[size_t(b) + 1] - paged.starts[size_t(b)];
    if (on_device(kernels())) return !splits_keys(kernels());
    if (queries > 1 && queries * (paged.shape.heads / paged.shape.key_heads) > 16) return true;
    const std::string name = kernels().name;
    const bool pairs = paged.dtype == DType::bfloat16 && (name == "avx512_bf16" || name == "neon_bf16");
    const bool even = paged.block_rows % 2 == 0 && paged.visibility.window == 0 && paged.visibility.chunk == 0;
    return paged.lengths[size_t(b)] <= 512 && (even || !pairs);
  }

  void compare(const PagedCase& paged, const Results& together, int64_t b) {
    const Shape& shape = paged.shape;
    const int64_t first = paged.starts[size_t(b)], queries = paged.starts[size_t(b) + 1] - first;
    Shape own = shape;
    own.queries = queries;
    Results results(own, paged.dtype, paged.capacity);
    Array keys, values;
    AttentionProblem problem = paged.alone(b, results, keys, values);
    const std::vector<int32_t> indices =
        paged.held == 0 ? paged.indices : by_head(paged.indices, first, queries, shape.heads, paged.held);
    const std::vector<int32_t> counts =
        paged.held == 0 ? paged.counts : by_head(paged.counts, first, queries, shape.heads, 1);
    if (paged.held > 0) {
      problem.edit.indices = indices.data();
      problem.edit.counts = counts.data();
      problem.edit.gain = paged.gain.data() + (paged.gain_of_sequences ? b * shape.heads : 0);
    }
    ScratchLease scratch;
    ASSERT_EQ(kernels().attention(problem, test_pool(1), *scratch), Status::ok);
    const bool same = adds_in_order(paged, b);
    const double rounding = paged.dtype == DType::float32 ? 1e-5 : paged.dtype == DType::bfloat16 ? 3e-2 : 4e-3;
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t d = 0; d < shape.value_width; ++d) {
          const double got = together.output.at(first + t, h, 0, d), expected = results.output.at(t, h, 0, d);
          if (same)
            ASSERT_EQ(got, expected) << "query " << t << " head " << h;
          else
            ASSERT_NEAR(got, expected, rounding) << "query " << t << " head " << h;
        }
    if (!same) {
      const std::vector<float> lse = by_head(together.lse, first, queries, shape.heads, 1);
      // Under rule row it has what strengthened weights gain, each rounded to the type: once on either side.
      const double unit = paged.dtype == DType::float32 ? 0.0 : paged.dtype == DType::bfloat16 ? 0x1p-9 : 0x1p-12;
      const double gained = paged.rule == Rule::row && paged.held > 0 ? 2.0 * unit : 0.0;
      for (size_t row = 0; row < lse.size(); ++row) {
        // Of equal infinities the difference is NaN.
        if (lse[row] == results.lse[row]) continue;
        ASSERT_NEAR(lse[row], results.lse[row], 1e-5 * (1.0 + std::fabs(results.lse[row])) + gained) << "row " << row;
      }
      return;
    }
    EXPECT_EQ(by_head(together.lse, first, queries, shape.heads, 1), results.lse);
    if (paged.capacity == 0) return;
    EXPECT_EQ(by_head(together.found, first, queries, shape.heads, paged.capacity), results.found);
    EXPECT_EQ(by_head(together.counts, first, queries, shape.heads, 1), results.counts);
  }
};

TEST_P(Paging, EverySequenceHasTheResultsOfACallOfItsOwn) {
  for (int64_t seed = 0; seed < case_count(); ++seed) {
    const PagedCase paged{uint64_t(seed)};
    const Results together = run(paged, 2);
    for (int64_t b = 0; b < paged.shape.batch; ++b) {
      const int64_t first = paged.starts[size_t(b)], last = paged.starts[size_t(b) + 1];
      if (paged.lengths[size_t(b)] > 0) {
        compare(paged, together, b);
        if (HasFatalFailure() || HasFailure()) FAIL() << "seed " << seed << ", sequence " << b;
        continue;
      }
      for (int64_t row = first * paged.shape.heads; row < last * paged.shape.heads; ++row) {
        ASSERT_EQ(together.lse[size_t(row)], -77.0f) << "a skipped row was written, seed " << seed;
        ASSERT_TRUE(std::isnan(together.output.at(row / paged.shape.heads, row % paged.shape.heads, 0, 0)));
      }
    }
    ASSERT_TRUE(together.output.surroundings_untouched()) << "seed " << seed;
  }
}

TEST_P(Paging, ThreadsChangeNothing) {
  for (int64_t seed = 1000; seed < 1000 + case_count() / 20; ++seed) {
    const PagedCase paged{uint64_t(seed)};
    const Results alone = run(paged, 1), several = run(paged, 4);
    ASSERT_EQ(alone.output.bytes(), several.output.bytes()) << "seed " << seed;
    ASSERT_EQ(alone.lse, several.lse) << "seed " << seed;
    ASSERT_EQ(alone.found, several.found) << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, Paging, ::testing::ValuesIn(tested_kernels()), kernel_name);

}  // namespace
}  // namespace attnrb::testing
