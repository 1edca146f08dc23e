// A CUDA grid on one CPU thread, for tests: the machinery under ptx_emulated.inl.h.
//
// Block after block; every CUDA thread is a fiber that runs until it must wait for others. Warps run ahead of each other as far as
// they can, and the order of blocks, warps and lanes comes from a seed (0: in order), so that a missing barrier shows as poison or
// as results that differ from seed to seed. What hardware does not allow and is cheap to notice ends the launch with a text:
// waiting where the others are not, addresses that are misaligned or not in shared memory, writes around shared memory, pointers
// that are not aligned to their type (with -fsanitize=alignment, whose handler is here). Not modelled: speed, bank conflicts,
// registers, launch bounds, reads past the end of shared memory (poison; ASan reports them), the rounding of tensor cores, memory
// ordering between blocks, spinning on another block's flag (hangs).
//
// The last lane to come to a collective does the work for its warp and goes on, so that one costs a switch for each other lane.
// Measured: `python tests/test_emulated_grid.py`, one virtual core of a Xeon: 90 million switches a second; shfl_xor takes 0.35 us
// a warp, mma_f16 0.9 us, block_barrier 2.7 us for 256 threads. With ucontext instead of assembly 6 million switches a second.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"

// Hidden: several libraries with a grid each may be loaded.
#pragma GCC visibility push(hidden)

// What CUDA has in the global namespace -----------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastseq::emulation {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr int kDefaultSharedBytes = 48 * 1024;  // more needs prepare()
constexpr int kMostSharedBytes = 227 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every type
constexpr uint16_t kCanary = 0xfffd;     // NaN too, and not the poison
constexpr int kGuardBytes = 16 * 1024;   // before and after shared memory

// The grid -----------------------------------------------------------------------------------------------------------------------

// Where a thread waits: the primitive, and the line that calls it.
struct Site {
  const char* file;
  int line;
};
struct Place {
  const char* what;
  Site site;
  bool operator==(const Place& other) const {
    return site.line == other.site.line && (what == other.what || std::strcmp(what, other.what) == 0);
  }
};

inline std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}
inline std::string text_of(const Place& place) {
  const char* slash = std::strrchr(place.site.file, '/');
  return text("%s (%s:%d)", place.what, slash ? slash + 1 : place.site.file, place.site.line);
}

// A cp.async that has been issued. `data` is what the source held then: it must not change before the copy is done.
struct Copy {
  unsigned char* shared;
  const void* global;  // null: zeros
  int bytes;
  int64_t group;
  unsigned char data[16];
};

struct Thread : Fiber {
  int index = 0;
  bool has_exited = false;
  Place place{};  // where it waits, or has last
  std::vector<Copy> copies;
  size_t copies_done = 0;
  int64_t groups = 0;  // committed
};

struct Warp {
  int first = 0, size = 0;
  int order[kLanes];   // in which lanes run
  uint32_t ready = 0;  // bit i: lane order[i] can run
  int arrived = 0;     // lanes at the collective `place`
  Place place{};
  void* lanes[kLanes];  // what they brought
};

// What is launched. `call` knows the type of `kernel` and of its `args`.
struct Launch {
  const void* kernel;
  void (*call)(const void* kernel, const void* args);
  const void* args;
  uint3 grid;
  int threads, shared_bytes;
  int64_t switches = 0;
  bool is_prepared = false;  // prepare() came before
};

[[noreturn]] void run_thread();

class Machine {
 public:
  // To be set by tests.
  uint64_t seed = 1;
  int shared_bytes_per_block = kMostSharedBytes;
  std::vector<Launch> log;  // the first launches

  // For launch.h. Null, or a text that lives until the thread's next error.
  const char* prepare(const void* kernel, int shared_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shared_bytes < 0 || shared_bytes > shared_bytes_per_block) {
      return error(text("prepare: %d bytes of shared memory, a block has %d", shared_bytes, shared_bytes_per_block));
    }
    prepared_[kernel] = shared_bytes;
    return nullptr;
  }

  const char* launch(const Launch& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::string refusal = refuses(what); !refusal.empty()) return error(refusal);
    launch_ = what;
    random_ = seed * 0x9e3779b97f4a7c15u;
    set_up();
    const uint64_t blocks = uint64_t{what.grid.x} * what.grid.y * what.grid.z;
    uint64_t step = 1, block = 0;
    if (seed != 0) {
      block = random() % blocks;
      do step = random() % blocks + 1;
      while (std::gcd(step, blocks) != 1);
    }
    error_.clear();
    for (uint64_t i = 0; i < blocks && error_.empty(); ++i, block = (block + step) % blocks) {
      blockIdx = {static_cast<unsigned>(block % what.grid.x), static_cast<unsigned>(block / what.grid.x % what.grid.y),
                  static_cast<unsigned>(block / what.grid.x / what.grid.y)};
      run_block();
    }
    check_stacks();
    launch_.is_prepared = prepared_.count(what.kernel) > 0;
    if (log.size() < kMostLogged) log.push_back(launch_);
    return error_.empty() ? nullptr : error(error_);
  }

  // For kernels.
  unsigned char* shared() { return shared_; }
  int lane() const { return current_->index % kLanes; }

  [[noreturn]] void fail(const std::string& what) {
    if (current_ == &host_) {  // not in a kernel: in the code that launches it
      std::fprintf(stderr, "%s\n", what.c_str());
      std::abort();
    }
    if (error_.empty()) {
      error_ = text("block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, current_->index) + what;
    }
    leave(host_);
  }
  [[noreturn]] void fail(const Place& place, const std::string& what) { fail(text_of(place) + ": " + what); }

  // `bytes` at `pointer` must be shared memory, aligned to `alignment`.
  void check_shared(const Place& place, const void* pointer, int bytes, int alignment) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - shared_;
    if (offset < 0 || offset + bytes > launch_.shared_bytes) {
      fail(place, text("offset %td is not in the %d bytes of shared memory", offset, launch_.shared_bytes));
    }
    if (offset % alignment != 0) fail(place, text("offset %td in shared memory is not aligned to %d bytes", offset, alignment));
  }

  // All lanes of a warp meet, and the last calls work(lanes), where lanes[i] is what lane i brought.
  template <typename Lane, typename Work>
  void collective(const Place& place, Lane& brought, const Work& work) {
    Thread& thread = *current_;
    Warp& warp = warps_[thread.index / kLanes];
    if (warp.size != kLanes) fail(place, text("the warp has %d lanes", warp.size));
    if (warp.arrived == 0) {
      warp.place = place;
    } else if (!(place == warp.place)) {
      fail(place, "divergence, other lanes wait at " + text_of(warp.place));
    }
    warp.lanes[lane()] = &brought;
    thread.place = place;
    if (++warp.arrived < kLanes) return wait();

    Lane* lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Lane*>(warp.lanes[i]);
    work(lanes);
    warp.arrived = 0;
    warp.ready = ~0u;
    if (seed != 0 && random() % 16 == 0) {  // let other warps overtake
      warp_ = any_warp();
      return wait();
    }
    for (int i = 0; i < kLanes; ++i) {
      if (warp.order[i] == lane()) warp.ready &= ~(1u << i);
    }
  }

  void block_barrier(const Place& place) {
    if (at_barrier_ == 0) {
      barrier_ = place;
    } else if (!(place == barrier_)) {
      fail(place, "divergence, other threads wait at " + text_of(barrier_));
    }
    current_->place = place;
    if (++at_barrier_ == launch_.threads) {
      at_barrier_ = 0;
      for (Warp& warp : warps_) warp.ready = all_lanes(warp);
      warp_ = any_warp();
    }
    wait();
  }

  void copy_async(const Place& place, void* shared, const void* global, int bytes, bool is_valid) {
    check_shared(place, shared, bytes, bytes);
    Copy copy{static_cast<unsigned char*>(shared), nullptr, bytes, current_->groups, {}};
    if (is_valid) {
      const auto* source = static_cast<const unsigned char*>(global);
      if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail(place, text("the source is not aligned to %d bytes", bytes));
      const bool is_on_stack = source >= stacks_.get() && source < stacks_.get() + stacks_count_ * kStackBytes;
      const bool is_shared = source >= memory_.get() && source < memory_.get() + memory_bytes_;
      if (is_on_stack || is_shared) fail(place, "the source is not global memory");
      copy.global = global;
      std::memcpy(copy.data, global, bytes);
    }
    std::memset(shared, kPoison, bytes);
    current_->copies.push_back(copy);
  }
  void commit_copies() { current_->groups++; }
  void wait_copies(const Place& place, int pending_groups) {
    Thread& thread = *current_;
    while (thread.copies_done < thread.copies.size()) {
      const Copy& copy = thread.copies[thread.copies_done];
      if (copy.group >= thread.groups - pending_groups) return;
      if (copy.global && std::memcmp(copy.data, copy.global, copy.bytes) != 0) fail(place, "the source of a copy has changed");
      std::memcpy(copy.shared, copy.data, copy.bytes);
      thread.copies_done++;
    }
    thread.copies.clear();
    thread.copies_done = 0;
  }

 private:
  static constexpr size_t kMostLogged = 4096;

  uint64_t random() {  // splitmix64
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  static const char* error(const std::string& what) {
    thread_local std::string kept;
    kept = what;
    return kept.c_str();
  }

  std::string refuses(const Launch& what) const {
    if (what.grid.x < 1 || what.grid.y < 1 || what.grid.z < 1 || what.grid.x > 0x7fffffffu || what.grid.y > 65535 ||
        what.grid.z > 65535) {
      return text("launch: a grid of %u x %u x %u blocks", what.grid.x, what.grid.y, what.grid.z);
    }
    if (what.threads < 1 || what.threads > kMostThreads) return text("launch: blocks of %d threads", what.threads);
    if (what.shared_bytes < 0 || what.shared_bytes > shared_bytes_per_block) {
      return text("launch: %d bytes of shared memory, a block has %d", what.shared_bytes, shared_bytes_per_block);
    }
    const auto row = prepared_.find(what.kernel);
    const int prepared = row == prepared_.end() ? 0 : row->second;
    if (what.shared_bytes > kDefaultSharedBytes && what.shared_bytes > prepared) {
      return text("launch: %d bytes of shared memory, prepared for %d", what.shared_bytes, prepared);
    }
    return "";
  }

  void set_up() {
    blockDim = {static_cast<unsigned>(launch_.threads), 1, 1};
    gridDim = launch_.grid;
    const size_t threads = launch_.threads;
    if (stacks_count_ < threads) {
      stacks_.reset(new unsigned char[threads * kStackBytes]);
      stacks_count_ = threads;
    }
    threads_.resize(threads);
    for (size_t i = 0; i < threads; ++i) {
      threads_[i].index = static_cast<int>(i);
      std::memcpy(stack_of(threads_[i]), &kCanary, sizeof kCanary);
    }
    warps_.resize((threads + kLanes - 1) / kLanes);
    // To 16 bytes and no more: kernels may count on nothing else.
    memory_bytes_ = static_cast<size_t>(launch_.shared_bytes) + 2 * kGuardBytes + 144;
    memory_.reset(new unsigned char[memory_bytes_]);
    shared_ = memory_.get() + kGuardBytes;
    shared_ += 144 - reinterpret_cast<uintptr_t>(shared_) % 128;
    for (int i = 0; i < kGuardBytes; i += 2) {
      std::memcpy(shared_ - kGuardBytes + i, &kCanary, 2);
      std::memcpy(shared_ + launch_.shared_bytes + i, &kCanary, 2);
    }
  }

  void run_block() {
    std::memset(shared_, kPoison, launch_.shared_bytes);
    for (Thread& thread : threads_) {
      thread.start(stack_of(thread), run_thread);
      thread.has_exited = false;
      thread.copies.clear();
      thread.copies_done = 0;
      thread.groups = 0;
    }
    for (size_t i = 0; i < warps_.size(); ++i) {
      Warp& warp = warps_[i];
      warp.first = static_cast<int>(i) * kLanes;
      warp.size = std::min(kLanes, launch_.threads - warp.first);
      warp.arrived = 0;
      warp.ready = all_lanes(warp);
      std::iota(warp.order, warp.order + warp.size, 0);
      for (int j = warp.size - 1; j > 0 && seed != 0; --j) std::swap(warp.order[j], warp.order[random() % (j + 1)]);
    }
    at_barrier_ = 0;
    warp_ = any_warp();
    current_ = &host_;
    ASAN_POISON_MEMORY_REGION(shared_ - kGuardBytes, kGuardBytes);
    ASAN_POISON_MEMORY_REGION(shared_ + launch_.shared_bytes, kGuardBytes);
    wait();
    ASAN_UNPOISON_MEMORY_REGION(shared_ - kGuardBytes, kGuardBytes);
    ASAN_UNPOISON_MEMORY_REGION(shared_ + launch_.shared_bytes, kGuardBytes);
    check_guards();
  }

  unsigned char* stack_of(const Thread& thread) const { return stacks_.get() + thread.index * kStackBytes; }

  static uint32_t all_lanes(const Warp& warp) { return ~0u >> (kLanes - warp.size); }

  // A warp with a lane that can run, or -1.
  int any_warp() {
    const int count = static_cast<int>(warps_.size());
    const int start = seed == 0 ? 0 : static_cast<int>(random() % count);
    for (int i = 0; i < count; ++i) {
      const int candidate = (start + i) % count;
      if (warps_[candidate].ready != 0) return candidate;
    }
    return -1;
  }

  // The next thread to run; when none is left, the host.
  Thread& next() {
    if (warps_[warp_].ready == 0) {
      const int other = any_warp();
      if (other < 0) {
        report_divergence();
        return host_;
      }
      warp_ = other;
    }
    Warp& warp = warps_[warp_];
    const int position = __builtin_ctz(warp.ready);
    warp.ready &= warp.ready - 1;
    return threads_[warp.first + warp.order[position]];
  }

  // Runs others until somebody lets this thread go on.
  void wait() {
    Thread& to = next();
    if (&to != current_) switch_to(to);
  }

  void switch_to(Thread& to, bool is_for_good = false) {
    Thread& from = *current_;
    current_ = &to;
    threadIdx.x = static_cast<unsigned>(to.index);
    ++launch_.switches;
    from.switch_to(to, is_for_good);
  }
  [[noreturn]] void leave(Thread& to) {
    switch_to(to, true);
    __builtin_unreachable();
  }

  friend void run_thread();
  [[noreturn]] void run_kernel() {
    current_->arrive();
    std::string exception;
    try {
      launch_.call(launch_.kernel, launch_.args);
    } catch (const std::exception& thrown) {
      exception = text("exception: %s", thrown.what());
    } catch (...) {
      exception = "exception";
    }
    if (!exception.empty()) fail(exception);
    current_->has_exited = true;
    leave(next());
  }

  // No thread can run: all have exited, or some wait for ever.
  void report_divergence() {
    struct Group {
      std::string where;
      int first, count;
    };
    std::vector<Group> groups;
    bool is_stuck = false;
    for (const Thread& thread : threads_) {
      is_stuck |= !thread.has_exited;
      const std::string where = thread.has_exited ? "exited" : "at " + text_of(thread.place);
      auto same = groups.begin();
      while (same != groups.end() && same->where != where) ++same;
      if (same == groups.end()) {
        groups.push_back({where, thread.index, 1});
      } else {
        same->count++;
      }
    }
    if (!is_stuck || !error_.empty()) return;
    error_ = text("block (%u, %u, %u): divergence", blockIdx.x, blockIdx.y, blockIdx.z);
    for (const Group& group : groups) {
      error_ += text("; thread %d", group.first);
      if (group.count > 1) error_ += text(" and %d more", group.count - 1);
      error_ += ": " + group.where;
    }
  }

  void check_guards() {
    for (int side = 0; side < 2 && error_.empty(); ++side) {
      const unsigned char* guard = side == 0 ? shared_ - kGuardBytes : shared_ + launch_.shared_bytes;
      for (int i = 0; i < kGuardBytes; i += 2) {
        if (std::memcmp(guard + i, &kCanary, 2) == 0) continue;
        error_ = text("block (%u, %u, %u): written at offset %td of %d bytes of shared memory", blockIdx.x, blockIdx.y, blockIdx.z,
                      guard + i - shared_, launch_.shared_bytes);
        break;
      }
    }
  }

  void check_stacks() {
    for (const Thread& thread : threads_) {
      if (error_.empty() && std::memcmp(stack_of(thread), &kCanary, sizeof kCanary) != 0) {
        error_ = text("thread %d: more than %zu bytes of stack", thread.index, kStackBytes);
      }
    }
  }

  std::mutex mutex_;  // one launch at a time
  std::map<const void*, int> prepared_;
  Launch launch_{};
  std::string error_;  // of this launch
  uint64_t random_ = 0;
  std::unique_ptr<unsigned char[]> stacks_, memory_;
  size_t stacks_count_ = 0, memory_bytes_ = 0;
  unsigned char* shared_ = nullptr;  // in memory_, between guards
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Thread host_;
  Thread* current_ = &host_;
  int warp_ = 0;        // that runs
  int at_barrier_ = 0;  // threads at `barrier_`
  Place barrier_{};
};

inline Machine machine;

inline void run_thread() { machine.run_kernel(); }

}  // namespace fastseq::emulation

#pragma GCC visibility pop

// Called by code compiled with -fsanitize=alignment, which then needs no runtime library.
extern "C" __attribute__((used, weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(void*, void* pointer) {
  const int bits = __builtin_ctzll(reinterpret_cast<uintptr_t>(pointer) | 4096);
  fastseq::emulation::machine.fail(fastseq::emulation::text("misaligned address, only a multiple of %d bytes", 1 << bits));
}
