// The weights and biases of a native run, and what its BatchNorms and PReLUs hold, and whether they are still what packed copies
// were made from.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "bindings/run_input.h"
#include "bindings/watch.h"

namespace fastseq {

// A parameter as it was at the last call. The object is kept, so that its address means it; its tensor is not, since a second
// reference to that would stop torch.utils.swap_tensors, which load_state_dict and .to() may use.
struct ParameterState {
  py::object object;
  const void* tensor = nullptr;  // the TensorImpl
  c10::DispatchKeySet keys;      // none where they are plain only because of what the thread excluded
  const void* data = nullptr;
  uint32_t version = 0;
  uint64_t fingerprint = 0;  // of the contents; CPU only
  c10::Device device = c10::kCPU;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> sizes, strides;
};

// kContents: another tensor or other values, of the same sizes, strides, device, dtype and alignment.
enum class Change { kNone, kContents, kLayout };

class Parameters {
 public:
  using Fingerprint = std::function<uint64_t(const at::Tensor&)>;

  Parameters(const std::vector<StepSource>& steps, const std::vector<std::shared_ptr<ModuleWatch>>& watches);

  // Compares with the last call and remembers. Null, or why the run cannot take these parameters. change(i): of step i.
  // `fingerprint` may be empty: then contents are not looked at. `replaced` takes the objects that are not referred to any more:
  // the end of one may let other threads run, which must not find the changes told of but not yet followed.
  Reason check(const at::Tensor& input, bool records_grad, const Fingerprint& fingerprint, std::vector<py::object>& replaced);
  Change change(size_t step) const { return changes_[step]; }
  Change largest_change() const;

  // Of a step, undefined where it has none. Valid after check().
  at::Tensor weight(size_t step) const { return tensor(kSlots * step); }
  at::Tensor bias(size_t step) const { return tensor(kSlots * step + 1); }
  const void* weight_data(size_t step) const { return states_[kSlots * step].data; }
  const void* bias_data(size_t step) const { return states_[kSlots * step + 1].data; }
  // Of the BatchNorm behind a step: weight and bias, undefined where it has none, running mean and variance.
  at::Tensor norm(size_t step, size_t which) const { return tensor(kSlots * step + kNormSlot + which); }
  at::Tensor slopes(size_t step) const { return tensor(kSlots * step + kSlopeSlot); }
  std::vector<at::Tensor> weights() const;
  std::vector<at::Tensor> biases() const;

  void forget();
  int traverse(visitproc visit, void* arg) const;

 private:
  static constexpr size_t kNormSlot = 2, kSlopeSlot = 6, kSlots = 7;

  // A tensor that a step reads: where it is kept, and which of the tensors of which watch it is.
  struct Slot {
    size_t step, state, index;
    int watch;
    bool is_required;
  };

  at::Tensor tensor(size_t slot) const;

  const std::vector<StepSource>& steps_;
  const std::vector<std::shared_ptr<ModuleWatch>>& watches_;
  std::vector<Slot> slots_;
  std::vector<ParameterState> states_;  // kSlots of each step
  std::vector<Change> changes_;
};

}  // namespace fastseq
