// The entries of a row that its edit names, and those that it is asked to emit.
//
// Note: [Strengthened probabilities]
// Rules none and row multiply an outlier's probability by 1 + gain after it joined the row sum l, so the other weights
// stay as they were. Rule row collects the gained mass in `mass` and divides the row by l + mass instead of l. Whether
// the slots ascend is seen on the way, and for those behind the last block when the row is finished: a look of its own
// at every row cost 2% of a prefill.
//
// Note: [Sharing with the rest]
// Rule rest takes the outliers out of the walk: their scores become minus infinity before probabilities are made, and
// they get sums of their own, U with mass m beside R with sum l of the others (a sink is one of them). Of Note: [Edited
// attention] then
//   y = ((1 + g) U + (1 - g m / l) R) / (l + m) = ((1 + g) U + R - g m (R / l)) / (l + m)
// where no difference of masses is taken, and R / l is a mean that no small l makes large.
//
// Note: [One-pass outliers]
// The weight of key j exceeds the threshold tau when t_j > m + log2(tau * l) at the end. m + log2 l only grows, so the
// same test against the running value keeps a superset; it is cut down when its buffer fills and once more at the end.
// For the running test, log2 is bounded from below by the exponent plus the mantissa's fraction (2^e(1+f) <= 2^(e+f)),
// a subtraction on the bits; the superset grows by at most 6%.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../problem.h"
#include "math.h"

namespace attnrb {
namespace ATTNRB_ISA {

constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();  // behind all keys
constexpr int64_t kMostBlockKeys = 256;                          // of any driver

// Outliers of one row that are still to come.
struct Marks {
  const int32_t* slots = nullptr;
  int32_t count = 0, next = 0;
  int64_t key = kNoKey;   // position of the next of them
  bool unsorted = false;  // they were found not to ascend
  float gain = 0.0f;
  float mass = 0.0f;  // rule row: what they gained; rule rest: their own
};

// Entries of one row that may turn out to be outliers.
struct Candidates {
  float* scores = nullptr;  // null where none are wanted
  int32_t* positions = nullptr;
  int32_t count = 0;
};

class MarkRules {
 public:
  explicit MarkRules(const AttentionProblem& problem)
      : problem_(problem),
        threshold_log2_(float(std::log2(problem.emit.threshold))),
        threshold_(float(problem.emit.threshold)),
        room_(int32_t(candidate_capacity(0)) - Vec::width) {}

  bool emits() const { return problem_.emit.indices != nullptr; }
  bool edits() const { return problem_.edit.indices != nullptr; }
  // Whether outliers have sums of their own.
  bool parts() const { return edits() && problem_.edit.rule == Rule::rest; }
  // Whether a row is divided by what its outliers gained as well.
  bool adds_mass() const { return edits() && problem_.edit.rule == Rule::row; }
  int64_t key_offset() const { return problem_.visibility.key_offset; }

  // Candidates per row: the running test keeps at most 1.07/threshold of them, and one block more may come at once.
  int64_t candidate_capacity(int64_t block_keys) const {
    return emits() ? problem_.emit.capacity + problem_.emit.capacity / 8 + 2 * Vec::width + block_keys : 0;
  }

  // Asks for what start() is going to read: the outliers of a row lie far from the next row's, in a table of which
  // little is filled.
  ATTNRB_INLINE void prefetch(int64_t batch, int64_t head, int64_t query) const {
    if (!edits()) return;
    const int32_t* row = problem_.edit.indices + list(batch, head, query) * problem_.edit.capacity;
    __builtin_prefetch(row);
    __builtin_prefetch(row + 15);
  }

  Status start(Marks& marks, int64_t batch, int64_t head, int64_t query) const {
    if (!edits()) return Status::ok;
    const Edit& edit = problem_.edit;
    const int64_t index = list(batch, head, query);
    marks.gain = edit.gain[batch * edit.gain_stride + head];
    marks.slots = edit.indices + index * edit.capacity;
    const int32_t count = edit.counts[index];
    if (count < 0 || count > edit.capacity) return Status::outlier_count;
    marks.count = count;
    if (marks.gain != 0.0f && count > 0) marks.key = marks.slots[0] - problem_.visibility.key_offset;
    return Status::ok;
  }

  // What is wrong with the row's outliers, once it has seen all its keys.
  static Status finish(const Marks& marks) {
    bool unsorted = marks.unsorted;
    for (int32_t c = marks.next + 1; c < marks.count; ++c) unsorted |= marks.slots[c] <= marks.slots[c - 1];
    return unsorted ? Status::unsorted_outliers : Status::ok;
  }

  // See Note: [Strengthened probabilities]. Of the keys [key, end); slots before them, hence outside memory or not
  // seen, are passed over.
  template <class Engine>
  ATTNRB_INLINE void strengthen(Marks& marks, typename Engine::Probability* probabilities, int64_t key,
                                int64_t end) const {
    const float factor = 1.0f + marks.gain;
    walk(marks, key, end, [&](int64_t j) {
      const float before = Engine::load_probability(probabilities, j);
      Engine::scale_probability(probabilities, j, factor);
      // What the output really gained: rounded probabilities must not be divided by exact ones.
      if (adds_mass()) marks.mass += Engine::load_probability(probabilities, j) - before;
    });
  }

  // Outliers of one block, taken out of its scores.
  struct Lifted {
    int32_t keys[kMostBlockKeys];
    float scores[kMostBlockKeys];
    int32_t count = 0;
  };

  // See Note: [Sharing with the rest]. Scores of the keys [key, end); those that the row does not see are minus
  // infinity already.
  template <class Places>
  void lift(Marks& marks, float* scores, int64_t key, int64_t end, Lifted& lifted) const {
    walk(marks, key, end, [&](int64_t j) {
      float& score = scores[Places::place(j)];
      if (score == -kInfinity) return;
      lifted.keys[lifted.count] = int32_t(j);
      lifted.scores[lifted.count++] = score;
      score = -kInfinity;
    });
  }

  // Calls take(key, weight) for each of them, and adds up their mass.
  template <class Engine, class Take>
  void weigh(Marks& marks, Lifted& lifted, float to_log2, float reference, Take&& take) const {
    Vec mass = Vec::zero();
    for (int32_t c = 0; c < lifted.count; c += Vec::width) {
      const int n = int(smaller(int64_t(lifted.count - c), int64_t(Vec::width)));
      const Vec exponent = Vec::fms(Vec::load(lifted.scores + c, n), Vec::set(to_log2), Vec::set(reference));
      float weights[Vec::width];
      exp2<Engine::exp2_degree>(Vec::max(Vec::set(-200.0f), exponent)).store(weights);
      mass = mass + Vec::load(weights, n);
      for (int i = 0; i < n; ++i) take(int64_t(lifted.keys[c + i]), weights[i]);
    }
    marks.mass += mass.sum();
  }

  template <class Places>
  static void put_back(const Lifted& lifted, float* scores) {
    for (int32_t c = 0; c < lifted.count; ++c) scores[Places::place(lifted.keys[c])] = lifted.scores[c];
  }

  // See Note: [One-pass outliers]. Of the largest weights so far, in base 2, and the `mass` of the row so far.
  // Of one row, or of a register of rows.
  template <class Number>
  ATTNRB_INLINE Number running_threshold(Number max, Number mass) const {
    constexpr float kMantissa = 1.0f / (1 << 23);
    const auto set = [](float x) {
      if constexpr (std::is_same<Number, float>::value)
        return x;
      else
        return Number::set(x);
    };
    return max + (bits_as_number(set(threshold_) * mass) * set(kMantissa) - set(127.0f)) - set(1e-4f);
  }

  // `largest` of the block's scores, in base 2.
  template <class Places>
  void collect(Candidates& found, const float* scores, int64_t key, int64_t count, float to_log2, float max, float mass,
               float largest) const {
    const float threshold = running_threshold(max, mass);
    if (largest > threshold) collect_above<Places, false>(found, scores, key, count, to_log2, threshold);
  }

  // Blindly: without a branch on what is found, where a wrong guess costs more than stores.
  template <class Places, bool Blindly>
  ATTNRB_INLINE void collect_above(Candidates& found, const float* scores, int64_t key, int64_t count, float to_log2,
                                   float threshold) const {
    const Vec by = Vec::set(to_log2), bound = Vec::set(threshold);
    float* const to = found.scores;
    int32_t* const positions = found.positions;
    int32_t kept = found.count;
    for (int64_t j = 0; j < count; j += Vec::width) {
      const Vec score = Vec::load(scores + Places::place(j)) * by;
      const typename Vec::Mask above = Vec::greater(score, bound);
      if (Blindly || Vec::bits(above) != 0)
        kept += Vec::compress(above, score, int32_t(key + j), to + kept, positions + kept);
    }
    // Rounding may let a few more pass than the bound says (see Note: [Outlier capacity]): the slack takes them, and
    // the buffer is cut back so that the next block fits again.
    found.count = kept > room_ ? cut_back(found, kept, threshold) : kept;
  }

  // Above it, in base 2, scores are of outliers: of a row that has met all its keys, or of a register of rows.
  template <class Number>
  ATTNRB_INLINE Number final_threshold(Number max, Number log2_mass) const {
    if constexpr (std::is_same<Number, float>::value)
      return max + log2_mass + threshold_log2_;
    else
      return max + log2_mass + Number::set(threshold_log2_);
  }

  // Writes the row's outliers: ascending slots, then -1. `own` is the position of its own key.
  void emit(const float* scores, const int32_t* positions, int64_t count, float threshold, int64_t own,
            int64_t index) const {
    const Emit& emit = problem_.emit;
    int32_t* out = emit.indices + index * emit.capacity;
    const int32_t except = own == int32_t(own) ? int32_t(own) : -1;
    int64_t kept = 0;
    for (int64_t c = 0; c < count; c += Vec::width) {
      const int n = int(smaller(count - c, int64_t(Vec::width)));
      const auto keep = [&](int32_t* to) {
        // Lanes behind the last are zeros, and may pass.
        const auto above = Vec::both(Vec::greater(Vec::load(scores + c, n), Vec::set(threshold)), Vec::first(n));
        return Vec::compress_indices(above, positions + c, except, int32_t(problem_.visibility.key_offset), to);
      };
      if (kept + Vec::width <= emit.capacity) {
        kept += keep(out + kept);
        continue;
      }
      int32_t last[Vec::width];
      const int64_t fit = smaller(int64_t(keep(last)), emit.capacity - kept);
      for (int64_t i = 0; i < fit; ++i) out[kept++] = last[i];
    }
    emit.counts[index] = int32_t(kept);
    std::memset(out + kept, 0xff, size_t(emit.capacity - kept) * sizeof(int32_t));
  }

 private:
  int64_t list(int64_t batch, int64_t head, int64_t query) const {
    const Shape& shape = problem_.shape;
    return shape.ragged() ? shape.row(batch, head, query)
                          : problem_.edit.list(shape.heads, shape.queries, batch, head, query);
  }

  // Calls each(place) for the row's outliers among the keys [key, end).
  template <class Each>
  ATTNRB_INLINE void walk(Marks& marks, int64_t key, int64_t end, Each&& each) const {
    const int64_t offset = problem_.visibility.key_offset;
    int32_t next = marks.next;
    int64_t at = marks.key;
    bool unsorted = false;
    do {
      if (at >= key) each(at - key);
      const int64_t last = at;
      at = ++next < marks.count ? marks.slots[next] - offset : kNoKey;
      unsorted |= at <= last;
    } while (at < end);
    marks.next = next;
    marks.key = at;
    marks.unsorted |= unsorted;
  }

  int32_t cut_back(Candidates& found, int32_t count, float threshold) const {
    int32_t kept = 0;
    for (int32_t c = 0; c < count; ++c)
      if (found.scores[c] > threshold && kept < room_) {
        found.scores[kept] = found.scores[c];
        found.positions[kept++] = found.positions[c];
      }
    return kept;
  }

  const AttentionProblem& problem_;
  const float threshold_log2_, threshold_;
  const int32_t room_;  // for candidates of a row, before those of the next block
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
