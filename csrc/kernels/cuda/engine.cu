// The engine of a CUDA build: all tables in one, and what is asked of the device itself.
#include <vector>

#include "kernels/cuda/chain_tables.h"
#include "kernels/cuda/launch.h"

namespace fastseq::cuda {
namespace {

Error properties(int device, DeviceProperties* properties) {
  cudaError_t error = cudaSuccess;
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  properties->major = get(cudaDevAttrComputeCapabilityMajor);
  properties->minor = get(cudaDevAttrComputeCapabilityMinor);
  properties->multiprocessors = get(cudaDevAttrMultiProcessorCount);
  properties->shared_bytes_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->l2_bytes = get(cudaDevAttrL2CacheSize);
  if (error != cudaSuccess) cudaGetLastError();
  // Such as a driver that is older than this runtime. Every file is compiled for the same architectures, so that one kernel tells
  // for all; those for newer ones only say so themselves.
  properties->unusable = error == cudaSuccess ? prepare_pack_weights() : text_of(error);
  return nullptr;
}

Error last_error(void* stream) {
  const cudaError_t of_stream = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  const cudaError_t of_launches = cudaGetLastError();  // asked in any case: it forgets the error
  return text_of(of_stream == cudaSuccess ? of_launches : of_stream);
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess)
    return status != cudaStreamCaptureStatusNone;
  cudaGetLastError();  // of the legacy stream while another one captures: it may not be waited for either
  return true;
}

}  // namespace

const Engine* engine() {
  static const std::vector<ChainKernel> chain = join_tables({tiny_mlp_kernels(), fused_mlp_kernels(), skinny_linear_kernels()});
  static const Engine engine = {
      /*is_emulated=*/false,
      FS_CUDA_ARCHITECTURES,  // from csrc/build_cuda.py
      {conv_kernels_f32(), conv_kernels_tf32(), conv_kernels_f16(), conv_kernels_bf16()},
      table_of(chain),
      max_pool_kernels(),
      prepare_pack_weights,
      pack_weights,
      properties,
      last_error,
      is_capturing,
  };
  return &engine;
}

}  // namespace fastseq::cuda
