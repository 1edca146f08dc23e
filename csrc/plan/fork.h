// What fork() breaks, and what stands it: a child has the forking thread alone, and memory as it was at that moment.
#pragma once

#include <mutex>

namespace fastseq {

// Whether this thread came out of a fork() in which its process lost other threads. OpenMP may still count on those: a
// parallel region of GNU's would wait for them for ever. Threads that the child starts have nothing to miss.
bool lost_threads_in_fork();

// A mutex that is free in every forked child. fork() waits until nobody holds one, so hold it shortly, and never two.
class ForkSafeMutex {
 public:
  ForkSafeMutex();
  ~ForkSafeMutex();
  ForkSafeMutex(const ForkSafeMutex&) = delete;
  ForkSafeMutex& operator=(const ForkSafeMutex&) = delete;
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  friend struct ForkHandlers;

  std::mutex mutex_;
  ForkSafeMutex *previous_ = nullptr, *next_ = nullptr;  // all there are, so that the handlers find them
};

}  // namespace fastseq
