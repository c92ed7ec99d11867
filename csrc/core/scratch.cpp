#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace attnrb {

namespace {

constexpr size_t kAlignment = 64;

std::mutex idle_mutex;

std::vector<std::unique_ptr<Scratch>>& idle_scratches() {
  static std::vector<std::unique_ptr<Scratch>> idle;
  return idle;
}

size_t held_bytes(const Scratch& scratch) {
  size_t bytes = scratch.shared.capacity();
  for (const AlignedBuffer& worker : scratch.workers) bytes += worker.capacity();
  return bytes;
}

}  // namespace

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

AlignedBuffer::~AlignedBuffer() { std::free(data_); }

void* AlignedBuffer::reserve(size_t bytes) {
  if (bytes <= capacity_) return data_;
  // Growing by half again keeps a cache that lengthens token by token from reallocating at every step.
  size_t wanted = bytes + (capacity_ > 0 ? bytes / 2 : 0);
  wanted = (wanted + kAlignment - 1) / kAlignment * kAlignment;
  std::free(std::exchange(data_, nullptr));
  capacity_ = 0;
  data_ = std::aligned_alloc(kAlignment, wanted);
  if (data_ == nullptr) throw std::bad_alloc();
  capacity_ = wanted;
  return data_;
}

ScratchLease::ScratchLease() {
  {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (!idle_scratches().empty()) {
      scratch_ = std::move(idle_scratches().back());
      idle_scratches().pop_back();
    }
  }
  if (!scratch_) scratch_ = std::make_unique<Scratch>();
}

ScratchLease::~ScratchLease() {
  std::lock_guard<std::mutex> lock(idle_mutex);
  try {
    idle_scratches().push_back(std::move(scratch_));
  } catch (const std::bad_alloc&) {
    // No room to remember it: let it be freed.
  }
}

size_t scratch_bytes() {
  std::lock_guard<std::mutex> lock(idle_mutex);
  size_t bytes = 0;
  for (const auto& scratch : idle_scratches()) bytes += held_bytes(*scratch);
  return bytes;
}

void release_scratch() {
  std::lock_guard<std::mutex> lock(idle_mutex);
  idle_scratches().clear();
}

}  // namespace attnrb
