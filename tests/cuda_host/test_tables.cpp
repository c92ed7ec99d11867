// Tables of ragged sequences that break the rules, on the emulated device: their rows become NaN, nobody else's change,
// and nothing is read through them. And the writer of keys, for slots of any kind.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "blocks.h"
#include "launch.h"
#include "random.h"

namespace attnrb::cuda {
namespace {

using attnrb::testing::Random;

constexpr int32_t kFar = std::numeric_limits<int32_t>::max();

// Sequences on blocks of their own, with what is wrong with some of them.
struct Tables {
  int64_t batch, blocks, block_rows, width, queries = 0;
  std::vector<int32_t> table, starts{0};
  std::vector<int64_t> lengths;
  std::vector<bool> broken;
  std::vector<int64_t> query_starts, key_counts, query_offsets;

  explicit Tables(Random& random)
      : batch(random.integer(1, 5)),
        blocks(random.integer(8, 20)),
        block_rows(random.pick<int64_t>({1, 3, 16})),
        width(random.integer(1, 4)) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t keys = random.chance(0.2) ? 0 : random.integer(1, width * block_rows);
      const int64_t rows = keys == 0 ? random.integer(0, 3) : random.integer(0, keys);
      queries += rows;
      starts.push_back(int32_t(queries));
      lengths.push_back(keys);
      for (int64_t j = 0; j < width; ++j)
        table.push_back(j * block_rows < keys ? int32_t(random.integer(0, blocks - 1)) : -kFar);
    }
    broken.assign(size_t(batch), false);
  }

  void break_some(Random& random) {
    for (int64_t b = 0; b < batch; ++b) {
      const size_t at = size_t(b);
      if (!random.chance(0.4)) continue;
      const int64_t rows = starts[at + 1] - starts[at];
      if (lengths[at] > 0 && random.chance(0.5)) {
        const int64_t used = (lengths[at] + block_rows - 1) / block_rows;
        table[size_t(b * width + random.integer(0, used - 1))] =
            random.pick<int32_t>({-1, int32_t(blocks), kFar, -kFar});
      } else if (random.chance(0.5) || rows < 2) {
        lengths[at] = random.pick<int64_t>({-1, width * block_rows + 1, int64_t(1) << 40, -(int64_t(1) << 62)});
      } else {
        lengths[at] = rows - 1;
      }
      broken[at] = true;
    }
  }

  void run() {
    query_starts.assign(size_t(batch + 1), -77);
    key_counts.assign(size_t(batch), -77);
    query_offsets.assign(size_t(batch), -77);
    TableParameters p;
    p.table = table.data();
    p.table_stride = width;
    p.blocks = blocks;
    p.block_rows = block_rows;
    p.room = width * block_rows;
    p.starts = starts.data();
    p.lengths = lengths.data();
    p.wide_lengths = true;
    p.batch = batch;
    p.queries = queries;
    p.query_starts = query_starts.data();
    p.key_counts = key_counts.data();
    p.query_offsets = query_offsets.data();
    start_tables(p, nullptr);
  }
};

TEST(Tables, NumbersThatKeepTheRulesAreTaken) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    Tables tables(random);
    tables.run();
    for (int64_t b = 0; b < tables.batch; ++b) {
      const size_t at = size_t(b);
      ASSERT_EQ(tables.query_starts[at], tables.starts[at]) << "seed " << seed;
      ASSERT_EQ(tables.key_counts[at], tables.lengths[at]) << "seed " << seed;
      ASSERT_EQ(tables.query_offsets[at], tables.lengths[at] - tables.starts[at + 1]) << "seed " << seed;
    }
    ASSERT_EQ(tables.query_starts.back(), tables.queries);
  }
}

TEST(Tables, ABrokenSequenceIsToldFromOthers) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    Random random(seed);
    Tables tables(random);
    tables.break_some(random);
    tables.run();
    for (size_t b = 0; b < size_t(tables.batch); ++b)
      ASSERT_EQ(tables.key_counts[b], tables.broken[b] ? kBrokenSequence : tables.lengths[b]) << "seed " << seed;
    for (size_t b = 0; b < tables.starts.size(); ++b) ASSERT_EQ(tables.query_starts[b], tables.starts[b]);
  }
}

TEST(Tables, WhereStartsBreakTheRulesAllRowsAreBroken) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed);
    Tables tables(random);
    const size_t at = size_t(random.integer(0, tables.batch));
    const bool last = at == size_t(tables.batch);
    tables.starts[at] = random.pick<int32_t>({-1, int32_t(tables.queries) + 1, kFar, -kFar});
    if (last && random.chance(0.5)) tables.starts[at] = int32_t(tables.queries) + (tables.queries > 0 ? -1 : 1);
    tables.run();
    ASSERT_EQ(tables.query_starts[0], 0);
    ASSERT_EQ(tables.key_counts[0], kBrokenSequence);
    for (size_t b = 1; b < tables.query_starts.size(); ++b) ASSERT_EQ(tables.query_starts[b], tables.queries);
  }
}

// What attention gives of them, every row of the pools 1: float32 of width 8, two query heads on one key head.
struct Attended {
  std::vector<float> output, lse;
  std::vector<int32_t> found, counts;
};
Attended attend(Tables& tables, int multiprocessors, Skipped skipped, std::vector<float>& pool) {
  constexpr int64_t kHeads = 2, kWidth = 8, kCapacity = 4;
  const size_t rows = size_t(tables.queries * kHeads);
  tables.run();
  std::vector<float> query(rows * kWidth, 0.5f);
  Attended got{std::vector<float>(rows * kWidth, 77.0f), std::vector<float>(rows, 77.0f),
               std::vector<int32_t>(rows * kCapacity, 77), std::vector<int32_t>(rows, 77)};
  AttentionProblem problem;
  Shape& shape = problem.shape;
  shape.batch = tables.batch;
  shape.heads = kHeads;
  shape.key_heads = 1;
  shape.queries = tables.queries;
  shape.keys = tables.width * tables.block_rows;
  shape.width = shape.value_width = kWidth;
  shape.query_starts = tables.query_starts.data();
  shape.key_counts = tables.key_counts.data();
  problem.visibility.query_offsets = tables.query_offsets.data();
  problem.query = {query.data(), {0, kWidth, kHeads * kWidth, 1}};
  KeyRows rows_of_pool(View{pool.data(), {tables.block_rows * kWidth, tables.block_rows * kWidth, kWidth, 1}});
  rows_of_pool.table = tables.table.data();
  rows_of_pool.table_stride = tables.width;
  rows_of_pool.block_rows = uint32_t(tables.block_rows);
  problem.key = problem.value = rows_of_pool;
  problem.output = got.output.data();
  problem.output_strides[1] = kWidth;
  problem.output_strides[2] = kHeads * kWidth;
  problem.lse = got.lse.data();
  problem.emit = {got.found.data(), got.counts.data(), kCapacity, 0.2};
  Device device;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = 99 * 1024;
  AttentionPlan plan = plan_attention(problem, device);
  plan.parameters.skipped = skipped;
  std::vector<unsigned char> workspace(size_t(plan.workspace_bytes), 0xff);
  start_attention(plan, workspace.data(), nullptr, nullptr);
  return got;
}

TEST(Tables, RowsOfBrokenSequencesAreNaNAndNoOthers) {
  for (uint64_t seed = 0; seed < 120; ++seed) {
    Random random(seed);
    Tables tables(random);
    if (random.chance(0.8)) tables.break_some(random);
    if (tables.queries == 0) continue;
    std::vector<float> pool(size_t(tables.blocks * tables.block_rows * 8), 1.0f);
    const Skipped skipped = random.pick({Skipped::untouched, Skipped::told, Skipped::cleared});
    const Attended got = attend(tables, random.pick({0, 1000}), skipped, pool);
    for (size_t b = 0; b < size_t(tables.batch); ++b)
      for (int64_t row = 2 * tables.starts[b]; row < 2 * tables.starts[b + 1]; ++row) {
        const size_t at = size_t(row);
        const float output = got.output[8 * at], lse = got.lse[at];
        SCOPED_TRACE("seed " + std::to_string(seed) + ", row " + std::to_string(row));
        if (tables.broken[b]) {
          ASSERT_TRUE(std::isnan(output) && std::isnan(got.output[8 * at + 7]) && std::isnan(lse));
          ASSERT_EQ(got.counts[at], 0);
          ASSERT_EQ(got.found[4 * at], -1);
        } else if (tables.lengths[b] == 0) {
          ASSERT_EQ(output, skipped == Skipped::cleared ? 0.0f : 77.0f);
          ASSERT_EQ(lse, skipped == Skipped::untouched ? 77.0f : -std::numeric_limits<float>::infinity());
          ASSERT_EQ(got.counts[at], skipped == Skipped::untouched ? 77 : 0);
        } else {
          ASSERT_NEAR(output, 1.0f, 1e-6);
          // Scores are all 4, and as many keys are seen as lie up to the query's own.
          const int64_t seen = tables.lengths[b] - (tables.starts[b + 1] - 1 - row / 2);
          ASSERT_NEAR(lse, 4.0f + std::log(float(seen)), 1e-4);
        }
      }
  }
}

template <class T>
void write_and_compare(uint64_t seed) {
  Random random(seed);
  const int64_t rows = random.integer(1, 20), heads = random.integer(1, 3), blocks = random.integer(1, 5),
                block_rows = random.pick<int64_t>({1, 4, 16}),
                widths[2] = {random.integer(1, 40), random.integer(1, 40)}, spare = random.pick<int64_t>({0, 1, 8}),
                held = blocks * block_rows;
  std::vector<int64_t> order(static_cast<size_t>(held)), slots;
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i-- > 1;) std::swap(order[i], order[size_t(random.integer(0, int64_t(i)))]);
  for (int64_t t = 0; t < rows; ++t)
    slots.push_back(t < held && random.chance(0.7)
                        ? order[size_t(t)]
                        : random.pick<int64_t>({-1, held, int64_t(1) << 62, -(int64_t(1) << 40)}));
  WriteProblem problem;
  problem.slots = slots.data();
  problem.rows = rows;
  problem.heads = heads;
  problem.blocks = blocks;
  problem.block_rows = block_rows;
  std::vector<T> from[2], to[2], expected[2];
  for (int pool = 0; pool < 2; ++pool) {
    const int64_t width = widths[pool], line = width + spare, size = sizeof(T);
    for (int64_t i = 0; i < rows * heads * line; ++i) from[pool].push_back(T(1 + i % 1000));
    to[pool].assign(size_t(held * heads * line), T(0));
    expected[pool] = to[pool];
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t slot = slots[size_t(t)];
        if (slot < 0 || slot >= held) continue;
        const int64_t place = ((slot / block_rows * heads + h) * block_rows + slot % block_rows) * line;
        std::memcpy(&expected[pool][size_t(place)], &from[pool][size_t((t * heads + h) * line)], size_t(width * size));
      }
    problem.pools[pool] = {reinterpret_cast<const char*>(from[pool].data()),
                           reinterpret_cast<char*>(to[pool].data()),
                           {heads * line * size, line * size},
                           {heads * block_rows * line * size, block_rows * line * size, line * size},
                           width * size};
  }
  start_write_keys(problem, nullptr);
  for (int pool = 0; pool < 2; ++pool) ASSERT_EQ(to[pool], expected[pool]) << "seed " << seed;
}

TEST(WriteKeys, RowsGoWhereTheirSlotsSayAndNowhereElse) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    write_and_compare<uint16_t>(seed);
    write_and_compare<float>(seed);
  }
}

}  // namespace
}  // namespace attnrb::cuda
