#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "huge_pages.h"

namespace attnrb {

namespace {

constexpr size_t kAlignment = 64;

std::mutex idle_mutex;

std::vector<std::unique_ptr<Scratch>>& idle_scratches() {
  static std::vector<std::unique_ptr<Scratch>> idle;
  return idle;
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
  ask_for_huge_pages(data_, int64_t(wanted));
  capacity_ = wanted;
  return data_;
}

void Scratch::reserve_workers(int64_t count, size_t bytes) {
  if (int64_t(workers_.size()) < count) workers_.resize(size_t(count));
  for (int64_t w = 0; w < count; ++w) workers_[size_t(w)].reserve(bytes);
}

void* Scratch::worker(int64_t index) { return workers_[size_t(index)].reserve(0); }

size_t Scratch::capacity() const {
  size_t bytes = shared.capacity();
  for (const AlignedBuffer& worker : workers_) bytes += worker.capacity();
  return bytes;
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
  for (const auto& scratch : idle_scratches()) bytes += scratch->capacity();
  return bytes;
}

void release_scratch() {
  std::lock_guard<std::mutex> lock(idle_mutex);
  idle_scratches().clear();
}

}  // namespace attnrb
