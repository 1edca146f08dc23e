// Who does a call's work: phases, each of a number of units that threads take in any order. A phase starts when the one before is
// done; the bits do not depend on who does what.
#pragma once

#include <cstdint>

namespace fastseq {

// Units [first, last) of a phase, on thread `thread` of those that take part.
struct PhasedWork {
  const void* context = nullptr;
  int phases = 0;
  int64_t (*units)(const void* context, int phase) = nullptr;
  void (*run)(const void* context, int phase, int64_t first, int64_t last, int thread) = nullptr;
};

// On the caller and up to `threads` - 1 others. Rethrows, when no thread is at work any more, the first exception of a unit; the
// phases behind it are left out then.
void run_on_threads(const PhasedWork& work, int threads);

// units(phase) and run(phase, first, last, thread); one thread is the caller, without further ado.
template <typename Units, typename Run>
void run_phases(int threads, int phases, const Units& units, const Run& run) {
  if (threads == 1) {
    for (int phase = 0; phase < phases; ++phase) run(phase, int64_t{0}, units(phase), 0);
    return;
  }
  struct Both {
    const Units& units;
    const Run& run;
  };
  const Both both{units, run};
  PhasedWork work;
  work.context = &both, work.phases = phases;
  work.units = [](const void* context, int phase) -> int64_t { return static_cast<const Both*>(context)->units(phase); };
  work.run = [](const void* context, int phase, int64_t first, int64_t last, int thread) {
    static_cast<const Both*>(context)->run(phase, first, last, thread);
  };
  run_on_threads(work, threads);
}

// How many threads a call may use here: 1 inside somebody's parallel region.
int usable_threads(int threads);
// Whether a second thread has to be started for the call first.
bool starts_threads();

}  // namespace fastseq
