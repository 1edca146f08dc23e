// Launching a kernel, for the .cu files: on a stream of the current device, or on the emulated grid of the tests.
//   Error launch(kernel, grid, threads, shared_bytes, stream, args)     null, or what went wrong
//   Error prepare(kernel, shared_bytes)    loads the kernel into the current device and lets it have that much shared memory
#pragma once

#include "kernels/cuda/kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace fastseq::cuda {

inline Error text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename Args>
Error launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, void* stream, const Args& args) {
  void* arguments[] = {const_cast<Args*>(&args)};
  return text_of(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads), arguments,
                                  static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)));
}

template <typename Args>
Error prepare(void (*kernel)(Args), int shared_bytes) {
  // Loading a module is not allowed while any stream of the process is captured, except in this mode: it does nothing to a stream.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return text_of(error);
  cudaFuncAttributes attributes;  // asked for because the answer makes a lazy loader load the kernel
  error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) cudaGetLastError();  // said here, and not again by a launch
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return text_of(error != cudaSuccess ? error : restored);
}

}  // namespace fastseq::cuda
#else
#include "emulated_launch.h"
#endif
