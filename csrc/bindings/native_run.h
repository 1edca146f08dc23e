// A native run: consecutive fused steps behind one call, on whichever engine the input is for.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/cpu_run.h"
#include "bindings/cuda_run.h"
#include "bindings/parameters.h"
#include "bindings/run_input.h"
#include "bindings/watch.h"

namespace fastseq {

struct Outcome {
  at::Tensor value;
  Reason reason = nullptr;
};

// How plans are made and run: what FASTSEQ_ISA, FASTSEQ_KERNEL, FASTSEQ_CHECK and optimize's winograd, compute_dtype and
// example_input ask for.
struct RunOptions {
  std::string isa_cap, forced_kernel;
  bool checks = false;
  bool allows_winograd = true;
  bool computes_bf16 = false;  // float32 models too; CPU engine only
  KernelTimings timings;       // CPU engine only
  bool times_kernels = false;  // calls add to them
};

class NativeRun {
 public:
  NativeRun(std::vector<StepSource> steps, std::vector<std::shared_ptr<ModuleWatch>> watches, RunShape shape,
            const RunOptions& options);
  NativeRun(const NativeRun&) = delete;
  NativeRun& operator=(const NativeRun&) = delete;

  // The run's result, or the reason why eager must compute it. Needs the GIL; releases it while the kernels work.
  Outcome call(PyObject* input);

  // Are the watched modules as they were?
  WatchResult check() const;

  // Forget packed weights and plans.
  void refresh();

  // Other threads' calls are answered with the weights of this moment until `load` ends, which loads new ones in this thread.
  // load(): True while it runs in another thread than the one that asks, None while in this one, False when it has ended.
  // CPU engine only.
  void hold(py::object load);

  // Calls on the CPU with inputs of this shape, dtype and memory format are eager's, which took less time for them in a trial.
  void leave_to_eager(const at::Tensor& example);

  // The plan of the last call: its steps, and scratch in bytes; nothing before the first.
  struct Description {
    std::vector<StepInfo> steps;
    int64_t scratch_bytes = 0;
  };
  std::optional<Description> describe_last_plan() const;
  int64_t plans_made() const { return cpu_.plans_made() + cuda_.plans_made(); }
  void forget_last_plan() { cpu_.forget_last_plan(), cuda_.forget_last_plan(); }
  const KernelTimings& timings() const { return cpu_.timings(); }
  int64_t packed_bytes() const { return cpu_.packed_bytes() + cuda_.packed_bytes(); }
  int64_t idle_scratch_bytes() const { return cpu_.idle_scratch_bytes(); }  // on CUDA torch's allocator has it
  void reserve_scratch(size_t calls) const { cpu_.reserve_scratch(calls); }

  // For the garbage collector: the references held here.
  int traverse(visitproc visit, void* arg) const;

 private:
  const std::vector<StepSource> steps_;
  const std::vector<std::shared_ptr<ModuleWatch>> watches_;
  const RunShape shape_;
  Parameters parameters_;
  CpuRun cpu_;
  CudaRun cuda_;
  std::vector<InputView> slower_;  // than eager
  py::object load_;                // of hold(), none when there is none

  enum class Held { kNo, kByOther, kByThis };
  Held held();
  Outcome call_held(const at::Tensor& input, const InputView& view, bool records_grad);
};

}  // namespace fastseq
