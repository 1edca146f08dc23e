// csrc/plan/threads.h without Python and torch. Returns 0, or says what is wrong; what hangs is ended by its alarm.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "plan/threads.h"

namespace {

using fastseq::run_phases;

int failures = 0;

void expect(bool is_so, const std::string& what) {
  if (is_so) return;
  if (++failures < 20) std::fprintf(stderr, "not so: %s\n", what.c_str());
}

// Waits until `count` threads are in here; false if they do not all come.
bool meet(std::atomic<int>& arrived, int count) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  ++arrived;
  while (arrived < count && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  return arrived >= count;
}

// As many units as threads, each of which ends when all have begun: nobody can do two, so all threads must come.
void check_that_others_help() {
  for (int threads : {2, 3, 5})
    for (int call = 0; call < 20; ++call) {
      std::atomic<int> arrived{0};
      std::atomic<int> met{0};
      std::vector<std::atomic<int>> by(static_cast<size_t>(threads));
      run_phases(
          threads, 1, [&](int) { return int64_t{threads}; },
          [&](int, int64_t first, int64_t last, int thread) {
            by[static_cast<size_t>(thread)] += static_cast<int>(last - first);
            if (meet(arrived, threads)) ++met;
          });
      expect(met == threads, std::to_string(threads) + " threads take part");
      for (const std::atomic<int>& units : by) expect(units == 1, "each with one unit, under a number of its own");
      if (call % 7 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // then they sleep
    }
}

// Each unit once, and no phase before the one in front of it is done.
void check_phases(uint32_t seed) {
  std::mt19937 random(seed);
  const int threads = 1 + static_cast<int>(random() % 4), phases = static_cast<int>(random() % 6);
  std::vector<int64_t> units;
  for (int p = 0; p < phases; ++p) units.push_back(random() % 10 == 0 ? 70000 + random() % 200000 : random() % 40);
  std::vector<std::vector<uint8_t>> done;
  for (int64_t count : units) done.emplace_back(static_cast<size_t>(count));
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[static_cast<size_t>(phases) + 1]);
  for (int p = 0; p < phases; ++p) left[p] = units[p];
  std::atomic<bool> is_in_order{true}, is_in_range{true};
  run_phases(
      threads, phases, [&](int phase) { return units[phase]; },
      [&](int phase, int64_t first, int64_t last, int thread) {
        if (thread < 0 || thread >= threads || first < 0 || last > units[phase]) is_in_range = false;
        if (phase > 0 && left[phase - 1] != 0) is_in_order = false;
        for (int64_t u = first; u < last; ++u) ++done[phase][static_cast<size_t>(u)];
        left[phase] -= last - first;
      });
  expect(is_in_order, "phases come one after the other");
  expect(is_in_range, "units and threads are those that were asked for");
  for (const std::vector<uint8_t>& phase : done)
    for (uint8_t times : phase) expect(times == 1, "each unit is done once");
}

void check_exceptions() {
  for (int threads : {1, 2, 3})
    for (int64_t bad : {0, 5, 9}) {
      std::atomic<bool> goes_on{false};
      bool is_caught = false;
      try {
        run_phases(
            threads, 2, [](int) { return int64_t{10}; },
            [&](int phase, int64_t first, int64_t last, int) {
              if (phase == 1) goes_on = true;
              if (phase == 0 && first <= bad && bad < last) throw std::runtime_error("unit");
            });
      } catch (const std::runtime_error& error) {
        is_caught = std::string(error.what()) == "unit";
      }
      expect(is_caught && !goes_on, "an exception reaches the caller, and no later phase runs");
      check_phases(static_cast<uint32_t>(bad));
    }
}

void check_callers_at_once() {
  std::vector<std::thread> callers;
  for (uint32_t caller = 0; caller < 4; ++caller)
    callers.emplace_back([caller] {
      for (uint32_t i = 0; i < 100; ++i) check_phases(caller * 1000 + i);
    });
  for (std::thread& caller : callers) caller.join();
}

// Helpers compute as their caller does, whatever he has set.
void check_float_mode() {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();
  for (unsigned mode : {before, before | 0x8040, before}) {  // flush to zero, denormals are zero
    _mm_setcsr(mode);
    std::atomic<int> arrived{0}, equal{0};
    run_phases(
        2, 1, [](int) { return int64_t{2}; },
        [&](int, int64_t, int64_t, int) {
          meet(arrived, 2);
          equal += (_mm_getcsr() & 0xffc0) == (mode & 0xffc0);
        });
    expect(equal == 2, "helpers have the caller's rounding and treatment of denormals");
  }
  _mm_setcsr(before);
#endif
}

void check_fork() {
  std::atomic<bool> ends{false};
  std::thread other([&] {
    for (uint32_t i = 0; !ends; ++i) check_phases(i);
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(60);
      failures = 0;
      check_phases(static_cast<uint32_t>(i));
      std::thread([] { check_phases(1), check_phases(2); }).join();
      _exit(failures);
    }
    int status = -1;
    waitpid(pid, &status, 0);
    expect(status == 0, "a forked child computes, in the thread that came out of the fork and in others");
  }
  ends = true;
  other.join();
}

}  // namespace

int main() {
  alarm(300);
  check_that_others_help();
  for (uint32_t seed = 0; seed < 300; ++seed) check_phases(seed);
  check_exceptions();
  check_float_mode();
  check_callers_at_once();
  check_fork();
  return failures ? 1 : 0;
}
