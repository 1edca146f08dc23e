#include "bindings/parameters.h"

#include <algorithm>
#include <initializer_list>

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
    : steps_(steps), watches_(watches), states_(kSlots * steps.size()), changes_(steps.size(), Change::kNone) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto add = [&](int watch, size_t first, std::initializer_list<bool> required) {
      size_t index = 0;
      for (const bool is_required : required) {
        if (watch >= 0) slots_.push_back({i, kSlots * i + first + index, index, watch, is_required});
        ++index;
      }
    };
    add(steps[i].layer, 0, {!normalizes(steps[i].spec.op), false});  // weight, bias
    add(steps[i].norm, kNormSlot, {false, false, true, true});       // the same, running mean and variance
    add(steps[i].slopes, kSlopeSlot, {true});
  }
}

Reason Parameters::check(const at::Tensor& input, bool records_grad, const Fingerprint& fingerprint,
                         std::vector<py::object>& replaced) {
  Reason refused = nullptr;
  std::fill(changes_.begin(), changes_.end(), Change::kNone);
  PyObject* const* objects = nullptr;
  for (const Slot& slot : slots_) {
    if (slot.index == 0) objects = watches_[static_cast<size_t>(slot.watch)]->current_parameters();
    ParameterState& state = states_[slot.state];
    PyObject* const object = objects[slot.index];
    if (!is_fresh(state, object, input, fingerprint)) {
      ParameterState before = std::move(state);
      if (Reason reason = adopt(state, object, slot.is_required, input, fingerprint)) refused = reason;
      Change& change = changes_[slot.step];
      change = std::max(change, has_same_layout(before, state) ? Change::kContents : Change::kLayout);
      if (before.object) replaced.push_back(std::move(before.object));
    }
    if (!refused && records_grad && state.tensor && exact_tensor(object)->requires_grad())
      refused = "gradients are being recorded (a parameter requires grad); use torch.no_grad() or inference_mode()";
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
