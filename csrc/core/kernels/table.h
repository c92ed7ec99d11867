// Assembles the table of one instruction set: what its translation unit includes last.
#pragma once

#include "../kernels.h"
#include "decode.h"
#include "elementwise.h"
#include "gradient.h"
#include "received.h"

namespace attnrb {
namespace ATTNRB_ISA {

// Which engine and which dot product serve an element type where nothing better is at hand.
template <class T>
struct FloatChoice {
  using Engine = FloatEngine<T>;
  using Dot = FloatDot<T>;
  using GradientEngine = FloatGradientEngine<T>;
};

template <class Function>
auto with_element_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::bfloat16:
      return function(bfloat16());
    case DType::float16:
      return function(float16());
    default:
      return function(float());
  }
}

template <template <class> class Choice>
Status run_attention(const AttentionProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.heads == 0 || shape.queries == 0) return Status::ok;
  return with_element_type(problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (shape.ragged()) {
      const Status few = Decode<typename Choice<T>::Dot>(problem, pool, scratch).run();
      const Status many = Prefill<typename Choice<T>::Engine>(problem, pool, scratch).run();
      return few != Status::ok ? few : many;
    }
    if (Decode<typename Choice<T>::Dot>::suits(problem))
      return Decode<typename Choice<T>::Dot>(problem, pool, scratch).run();
    return Prefill<typename Choice<T>::Engine>(problem, pool, scratch).run();
  });
}

template <template <class> class Choice>
void run_received(const ReceivedProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  const Shape& shape = problem.shape;
  if (shape.batch == 0 || shape.heads == 0 || shape.keys == 0) return;
  ScratchLease rows_scratch;
  AttentionProblem rows;
  rows.shape = shape;
  rows.shape.value_width = 0;
  rows.dtype = problem.dtype;
  rows.query = problem.query;
  rows.key = problem.key;
  rows.visibility = problem.visibility;
  rows.scoring = problem.scoring;
  rows.edit = problem.edit;
  rows.lse = problem.lse;
  rows.softmax = static_cast<float*>(
      (*rows_scratch).shared.reserve(2 * sizeof(float) * size_t(shape.batch * shape.heads * shape.queries + 1)));
  with_element_type(problem.dtype, [&](auto element) {
    // One engine for both passes: scores that differ in their last bit would not cancel between weight and sum.
    using Engine = typename Choice<decltype(element)>::Engine;
    if (shape.queries > 0) Prefill<Engine>(rows, pool, scratch).run();
    Received<Engine>(problem, rows, pool, scratch).run();
  });
}

template <template <class> class Choice>
Status run_gradient(const GradientProblem& problem, const ThreadPool& pool, Scratch& scratch) {
  return with_element_type(problem.dtype, [&](auto element) {
    return Gradient<typename Choice<decltype(element)>::GradientEngine>(problem, pool, scratch).run();
  });
}

inline void run_outlier_mask(const OutlierMaskProblem& problem, const ThreadPool& pool) {
  with_element_type(problem.dtype, [&](auto element) { outlier_mask<decltype(element)>(problem, pool); });
}

inline void run_rebalance(const RebalanceProblem& problem, const ThreadPool& pool) {
  with_element_type(problem.dtype, [&](auto element) { rebalance<decltype(element)>(problem, pool); });
}

inline void run_rebalance_gradient(const RebalanceGradientProblem& problem, const ThreadPool& pool) {
  with_element_type(problem.dtype, [&](auto element) { rebalance_gradient<decltype(element)>(problem, pool); });
}

template <template <class> class Choice>
constexpr Kernels make_table(const char* name) {
  return {name,          run_attention<Choice>, run_received<Choice>, run_gradient<Choice>, run_outlier_mask,
          run_rebalance, run_rebalance_gradient};
}

}  // namespace ATTNRB_ISA
}  // namespace attnrb
