// The GPU at hand in the place of the emulated device: operands go there and results come back around each call. Memory
// is managed, so both sides use the same pointers.
#include "table.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/outliers.h"
#include "gradient.h"
#include "launch.h"
#include "sparse.h"

namespace attnrb {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Without a device every test is skipped, or fails where ATTNRB_REQUIRE_CUDA=1.
class NeedsDevice : public ::testing::Environment {
 public:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return;
    const char* required = std::getenv("ATTNRB_REQUIRE_CUDA");
    if (required != nullptr && std::strcmp(required, "1") == 0) FAIL() << "there is no CUDA device";
    GTEST_SKIP() << "there is no CUDA device (ATTNRB_REQUIRE_CUDA=1 makes this a failure)";
  }
};
const ::testing::Environment* const needs_device = ::testing::AddGlobalTestEnvironment(new NeedsDevice);

int attribute(cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, 0), "asking for the limits of the device");
  return value;
}

// The device's own limits, but for the number of multiprocessors that keys are split over.
cuda::Device device(int multiprocessors) {
  cuda::Device device;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return device;
}

// Memory that both sides see; NaN at first.
class Managed {
 public:
  explicit Managed(int64_t bytes) {
    check(cudaMallocManaged(&data_, size_t(bytes) + 1), "asking for memory");
    std::memset(data_, 0xff, size_t(bytes) + 1);
  }
  ~Managed() { cudaFree(data_); }
  Managed(Managed&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Managed(const Managed&) = delete;
  Managed& operator=(const Managed&) = delete;
  unsigned char* data() const { return static_cast<unsigned char*>(data_); }

 private:
  void* data_ = nullptr;
};

// Host memory lent to the device for one call; what may be written comes back.
class Loan {
 public:
  template <class T>
  void read(const T*& pointer, int64_t count) {
    pointer = static_cast<const T*>(take(pointer, count * int64_t(sizeof(T)), false));
  }
  template <class T>
  void write(T*& pointer, int64_t count) {
    pointer = static_cast<T*>(take(pointer, count * int64_t(sizeof(T)), true));
  }
  void read(View& view, const int64_t (&sizes)[4], int64_t element_bytes) {
    view.data = take(view.data, extent(view.strides, sizes) * element_bytes, false);
  }
  void write(void*& data, const int64_t (&strides)[4], const int64_t (&sizes)[4], int64_t element_bytes) {
    data = take(data, extent(strides, sizes) * element_bytes, true);
  }
  void write(GradientProblem::Target& target, const int64_t (&sizes)[4], int64_t element_bytes) {
    write(target.data, {target.strides[0], target.strides[1], target.strides[2], 1}, sizes, element_bytes);
  }
  void read(Visibility& visibility, const Shape& shape) {
    read(visibility.key_start, shape.batch);
    read(visibility.key_end, shape.batch);
    read(visibility.query_offsets, shape.batch);
    read(visibility.mask, extent(visibility.mask_strides, {shape.batch, shape.heads, shape.queries, shape.keys}));
  }

  void read(Edit& edit, const Shape& shape) {
    const int64_t lists = shape.batch * shape.heads * (edit.shared_rows ? 1 : shape.queries);
    read(edit.indices, lists * edit.capacity);
    read(edit.counts, lists);
    read(edit.gain, shape.heads);
    const int64_t strides[4] = {edit.bias_strides[0], edit.bias_strides[1], edit.bias_strides[2], 0};
    read(edit.key_bias, extent(strides, {shape.batch, shape.heads, edit.bias_slots, 1}));
    read(edit.first_query, shape.batch);
  }

  // Waits for the device and takes back what it wrote.
  void settle() {
    check(cudaGetLastError(), "starting a kernel");
    check(cudaDeviceSynchronize(), "a kernel");
    for (const Entry& entry : entries_)
      if (entry.written) std::memcpy(const_cast<void*>(entry.host), entry.memory.data() + entry.offset, entry.bytes);
  }

 private:
  struct Entry {
    const void* host;
    size_t bytes, offset;
    bool written;
    Managed memory;
  };

  static int64_t extent(const int64_t* strides, const int64_t (&sizes)[4]) {
    int64_t last = 0;
    for (int axis = 0; axis < 4; ++axis) {
      if (sizes[axis] == 0) return 0;
      last += (sizes[axis] - 1) * strides[axis];
    }
    return last + 1;
  }

  // As far from an aligned address as on the host: that decides which way a kernel reads.
  void* take(const void* host, int64_t bytes, bool written) {
    if (host == nullptr) return nullptr;
    const size_t offset = reinterpret_cast<uintptr_t>(host) % 256;
    Managed memory(int64_t(offset) + bytes);
    std::memcpy(memory.data() + offset, host, size_t(bytes));
    void* there = memory.data() + offset;
    entries_.push_back({host, size_t(bytes), offset, written, std::move(memory)});
    return there;
  }

  std::vector<Entry> entries_;
};

// Where kernels report what is wrong with outlier rows.
struct StatusMemory {
  StatusMemory() : memory(sizeof(int32_t)) { *data() = int32_t(Status::ok); }
  int32_t* data() const { return reinterpret_cast<int32_t*>(memory.data()); }
  Status status() const { return Status(*data()); }
  Managed memory;
};

// Numbers that are zero before the kernels start.
struct Zeros {
  explicit Zeros(int64_t count) : memory(count * int64_t(sizeof(int32_t))) {
    std::memset(memory.data(), 0, size_t(count) * sizeof(int32_t));
  }
  int32_t* data() const { return reinterpret_cast<int32_t*>(memory.data()); }
  Managed memory;
};

AttentionProblem lend(const AttentionProblem& given, Loan& loan) {
  AttentionProblem problem = given;
  if (problem.edit.capacity == 0) problem.edit.indices = nullptr;
  const Shape& shape = problem.shape;
  const int64_t bytes = element_size(problem.dtype), rows = shape.batch * shape.heads * shape.queries;
  loan.read(problem.query, {shape.batch, shape.heads, shape.queries, shape.width}, bytes);
  loan.read(problem.key, {shape.batch, shape.key_heads, shape.keys, shape.width}, bytes);
  loan.read(problem.value, {shape.batch, shape.key_heads, shape.keys, shape.value_width}, bytes);
  loan.read(problem.visibility, shape);
  loan.read(problem.scoring.sinks, shape.heads);
  const int64_t* strides = problem.output_strides;
  loan.write(problem.output, {strides[0], strides[1], strides[2], 1},
             {shape.batch, shape.heads, shape.queries, shape.value_width}, bytes);
  loan.write(problem.lse, rows);
  loan.write(problem.softmax, 2 * rows);
  loan.write(problem.emit.indices, rows * problem.emit.capacity);
  loan.write(problem.emit.counts, rows);
  loan.read(problem.edit, shape);
  return problem;
}

template <int multiprocessors>
Status attention(const AttentionProblem& given, const ThreadPool&, Scratch&) {
  Loan loan;
  const AttentionProblem problem = lend(given, loan);
  cuda::AttentionPlan plan = cuda::plan_attention(problem, device(multiprocessors));
  const Managed workspace(plan.workspace_bytes);
  const StatusMemory status;
  cuda::start_attention(plan, workspace.data(), status.data(), nullptr);
  loan.settle();
  return status.status();
}

template <int multiprocessors>
void received_attention(const ReceivedProblem& given, const ThreadPool&, Scratch&) {
  ReceivedProblem problem = given;
  const Shape& shape = problem.shape;
  const int64_t bytes = element_size(problem.dtype);
  Loan loan;
  loan.read(problem.query, {shape.batch, shape.heads, shape.queries, shape.width}, bytes);
  loan.read(problem.key, {shape.batch, shape.key_heads, shape.keys, shape.width}, bytes);
  loan.read(problem.visibility, shape);
  loan.read(problem.scoring.sinks, shape.heads);
  loan.read(problem.edit, shape);
  loan.write(problem.received, shape.batch * shape.heads * shape.keys);
  loan.write(problem.lse, shape.batch * shape.heads * shape.queries);
  cuda::ReceivedPlan plan = cuda::plan_received(problem, device(multiprocessors));
  const Managed workspace(plan.workspace_bytes);
  cuda::start_received(plan, workspace.data(), nullptr);
  loan.settle();
}

GradientProblem lend(const GradientProblem& given, Loan& loan) {
  GradientProblem problem = given;
  if (problem.edit.capacity == 0) problem.edit.indices = nullptr;
  const Shape& shape = problem.shape;
  const int64_t bytes = element_size(problem.dtype), rows = shape.batch * shape.heads * shape.queries;
  const int64_t of_query[4] = {shape.batch, shape.heads, shape.queries, shape.width};
  const int64_t of_key[4] = {shape.batch, shape.key_heads, shape.keys, shape.width};
  const int64_t of_value[4] = {shape.batch, shape.key_heads, shape.keys, shape.value_width};
  const int64_t of_output[4] = {shape.batch, shape.heads, shape.queries, shape.value_width};
  loan.read(problem.query, of_query, bytes);
  loan.read(problem.key, of_key, bytes);
  loan.read(problem.value, of_value, bytes);
  loan.read(problem.visibility, shape);
  loan.read(problem.scoring.sinks, shape.heads);
  loan.read(problem.lse, rows);
  loan.read(problem.output, of_output, bytes);
  loan.read(problem.grad_output, of_output, bytes);
  loan.read(problem.grad_lse, rows);
  loan.read(problem.edit, shape);
  loan.read(problem.grad_received, shape.batch * shape.heads * shape.keys);
  loan.write(problem.grad_query, of_query, bytes);
  loan.write(problem.grad_key, of_key, bytes);
  loan.write(problem.grad_value, of_value, bytes);
  loan.write(problem.grad_gain, shape.heads);
  loan.write(problem.grad_sinks, shape.heads);
  const int64_t* strides = problem.grad_bias_strides;
  if (problem.grad_bias != nullptr)
    loan.write(problem.grad_bias, strides[0] * (strides[0] == 0 ? 0 : shape.batch - 1) +
                                      strides[1] * (strides[1] == 0 ? 0 : shape.heads - 1) + problem.edit.bias_slots);
  return problem;
}

Status gradient(const GradientProblem& given, const ThreadPool&, Scratch&) {
  Loan loan;
  const GradientProblem problem = lend(given, loan);
  cuda::GradientPlan plan = cuda::plan_gradient(problem, device(0));
  const Managed workspace(plan.workspace_bytes);
  const StatusMemory status;
  cuda::start_gradient(plan, workspace.data(), status.data(), nullptr);
  loan.settle();
  return status.status();
}

void outlier_mask(const OutlierMaskProblem& given, const ThreadPool&) {
  OutlierMaskProblem problem = given;
  const Shape& shape = problem.shape;
  Loan loan;
  loan.read(problem.weights, {shape.batch, shape.heads, shape.queries, shape.keys}, element_size(problem.dtype));
  loan.write(problem.mask, shape.batch * shape.heads * shape.queries * shape.keys);
  cuda::start_outlier_mask(problem, nullptr);
  loan.settle();
}

void rebalance(const RebalanceProblem& given, const ThreadPool&) {
  RebalanceProblem problem = given;
  const Shape& shape = problem.shape;
  const int64_t sizes[4] = {shape.batch, shape.heads, shape.queries, shape.keys};
  const int64_t contiguous[4] = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  Loan loan;
  loan.read(problem.weights, sizes, element_size(problem.dtype));
  loan.read(problem.mask, sizes, 1);
  loan.read(problem.gain, shape.heads);
  loan.write(problem.output, contiguous, sizes, element_size(problem.dtype));
  cuda::start_rebalance(problem, 1, 0.0f, nullptr);
  loan.settle();
}

void rebalance_gradient(const RebalanceGradientProblem& given, const ThreadPool&) {
  RebalanceGradientProblem problem = given;
  const Shape& shape = problem.shape;
  const int64_t sizes[4] = {shape.batch, shape.heads, shape.queries, shape.keys};
  const int64_t contiguous[4] = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  const int64_t bytes = element_size(problem.dtype);
  Loan loan;
  loan.read(problem.weights, sizes, bytes);
  loan.read(problem.grad_output, sizes, bytes);
  loan.read(problem.mask, sizes, 1);
  loan.read(problem.gain, shape.heads);
  loan.write(problem.grad_weights, contiguous, sizes, bytes);
  loan.write(problem.gain_rows, shape.batch * shape.heads * shape.queries);
  loan.write(problem.grad_gain, shape.heads);
  cuda::start_rebalance_gradient(problem, 1, nullptr);
  loan.settle();
}

}  // namespace

const Kernels emulated_cuda_kernels = {"cuda",       attention<0>, received_attention<0>, gradient,
                                       outlier_mask, rebalance,    rebalance_gradient};
const Kernels emulated_cuda_split_kernels = {
    "cuda", attention<1000>, received_attention<1000>, nullptr, outlier_mask, rebalance, nullptr};

Status add_sparse_part(const AttentionProblem& given, const cuda::DensePart& given_dense) {
  Loan loan;
  const AttentionProblem problem = lend(given, loan);
  const Shape& shape = problem.shape;
  cuda::DensePart dense = given_dense;
  loan.read(dense.lse, shape.batch * dense.lse_strides[0]);
  if (given_dense.output.data == given.output)
    dense.output.data = problem.output;
  else
    loan.read(dense.output, {shape.batch, shape.heads, shape.queries, shape.width}, element_size(problem.dtype));
  cuda::SparsePlan plan = cuda::plan_sparse(problem, dense, device(0));
  const Zeros doubtful(plan.doubtful_numbers);
  const StatusMemory status;
  cuda::start_sparse(plan, doubtful.data(), status.data(), nullptr);
  loan.settle();
  return status.status();
}

Status add_sparse_gradient(const GradientProblem& given, const cuda::DenseGradientViews& given_dense,
                           int32_t most_parts) {
  Loan loan;
  const GradientProblem problem = lend(given, loan);
  const Shape& shape = problem.shape;
  const int64_t bytes = element_size(problem.dtype);
  cuda::DenseGradientViews dense = given_dense;
  loan.read(dense.query, {shape.batch, shape.heads, shape.queries, shape.width}, bytes);
  loan.read(dense.key, {shape.batch, shape.key_heads, shape.keys, shape.width}, bytes);
  loan.read(dense.value, {shape.batch, shape.key_heads, shape.keys, shape.value_width}, bytes);
  cuda::SparseGradientPlan plan = cuda::plan_sparse_gradient(problem, dense, device(0));
  plan.parameters.most_parts = std::min(plan.parameters.most_parts, most_parts);
  const Managed workspace(plan.workspace_bytes);
  const Zeros zeros(plan.zero_numbers);
  const StatusMemory status;
  cuda::start_sparse_gradient(plan, workspace.data(), zeros.data(), status.data(), nullptr);
  loan.settle();
  return status.status();
}

}  // namespace attnrb
