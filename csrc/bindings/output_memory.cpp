#include "bindings/output_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "plan/fork.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq {
namespace {

// Below this malloc reuses memory by itself.
constexpr size_t kLargeBytes = size_t{1} << 20;
constexpr size_t kHugePageBytes = size_t{2} << 20;
// Of all idle blocks together.
constexpr size_t kKeptBytes = size_t{64} << 20, kMostKept = 8;

struct Block {
  void* data;
  size_t bytes;
  ~Block() { std::free(data); }
};
using BlockPtr = std::unique_ptr<Block>;

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    BlockPtr block = take(bytes);
    if (!block) {
      const size_t alignment = bytes >= kHugePageBytes ? kHugePageBytes : 64;
      const size_t rounded = (std::max<size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
      void* const data = std::aligned_alloc(alignment, rounded);
      if (!data) throw std::bad_alloc();
      block.reset(new Block{data, rounded});
#if defined(__linux__)
      if (alignment == kHugePageBytes) madvise(data, rounded, MADV_HUGEPAGE);
#endif
    }
    void* const data = block->data;
    return {data, block.release(), &release, at::Device(at::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the data is not the context

  void copy_data(void* dst, const void* src, size_t bytes) const override { default_copy_data(dst, src, bytes); }

  static OutputAllocator& instance() {
    static OutputAllocator* const allocator = new OutputAllocator;  // tensors may outlive every static
    return *allocator;
  }

 private:
  static void release(void* context) { instance().give_back(BlockPtr(static_cast<Block*>(context))); }

  // The smallest idle block that is large enough and not half empty.
  BlockPtr take(size_t bytes) {
    std::lock_guard<ForkSafeMutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes / 2 <= bytes && (best == idle_.end() || (*it)->bytes < (*best)->bytes)) best = it;
    if (best == idle_.end()) return nullptr;
    BlockPtr found = std::move(*best);
    idle_.erase(best);
    kept_ -= found->bytes;
    return found;
  }

  void give_back(BlockPtr block) {
    std::vector<BlockPtr> dropped;  // freed outside the lock
    std::lock_guard<ForkSafeMutex> lock(mutex_);
    if (block->bytes > kKeptBytes) {
      dropped.push_back(std::move(block));
      return;
    }
    kept_ += block->bytes;
    idle_.push_back(std::move(block));
    while (kept_ > kKeptBytes || idle_.size() > kMostKept) {  // the oldest
      kept_ -= idle_.front()->bytes;
      dropped.push_back(std::move(idle_.front()));
      idle_.erase(idle_.begin());
    }
  }

  ForkSafeMutex mutex_;
  std::vector<BlockPtr> idle_;
  size_t kept_ = 0;
};

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, std::optional<at::MemoryFormat> format) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (int64_t size : sizes) bytes *= size;
  if (bytes < static_cast<int64_t>(kLargeBytes)) return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format);
  return at::detail::empty_generic(sizes, &OutputAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, format);
}

}  // namespace fastseq
