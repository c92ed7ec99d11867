// Working memory that outlives a call, so that no call pays for page faults twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace attnrb {

// A 64-byte aligned heap block that only grows.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  ~AlignedBuffer();

  // At least `bytes` bytes; earlier contents are lost when it has to grow. Throws std::bad_alloc.
  void* reserve(size_t bytes);
  size_t capacity() const { return capacity_; }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

// What one running call holds: a block all workers share, and one block each. Kernels, which are compiled once for each
// instruction set, see no vector: its members would be symbols that they share.
class Scratch {
 public:
  AlignedBuffer shared;

  void reserve_workers(int64_t count, size_t bytes);
  void* worker(int64_t index);
  size_t capacity() const;

 private:
  std::vector<AlignedBuffer> workers_;
};

// Borrows a Scratch for one call; concurrent calls get different ones. Given back on destruction, also by exception.
class ScratchLease {
 public:
  ScratchLease();
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;
  Scratch& operator*() { return *scratch_; }

 private:
  std::unique_ptr<Scratch> scratch_;
};

size_t scratch_bytes();  // held by idle scratches
void release_scratch();  // frees all idle scratches

}  // namespace attnrb
