// Fibers: functions on stacks of their own that hand over to each other. On one thread, without a scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(pointer, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(pointer, bytes)
#endif

#pragma GCC visibility push(hidden)

namespace fastseq::emulation {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024 + 576;
#else
constexpr size_t kStackBytes = 64 * 1024 + 576;  // no power of two: the tops of all stacks would share a few cache lines
#endif

#if defined(__x86_64__) && defined(__ELF__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void fastseq_emulation_switch(void** from, void* to);
// swapcontext makes a system call for the signal mask, which takes fifteen times as long. In assembly outside of any function, so
// that the compiler takes it for a call to somewhere else, after which nothing it knew of memory holds.
asm(R"(
  .pushsection .text.fastseq_emulation_switch, "axG", @progbits, fastseq_emulation_switch, comdat
  .weak fastseq_emulation_switch
  .hidden fastseq_emulation_switch
  .type fastseq_emulation_switch, @function
fastseq_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastseq_emulation_switch, . - fastseq_emulation_switch
  .popsection
)");
inline void switch_context(Context& from, Context& to) { fastseq_emulation_switch(&from.stack_pointer, to.stack_pointer); }
inline void start_context(Context& context, unsigned char* stack, void (*entry)()) {
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
  void** words = reinterpret_cast<void**>(top) - 8;  // six registers, where to return to, and where that returns to: nowhere
  std::memset(words, 0, 8 * sizeof(void*));
  words[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = words;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_context(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which calls arrive() and never returns. `stack` has kStackBytes.
  void start(unsigned char* stack, void (*entry)()) {
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // of a fiber that was left half-way
    start_context(context_, stack, entry);
    stack_ = stack;
    stack_bytes_ = kStackBytes;
    fake_stack_ = nullptr;
  }

  // From this fiber, which runs, to another. Returns when one switches back, unless it is for good.
  void switch_to(Fiber& to, bool is_for_good) {
    to.previous_ = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(is_for_good ? nullptr : &fake_stack_, to.stack_, to.stack_bytes_);
#endif
    switch_context(context_, to.context_);
    arrive();
    (void)is_for_good;
  }

  void arrive() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, &previous_->stack_, &previous_->stack_bytes_);
#endif
  }

 private:
  Context context_;
  // What AddressSanitizer wants to know.
  Fiber* previous_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
};

}  // namespace fastseq::emulation

#pragma GCC visibility pop
