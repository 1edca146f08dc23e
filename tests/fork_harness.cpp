// csrc/plan/fork.h without Python and torch. Returns 0, or says what is wrong; a child that hangs is ended by its alarm.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "plan/fork.h"

namespace {

using fastseq::ForkSafeMutex;
using fastseq::lost_threads_in_fork;

int failures = 0;

void expect(bool is_so, const char* what) {
  if (is_so) return;
  std::fprintf(stderr, "not so: %s\n", what);
  ++failures;
}

// Whether `check` returned true in a forked child.
template <typename Check>
bool in_child(const Check& check) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(60);
    _exit(check() ? 0 : 1);
  }
  int status = -1;
  waitpid(pid, &status, 0);
  return status == 0;
}

bool lost_in_new_thread() {
  bool lost = true;
  std::thread([&] { lost = lost_threads_in_fork(); }).join();
  return lost;
}

bool can_lock(ForkSafeMutex& mutex) {
  mutex.lock();
  mutex.unlock();
  return true;
}

// A thread that waits until it is told to end.
class Other {
 public:
  ~Other() {
    ends_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> ends_{false};
  std::thread thread_{[this] {
    while (!ends_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }};
};

void check_lost_threads() {
  expect(!lost_threads_in_fork(), "nothing is lost before a fork");
  expect(in_child([] { return !lost_threads_in_fork(); }), "the child of a process with one thread lost nothing");
  {
    const Other other;
    expect(in_child([] { return lost_threads_in_fork(); }), "the child of a process with two threads lost one");
    expect(in_child([] { return !lost_in_new_thread(); }), "a thread that the child starts lost nothing");
    expect(in_child([] { return in_child([] { return lost_threads_in_fork(); }); }), "a child's child lost it too");
    expect(in_child([] {
             bool lost = false;
             std::thread([&] { lost = in_child([] { return lost_threads_in_fork(); }); }).join();
             return lost;
           }),
           "a child's thread that forks loses those beside it");
    expect(!lost_threads_in_fork() && !lost_in_new_thread(), "the parent loses nothing");
  }
  expect(in_child([] { return !lost_threads_in_fork(); }), "nor does a child after the other thread's end");
}

void check_held_locks() {
  ForkSafeMutex first, second;
  for (ForkSafeMutex* held : {&first, &second}) {
    std::atomic<bool> is_held{false};
    std::thread holder([&] {
      held->lock();
      is_held = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      held->unlock();
    });
    while (!is_held) std::this_thread::yield();
    expect(in_child([&] { return can_lock(first) && can_lock(second); }), "a lock held at the fork is free in the child");
    holder.join();
    expect(can_lock(first) && can_lock(second), "and in the parent");
  }
}

void check_locks_that_come_and_go() {
  ForkSafeMutex shared;
  std::atomic<bool> ends{false};
  auto work = [&] {
    while (!ends) {
      ForkSafeMutex a;
      auto b = std::make_unique<ForkSafeMutex>();
      ForkSafeMutex c;
      can_lock(a), can_lock(*b), can_lock(shared);
      b.reset();
      can_lock(c);
    }
  };
  std::thread threads[] = {std::thread(work), std::thread(work)};
  for (int i = 0; i < 100; ++i)
    expect(in_child([&] {
             ForkSafeMutex own;
             return can_lock(shared) && can_lock(own) && in_child([&] { return can_lock(shared) && can_lock(own); });
           }),
           "locks work in a child however many come and go in the parent");
  ends = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  alarm(120);
  check_lost_threads();
  check_held_locks();
  check_locks_that_come_and_go();
  return failures;
}
