// A CUDA plan: the launches of one native run for one input signature and batch size, with chosen kernels and arena offsets. Holds
// no pointer: the executor (bindings/cuda_run.cpp) fills in the tensors of a call. Immutable after build().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "plan/spec.h"

namespace fastseq {

// How a layer's weight lies in memory: conv2d (c_out, c_in, k_h, k_w), linear (n, k). And what else the plan knows of its tensors.
struct WeightLayout {
  int64_t strides[4] = {0, 0, 0, 0};
  bool is_aligned = true;  // to 16 bytes
  // Channels of a BatchNorm behind the layer, and slopes of a PReLU: 0 where there is none, kAnyChannels where nobody has counted.
  int64_t norm_channels = 0, slopes = 0;
  float norm_eps = 0;
};
constexpr int64_t kAnyChannels = -1;

struct CudaOptions {
  const cuda::Engine* engine = nullptr;
  cuda::DeviceProperties device;
  cuda::Math conv_math = cuda::Math::kIeee, linear_math = cuda::Math::kIeee;  // the same element type
  int64_t batch = 1;
  bool input_is_aligned = true;  // to 16 bytes
  bool output_is_nhwc = false;   // a spatial result in channels_last order
  bool allows_cudnn = true, allows_cublas = true;
  bool trusts_cudnn_relu = false;  // it does what torch.relu does
  std::string forced_kernel;       // part of a kernel's name, "" for none
};

// Where a launch reads or writes: elements of the element type.
struct Operand {
  enum class Place { kSrc, kDst, kArena, kHeld };  // kHeld: the tensor that the library call before made
  Place place = Place::kSrc;
  int64_t offset = 0;
};

// A weight in another order, kept up to date on the device.
struct PackSpec {
  int step = 0;
  int sizes[4] = {1, 1, 1, 1};
  int valid = 1;
  int64_t strides[4] = {0, 0, 0, 0};
  int64_t elements() const { return int64_t{1} * sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  bool operator==(const PackSpec& o) const;
};

struct CudaLaunch {
  enum class Kind { kConv, kChain, kPool, kCudnnConv, kCublasLinear };
  Kind kind = Kind::kConv;
  std::string kernel;
  int step = 0;     // whose weight and bias it takes; of a chain, the first
  int packed = -1;  // index in CudaPlan::packs(): takes that instead of the weight
  Operand src, dst;
  bool takes_bias = true;

  const cuda::ConvKernel* conv_kernel = nullptr;
  cuda::ConvPoolArgs conv;
  const cuda::ChainKernel* chain_kernel = nullptr;
  cuda::ChainArgs chain;
  std::vector<int> chain_packs;  // as `packed`, one a layer
  const cuda::PoolKernel* pool_kernel = nullptr;
  cuda::MaxPoolArgs pool;

  // Library calls. Source sizes and strides are those of `conv`, in images or rows.
  bool has_relu = false;
  bool is_nhwc = false;
};

class CudaPlan {
 public:
  // Throws Refusal where eager would raise, or no kernel takes the shapes.
  static std::shared_ptr<const CudaPlan> build(const InputSpec& input, const std::vector<StepSpec>& steps,
                                               const std::vector<WeightLayout>& weights, const CudaOptions& options);

  const OutputSpec& output() const { return output_; }
  const std::vector<CudaLaunch>& launches() const { return launches_; }
  const std::vector<PackSpec>& packs() const { return packs_; }
  // The launch that keeps packs()[i] for i >= packs_before() up to date on the side; -1 if all have launches of their own, first.
  int packing_launch() const { return packing_launch_; }
  int packs_before() const { return packs_before_; }
  int64_t arena_elements() const { return arena_elements_; }
  int64_t arena_bytes() const { return arena_elements_ * element_bytes_; }
  const std::vector<StepInfo>& describe() const { return infos_; }

 private:
  friend class CudaPlanBuilder;
  OutputSpec output_;
  std::vector<CudaLaunch> launches_;
  std::vector<PackSpec> packs_;
  int packing_launch_ = -1, packs_before_ = 0;
  int64_t arena_elements_ = 0, element_bytes_ = 4;
  std::vector<StepInfo> infos_;
};
using CudaPlanPtr = std::shared_ptr<const CudaPlan>;

}  // namespace fastseq
