// 64-byte aligned scratch memory, and a pool of it that concurrent calls share without sharing a block.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "plan/fork.h"

namespace fastseq {

class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t floats);  // zero-filled; large blocks ask for huge pages
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  float* data() const { return data_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(float)); }
  static int64_t made();  // in this process so far

 private:
  float* data_;
  int64_t size_;
};

using BufferPtr = std::unique_ptr<AlignedBuffer>;

// Blocks come back when a call ends and serve the next one, the smallest that is large enough. What a plan keeps while idle is
// bounded: as many blocks as were in use at once, and none above a limit.
class BufferPool {
 public:
  BufferPtr take(int64_t floats);
  void give_back(BufferPtr buffer);
  int64_t idle_bytes() const;
  // Makes what `calls` calls at once need, where one call after another has left what is idle.
  void reserve(size_t calls);

 private:
  mutable ForkSafeMutex mutex_;
  std::vector<BufferPtr> idle_;
  size_t reserved_ = 1;  // calls
};

// Several blocks of one pool for the length of a call.
class Lease {
 public:
  explicit Lease(BufferPool& pool) : pool_(pool) {}
  ~Lease() {
    pool_.give_back(std::move(first_));
    for (BufferPtr& buffer : others_) pool_.give_back(std::move(buffer));
  }
  float* add(int64_t floats) {
    if (!first_) return (first_ = pool_.take(floats))->data();
    others_.push_back(pool_.take(floats));
    return others_.back()->data();
  }

 private:
  BufferPool& pool_;
  BufferPtr first_;  // a short call needs one, and no vector
  std::vector<BufferPtr> others_;
};

}  // namespace fastseq
