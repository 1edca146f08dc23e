// A native run: consecutive fused steps behind one call. Keeps a few plans, by input signature, and sees that their packed weights
// are those of the layers at every call.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/watch.h"
#include "plan/plan.h"

namespace fastseq {

struct StepSource {
  StepSpec spec;           // all but the weights
  int layer = -1;          // index of the watch that holds weight and bias
  bool pads_same = false;  // padding='same': from the weight's size at call time
};

// A parameter as the packed copy was made from it. The object is kept, so that its address means it; its tensor is not, since a
// second reference to that would stop torch.utils.swap_tensors, which load_state_dict and .to() may use.
struct ParameterState {
  py::object object;
  const void* tensor = nullptr;  // the TensorImpl
  const void* data = nullptr;
  uint32_t version = 0;
  uint64_t fingerprint = 0;
  std::vector<int64_t> sizes, strides;
};

struct Outcome {
  at::Tensor value;
  Reason reason = nullptr;
};

class NativeRun {
 public:
  NativeRun(std::vector<StepSource> steps, std::vector<std::shared_ptr<ModuleWatch>> watches, bool flattens_input,
            bool flattens_output, const std::string& isa_cap, const std::string& forced_kernel);

  // The run's result, or the reason why eager must compute it. Needs the GIL; releases it while the kernels work.
  Outcome call(PyObject* input);

  // Are the watched modules as they were?
  WatchResult check() const;

  // Forget packed weights and plans.
  void refresh();

  PlanPtr last_plan() const { return last_plan_; }
  int64_t plans_made() const { return plans_made_; }
  void forget_last_plan() { last_plan_.reset(); }
  int64_t packed_bytes() const;

  // For the garbage collector: the references held here.
  int traverse(visitproc visit, void* arg) const;

 private:
  struct Signature {
    bool is_spatial = false, is_nhwc = false;
    int64_t channels = 0, h = 0, w = 0, features = 0;
    bool operator==(const Signature& o) const {
      return is_spatial == o.is_spatial && is_nhwc == o.is_nhwc && channels == o.channels && h == o.h && w == o.w &&
             features == o.features;
    }
  };
  struct Entry {
    Signature signature;
    PlanPtr plan;
    bool output_is_nhwc;
  };

  Reason check_parameters(bool records_grad);
  bool is_fresh(const ParameterState& state, PyObject* object) const;
  Reason adopt(ParameterState& state, PyObject* object, bool is_required);
  const Entry& plan_for(const Signature& signature);
  uint64_t fingerprint(const at::Tensor& tensor) const;

  std::vector<StepSource> steps_;
  std::vector<std::shared_ptr<ModuleWatch>> watches_;
  bool flattens_input_, flattens_output_;
  const cpu::KernelSet* kernels_;
  std::string forced_kernel_;
  std::vector<ParameterState> parameters_;  // weight and bias of each step that has them, in order
  PackCache packed_;
  std::vector<Entry> plans_;  // most recent first
  PlanPtr last_plan_;
  int64_t plans_made_ = 0;
};

}  // namespace fastseq
