// Strips of a tile of the backward on AMX, from products to operands in one go.
//
// Note: [Gradients in one go]
// Nearly all tiles are of rows without softcap, bias or boolean mask, under rule none or row, and hold numbers: what is
// hidden is hidden by an interval. Two rows of those go at once from the registers that hold P and dS to the three
// operands that the last products read, and no float of either is ever stored.
//
// Outliers come before, as changes of what they are made of. With s = 1 + gain the strengthened weight of one is
// w P = 2^(t + log2 s - LSE), and its gradient of a score
//   rule row   w P (dW - delta)        rule none   P (s dW - delta) = w P ((dW + c) - delta),   c = delta (1 - 1/s)
// so log2 s joins its score, and c its dW: for all outliers of a strip sixteen at a time, whatever their rows.
#pragma once

#include "amx_gradient_engine.h"
#include "gradient_strips.h"

namespace attnrb {
namespace ATTNRB_ISA {

template <class T>
class GradientStrips<AmxGradientEngine<T>> {
  using Engine = AmxGradientEngine<T>;
  using Weights = typename Engine::Weights;
  static constexpr int64_t kStrip = Engine::strip;

 public:
  GradientStrips(const GradientProblem& problem, const RowRules& rules, const GradientRows<T>& data)
      : problem_(problem), data_(data), to_log2_(short_nan(rules.score_factor() * kLog2E)) {}

  bool fit(int64_t head) const {
    // A gain of -1 or less has no logarithm, and one close to it no accurate one; nor has a scale of nothing an
    // inverse.
    constexpr float kLeastStrength = 1e-3f, kLeastFactor = 1e-30f;
    const bool strengthens = problem_.edit.indices == nullptr || 1.0f + problem_.edit.gain[head] >= kLeastStrength;
    return strengthens && to_log2_ >= kLeastFactor && !data_.received() && !data_.parts() &&
           problem_.edit.key_bias == nullptr && problem_.visibility.mask == nullptr && !(problem_.scoring.softcap > 0);
  }

  // A row's list lies far from the next one's, in a table of which little is filled, and each block of keys reads all
  // of them: so the first sixteen outliers of every row stand once more, side by side.
  void carve(Carver& carver) {
    const Shape& shape = problem_.shape;
    const int64_t rows = problem_.edit.indices != nullptr ? shape.batch * shape.heads * shape.queries : 0;
    copies_ = carver.take<int32_t>(16 * rows);
  }

  // Of sound lists.
  void copy_lists(int64_t batch, int64_t head, int64_t first, int64_t end) const {
    const Edit& edit = problem_.edit;
    if (edit.indices == nullptr) return;
    int32_t* copy = copies_ + 16 * ((batch * problem_.shape.heads + head) * problem_.shape.queries + first);
    for (int64_t query = first; query < end; ++query, copy += 16) {
      const int64_t list = list_of(batch, head, query);
      _mm512_store_si512(copy,
                         _mm512_maskz_loadu_epi32(Vec::first(edit.counts[list]), edit.indices + list * edit.capacity));
    }
  }

  // Asks for what differentiate() is going to read of `count` rows' outliers.
  void prefetch(int64_t row, int64_t count) const {
    if (problem_.edit.indices == nullptr) return;
    for (int64_t r = row; r < row + count; ++r) __builtin_prefetch(copies_ + 16 * r);
  }

  // Returns the strip's share of the gain's gradient.
  double differentiate(const TileStrip& strip, const Weights& weights) const {
    StripRows rows;
    load(strip, rows);
    const double gain = problem_.edit.indices != nullptr ? strengthen(strip, rows) : 0.0;
    for (int64_t r = 0; r < kStrip; r += 2)
      if (strip.range.partial)
        differentiate_pair<true>(strip, rows, r, weights);
      else
        differentiate_pair<false>(strip, rows, r, weights);
    return gain;
  }

 private:
  // Rows that are none, or have no part in any gradient, see no keys.
  struct StripRows {
    alignas(64) float references[kStrip] = {}, rests[kStrip] = {}, deltas[kStrip] = {};
    alignas(64) int32_t first[kStrip] = {}, last[kStrip] = {};  // keys that each sees within the range of the strip
  };

  int64_t list_of(int64_t batch, int64_t head, int64_t query) const {
    return problem_.edit.list(problem_.shape.heads, problem_.shape.queries, batch, head, query);
  }

  void load(const TileStrip& strip, StripRows& rows) const {
    const float* const references = data_.references + 2 * strip.row;
    for (int64_t r = 0; r < strip.rows; ++r) {
      rows.references[r] = short_nan(references[2 * r]);
      rows.rests[r] = short_nan(references[2 * r + 1]);
      rows.deltas[r] = short_nan(data_.deltas[strip.row + r]);
    }
    const int32_t first = int32_t(strip.range.first), last = int32_t(strip.range.last), key = int32_t(strip.key);
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int32_t low = data_.lows[strip.row + r] - key, high = data_.highs[strip.row + r] - key;
      rows.first[r] = low > first ? low : first;
      rows.last[r] = high < last ? high : last;
    }
    for (int64_t r = 0; r < strip.rows; ++r) rows.last[r] = larger(rows.first[r], rows.last[r]);
  }

  // 2^(score - log-sum-exp).
  template <bool Partial>
  ATTNRB_INLINE Vec weight(Vec score, Vec reference, Vec rest) const {
    const Vec exponent = Vec::fms(score, Vec::set(to_log2_), reference) - rest;
    return exp2<Engine::exp2_degree>(Partial ? Vec::max(Vec::set(-200.0f), exponent) : exponent);
  }

  // Partial: keys outside the rows' intervals have no weight, whatever their products hold.
  template <bool Partial>
  ATTNRB_INLINE void differentiate_pair(const TileStrip& strip, const StripRows& rows, int64_t r,
                                        const Weights& weights) const {
    const float *scores = strip.scores + TilePlaces::row(r), *products = strip.products + TilePlaces::row(r);
    const Vec references[2] = {Vec::set(rows.references[r]), Vec::set(rows.references[r + 1])};
    const Vec rests[2] = {Vec::set(rows.rests[r]), Vec::set(rows.rests[r + 1])};
    const Vec deltas[2] = {Vec::set(rows.deltas[r]), Vec::set(rows.deltas[r + 1])};
    for (int64_t j = strip.range.first; j < strip.range.last; j += 32) {
      typename Weights::TwoRows p, ds;
      for (int row = 0; row < 2; ++row)
        for (int half = 0; half < 2; ++half) {
          const int64_t at = TilePlaces::place(j) + half * kTileSums + row * 16;
          p[row][half] = weight<Partial>(Vec::load(scores + at), references[row], rests[row]);
          ds[row][half] = p[row][half] * (Vec::load(products + at) - deltas[row]);
          if (!Partial) continue;
          const __mmask16 seen = within(j + 16 * half, rows.first[r + row], rows.last[r + row]);
          p[row][half] = Vec::select(seen, p[row][half], Vec::zero());
          ds[row][half] = Vec::select(seen, ds[row][half], Vec::zero());
        }
      weights.store(strip.number, r, j, p, ds);
    }
  }

  // Which of 16 keys from j on lie in [first, last).
  static ATTNRB_INLINE __mmask16 within(int64_t j, int32_t first, int32_t last) {
    return in_interval(_mm512_add_epi32(lanes(), _mm512_set1_epi32(int32_t(j))), first, last);
  }
  static ATTNRB_INLINE __mmask16 in_interval(__m512i x, int32_t first, int32_t last) {
    return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(x, _mm512_set1_epi32(first)), _mm512_set1_epi32(last - first));
  }
  static ATTNRB_INLINE __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  // An outlier of a strip is one number: row and key.
  static constexpr int kKeyBits = 8;
  static_assert(Engine::block_keys == 1 << kKeyBits, "a key of a tile has so many bits");

  // What strengthening adds to a score, and of delta to a gradient of a weight.
  struct Strength {
    Vec score, delta;
  };

  // Finds the outliers that the strip's rows see, and strengthens them.
  double strengthen(const TileStrip& strip, const StripRows& rows) const {
    const Edit& edit = problem_.edit;
    const int64_t base = strip.key + problem_.visibility.key_offset;
    if (base > std::numeric_limits<int32_t>::max()) return 0.0;  // slots are not that large
    const float strength = 1.0f + edit.gain[strip.head];
    const Strength added{Vec::set(std::log2(strength) / to_log2_), Vec::set(1.0f - 1.0f / strength)};
    alignas(64) int32_t found[32];
    int count = 0;
    __m512d sum = _mm512_setzero_pd();
    const __m512i from = _mm512_set1_epi32(int32_t(base));
    for (int64_t r = 0; r < strip.rows; ++r) {
      const int64_t list = list_of(strip.batch, strip.head, strip.query + r);
      const int32_t *slots = edit.indices + list * edit.capacity, listed = edit.counts[list];
      const int32_t first = rows.first[r], last = rows.last[r];
      const __m512i to_code = _mm512_set1_epi32(int32_t(r << kKeyBits) - int32_t(base));
      const auto take = [&](__m512i some, int held) {
        const __mmask16 here = Vec::first(held) & in_interval(_mm512_sub_epi32(some, from), first, last);
        _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(here, _mm512_add_epi32(some, to_code)));
        count += __builtin_popcount(here);
        if (count < 16) return;
        sum = strengthen_some(strip, rows, added, found, 16, sum);
        count -= 16;
        _mm512_store_si512(found, _mm512_load_si512(found + 16));
      };
      take(_mm512_load_si512(copies_ + 16 * (strip.row + r)), listed);
      if (listed <= 16) continue;
      for (int32_t c = larger(16, first_vector(slots, listed, base + first)); c < listed; c += 16) {
        take(_mm512_maskz_loadu_epi32(Vec::first(listed - c), slots + c), listed - c);
        if (c + 16 < listed && slots[c + 15] >= base + last) break;
      }
    }
    if (count > 0) sum = strengthen_some(strip, rows, added, found, count, sum);
    return _mm512_reduce_add_pd(sum);
  }

  // Of the ascending slots, taken 16 by 16, where the 16 begin that the first slot from `slot` on is among.
  static ATTNRB_INLINE int32_t first_vector(const int32_t* slots, int32_t count, int64_t slot) {
    int32_t low = 0, high = (count - 1) / 16;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (slots[16 * middle + 15] < slot)
        low = middle + 1;
      else
        high = middle;
    }
    return 16 * low;
  }

  // Returns `sum` and these outliers' share of the gain's gradient, P dW or P (dW - delta).
  ATTNRB_INLINE __m512d strengthen_some(const TileStrip& strip, const StripRows& rows, const Strength& added,
                                        const int32_t* found, int count, __m512d sum) const {
    const __mmask16 live = Vec::first(count);
    const __m512i codes = _mm512_maskz_load_epi32(live, found);
    const __m512i r = _mm512_srli_epi32(codes, kKeyBits);
    const __m512i place = score_places(r, _mm512_and_si512(codes, _mm512_set1_epi32((1 << kKeyBits) - 1)));
    const bool row_rule = problem_.edit.rule == Rule::row;
    const Vec delta = gather(rows.deltas, r), score = gather(strip.scores, place), dw = gather(strip.products, place);
    const Vec stronger = score + added.score;
    _mm512_mask_i32scatter_ps(strip.scores, live, place, stronger.v, 4);
    if (!row_rule) _mm512_mask_i32scatter_ps(strip.products, live, place, Vec::fma(delta, added.delta, dw).v, 4);
    if (problem_.grad_gain == nullptr) return sum;
    const Vec p = weight<true>(score, gather(rows.references, r), gather(rows.rests, r));
    const Vec seen = Vec::select(live, p, Vec::zero()), by = Vec::select(live, row_rule ? dw - delta : dw, Vec::zero());
    sum = _mm512_fmadd_pd(low_half(seen), low_half(by), sum);
    return _mm512_fmadd_pd(high_half(seen), high_half(by), sum);
  }

  static ATTNRB_INLINE Vec gather(const float* from, __m512i places) { return {_mm512_i32gather_ps(places, from, 4)}; }
  static ATTNRB_INLINE __m512d low_half(Vec x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)); }
  static ATTNRB_INLINE __m512d high_half(Vec x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)); }

  const GradientProblem& problem_;
  const GradientRows<T>& data_;
  const float to_log2_;
  int32_t* copies_ = nullptr;  // [rows, 16]
};

}  // namespace ATTNRB_ISA
}  // namespace attnrb
