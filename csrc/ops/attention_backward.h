// Gradients of the attention ops, from what their forwards left, on any device. A Device is as in attention.h, and runs
// a problem (differentiate()), whose tensors it may hand on.
#pragma once

#include <tuple>

#include "ops/attention.h"

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

// float32, in the shape of the key bias; empty without one.
class BiasGradient {
 public:
  BiasGradient(const OptionalTensor& bias, const Operand& like) {
    if (!bias) {
      tensor_ = empty<1>({0}, dtype_codes().float32, like);
      return;
    }
    const Operand operand("key_bias", *bias);
    const std::array<int64_t, 3> sizes{operand.sizes[0], operand.sizes[1], operand.sizes[2]};
    strides_ = contiguous_strides<3>(sizes);
    for (int axis = 0; axis < 2; ++axis)
      if (sizes[size_t(axis)] == 1) strides_[size_t(axis)] = 0;
    tensor_ = empty<3>(sizes, dtype_codes().float32, like);
  }
  void aim(GradientProblem& problem) const {
    problem.grad_bias = static_cast<float*>(tensor_.mutable_data_ptr());
    std::copy_n(strides_.begin(), 3, problem.grad_bias_strides);
  }
  void clear() { torch::stable::zero_(tensor_); }
  Tensor release() { return std::move(tensor_); }

 private:
  std::array<int64_t, 3> strides_{};
  Tensor tensor_;
};

inline View output_view(const char* name, const Tensor& tensor, const Shape& shape, const Operand& query) {
  const Operand operand(name, tensor);
  check_shape(operand, {shape.batch, shape.heads, shape.queries, shape.value_width}, "[B, H, M, Dv]");
  check_companion(operand, query);
  return view_of(operand);
}

template <class Device>
GradientProblem gradient_problem(const Operand& query, const Operand& key, const Shape& shape,
                                 const CheckedOptions<Device>& checked, const RowNumbers& lse,
                                 const GradientTensor& grad_query, const GradientTensor& grad_key,
                                 const HeadGradient& grad_sinks, const BiasGradient& grad_bias) {
  GradientProblem problem;
  problem.shape = shape;
  problem.dtype = check_element_type(query);
  problem.query = view_of(query);
  problem.key = view_of(key);
  problem.visibility = checked.visibility;
  problem.scoring = checked.scoring;
  problem.edit = checked.edit;
  problem.lse = lse.data();
  problem.grad_query = grad_query.target();
  problem.grad_key = grad_key.target();
  problem.grad_sinks = grad_sinks.data();
  if (checked.edit.key_bias != nullptr) grad_bias.aim(problem);
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

// Of query, key, value, gain, key bias and sinks.
using AttentionGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
AttentionGradients differentiate_attention(const BackwardTensors& tensors, const OptionalTensor& grad_lse,
                                           const Options& options) {
  const Operand query("query", tensors.query), key("key", tensors.key), value("value", tensors.value);
  check_element_type(query);
  const Shape shape = check_attention(query, key, value);
  const CheckedOptions<Device> checked(options, shape, query);
  const RowNumbers lse("lse", "[B, H, M]", tensors.lse, shape, shape.queries, query);
  std::optional<RowNumbers> lse_gradient;
  if (grad_lse) lse_gradient.emplace("grad_lse", "[B, H, M]", *grad_lse, shape, shape.queries, query);

  GradientTensor grad_query(shape.batch, shape.heads, shape.queries, shape.width, query);
  GradientTensor grad_key(shape.batch, shape.key_heads, shape.keys, shape.width, query);
  GradientTensor grad_value(shape.batch, shape.key_heads, shape.keys, shape.value_width, query);
  HeadGradient grad_gain(shape, query), grad_sinks(shape, query);
  BiasGradient grad_bias(options.edit.key_bias, query);
  GradientProblem problem =
      gradient_problem(query, key, shape, checked, lse, grad_query, grad_key, grad_sinks, grad_bias);
  problem.value = view_of(value);
  problem.output = output_view("output", tensors.output, shape, query);
  problem.grad_output = output_view("grad_output", tensors.grad_output, shape, query);
  if (lse_gradient) problem.grad_lse = lse_gradient->data();
  problem.grad_value = grad_value.target();
  if (checked.edit.indices != nullptr) problem.grad_gain = grad_gain.data();
  if (!differentiate<Device>(problem, query, checked.gain ? &*checked.gain : nullptr, &tensors)) {
    for (GradientTensor* each : {&grad_query, &grad_key, &grad_value}) each->clear();
    grad_bias.clear();
  }
  return {grad_query.release(), grad_key.release(),  grad_value.release(),
          grad_gain.release(),  grad_bias.release(), grad_sinks.release()};
}

template <class Device>
AttentionGradients attention_backward(Arguments& arguments) {
  const Tensor grad_output = arguments.next<Tensor>();
  const OptionalTensor grad_lse = arguments.next<OptionalTensor>();
  const Tensor query = arguments.next<Tensor>(), key = arguments.next<Tensor>(), value = arguments.next<Tensor>(),
               output = arguments.next<Tensor>(), lse = arguments.next<Tensor>();
  const Options options = read_options(arguments);
  arguments.finish();
  return differentiate_attention<Device>({grad_output, query, key, value, output, lse}, grad_lse, options);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> received_attention_backward(Arguments& arguments) {
  const Tensor grad_received = arguments.next<Tensor>(), query_tensor = arguments.next<Tensor>(),
               key_tensor = arguments.next<Tensor>(), lse_tensor = arguments.next<Tensor>();
  Options options;
  read_received(arguments, options);
  arguments.finish();
  const Operand query("query", query_tensor), key("key", key_tensor);
  check_element_type(query);
  const Shape shape = check_query_key(query, key);
  const CheckedOptions<Device> checked(options, shape, query);
  const RowNumbers lse("lse", "[B, H, M]", lse_tensor, shape, shape.queries, query);
  const RowNumbers gradient("grad_received", "[B, H, N]", grad_received, shape, shape.keys, query);

  GradientTensor grad_query(shape.batch, shape.heads, shape.queries, shape.width, query);
  GradientTensor grad_key(shape.batch, shape.key_heads, shape.keys, shape.width, query);
  HeadGradient grad_sinks(shape, query);
  BiasGradient grad_bias(options.edit.key_bias, query);
  GradientProblem problem =
      gradient_problem(query, key, shape, checked, lse, grad_query, grad_key, grad_sinks, grad_bias);
  problem.grad_received = gradient.data();
  if (!differentiate<Device>(problem, query, nullptr, nullptr)) {
    for (GradientTensor* each : {&grad_query, &grad_key}) each->clear();
    grad_bias.clear();
  }
  return {grad_query.release(), grad_key.release(), grad_sinks.release(), grad_bias.release()};
}

}  // namespace attnrb::ops
