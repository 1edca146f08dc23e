#include "plan/memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr int64_t kKeptFloats = int64_t{64} << 20 >> 2;  // 64 MiB

std::atomic<int64_t> buffers_made{0};

// Blocks from here on are the kernel's, and go back to it: in malloc's heaps, what is packed for new weights beside the old ones
// would leave holes that only blocks of their size fill.
constexpr size_t kMappedBytes = size_t{1} << 20;

size_t whole_bytes(int64_t floats) {
  const size_t bytes = static_cast<size_t>(floats > 0 ? floats : 1) * sizeof(float);
  const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : 64;
  return (bytes + alignment - 1) / alignment * alignment;
}

#if defined(__linux__)
// Null where there is no memory.
void* map(size_t bytes) {
  const size_t room = bytes + (bytes >= kHugePageBytes ? kHugePageBytes : 0);
  void* const begin = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED || room == bytes) return begin == MAP_FAILED ? nullptr : begin;
  char* const from = static_cast<char*>(begin);
  const size_t before = (kHugePageBytes - reinterpret_cast<uintptr_t>(begin) % kHugePageBytes) % kHugePageBytes;
  if (before) munmap(from, before);
  if (before < kHugePageBytes) munmap(from + before + bytes, kHugePageBytes - before);
  // Advice only: weights and activations of this size miss the TLB on 4 KiB pages.
  madvise(from + before, bytes, MADV_HUGEPAGE);
  return from + before;
}
#endif

}  // namespace

AlignedBuffer::AlignedBuffer(int64_t floats) : size_(floats) {
  const size_t bytes = whole_bytes(floats);
#if defined(__linux__)
  if (bytes >= kMappedBytes) {
    data_ = static_cast<float*>(map(bytes));
    if (!data_) throw std::bad_alloc();
    buffers_made.fetch_add(1, std::memory_order_relaxed);
    return;
  }
#endif
  data_ = static_cast<float*>(std::aligned_alloc(bytes >= kHugePageBytes ? kHugePageBytes : 64, bytes));
  if (!data_) throw std::bad_alloc();
  std::memset(data_, 0, bytes);
  buffers_made.fetch_add(1, std::memory_order_relaxed);
}

AlignedBuffer::~AlignedBuffer() {
#if defined(__linux__)
  const size_t bytes = whole_bytes(size_);
  if (bytes >= kMappedBytes) {
    munmap(data_, bytes);
    return;
  }
#endif
  std::free(data_);
}

int64_t AlignedBuffer::made() { return buffers_made.load(std::memory_order_relaxed); }

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

void BufferPool::reserve(size_t calls) {
  std::vector<int64_t> sizes;
  {
    std::lock_guard<ForkSafeMutex> lock(mutex_);
    for (const BufferPtr& buffer : idle_) sizes.push_back(buffer->size());
    std::sort(sizes.begin(), sizes.end());
    // Of as many as were reserved before, each size is there as many times.
    for (size_t i = 0; i * reserved_ < sizes.size(); ++i) sizes[i] = sizes[i * reserved_];
    sizes.resize((sizes.size() + reserved_ - 1) / reserved_);
    if (calls <= reserved_) return;
    calls -= std::exchange(reserved_, calls);
  }
  for (const int64_t size : sizes)
    for (size_t i = 0; i < calls; ++i) {
      auto buffer = std::make_unique<AlignedBuffer>(size);
      std::memset(buffer->data(), 0, static_cast<size_t>(buffer->bytes()));  // so that its pages are there too
      give_back(std::move(buffer));
    }
}

int64_t BufferPool::idle_bytes() const {
  std::lock_guard<ForkSafeMutex> lock(mutex_);
  int64_t bytes = 0;
  for (const BufferPtr& buffer : idle_) bytes += buffer->bytes();
  return bytes;
}

}  // namespace fastseq
