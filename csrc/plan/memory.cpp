#include "plan/memory.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr int64_t kKeptFloats = int64_t{64} << 20 >> 2;  // 64 MiB

}  // namespace

AlignedBuffer::AlignedBuffer(int64_t floats) : size_(floats) {
  size_t bytes = static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float);
  const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  // Advice only: weights and activations of this size miss the TLB on 4 KiB pages.
  if (alignment == kHugePageBytes) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  std::memset(data_, 0, bytes);
}

AlignedBuffer::~AlignedBuffer() { std::free(data_); }

BufferPtr BufferPool::take(int64_t floats) {
  BufferPtr outgrown;  // freed outside the lock
  {
    std::lock_guard<ForkSafeMutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if ((*it)->size() >= floats && (best == idle_.end() || (*it)->size() < (*best)->size())) best = it;
    if (best != idle_.end()) {
      BufferPtr found = std::move(*best);
      idle_.erase(best);
      return found;
    }
    if (!idle_.empty()) {
      outgrown = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  return std::make_unique<AlignedBuffer>(floats);
}

void BufferPool::give_back(BufferPtr buffer) {
  if (!buffer || buffer->size() > kKeptFloats) return;
  std::lock_guard<ForkSafeMutex> lock(mutex_);
  idle_.push_back(std::move(buffer));
}

}  // namespace fastseq
