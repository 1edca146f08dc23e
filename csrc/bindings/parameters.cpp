#include "bindings/parameters.h"

#include <algorithm>

namespace fastseq {
namespace {

constexpr uintptr_t kAlignment = 16;  // what CUDA kernels ask for

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

// Whether `state` describes `object` with the contents it had. No mode is active, so a tensor of the same plain keys passes the
// gate again if it has no tangent.
bool is_fresh(const ParameterState& state, PyObject* object, const at::Tensor& input, const Parameters::Fingerprint& fingerprint) {
  if (!object || object != state.object.ptr()) return false;
  if (object == Py_None) return true;
  const at::Tensor* const tensor = exact_tensor(object);
  if (!tensor || tensor->unsafeGetTensorImpl() != state.tensor) return false;
  const c10::TensorImpl& impl = *tensor->unsafeGetTensorImpl();
  const bool passes = impl.key_set() == state.keys && state.device == input.device() && state.dtype == input.scalar_type()
                          ? !has_tangent(*tensor)
                          : !refuse_parameter(*tensor, input);
  return passes && data_of(impl) == state.data && version_of(*tensor) == state.version && tensor->device() == state.device &&
         tensor->scalar_type() == state.dtype && tensor->sizes().equals(state.sizes) && tensor->strides().equals(state.strides) &&
         (!fingerprint || fingerprint(*tensor) == state.fingerprint);
}

bool has_same_layout(const ParameterState& a, const ParameterState& b) {
  return a.object && b.object && a.object.is_none() == b.object.is_none() && a.device == b.device && a.dtype == b.dtype &&
         a.sizes == b.sizes && a.strides == b.strides && is_aligned(a.data) == is_aligned(b.data);
}

Reason adopt(ParameterState& state, PyObject* object, bool is_required, const at::Tensor& input,
             const Parameters::Fingerprint& fingerprint) {
  state = ParameterState();
  if (!object) return "a layer has lost a parameter";
  if (object == Py_None) {
    if (is_required) return "a layer has no weight, or no running statistics";
    state.object = py::none();
    return nullptr;
  }
  const at::Tensor* tensor = exact_tensor(object);
  if (!tensor) return "a parameter is not a plain torch.Tensor or Parameter";
  if (Reason reason = refuse_parameter(*tensor, input)) return reason;
  if (!tensor->is_non_overlapping_and_dense() || tensor->numel() == 0) return "a parameter is empty, or not dense in memory";
  state.tensor = tensor->unsafeGetTensorImpl();
  if (are_plain(tensor->key_set(), tensor->device().type())) state.keys = tensor->key_set();
  state.data = data_of(*tensor->unsafeGetTensorImpl());
  state.version = version_of(*tensor);
  state.device = tensor->device();
  state.dtype = tensor->scalar_type();
  state.sizes = tensor->sizes().vec();
  state.strides = tensor->strides().vec();
  if (fingerprint) state.fingerprint = fingerprint(*tensor);
  state.object = py::reinterpret_borrow<py::object>(object);
  return nullptr;
}

}  // namespace

Parameters::Parameters(const std::vector<StepSource>& steps, const std::vector<std::shared_ptr<ModuleWatch>>& watches)
    : steps_(steps), watches_(watches), states_(kSlots * steps.size()), changes_(steps.size(), Change::kNone) {}

Reason Parameters::check(const at::Tensor& input, bool records_grad, const Fingerprint& fingerprint,
                         std::vector<py::object>& replaced) {
  // Of which of a step's layers: the one with the weights, its BatchNorm, its PReLU.
  struct Slot {
    size_t layer, index;
    bool is_required;
  };
  static constexpr Slot slots[kSlots] = {{0, 0, true}, {0, 1, false}, {1, 0, false}, {1, 1, false},
                                         {1, 2, true}, {1, 3, true},  {2, 0, true}};
  Reason refused = nullptr;
  for (size_t i = 0; i < steps_.size(); ++i) {
    changes_[i] = Change::kNone;
    const auto found = [&](int watch) { return watch < 0 ? nullptr : watches_[static_cast<size_t>(watch)]->current_parameters(); };
    PyObject* const* const of[] = {found(steps_[i].layer), found(steps_[i].norm), found(steps_[i].slopes)};
    for (size_t which = 0; which < kSlots; ++which) {
      const Slot& slot = slots[which];
      if (!of[slot.layer]) continue;
      ParameterState& state = states_[kSlots * i + which];
      PyObject* const object = of[slot.layer][slot.index];
      if (!is_fresh(state, object, input, fingerprint)) {
        ParameterState before = std::move(state);
        if (Reason reason = adopt(state, object, slot.is_required, input, fingerprint)) refused = reason;
        changes_[i] = std::max(changes_[i], has_same_layout(before, state) ? Change::kContents : Change::kLayout);
        if (before.object) replaced.push_back(std::move(before.object));
      }
      if (!refused && records_grad && state.tensor && exact_tensor(object)->requires_grad())
        refused = "gradients are being recorded (a parameter requires grad); use torch.no_grad() or inference_mode()";
    }
  }
  return refused;
}

Change Parameters::largest_change() const {
  return changes_.empty() ? Change::kNone : *std::max_element(changes_.begin(), changes_.end());
}

at::Tensor Parameters::tensor(size_t slot) const {
  PyObject* const object = states_[slot].object.ptr();
  return object && object != Py_None ? *exact_tensor(object) : at::Tensor();
}

std::vector<at::Tensor> Parameters::weights() const {
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < steps_.size(); ++i) all.push_back(weight(i));
  return all;
}

std::vector<at::Tensor> Parameters::biases() const {
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < steps_.size(); ++i) all.push_back(bias(i));
  return all;
}

void Parameters::forget() {
  for (ParameterState& state : states_) state = ParameterState();
}

int Parameters::traverse(visitproc visit, void* arg) const {
  for (const ParameterState& state : states_) Py_VISIT(state.object.ptr());
  return 0;
}

}  // namespace fastseq
