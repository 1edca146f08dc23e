// A native run on the CPU engine: a few plans, by input signature, with their packed weights.
#pragma once

#include <ATen/core/Tensor.h>
#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/parameters.h"
#include "bindings/run_input.h"
#include "plan/plan.h"

namespace fastseq {

class CpuRun {
 public:
  CpuRun(const std::vector<StepSource>& steps, RunShape shape, const std::string& isa_cap, std::string forced_kernel,
         bool allows_winograd, bool computes_bf16, KernelTimings timings, bool times_kernels);

  // The result of a call whose input and parameters passed the gate. Throws Refusal. Releases the GIL while the kernels work.
  at::Tensor call(const at::Tensor& input, const InputView& view, const Parameters& parameters);

  // The same with the weights that are packed already, whatever became of the parameters; nothing if no plan is for this input or
  // it reads weights in place.
  std::optional<at::Tensor> call_as_planned(const at::Tensor& input, const InputView& view);
  // Makes the plans there are anew from other weights. Throws Refusal, and then there are fewer.
  void pack_again(const Parameters& parameters);

  // Whether a call, of this process, is reading parameters in place now.
  bool is_reading() const;

  // Whether calls are timed and none with this signature was. time_kernels() lets go of the GIL: afterwards nothing is known of the
  // parameters. Throws Refusal.
  bool wants_timing(const Signature& signature) const;
  void time_kernels(const InputView& view, const Parameters& parameters);
  const KernelTimings& timings() const { return timings_; }  // what was given and what was timed

  uint64_t fingerprint(const at::Tensor& tensor) const;
  bool has_plans() const { return !plans_.empty(); }
  at::ScalarType dtype() const { return plans_.front().signature.dtype; }  // of the latest call's input; there must be plans
  void forget_plans();                                                     // and packed weights
  void forget();                                                           // and what was run last

  PlanPtr last_plan() const { return last_plan_; }
  void forget_last_plan() { last_plan_.reset(); }
  int64_t plans_made() const { return plans_made_; }
  int64_t packed_bytes() const;
  int64_t idle_scratch_bytes() const;
  void reserve_scratch(size_t calls) const;

 private:
  class Reading;

  struct Entry {
    Signature signature;
    PlanPtr plan;
    bool output_is_nhwc;
  };

  struct Layers;

  const Entry* find(const Signature& signature);
  PlanOptions plan_options(const Signature& signature, bool output_is_nhwc) const;
  const Entry& plan_for(const Signature& signature, const Parameters& parameters);
  at::Tensor run(const Entry& entry, const at::Tensor& input, const InputView& view, const Parameters* parameters);

  const std::vector<StepSource>& steps_;
  const RunShape shape_;
  const cpu::KernelSet* kernels_;
  const cpu::Bf16Tiles* bf16_;
  const std::string forced_kernel_;
  const bool allows_winograd_, computes_bf16_;
  KernelTimings timings_;
  const bool times_kernels_;
  std::vector<Signature> timed_;
  PackCache packed_;
  std::vector<at::Tensor> copies_;  // by step: contiguous copies of weights that would be read in place if they were
  // Under the GIL. A forked child has none of its parent's readers.
  int readers_ = 0;
  pid_t readers_process_ = 0;
  std::vector<Entry> plans_;  // most recent first
  PlanPtr last_plan_;
  int64_t plans_made_ = 0;
};

}  // namespace fastseq
