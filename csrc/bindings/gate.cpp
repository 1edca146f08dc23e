#include "bindings/gate.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastseq {
namespace {

// What the dispatcher would see of a plain CPU tensor outside every transform. One test of all other bits replaces a list of checks
// and cannot miss a mode that a later torch adds: functorch, FakeTensor, autocast, tracing, neg and conj bits, sparse, nested,
// quantized, mkldnn.
bool has_only_plain_keys(c10::DispatchKeySet keys) {
  static const uint64_t plain = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::BackendSelect,
                                                     c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU})
                                    .raw_repr();
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet effective = (keys | local.included_) - local.excluded_;
  return (effective.raw_repr() & ~plain) == 0;
}

}  // namespace

const at::Tensor* exact_tensor(PyObject* object) { return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr; }

Reason active_mode() {
  if (at::impl::torch_function_mode_enabled()) return "a torch function mode is active";
  if (!c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutocastCPU)) return "autocast is active";
  if (!has_only_plain_keys(c10::DispatchKeySet())) return "a dispatch mode, transform or tracing is active";
  return nullptr;
}

Reason refuse_tensor(const at::Tensor& tensor, bool is_parameter) {
  if (!tensor.defined()) return "undefined tensor";
  if (!tensor.device().is_cpu()) return is_parameter ? "a parameter is not on the CPU" : "the input is not on the CPU";
  if (!has_only_plain_keys(tensor.key_set()))
    return is_parameter ? "a parameter is not a plain dense tensor" : "the input is not a plain dense tensor";
  if (tensor.scalar_type() != at::kFloat)
    return is_parameter ? "a parameter is not float32; fused kernels take float32"
                        : "the input is not float32; fused kernels take float32";
  // Storage that was resized to nothing, as sharding does between uses, leaves the sizes as they were.
  if (tensor.numel() > 0 && !tensor.const_data_ptr())
    return is_parameter ? "a parameter has no storage" : "the input has no storage";
  // Forward-mode tangents flow even under no_grad. Only tensors with autograd metadata can have one.
  if (tensor.unsafeGetTensorImpl()->autograd_meta() && tensor._fw_grad(/*level=*/0).defined())
    return "forward-mode differentiation is active";
  return nullptr;
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

}  // namespace fastseq
