#include "bindings/gate.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <set>
#include <utility>

#include "kernels/cuda/kernels.h"

namespace fastseq {
namespace {

constexpr c10::DispatchKeySet plain_keys(c10::DispatchKey backend, c10::DispatchKey autograd) {
  return c10::DispatchKeySet({backend, c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView, autograd});
}

uint64_t all_but_plain(c10::DeviceType device) {
  static const uint64_t cpu = ~plain_keys(c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU).raw_repr();
  static const uint64_t cuda = ~plain_keys(c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA).raw_repr();
  return device == c10::DeviceType::CUDA ? cuda : cpu;
}

// What the dispatcher would see of a plain tensor outside every transform. One test of all other bits replaces a list of checks
// and cannot miss a mode that a later torch adds: functorch, FakeTensor, autocast, tracing, neg and conj bits, sparse, nested,
// quantized, mkldnn.
bool has_only_plain_keys(c10::DispatchKeySet keys, c10::DeviceType device) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet effective = (keys | local.included_) - local.excluded_;
  return (effective.raw_repr() & all_but_plain(device)) == 0;
}

// Every tensor has its device's key of autocast, which a thread excludes unless autocast is active.
c10::DispatchKey autocast_key(c10::DeviceType device) {
  return device == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
}

// Storage that was resized to nothing, as sharding does between uses, leaves the sizes as they were.
bool has_lost_storage(const at::Tensor& tensor) { return tensor.numel() > 0 && !data_of(*tensor.unsafeGetTensorImpl()); }

constexpr Reason kTangent = "forward-mode differentiation is active";

thread_local bool disabled = false;

}  // namespace

bool set_disabled(bool is_disabled) { return std::exchange(disabled, is_disabled); }
bool is_disabled() { return disabled; }

Reason lasting(const std::string& text) {
  static auto* const texts = new std::set<std::string>;
  return texts->insert(text).first->c_str();
}

Backend backend_of(const at::Tensor& input) {
  static const bool is_emulated = cuda::engine() && cuda::engine()->is_emulated;
  return is_emulated || input.is_cuda() ? Backend::kCuda : Backend::kCpu;
}

const at::Tensor* exact_tensor(PyObject* object) { return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr; }

bool are_plain(c10::DispatchKeySet keys, c10::DeviceType device) {
  return (keys.remove(autocast_key(device)).raw_repr() & all_but_plain(device)) == 0;
}

// Forward-mode tangents flow even under no_grad. Only tensors with autograd metadata can have one.
bool has_tangent(const at::Tensor& tensor) {
  const auto* const meta = static_cast<torch::autograd::AutogradMeta*>(tensor.unsafeGetTensorImpl()->autograd_meta());
  return meta && meta->fw_grad_ && tensor._fw_grad(/*level=*/0).defined();
}

Reason active_mode(c10::DeviceType device) {
  if (at::impl::torch_function_mode_enabled()) return "a torch function mode is active";
  if (!c10::impl::tls_is_dispatch_key_excluded(autocast_key(device))) return "autocast is active";
  if (!has_only_plain_keys(c10::DispatchKeySet(), device)) return "a dispatch mode, transform or tracing is active";
  return nullptr;
}

Reason refuse_input(const at::Tensor& input, Backend backend) {
  if (!input.defined()) return "undefined tensor";
  if (!input.is_cpu() && !input.is_cuda()) return "the input is not on the CPU or a CUDA device";
  if (!has_only_plain_keys(input.key_set(), input.device().type())) return "the input is not a plain dense tensor";
  if (backend == Backend::kCuda && !cuda::engine()) return "this build of fastseq has no CUDA kernels";
  const at::ScalarType dtype = input.scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16)
    return "the input is not float32, float16 or bfloat16; fused kernels take those";
  if (has_lost_storage(input)) return "the input has no storage";
  if (has_tangent(input)) return kTangent;
  return nullptr;
}

Reason refuse_parameter(const at::Tensor& parameter, const at::Tensor& input) {
  if (!parameter.defined()) return "undefined tensor";
  if (parameter.device() != input.device()) return "a parameter is on another device than the input";
  if (!has_only_plain_keys(parameter.key_set(), parameter.device().type())) return "a parameter is not a plain dense tensor";
  if (parameter.scalar_type() != input.scalar_type())
    return input.scalar_type() == at::kFloat ? "a parameter is not float32, as the input is"
                                             : "a parameter has another dtype than the input";
  if (has_lost_storage(parameter)) return "a parameter has no storage";
  if (has_tangent(parameter)) return kTangent;
  return nullptr;
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

}  // namespace fastseq
