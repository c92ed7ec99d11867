#include "cases.h"

#include <algorithm>
#include <limits>
#include <set>
#include <sstream>

#include "core/outliers.h"

namespace attnrb::testing {

namespace {

Layout random_layout(Random& random, bool adjacent_columns) {
  Layout layout;
  if (random.chance(0.5)) std::swap(layout.order[1], layout.order[2]);  // [B, M, H, D], as models have it
  if (random.chance(0.3)) layout.row_padding = random.integer(1, 9);
  if (random.chance(0.5)) layout.offset = random.integer(1, 17);
  if (!adjacent_columns && random.chance(0.2)) {
    layout.column_step = 2;
    if (random.chance(0.5)) std::swap(layout.order[2], layout.order[3]);  // columns far apart
  }
  return layout;
}

// Few queries (decoding) as often as many, and sizes around the blocks and vectors of kernels.
void random_sizes(AttentionCase& attention, Random& random, const Rarities& rarities) {
  Shape& shape = attention.shape;
  shape.batch = random.pick<int64_t>({1, 1, 2, 3});
  shape.key_heads = random.pick<int64_t>({1, 1, 2, 3});
  shape.heads = shape.key_heads * random.pick<int64_t>({1, 2, 3, 4, 7});
  shape.width = random.chance(0.3) ? random.pick<int64_t>({16, 32, 64, 128}) : random.integer(1, 70);
  shape.value_width = random.chance(0.6) ? shape.width : random.integer(1, 70);
  if (random.chance(0.45)) {
    shape.queries = random.pick<int64_t>({1, 1, 1, 2, 3, 4});
    shape.keys = random.chance(0.15) ? random.integer(1000, 1600) : random.integer(1, 300);
  } else {
    shape.queries = random.integer(1, 100);
    shape.keys = random.chance(0.5) ? shape.queries : random.integer(1, 200);
  }
  if (rarities.wide) {
    shape.width = random.integer(129, 270);
    shape.value_width = random.chance(0.5) ? shape.width : random.integer(1, 270);
    shape.batch = 1;
    shape.queries = std::min<int64_t>(shape.queries, 40);
    shape.keys = std::min<int64_t>(shape.keys, 100);
  }
  if (rarities.small) {
    shape.key_heads = std::min<int64_t>(shape.key_heads, 2);
    shape.heads = shape.key_heads * random.pick<int64_t>({1, 2, 3});
    shape.queries = random.integer(1, shape.queries > 4 ? 20 : shape.queries);
    shape.keys = random.integer(1, 40);
    shape.width = random.integer(1, 24);
    shape.value_width = random.integer(1, 24);
  }
  // The oracle takes its time: about two million products a case at most.
  const int64_t products = shape.queries * shape.keys * shape.width * shape.batch;
  const int64_t group = shape.heads / shape.key_heads;
  while (products * shape.heads > 2000000 && shape.key_heads > 1) shape.heads = group * --shape.key_heads;
}

void random_visibility(AttentionCase& attention, Random& random, bool windowed) {
  const Shape& shape = attention.shape;
  Visibility& visibility = attention.visibility;
  if (random.chance(0.3)) visibility.key_offset = random.integer(1, 1000);
  visibility.query_offset = visibility.key_offset + shape.keys - shape.queries;
  if (random.chance(0.2)) visibility.query_offset += random.integer(-40, 40);
  visibility.causal = random.chance(0.7);
  if (random.chance(0.25) || windowed) visibility.window = random.integer(1, shape.keys + 5);
  const auto slots = [&](std::vector<int64_t>& out, int64_t low, int64_t high) {
    for (int64_t b = 0; b < shape.batch; ++b) out.push_back(visibility.key_offset + random.integer(low, high));
  };
  if (random.chance(0.25)) slots(attention.key_start, -5, shape.keys + 2);
  if (random.chance(0.25)) slots(attention.key_end, -2, shape.keys + 5);
  if (!random.chance(0.25)) return;

  const int64_t sizes[4] = {shape.batch, shape.heads, shape.queries, shape.keys};
  int64_t stride = random.chance(0.2) ? 2 : 1, count = 1;
  for (int axis = 3; axis >= 0; --axis) {
    if (axis < 3 && random.chance(0.4)) continue;  // broadcast along this axis
    visibility.mask_strides[axis] = stride;
    stride *= sizes[axis];
    count += visibility.mask_strides[axis] * (sizes[axis] - 1);
  }
  attention.mask = std::make_unique<bool[]>(size_t(count));
  const double density = random.pick({0.05, 0.5, 0.95});
  for (int64_t i = 0; i < count; ++i) attention.mask[size_t(i)] = random.chance(density);
}

void random_scoring(AttentionCase& attention, Random& random, bool capped) {
  const Shape& shape = attention.shape;
  // From nearly even weights to rows that one key takes all of.
  attention.scoring.scale = float(random.uniform(0.1, 4.0) / double(std::max<int64_t>(shape.width, 4)) * 2.0);
  if (random.chance(0.05)) attention.scoring.scale = random.pick({0.0f, -0.3f});
  if (random.chance(0.2) || capped) attention.scoring.softcap = float(random.uniform(0.5, 30.0));
  if (random.chance(0.2))
    for (int64_t h = 0; h < shape.heads; ++h) attention.sinks.push_back(float(random.uniform(-4.0, 4.0)));
}

void fill(AttentionCase& attention, Random& random, bool any_layout) {
  const Shape& shape = attention.shape;
  const auto layout = [&](bool adjacent_columns) {
    return any_layout ? random_layout(random, adjacent_columns) : Layout();
  };
  const DType dtype = attention.dtype;
  attention.query = Array(dtype, {shape.batch, shape.heads, shape.queries, shape.width}, layout(false));
  attention.key = Array(dtype, {shape.batch, shape.key_heads, shape.keys, shape.width}, layout(false));
  attention.value = Array(dtype, {shape.batch, shape.key_heads, shape.keys, shape.value_width}, layout(false));
  attention.output = Array(dtype, {shape.batch, shape.heads, shape.queries, shape.value_width}, layout(true));
  attention.query.fill_uniform(random, -3.0, 3.0);
  attention.key.fill_uniform(random, -1.5, 1.5);
  attention.value.fill_uniform(random, -2.0, 2.0);
}

}  // namespace

const char* dtype_name(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

void add_outliers(AttentionCase& attention, Random& random, int64_t capacity) {
  if (!attention.edits()) attention.role = Role::rebalanced;
  attention.capacity = capacity;
  const Visibility& visibility = attention.visibility;
  const int64_t low = visibility.key_offset - 8, high = visibility.key_offset + attention.shape.keys + 8;
  const int64_t lists = attention.shared_rows ? attention.shape.batch * attention.shape.heads : attention.rows();
  for (int64_t row = 0; row < lists; ++row) {
    std::set<int32_t> slots;
    const int64_t wanted = random.integer(0, capacity);
    for (int64_t i = 0; i < wanted; ++i) slots.insert(int32_t(random.integer(low, high)));
    if (capacity > 0 && random.chance(0.02)) {
      slots = {std::numeric_limits<int32_t>::min()};
      if (capacity > 1) slots.insert(std::numeric_limits<int32_t>::max());
    }
    attention.counts.push_back(int32_t(slots.size()));
    attention.indices.insert(attention.indices.end(), slots.begin(), slots.end());
    attention.indices.resize(size_t((row + 1) * capacity), -1);
  }
  for (int64_t h = 0; h < attention.shape.heads; ++h)
    attention.gain.push_back(random.chance(0.1) ? 0.0f : float(random.uniform(-0.5, 1.0)));
}

AttentionCase generate_case(uint64_t seed, const Rarities& rarities) {
  Random random(seed);
  AttentionCase attention;
  attention.dtype = random.pick({DType::float32, DType::float32, DType::bfloat16, DType::float16});
  random_sizes(attention, random, rarities);
  random_visibility(attention, random, rarities.windowed);
  random_scoring(attention, random, rarities.capped);
  fill(attention, random, true);
  attention.role = random.pick({Role::plain, Role::source, Role::source, Role::rebalanced});
  attention.threshold = random.pick({0.01, 0.01, 0.05, 0.3, 0.003});
  attention.rule = random.chance(0.5) ? Rule::row : Rule::none;
  if (attention.role == Role::rebalanced) add_outliers(attention, random, random.pick<int64_t>({0, 1, 5, 40}));
  return attention;
}

void add_bias(AttentionCase& attention, Random& random) {
  const Shape& shape = attention.shape;
  const int64_t keys = attention.visibility.key_offset + shape.keys;
  const int64_t sizes[3] = {random.chance(0.5) ? 1 : shape.batch, random.chance(0.5) ? 1 : shape.heads,
                            std::max<int64_t>(1, random.pick<int64_t>({keys, keys, keys + 7, keys / 2, 3}))};
  int64_t stride = random.chance(0.2) ? 2 : 1;
  for (int axis = 2; axis >= 0; --axis) {
    attention.bias_sizes[axis] = sizes[axis];
    attention.bias_strides[axis] = sizes[axis] == 1 && axis < 2 ? 0 : stride;
    stride *= sizes[axis];
  }
  const double removed = random.pick({0.0, 0.0, 0.05, 0.6, 1.0});
  for (int64_t i = 0; i < stride; ++i)
    attention.bias.push_back(random.chance(removed) ? -std::numeric_limits<float>::infinity()
                                                    : float(random.uniform(-3.0, 3.0)));
  if (random.chance(0.4))
    for (int64_t b = 0; b < shape.batch; ++b)
      attention.first_query.push_back(attention.visibility.query_offset + random.integer(-2, shape.queries + 2));
}

AttentionCase generate_edited_case(uint64_t seed, const Rarities& rarities) {
  AttentionCase attention = generate_case(seed, rarities);
  Random random(seed + 77000000);
  const Shape& shape = attention.shape;
  attention.indices.clear();
  attention.counts.clear();
  attention.gain.clear();
  attention.role = random.pick({Role::source, Role::rebalanced, Role::rebalanced, Role::both});
  attention.rule = random.pick({Rule::none, Rule::row, Rule::rest, Rule::rest});
  attention.shared_rows = random.chance(0.4);
  if (attention.edits()) add_outliers(attention, random, random.pick<int64_t>({1, 5, 40}));
  // Gains of -1, where outliers lose all.
  if (attention.rule != Rule::row)
    for (float& gain : attention.gain)
      if (random.chance(0.15)) gain = -1.0f;
  if (random.chance(0.4))
    for (int64_t b = 0; b < shape.batch; ++b)
      attention.query_offsets.push_back(attention.visibility.query_offset + random.integer(-shape.keys / 2, 10));
  if (random.chance(0.3)) attention.visibility.chunk = random.integer(1, shape.keys + 5);
  if (random.chance(0.7)) add_bias(attention, random);
  return attention;
}

AttentionCase simple_case(const Shape& shape, DType dtype, uint64_t seed) {
  Random random(seed);
  AttentionCase attention;
  attention.shape = shape;
  attention.dtype = dtype;
  attention.visibility.query_offset = shape.keys - shape.queries;
  attention.scoring.scale = float(1.0 / double(std::max<int64_t>(shape.width, 1)));
  fill(attention, random, false);
  return attention;
}

AttentionProblem AttentionCase::problem() {
  AttentionProblem problem;
  problem.shape = shape;
  problem.dtype = dtype;
  problem.query = query.view();
  problem.key = key.view();
  problem.value = value.view();
  problem.visibility = visibility;
  problem.visibility.key_start = key_start.empty() ? nullptr : key_start.data();
  problem.visibility.key_end = key_end.empty() ? nullptr : key_end.data();
  problem.visibility.query_offsets = query_offsets.empty() ? nullptr : query_offsets.data();
  problem.visibility.mask = mask.get();
  problem.scoring = scoring;
  problem.scoring.sinks = sinks.empty() ? nullptr : sinks.data();

  output.fill_sentinel();
  problem.output = output.data();
  std::copy_n(output.strides().begin(), 3, problem.output_strides);
  lse.assign(size_t(rows()), -77.0f);
  problem.lse = lse.data();
  if (emits()) {
    problem.emit.capacity = outlier_capacity(threshold, shape.keys);
    problem.emit.threshold = threshold;
    found.assign(size_t(rows() * problem.emit.capacity + 1), kUnwritten);
    found_counts.assign(size_t(rows()), kUnwritten);
    problem.emit.indices = found.data();
    problem.emit.counts = found_counts.data();
  }
  // Even without room for outliers the pointers are not null.
  if (indices.empty()) indices.reserve(1);
  problem.edit = edit();
  return problem;
}

Edit AttentionCase::edit() const {
  Edit edit;
  if (edits()) {
    edit.indices = indices.data();
    edit.counts = counts.data();
    edit.capacity = capacity;
    edit.shared_rows = shared_rows;
    edit.gain = gain.data();
    edit.rule = rule;
  }
  if (!bias.empty()) {
    edit.key_bias = bias.data();
    std::copy_n(bias_strides, 3, edit.bias_strides);
    edit.bias_slots = bias_sizes[2];
    edit.first_query = first_query.empty() ? nullptr : first_query.data();
  }
  return edit;
}

ReceivedProblem AttentionCase::received_problem(std::vector<float>& received) const {
  ReceivedProblem problem;
  problem.shape = shape;
  problem.dtype = dtype;
  problem.query = query.view();
  problem.key = key.view();
  problem.visibility = visibility;
  problem.visibility.key_start = key_start.empty() ? nullptr : key_start.data();
  problem.visibility.key_end = key_end.empty() ? nullptr : key_end.data();
  problem.visibility.query_offsets = query_offsets.empty() ? nullptr : query_offsets.data();
  problem.visibility.mask = mask.get();
  problem.scoring = scoring;
  problem.scoring.sinks = sinks.empty() ? nullptr : sinks.data();
  problem.edit = edit();
  problem.edit.indices = nullptr;
  received.assign(size_t(shape.batch * shape.heads * shape.keys), -77.0f);
  problem.received = received.data();
  return problem;
}

std::string AttentionCase::describe() const {
  std::ostringstream text;
  const char* roles[] = {"plain", "source", "rebalanced", "both"};
  text << roles[int(role)] << ' ' << dtype_name(dtype) << " B" << shape.batch << " H" << shape.heads << '/'
       << shape.key_heads << " M" << shape.queries << " N" << shape.keys << " D" << shape.width << " Dv"
       << shape.value_width << (visibility.causal ? " causal" : "") << " query_offset " << visibility.query_offset
       << " key_offset " << visibility.key_offset << " window " << visibility.window;
  if (!key_start.empty()) text << " key_start";
  if (!key_end.empty()) text << " key_end";
  if (mask) text << " mask";
  text << " scale " << scoring.scale << " softcap " << scoring.softcap << (sinks.empty() ? "" : " sinks");
  if (emits()) text << " threshold " << threshold;
  if (edits()) text << " capacity " << capacity << " rule " << int(rule) << (shared_rows ? " shared" : "");
  if (!query_offsets.empty()) text << " query_offsets";
  if (visibility.chunk > 0) text << " chunk " << visibility.chunk;
  if (!bias.empty())
    text << " bias [" << bias_sizes[0] << ", " << bias_sizes[1] << ", " << bias_sizes[2] << "]"
         << (first_query.empty() ? "" : " first_query");
  for (const Array* array : {&query, &key, &value, &output}) {
    text << " strides";
    for (const int64_t stride : array->strides()) text << ' ' << stride;
  }
  return text.str();
}

}  // namespace attnrb::testing
