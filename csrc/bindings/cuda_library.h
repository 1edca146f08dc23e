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

// Whether cuDNN's and cuBLAS's ReLU epilogues keep NaN here, found out once per device by trying; unknown while the first call that
// wants to know is captured into a graph.
struct LibraryTraits {
  bool has_cudnn = false;
  bool cudnn_relu_keeps_nan = false, cublas_relu_keeps_nan = false;
};
std::optional<LibraryTraits> library_traits(c10::Device device, void* stream);

// convolution(src, weight) with bias and ReLU where `applies_epilogue`, and bare otherwise. On the CPU: the same by torch's own.
at::Tensor library_conv(const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, const cuda::ConvPoolArgs& args,
                        bool applies_epilogue);

// dst = src * weight^T + bias, ReLU included. src (rows, k), weight (n, k), dst (rows, n).
void library_linear(at::Tensor& dst, const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, bool has_relu,
                    bool relu_keeps_nan);

}  // namespace fastseq
