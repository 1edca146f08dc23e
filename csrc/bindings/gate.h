// The gate: may a native run take this call? Everything it turns away goes to eager, which computes it or raises.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace fastseq {

// Reasons are static strings: they are counted, compared and shown.
using Reason = const char*;

// Reasons must outlive the call that gives them: they are counted by pointer and shown later. There are few different ones.
Reason lasting(const std::string& text);

// The engine that a call's tensors must be for, all float32, float16 or bfloat16: the CUDA engine takes those of one CUDA device,
// and of the CPU where it is the emulated one of the tests; the CPU engine those on the CPU.
enum class Backend { kCpu, kCuda };
Backend backend_of(const at::Tensor& input);

// The tensor behind a torch.Tensor or Parameter, or null for anything else: subclasses, proxies and non-tensors go to eager.
const at::Tensor* exact_tensor(PyObject* object);

// Whether everything that this thread calls is to run eager; returns what was so before.
bool set_disabled(bool is_disabled);
bool is_disabled();

// A mode that must see every operation: __torch_function__ modes, tracing, autocast, functorch, dispatch modes.
Reason active_mode(c10::DeviceType device);

// Null if `input` is a plain dense tensor that the backend takes, on which no transform is at work.
Reason refuse_input(const at::Tensor& input, Backend backend);
// The same of a layer's parameter, which must also have the input's device and dtype.
Reason refuse_parameter(const at::Tensor& parameter, const at::Tensor& input);

// Whether keys are those of a plain tensor in any thread without an active mode, and whether a tensor has a forward-mode tangent:
// of a tensor that was looked at before, and has the keys it had, the second alone has to be asked again.
bool are_plain(c10::DispatchKeySet keys, c10::DeviceType device);
bool has_tangent(const at::Tensor& tensor);

// The tensor's memory, or null where it has none.
inline const void* data_of(const c10::TensorImpl& tensor) {
  const c10::Storage& storage = tensor.unsafe_storage();
  if (!storage || !storage.data()) return nullptr;
  return static_cast<const char*>(storage.data()) + static_cast<int64_t>(tensor.itemsize()) * tensor.storage_offset();
}

// The number of in-place changes, or 0 for an inference tensor, which keeps none.
uint32_t version_of(const at::Tensor& tensor);

}  // namespace fastseq
