#include "plan/fork.h"

#include <dirent.h>
#include <pthread.h>

namespace fastseq {
namespace {

// Trivial types, constant from the start: plans are made and destroyed whenever Python likes, at its exit too.
std::mutex all_mutex;  // of `all`
ForkSafeMutex* all = nullptr;

thread_local bool is_forking_with_others = false;
thread_local bool lost_threads = false;

// Whether this process has more than one thread; true where nobody can say.
bool has_other_threads() {
  DIR* const tasks = opendir("/proc/self/task");
  if (!tasks) return true;
  int count = 0;
  while (count < 2) {
    const dirent* const entry = readdir(tasks);
    if (!entry) break;
    if (entry->d_name[0] != '.') ++count;
  }
  closedir(tasks);
  return count != 1;
}

}  // namespace

struct ForkHandlers {
  static void prepare() {
    is_forking_with_others = has_other_threads();
    all_mutex.lock();
    for (ForkSafeMutex* m = all; m; m = m->next_) m->lock();
  }

  static void release() {
    for (ForkSafeMutex* m = all; m; m = m->next_) m->unlock();
    all_mutex.unlock();
  }

  static void in_child() {
    if (is_forking_with_others) lost_threads = true;
    release();
  }

  // When the library is loaded: a pool that torch used before the first fused call counts too.
  ForkHandlers() { pthread_atfork(prepare, release, in_child); }
};

namespace {

const ForkHandlers handlers;

}  // namespace

bool lost_threads_in_fork() { return lost_threads; }

ForkSafeMutex::ForkSafeMutex() {
  const std::lock_guard<std::mutex> lock(all_mutex);
  next_ = all;
  if (next_) next_->previous_ = this;
  all = this;
}

ForkSafeMutex::~ForkSafeMutex() {
  const std::lock_guard<std::mutex> lock(all_mutex);
  (previous_ ? previous_->next_ : all) = next_;
  if (next_) next_->previous_ = previous_;
}

}  // namespace fastseq
