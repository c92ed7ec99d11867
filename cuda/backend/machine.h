// The device's own instructions: see cuda/kernels/device.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "core/types.h"

#define ATTNRB_KERNEL __global__
#define ATTNRB_DEVICE __device__ __forceinline__
#define ATTNRB_PARAMETERS const __grid_constant__
// Threads of a block and, where given, the blocks that a multiprocessor is to hold at least.
#define ATTNRB_BLOCK_THREADS(...) __launch_bounds__(__VA_ARGS__)

namespace attnrb::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

ATTNRB_DEVICE int thread_index() { return int(threadIdx.x); }
ATTNRB_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }

ATTNRB_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

ATTNRB_DEVICE void block_sync() { __syncthreads(); }
// Lanes meet, and see what the others wrote to memory before.
ATTNRB_DEVICE void warp_sync() { __syncwarp(kAllLanes); }

ATTNRB_DEVICE bool any(bool x) { return __any_sync(kAllLanes, x); }
ATTNRB_DEVICE unsigned ballot(bool x) { return __ballot_sync(kAllLanes, x); }
template <class T>
ATTNRB_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
template <class T>
ATTNRB_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}

// Loads stay on their side of this, so that a long unrolled loop does not hold all of them in registers at once.
ATTNRB_DEVICE void keep_loads_apart() { asm volatile("" ::: "memory"); }

ATTNRB_DEVICE int count_bits(uint64_t x) { return __popcll(x); }

ATTNRB_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, both aligned; zeros where `valid` is false. They may be read after
// wait_for_copies() by the thread that asked for them, and after a barrier behind it by the block.
ATTNRB_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
ATTNRB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
ATTNRB_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group 0;\n" ::: "memory"); }
// For all but those of the last commit_copies().
ATTNRB_DEVICE void wait_for_copies_before_last() { asm volatile("cp.async.wait_group 1;\n" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32-bit ones: lane l gives the address of row l % 8 of matrix l
// / 8.
ATTNRB_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
ATTNRB_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, see Note: [Fragments].
ATTNRB_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ATTNRB_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ATTNRB_DEVICE void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x within 2^-22, relatively; 0 below 2^-126.
ATTNRB_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 2^-23, relatively; 0 for infinity.
ATTNRB_DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers in one word, the first in the low half.
template <class T>
ATTNRB_DEVICE uint32_t pack(float low, float high);
template <>
ATTNRB_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
ATTNRB_DEVICE uint32_t pack<float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// Elements and numbers, by one instruction where the machine has one.
template <class T>
ATTNRB_DEVICE float widen(T x) {
  return to_float(x);
}
template <>
ATTNRB_DEVICE float widen<float16>(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(y) : "h"(x.bits));
  return y;
}
template <class T>
ATTNRB_DEVICE T narrow(float x) {
  return from_float<T>(x);
}
template <>
ATTNRB_DEVICE float16 narrow<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
ATTNRB_DEVICE bfloat16 narrow<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(y.bits) : "f"(x));
  return y;
}

// Lanes with an equal number, the own one among them, as bits.
ATTNRB_DEVICE unsigned match_any(int32_t x) { return __match_any_sync(kAllLanes, x); }
// In memory that other blocks change too; returns what was there before.
ATTNRB_DEVICE int32_t atomic_add(int32_t* at, int32_t x) { return atomicAdd(at, x); }
ATTNRB_DEVICE void atomic_or(uint32_t* at, uint32_t x) { atomicOr(at, x); }

// Reports what is wrong with the data of a call; the larger code wins.
ATTNRB_DEVICE void report_status(int32_t* status, int32_t code) {
  if (status != nullptr) atomicMax(status, code);
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("attnrb: ") + what + " failed: " + cudaGetErrorString(error));
}

// Lets a kernel ask for all the shared memory that the device has for a block, once for each device. The limit is one
// value for each kernel and device: were it set to what a call needs, threads that serve several widths would take it
// from each other between setting it and starting the kernel.
template <auto kernel>
void allow_shared_memory() {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "asking for the device");
  const auto ask = [&] {
    int limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "asking for shared memory");
  };
  if (device < kDevices)
    std::call_once(asked[device], ask);
  else
    ask();
}

// Starts kernel(parameters) on `blocks` blocks.
template <auto kernel, class Parameters>
void launch(int64_t blocks, int threads, int64_t shared_bytes, void* stream, const Parameters& parameters) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared_memory<kernel>();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, parameters), "starting a kernel");
}

}  // namespace attnrb::cuda
