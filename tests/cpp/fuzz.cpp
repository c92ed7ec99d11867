// Kernels on as many generated cases as asked for, for the scorecard: counts and faults as one JSON document.
//
//   attnrb_fuzz MODE --count N [--seed S] [--seconds T]
//
// differential  every instruction set on the same cases, each against the oracle
// threads       the same bits on 1, 2, 3 and 4 threads, and again
// hidden        NaN and infinity in everything that no query may see change no bit, forward or backward
// calls         calls of kernels on small cases and few large ones: for builds with ASan and UBSan; N counts calls
// callers       8 threads at once, each with a pool of 2: for a build with TSan; N counts calls
//
// A call is one call of an entry of a kernel table (csrc/core/kernels.h). It ends with 1 where it found a fault.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "gradient_case.h"
#include "runner.h"
#include "threads.h"

namespace attnrb::testing {

bool visible(const Visibility& visibility, int64_t batch, int64_t head, int64_t query, int64_t key);

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kShownFaults = 40;

struct Fuzz {
  int64_t count = 1000;
  uint64_t seed = 0;
  double seconds = 1e30;
  std::map<std::string, int64_t> counts;
  int64_t faults = 0;
  std::vector<std::string> shown;
  std::mutex mutex;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

  bool over() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds;
  }
  uint64_t first_seed() const { return 50000000 + seed * 10000000; }  // past those of the suite
  void fault(const std::string& line) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (++faults <= kShownFaults) shown.push_back(line);
    std::fprintf(stderr, "FAULT: %s\n", line.c_str());
  }
};

// The entries of one table that attention has, on one case. A backward reads the output that the forward wrote.
struct Calls {
  const Kernels& kernels;
  AttentionCase& attention;
  GradientCase* gradient;  // null: no backward
  int64_t threads;

  Written forward() const { return run_attention(kernels, attention, threads); }
  std::vector<float> received() const {
    std::vector<float> found;
    const ReceivedProblem problem = attention.received_problem(found);
    ScratchLease scratch;
    kernels.received_attention(problem, test_pool(threads), *scratch);
    return found;
  }
  std::vector<unsigned char> backward() const {
    const GradientProblem problem = gradient->problem();
    ScratchLease scratch;
    const Status status = kernels.gradient(problem, test_pool(threads), *scratch);
    std::vector<unsigned char> written = gradient->written();
    written.push_back(static_cast<unsigned char>(status));
    return written;
  }
};

bool same(const std::vector<float>& one, const std::vector<float>& other) {
  return one.size() == other.size() && std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0;
}

// A case with its backward, every option among them; one in five is for received attention.
struct Drawn {
  AttentionCase attention;
  std::unique_ptr<GradientCase> gradient;

  Drawn(uint64_t seed, bool small) {
    Rarities rarities;
    rarities.small = small;
    rarities.wide = !small && seed % 11 == 0;
    attention = seed % 2 == 0 ? generate_case(seed, rarities) : generate_edited_case(seed, rarities);
    Random random(seed + 1000000);
    gradient = std::make_unique<GradientCase>(attention, random, for_received_attention(seed));
  }
};

std::string place(const Kernels& kernels, uint64_t seed, const AttentionCase& attention) {
  return std::string(kernels.name) + ", seed " + std::to_string(seed) + ": " + attention.describe();
}

void run_seeds(Fuzz& fuzz, const std::function<void(uint64_t)>& attempt) {
  for (int64_t i = 0; i < fuzz.count && !fuzz.over(); ++i) attempt(fuzz.first_seed() + uint64_t(i));
}

// ------------------------------------------------------------------------------------------------------------ modes

void check_received(Fuzz& fuzz, const Kernels& kernels, AttentionCase& attention, uint64_t seed) {
  const std::vector<float> found = Calls{kernels, attention, nullptr, 1}.received();
  std::vector<float> unused;
  const std::vector<Bounded> truth = received_truth(attention.received_problem(unused));
  for (size_t i = 0; i < truth.size(); ++i)
    if (!close(kernels, found[i], truth[i])) return fuzz.fault("received: " + place(kernels, seed, attention));
}

void differential(Fuzz& fuzz) {
  int64_t ties = 0;
  run_seeds(fuzz, [&](uint64_t seed) {
    Drawn drawn(seed, false);
    const bool backward = seed % 4 < 2, received = seed % 4 == 3;
    // A backward starts from the oracle's output, which a forward would replace.
    Drawn kept(seed, !backward);
    const GradientTruth slopes = backward ? gradient_truth(kept.gradient->problem()) : GradientTruth();
    const AttentionTruth truth = attention_truth(drawn.attention.problem());
    ++fuzz.counts["cases"];
    for (const Kernels* kernels : tested_kernels()) {
      ++fuzz.counts["comparisons with the oracle"];
      const Written written = run_attention(*kernels, drawn.attention, 1);
      const ::testing::AssertionResult right = matches(*kernels, drawn.attention, truth, &ties);
      if (written.status != Status::ok || !right)
        fuzz.fault(place(*kernels, seed, drawn.attention) + ": " + right.message());
      if (received) {
        ++fuzz.counts["comparisons with the oracle"];
        check_received(fuzz, *kernels, drawn.attention, seed);
      }
      if (!backward || kernels->gradient == nullptr) continue;
      ++fuzz.counts["comparisons with the oracle"];
      Calls{*kernels, kept.attention, kept.gradient.get(), 1}.backward();
      check_gradient(*kernels, *kept.gradient, slopes);
      if (::testing::Test::HasFailure()) {
        fuzz.fault("gradient: " + place(*kernels, seed, drawn.attention));
        fuzz.count = 0;  // GoogleTest keeps a failure
      }
    }
  });
}

void threads(Fuzz& fuzz) {
  run_seeds(fuzz, [&](uint64_t seed) {
    Drawn drawn(seed, seed % 3 != 0);
    ++fuzz.counts["cases"];
    for (const Kernels* kernels : tested_kernels()) {
      const Calls alone{*kernels, drawn.attention, drawn.gradient.get(), 1};
      const Written forward = alone.forward();
      const std::vector<float> received = alone.received();
      const std::vector<unsigned char> backward = alone.backward();
      for (const int64_t count : {2, 3, 4, 1}) {
        const Calls again{*kernels, drawn.attention, drawn.gradient.get(), count};
        fuzz.counts["repeats of a forward, received attention and a backward"] += 1;
        if (!(again.forward() == forward) || !same(again.received(), received) || again.backward() != backward)
          fuzz.fault(std::to_string(count) + " threads: " + place(*kernels, seed, drawn.attention));
      }
    }
  });
}

// Whether any query of the heads that share a key head sees the key, were there no bias.
bool seen_by_any(const ReceivedProblem& problem, int64_t b, int64_t key_head, int64_t j) {
  const int64_t group = problem.shape.heads / problem.shape.key_heads;
  for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
    for (int64_t i = 0; i < problem.shape.queries; ++i)
      if (visible(problem.visibility, b, h, i, j)) return true;
  return false;
}

// NaN and infinities where nothing may look: keys and values that no query sees, the bias of slots that no query sees;
// and anything in list entries behind the last.
int64_t poison(Drawn& drawn, Random& random) {
  AttentionCase& attention = drawn.attention;
  std::vector<float> unused;
  const ReceivedProblem problem = attention.received_problem(unused);
  const Shape& shape = attention.shape;
  const auto bad = [&] { return random.pick({kNaN, kInfinity, -kInfinity}); };
  int64_t places = 0;
  std::vector<bool> of_slots(attention.bias.size(), false);  // bias entries that stay
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t k = 0; k < shape.key_heads; ++k)
      for (int64_t j = 0; j < shape.keys; ++j) {
        if (!seen_by_any(problem, b, k, j)) {
          for (int64_t d = 0; d < shape.width; ++d) attention.key.set(b, k, j, d, bad());
          for (int64_t d = 0; d < shape.value_width; ++d) attention.value.set(b, k, j, d, bad());
          ++places;
          continue;
        }
        const int64_t slot = attention.visibility.key_offset + j, group = shape.heads / shape.key_heads;
        if (!attention.bias.empty() && slot < attention.bias_sizes[2])
          for (int64_t h = k * group; h < (k + 1) * group; ++h)
            of_slots[size_t(b * attention.bias_strides[0] + h * attention.bias_strides[1] +
                            slot * attention.bias_strides[2])] = true;
      }
  for (size_t i = 0; i < attention.bias.size(); ++i)
    if (!of_slots[i]) attention.bias[i] = float(bad()), ++places;
  for (int64_t list = 0; attention.edits() && list < int64_t(attention.counts.size()); ++list)
    for (int64_t c = attention.counts[size_t(list)]; c < attention.capacity; ++c)
      attention.indices[size_t(list * attention.capacity + c)] = int32_t(random.bits()), ++places;
  return places;
}

void hidden(Fuzz& fuzz) {
  const std::vector<const Kernels*> tables = tested_kernels();
  run_seeds(fuzz, [&](uint64_t seed) {
    const bool small = seed % 3 != 0;
    Drawn drawn(seed, small), kept(seed, small);  // a backward starts from the oracle's output
    std::vector<Written> forwards;
    std::vector<std::vector<float>> received;
    std::vector<std::vector<unsigned char>> backwards;
    for (const Kernels* kernels : tables) {
      const Calls clean{*kernels, drawn.attention, nullptr, 1};
      forwards.push_back(clean.forward());
      received.push_back(clean.received());
      backwards.push_back(Calls{*kernels, kept.attention, kept.gradient.get(), 1}.backward());
    }
    Random random(seed + 3), again(seed + 3);
    const int64_t places = poison(drawn, random);
    poison(kept, again);
    if (places == 0) return;
    ++fuzz.counts["cases with something hidden"];
    fuzz.counts["rows, bias entries and list entries poisoned"] += places;
    for (size_t t = 0; t < tables.size(); ++t) {
      const Kernels& kernels = *tables[t];
      const Calls poisoned{kernels, drawn.attention, nullptr, 1};
      fuzz.counts["forwards, received attentions and backwards"] += 3;
      if (!(poisoned.forward() == forwards[t])) fuzz.fault("forward: " + place(kernels, seed, drawn.attention));
      if (!same(poisoned.received(), received[t])) fuzz.fault("received: " + place(kernels, seed, drawn.attention));
      if (Calls{kernels, kept.attention, kept.gradient.get(), 1}.backward() != backwards[t])
        fuzz.fault("backward: " + place(kernels, seed, drawn.attention));
    }
  });
}

// The operations on weights in memory.
int64_t elementwise(const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  Shape shape;
  shape.batch = random.integer(1, 2);
  shape.heads = shape.key_heads = random.integer(1, 3);
  shape.queries = random.integer(0, 9);
  shape.keys = random.integer(1, 30);
  const DType dtype = random.pick({DType::float32, DType::bfloat16, DType::float16});
  const Sizes sizes = {shape.batch, shape.heads, shape.queries, shape.keys};
  Array weights(dtype, sizes), upstream(dtype, sizes), output(dtype, sizes);
  weights.fill_uniform(random, 0.0, 0.1);
  upstream.fill_uniform(random, -1.0, 1.0);
  const size_t count = size_t(shape.batch * shape.heads * shape.queries * shape.keys);
  const std::unique_ptr<bool[]> mask = std::make_unique<bool[]>(count);
  OutlierMaskProblem outliers;
  outliers.shape = shape;
  outliers.dtype = dtype;
  outliers.weights = weights.view();
  outliers.threshold = 0.05;
  outliers.query_offset = random.integer(-2, 30);
  outliers.mask = mask.get();
  kernels.outlier_mask(outliers, test_pool(1));
  const std::vector<float> gain(size_t(shape.heads), 0.5f);
  const int64_t *s = sizes.data(), rows = s[2] * s[3];
  RebalanceProblem rebalance;
  rebalance.shape = shape;
  rebalance.dtype = dtype;
  rebalance.weights = weights.view();
  rebalance.mask = {mask.get(), {s[1] * rows, rows, s[3], 1}};
  rebalance.gain = gain.data();
  rebalance.normalize = random.chance(0.5);
  rebalance.output = output.data();
  kernels.rebalance(rebalance, test_pool(1));
  std::vector<double> gain_rows(size_t(s[0] * s[1] * s[2]) + 1);
  std::vector<float> grad_gain(size_t(shape.heads), 0.0f);
  RebalanceGradientProblem slopes;
  slopes.shape = shape;
  slopes.dtype = dtype;
  slopes.weights = weights.view();
  slopes.grad_output = upstream.view();
  slopes.mask = rebalance.mask;
  slopes.gain = gain.data();
  slopes.normalize = rebalance.normalize;
  slopes.grad_weights = output.data();
  slopes.gain_rows = gain_rows.data();
  slopes.grad_gain = grad_gain.data();
  kernels.rebalance_gradient(slopes, test_pool(1));
  return 3;
}

void calls(Fuzz& fuzz) {
  constexpr uint64_t kLargeEvery = 200;
  int64_t made = 0;
  for (uint64_t seed = fuzz.first_seed(); made < fuzz.count && !fuzz.over(); ++seed) {
    const bool large = seed % kLargeEvery == 0;
    Drawn drawn(seed, !large);
    if (seed % 8 == 0) release_scratch();  // so that what a call needs is what there is
    for (const Kernels* kernels : tested_kernels()) {
      const Calls each{*kernels, drawn.attention, drawn.gradient.get(), seed % 16 == 0 ? 2 : 1};
      each.forward();
      each.received();
      each.backward();
      if (!drawn.attention.output.surroundings_untouched()) fuzz.fault(place(*kernels, seed, drawn.attention));
      made += 3 + elementwise(*kernels, seed);
    }
    ++fuzz.counts[large ? "large cases" : "small cases"];
  }
  fuzz.counts["kernel calls"] = made;
}

void callers(Fuzz& fuzz) {
  constexpr int kCallers = 8;
  std::atomic<int64_t> made{0};
  const std::vector<const Kernels*> tables = tested_kernels();
  std::vector<std::thread> running;
  for (int caller = 0; caller < kCallers; ++caller)
    running.emplace_back([&, caller] {
      for (uint64_t seed = fuzz.first_seed() + uint64_t(caller); made < fuzz.count && !fuzz.over(); seed += kCallers) {
        Drawn drawn(seed, seed % 50 != 0);
        for (const Kernels* kernels : tables) {
          const Calls alone{*kernels, drawn.attention, drawn.gradient.get(), 1};
          const Calls shared{*kernels, drawn.attention, drawn.gradient.get(), 2};
          const Written forward = alone.forward();
          const std::vector<unsigned char> backward = alone.backward();
          const std::vector<float> received = alone.received();
          if (!(shared.forward() == forward) || shared.backward() != backward || !same(shared.received(), received))
            fuzz.fault(place(*kernels, seed, drawn.attention));
          made += 6;
        }
      }
    });
  for (std::thread& thread : running) thread.join();
  release_scratch();
  fuzz.counts["callers at once"] = kCallers;
  fuzz.counts["kernel calls"] = made;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text)
    if (c == '"' || c == '\\')
      out += std::string("\\") + c;
    else
      out += c < ' ' ? ' ' : c;
  return out + '"';
}

int run(int argc, char** argv) {
  const std::map<std::string, void (*)(Fuzz&)> modes = {
      {"differential", differential}, {"threads", threads}, {"hidden", hidden}, {"calls", calls}, {"callers", callers}};
  const auto mode = argc > 1 ? modes.find(argv[1]) : modes.end();
  if (mode == modes.end() || argc % 2 != 0) {
    std::fprintf(stderr, "usage: attnrb_fuzz MODE [--count N] [--seed S] [--seconds T]\n");
    return 2;
  }
  Fuzz fuzz;
  for (int i = 2; i < argc; i += 2) {
    if (std::strcmp(argv[i], "--count") == 0) fuzz.count = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) fuzz.seed = uint64_t(std::atoll(argv[i + 1]));
    if (std::strcmp(argv[i], "--seconds") == 0) fuzz.seconds = std::atof(argv[i + 1]);
  }
  mode->second(fuzz);
  std::string out = "{\"counts\": {";
  for (const auto& [label, count] : fuzz.counts)
    out += (out.back() == '{' ? "" : ", ") + quoted(label) + ": " + std::to_string(count);
  out += "}, \"tables\": [";
  for (const Kernels* kernels : tested_kernels()) {
    const bool own = find_kernels(kernels->name) == kernels;
    out += (out.back() == '[' ? "" : ", ") + quoted(std::string(kernels->name) + (own ? "" : " on emulated tiles"));
  }
  out += "], \"fault_count\": " + std::to_string(fuzz.faults) + ", \"faults\": [";
  for (const std::string& line : fuzz.shown) out += (out.back() == '[' ? "" : ", ") + quoted(line);
  std::printf("%s]}\n", out.c_str());
  return fuzz.faults > 0;
}

}  // namespace
}  // namespace attnrb::testing

int main(int argc, char** argv) { return attnrb::testing::run(argc, argv); }
