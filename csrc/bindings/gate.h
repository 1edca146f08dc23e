// The gate: may a native run take this call? Everything it turns away goes to eager, which computes it or raises.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

namespace fastseq {

// Reasons are static strings: they are counted, compared and shown.
using Reason = const char*;

// The tensor behind a torch.Tensor or Parameter, or null for anything else: subclasses, proxies and non-tensors go to eager.
const at::Tensor* exact_tensor(PyObject* object);

// A mode that must see every operation: __torch_function__ modes, tracing, autocast, functorch, dispatch modes.
Reason active_mode();

// Null if `tensor` is a plain dense float32 CPU tensor on which no transform is at work.
Reason refuse_tensor(const at::Tensor& tensor, bool is_parameter);

// The number of in-place changes, or 0 for an inference tensor, which keeps none.
uint32_t version_of(const at::Tensor& tensor);

}  // namespace fastseq
