// What the CUDA engine asks of torch and its libraries: streams, memory, and the fused operators that deep layers are handed to.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/cuda/kernels.h"
#include "plan/cuda_plan.h"

namespace fastseq {

// The current stream of `device` as a cudaStream_t; null for the CPU of the emulated engine.
void* current_stream(c10::Device device);

// A new tensor from the caching allocator of `device`, which must be current.
at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype, c10::Device device,
                    at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Memory of another tensor as one, without owning it.
at::Tensor view_of(void* data, at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like);

const cuda::DeviceProperties& device_properties(c10::Device device);

// Whether cuDNN's and cuBLAS's ReLU epilogues do what torch.relu does: keep NaN, and make none of what lay in their output before.
// Found out by trying, once per device and arithmetic, because each has engines of its own; unknown while the first call that wants
// to know is captured into a graph.
struct LibraryTraits {
  bool has_cudnn = false;
  bool trusts_cudnn_relu = false, trusts_cublas_relu = false;
};
struct Arithmetic {
  at::ScalarType dtype = at::kFloat;
  bool allows_tf32_conv = false, allows_tf32_linear = false;  // as torch's flags are now
};
std::optional<LibraryTraits> library_traits(c10::Device device, const Arithmetic& arithmetic, void* stream);

// convolution(src, weight) with bias and ReLU where `applies_epilogue`, and bare otherwise. On the CPU: the same by torch's own.
at::Tensor library_conv(const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, const cuda::ConvPoolArgs& args,
                        bool applies_epilogue);

// dst = src * weight^T + bias, ReLU included. src (rows, k), weight (n, k), dst (rows, n).
void library_linear(at::Tensor& dst, const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, bool has_relu,
                    bool trusts_relu);

}  // namespace fastseq
