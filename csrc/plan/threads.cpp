#include "plan/threads.h"

#include <omp.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "plan/fork.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastseq {
namespace {

constexpr int kSpinsBeforeYield = 4000;
// How long a helper looks for work before it sleeps: between the phases of a call, and between calls.
constexpr std::chrono::microseconds kSpinInCall{200}, kSpinBetweenCalls{50};
constexpr int kMostHelpers = 255;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Rounding, and what becomes of denormals, are as in the calling thread.
struct FloatMode {
#if defined(__x86_64__)
  unsigned value = _mm_getcsr();
  void use() const {
    if (_mm_getcsr() != value) _mm_setcsr(value);
  }
#else
  void use() const {}
#endif
};

// The first exception of any thread.
class Failure {
 public:
  void note() {
    if (!is_noted_.exchange(true, std::memory_order_relaxed))
      first_ = std::current_exception(), is_set_.store(true, std::memory_order_release);
  }
  // When no other thread is at work.
  void rethrow() const {
    if (is_set_.load(std::memory_order_acquire)) std::rethrow_exception(first_);
  }
  bool is_set() const { return is_set_.load(std::memory_order_acquire); }

 private:
  std::exception_ptr first_;
  std::atomic<bool> is_noted_{false}, is_set_{false};
};

// --- helpers of our own -----------------------------------------------------------------------------------------------
// Nobody waits for a thread that has not come: whoever is there takes what is left. So a core that another process keeps busy costs
// the help of its thread, not the milliseconds until the system lets that thread run, which the end of an OpenMP region waits for.

// A thread's part of a phase: units [first, last), and which phase that is. A thread that slept meanwhile finds another phase
// here and takes nothing.
struct alignas(64) Part {
  std::atomic<uint64_t> word{0};

  static uint64_t pack(uint32_t phase, uint64_t first, uint64_t last) { return uint64_t{phase} << 32 | first << 16 | last; }
};
constexpr int64_t kMostUnits = 0xffff;  // of a phase; more are taken several at a time

class Team {
 public:
  // False if another call has the team.
  bool run(const PhasedWork& work, int threads) {
    if (is_busy_.exchange(true, std::memory_order_acquire)) return false;
    struct Release {
      std::atomic<bool>& flag;
      ~Release() { flag.store(false, std::memory_order_release); }
    } release{is_busy_};
    const int size = 1 + start_helpers(std::min(threads - 1, kMostHelpers));
    Failure failure;
    work_ = &work, failure_ = &failure, mode_ = FloatMode();
    for (int phase = 0; phase < work.phases && !failure.is_set(); ++phase) run_phase(phase, size);
    state_.store(state_of(sequence_, 0), std::memory_order_seq_cst);
    failure.rethrow();
    return true;
  }

 private:
  // Without a lock: a helper that holds one might be the thread that the system does not run.
  struct Helper {
    sem_t wakes;
    alignas(64) std::atomic<bool> sleeps{false};

    Helper() { sem_init(&wakes, /*pshared=*/0, 0); }
  };

  // What a helper looks at: which phase there is, and for how many threads, 0 between calls.
  static uint64_t state_of(uint32_t sequence, int size) { return uint64_t{sequence} << 32 | static_cast<uint32_t>(size); }
  static uint32_t sequence_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
  static int size_of(uint64_t state) { return static_cast<int>(state & 0xffffffffu); }

  int start_helpers(int count) {
    while (static_cast<int>(helpers_.size()) < count) {
      try {
        helpers_.push_back(std::make_unique<Helper>());
        Helper& helper = *helpers_.back();
        const int index = static_cast<int>(helpers_.size());
        sigset_t all, before;  // signals are for the program's own threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
          std::thread([this, &helper, index] { help(helper, index); }).detach();
        } catch (...) {
          helpers_.pop_back();
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (static_cast<int>(helpers_.size()) < index) break;  // no more threads
      } catch (const std::bad_alloc&) {
        break;
      }
    }
    return std::min(count, static_cast<int>(helpers_.size()));
  }

  void run_phase(int phase, int size) {
    const int64_t units = work_->units(work_->context, phase);
    scale_ = std::max<int64_t>(1, (units + kMostUnits - 1) / kMostUnits);
    phase_ = phase, units_ = units;
    const uint64_t parts = static_cast<uint64_t>((units + scale_ - 1) / scale_), count = static_cast<uint64_t>(size);
    done_.store(0, std::memory_order_relaxed);
    ++sequence_;
    for (uint64_t i = 0; i < count; ++i)
      parts_[i].word.store(Part::pack(sequence_, parts * i / count, parts * (i + 1) / count), std::memory_order_release);
    state_.store(state_of(sequence_, size), std::memory_order_seq_cst);
    if (parts > 1)
      for (int i = 1; i < size; ++i) wake(*helpers_[static_cast<size_t>(i - 1)]);
    take_all(sequence_, size, 0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < static_cast<int64_t>(parts); ++spins) {
      if (spins < kSpinsBeforeYield) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  static void wake(Helper& helper) {
    if (helper.sleeps.load(std::memory_order_seq_cst) && helper.sleeps.exchange(false)) sem_post(&helper.wakes);
  }

  // Until the state is another than `seen`.
  void sleep(Helper& self, uint64_t seen) {
    self.sleeps.store(true, std::memory_order_seq_cst);
    // Whoever takes the mark away posts.
    if (state_.load(std::memory_order_seq_cst) != seen && self.sleeps.exchange(false)) return;
    while (sem_wait(&self.wakes) != 0) {
    }
  }

  // Some units of a part: the next ones of one's own, the last ones of another's. False if there are none of this phase.
  static bool take(Part& part, uint32_t sequence, bool is_own, int64_t& first, int64_t& last) {
    uint64_t word = part.word.load(std::memory_order_acquire);
    for (;;) {
      const int64_t begin = static_cast<int64_t>(word >> 16 & 0xffff), end = static_cast<int64_t>(word & 0xffff);
      if (static_cast<uint32_t>(word >> 32) != sequence || begin >= end) return false;
      const int64_t count = is_own ? (end - begin + 2) / 3 : (end - begin + 1) / 2;
      first = is_own ? begin : end - count, last = first + count;
      const uint64_t rest = is_own ? Part::pack(sequence, static_cast<uint64_t>(last), static_cast<uint64_t>(end))
                                   : Part::pack(sequence, static_cast<uint64_t>(begin), static_cast<uint64_t>(first));
      if (part.word.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
    }
  }

  // What the caller has written about the phase may be read by whoever took a unit of it: the caller waits for that.
  void take_all(uint32_t sequence, int size, int thread) {
    for (int i = 0; i < size; ++i) {
      int64_t first, last;
      while (take(parts_[(thread + i) % size], sequence, i == 0, first, last)) {
        if (thread > 0) mode_.use();
        try {
          work_->run(work_->context, phase_, first * scale_, std::min(units_, last * scale_), thread);
        } catch (...) {
          failure_->note();
        }
        done_.fetch_add(last - first, std::memory_order_acq_rel);
      }
    }
  }

  [[noreturn]] void help(Helper& self, int thread) {
    typedef std::chrono::steady_clock Clock;
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fastseq");
#endif
    Clock::time_point since = Clock::now();
    for (uint64_t seen = 0;;) {
      const uint64_t state = state_.load(std::memory_order_acquire);
      if (state != seen) {
        seen = state;
        if (thread < size_of(state)) {
          take_all(sequence_of(state), size_of(state), thread);
          since = Clock::now();  // even where it came too late: it should not be asleep at the next call
        }
        continue;
      }
      for (int i = 0; i < 64 && state_.load(std::memory_order_relaxed) == seen; ++i) pause();
      if (Clock::now() - since < (size_of(seen) ? kSpinInCall : kSpinBetweenCalls)) continue;
      sleep(self, seen);
      since = Clock::now();
    }
  }

  std::atomic<bool> is_busy_{false};
  std::vector<std::unique_ptr<Helper>> helpers_;  // they and the team are never destroyed: threads end with the process
  uint32_t sequence_ = 0;
  // Of the phase at work.
  const PhasedWork* work_ = nullptr;
  Failure* failure_ = nullptr;
  FloatMode mode_;
  int phase_ = 0;
  int64_t units_ = 0, scale_ = 1;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  Part parts_[kMostHelpers + 1];
};

// Null until the first call on several threads, and again in a forked child, which has no helpers.
std::atomic<Team*> the_team{nullptr};

Team& team() {
  Team* found = the_team.load(std::memory_order_acquire);
  if (!found) {
    auto made = std::make_unique<Team>();
    if (the_team.compare_exchange_strong(found, made.get(), std::memory_order_acq_rel)) found = made.release();
  }
  return *found;
}

const int at_fork = pthread_atfork(nullptr, nullptr, [] { the_team.store(nullptr, std::memory_order_relaxed); });

// --- others' threads --------------------------------------------------------------------------------------------------

// All threads of a region meet here. Spins shortly, then gives the core away: another process may need it more.
class Barrier {
 public:
  // The runtime may give fewer threads than were asked for; one of them says how many there are before any waits.
  void expect(int threads) { threads_ = threads; }
  void wait() {
    if (threads_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpinsBeforeYield) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  int threads_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// One of `count` threads, each of which does its share of every phase.
void run_shares(const PhasedWork& work, int thread, int count, Barrier& barrier, Failure& failure) {
  for (int phase = 0; phase < work.phases; ++phase) {
    const int64_t units = work.units(work.context, phase);
    const int64_t first = units * thread / count, last = units * (thread + 1) / count;
    try {
      if (first < last && !failure.is_set()) work.run(work.context, phase, first, last, thread);
    } catch (...) {
      failure.note();
    }
    if (phase + 1 < work.phases) barrier.wait();
  }
}

// On threads started for this call alone, or on as many of them as the system gives.
void run_on_new_threads(const PhasedWork& work, int threads, Barrier& barrier, Failure& failure) {
  std::atomic<int> count{0};  // known when all are started
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int thread = 1; thread < threads; ++thread)
      others.emplace_back([&, thread] {
        while (!count.load(std::memory_order_acquire)) std::this_thread::yield();
        run_shares(work, thread, count.load(std::memory_order_relaxed), barrier, failure);
      });
  } catch (const std::exception&) {  // no more threads, or no memory for one
  }
  const int started = static_cast<int>(others.size()) + 1;
  barrier.expect(started);
  count.store(started, std::memory_order_release);
  run_shares(work, 0, started, barrier, failure);
  for (std::thread& other : others) other.join();
}

void run_on_openmp_threads(const PhasedWork& work, int threads, Barrier& barrier, Failure& failure) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier.expect(omp_get_num_threads());
    run_shares(work, omp_get_thread_num(), omp_get_num_threads(), barrier, failure);
  }
}

}  // namespace

void run_on_threads(const PhasedWork& work, int threads) {
  if (!lost_threads_in_fork() && team().run(work, threads)) return;
  Barrier barrier;
  Failure failure;
  if (lost_threads_in_fork()) {
    run_on_new_threads(work, threads, barrier, failure);
  } else {
    run_on_openmp_threads(work, threads, barrier, failure);
  }
  failure.rethrow();
}

int usable_threads(int threads) { return omp_in_parallel() ? 1 : threads; }

bool starts_threads() { return lost_threads_in_fork(); }

}  // namespace fastseq
