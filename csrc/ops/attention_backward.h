// Gradients of the three attention ops, from what their forwards left, on any device. `Device` says what a gain is
// there (Gain, numbers()) and runs a problem (differentiate()), whose tensors it may hand on.
#pragma once

#include <tuple>

#include "ops/arguments.h"

namespace attnrb::ops {

// A gradient in the layout of OutputLayout: [batch, heads, rows, width] in memory laid out as [batch, rows, heads,
// width].
class GradientTensor {
 public:
  GradientTensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, const Operand& like)
      : layout_(Shape{batch, heads, heads, rows, rows, width, width}),
        tensor_(empty_strided(layout_.sizes, layout_.strides, like.dtype, like)) {}

  GradientProblem::Target target() const {
    return {tensor_.mutable_data_ptr(), {layout_.strides[0], layout_.strides[1], layout_.strides[2]}};
  }
  void clear() { torch::stable::zero_(tensor_); }
  Tensor release() { return std::move(tensor_); }

 private:
  OutputLayout layout_;
  Tensor tensor_;
};

// float32 [H], zeros.
class HeadGradient {
 public:
  HeadGradient(const Shape& shape, const Operand& like)
      : tensor_(empty<1>({shape.heads}, dtype_codes().float32, like)) {
    torch::stable::zero_(tensor_);
  }
  float* data() const { return static_cast<float*>(tensor_.mutable_data_ptr()); }
  Tensor release() { return std::move(tensor_); }

 private:
  Tensor tensor_;
};

// float32 [B, H, last], as the core reads it.
class RowNumbers {
 public:
  RowNumbers(const char* name, const char* axes, const Tensor& tensor, const Shape& shape, int64_t last,
             const Operand& query) {
    const Operand operand(name, tensor);
    check_shape(operand, {shape.batch, shape.heads, last}, axes);
    check_dtype(operand, dtype_codes().float32);
    check_device(operand, query);
    data_ = contiguous_data<float>(operand, tensor, dtype_codes().float32, copy_);
  }
  const float* data() const { return data_; }

 private:
  OptionalTensor copy_;
  const float* data_ = nullptr;
};

inline View output_view(const char* name, const Tensor& tensor, const Shape& shape, const Operand& query) {
  const Operand operand(name, tensor);
  check_shape(operand, {shape.batch, shape.heads, shape.queries, shape.value_width}, "[B, H, M, Dv]");
  check_companion(operand, query);
  return view_of(operand);
}

inline GradientProblem gradient_problem(const Operand& query, const Operand& key, const Shape& shape,
                                        const SharedArguments& shared, const RowNumbers& lse,
                                        const GradientTensor& grad_query, const GradientTensor& grad_key,
                                        const HeadGradient& grad_sinks) {
  GradientProblem problem;
  problem.shape = shape;
  problem.dtype = check_element_type(query);
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.visibility = shared.visibility;
  problem.scoring = shared.scoring;
  problem.lse = lse.data();
  problem.grad_query = grad_query.target();
  problem.grad_key = grad_key.target();
  problem.grad_sinks = grad_sinks.data();
  return problem;
}

// What the backward of an attention that has an output is given.
struct BackwardTensors {
  const Tensor &grad_output, &query, &key, &value, &output, &lse;
};

// Runs the kernels of a device; returns whether there was anything to compute, else the caller's gradients are zeros.
template <class Device>
bool differentiate(const GradientProblem& problem, const Operand& query, const typename Device::Gain* gains,
                   const BackwardTensors* tensors) {
  const Shape& shape = problem.shape;
  if (shape.batch * shape.heads * shape.queries * shape.keys == 0) return false;
  Device::differentiate(problem, query, gains, tensors);
  return true;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> source_attention_backward(
    const Tensor& grad_output, const OptionalTensor& grad_lse, const Tensor& query_tensor, const Tensor& key_tensor,
    const Tensor& value_tensor, const Tensor& output, const Tensor& lse_tensor, bool causal, int64_t query_offset,
    int64_t key_offset, int64_t window, const OptionalTensor& key_start, const OptionalTensor& key_end,
    const OptionalTensor& mask, double scale, double softcap, const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);
  const RowNumbers lse("lse", "[B, H, M]", lse_tensor, shape, shape.queries, query);
  std::optional<RowNumbers> lse_gradient;
  if (grad_lse) lse_gradient.emplace("grad_lse", "[B, H, M]", *grad_lse, shape, shape.queries, query);

  GradientTensor grad_query(shape.batch, shape.heads, shape.queries, shape.width, query);
  GradientTensor grad_key(shape.batch, shape.key_heads, shape.keys, shape.width, query);
  GradientTensor grad_value(shape.batch, shape.key_heads, shape.keys, shape.value_width, query);
  HeadGradient grad_sinks(shape, query);
  GradientProblem problem = gradient_problem(query, key, shape, shared, lse, grad_query, grad_key, grad_sinks);
  problem.value = view_of(value);
  problem.output = output_view("output", output, shape, query);
  problem.grad_output = output_view("grad_output", grad_output, shape, query);
  if (lse_gradient) problem.grad_lse = lse_gradient->data();
  problem.grad_value = grad_value.target();
  const BackwardTensors tensors{grad_output, query_tensor, key_tensor, value_tensor, output, lse_tensor};
  if (!differentiate<Device>(problem, query, nullptr, &tensors))
    for (GradientTensor* each : {&grad_query, &grad_key, &grad_value}) each->clear();
  return {grad_query.release(), grad_key.release(), grad_value.release(), grad_sinks.release()};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rebalanced_attention_backward(
    const Tensor& grad_output, const Tensor& query_tensor, const Tensor& key_tensor, const Tensor& value_tensor,
    const Tensor& output, const Tensor& lse_tensor, const Tensor& indices, const Tensor& counts, const Tensor& gain,
    bool normalize, bool causal, int64_t query_offset, int64_t key_offset, int64_t window,
    const OptionalTensor& key_start, const OptionalTensor& key_end, const OptionalTensor& mask, double scale,
    double softcap, const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor), value("value", value_tensor);
  check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  const OutlierArguments outliers(indices, counts, shape, query);
  const typename Device::Gain gains(gain, shape, query);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);
  const RowNumbers lse("lse", "[B, H, M]", lse_tensor, shape, shape.queries, query);

  GradientTensor grad_query(shape.batch, shape.heads, shape.queries, shape.width, query);
  GradientTensor grad_key(shape.batch, shape.key_heads, shape.keys, shape.width, query);
  GradientTensor grad_value(shape.batch, shape.key_heads, shape.keys, shape.value_width, query);
  HeadGradient grad_gain(shape, query), grad_sinks(shape, query);
  GradientProblem problem = gradient_problem(query, key, shape, shared, lse, grad_query, grad_key, grad_sinks);
  problem.value = view_of(value);
  problem.output = output_view("output", output, shape, query);
  problem.grad_output = output_view("grad_output", grad_output, shape, query);
  problem.grad_value = grad_value.target();
  if (outliers.capacity > 0) {
    problem.boost = {outliers.indices, outliers.counts, outliers.capacity, Device::numbers(gains), normalize};
    problem.grad_gain = grad_gain.data();
  }
  const BackwardTensors tensors{grad_output, query_tensor, key_tensor, value_tensor, output, lse_tensor};
  if (!differentiate<Device>(problem, query, &gains, &tensors))
    for (GradientTensor* each : {&grad_query, &grad_key, &grad_value}) each->clear();
  return {grad_query.release(), grad_key.release(), grad_value.release(), grad_gain.release(), grad_sinks.release()};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> received_attention_backward(const Tensor& grad_received, const Tensor& query_tensor,
                                                               const Tensor& key_tensor, const Tensor& lse_tensor,
                                                               bool causal, int64_t query_offset, int64_t key_offset,
                                                               int64_t window, const OptionalTensor& key_start,
                                                               const OptionalTensor& key_end,
                                                               const OptionalTensor& mask, double scale, double softcap,
                                                               const OptionalTensor& sinks) {
  const Operand query("query", query_tensor), key("key", key_tensor);
  check_element_type(query);
  const Shape shape = check_query_key(query, key);
  const SharedArguments shared({causal, query_offset, key_offset, window, key_start, key_end, mask},
                               {scale, softcap, sinks}, shape, query);
  const RowNumbers lse("lse", "[B, H, M]", lse_tensor, shape, shape.queries, query);
  const RowNumbers gradient("grad_received", "[B, H, N]", grad_received, shape, shape.keys, query);

  GradientTensor grad_query(shape.batch, shape.heads, shape.queries, shape.width, query);
  GradientTensor grad_key(shape.batch, shape.key_heads, shape.keys, shape.width, query);
  HeadGradient grad_sinks(shape, query);
  GradientProblem problem = gradient_problem(query, key, shape, shared, lse, grad_query, grad_key, grad_sinks);
  problem.grad_received = gradient.data();
  if (!differentiate<Device>(problem, query, nullptr, nullptr))
    for (GradientTensor* each : {&grad_query, &grad_key}) each->clear();
  return {grad_query.release(), grad_key.release(), grad_sinks.release()};
}

}  // namespace attnrb::ops
