// A native run on the CUDA engine: plans by input signature and batch size, and the packed weights they share.
//
// Weights. Most kernels read the layers' own tensors, and all read those of BatchNorms and PReLUs so. A copy in another order is
// compared with its weight on the device at each call and repaired where it differs (PackJob), so no call reads device memory from
// the host or waits for it, and a captured graph follows its weights too. Copies that a graph may refer to live as long as the run.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "bindings/parameters.h"
#include "bindings/run_input.h"
#include "plan/cuda_plan.h"

namespace fastseq {

// What a plan is made from besides the steps.
struct CudaPlanRequest {
  at::ScalarType dtype = at::kFloat;
  bool allows_tf32_conv = false, allows_tf32_linear = false;
  CudaOptions options;  // all but the kinds of arithmetic and the order of the output
};
// Of a step's BatchNorm and PReLU, as in WeightLayout.
struct ChannelCounts {
  int64_t norm = 0, slopes = 0;
};
// Throws Refusal.
CudaPlanPtr make_cuda_plan(const std::vector<StepSource>& steps, const std::vector<at::Tensor>& weights,
                           const std::vector<at::Tensor>& biases, const std::vector<ChannelCounts>& counts,
                           const Signature& signature, const RunShape& shape, CudaPlanRequest& request);

class CudaRun {
 public:
  // checks: wait after each launch and name the kernel that failed.
  CudaRun(const std::vector<StepSource>& steps, RunShape shape, std::string forced_kernel, bool checks);

  // The result of a call whose input and parameters passed the gate. Throws Refusal, and c10::Error where a launch fails.
  at::Tensor call(const at::Tensor& input, const InputView& view, const Parameters& parameters);

  // What the last check of the parameters found: copies are made again, or dropped.
  void follow(const Parameters& parameters);
  void forget();

  CudaPlanPtr last_plan() const { return last_plan_; }
  void forget_last_plan() { last_plan_.reset(); }
  int64_t plans_made() const { return plans_made_; }
  int64_t packed_bytes() const;

 private:
  // What a plan is made for.
  struct Key {
    Signature signature;
    int64_t batch = 0;
    c10::Device device = c10::kCPU;
    at::ScalarType dtype = at::kFloat;
    bool allows_tf32_conv = false, allows_tf32_linear = false, allows_cudnn = false, is_aligned = false;
    bool operator==(const Key& o) const;
  };
  struct Copy;  // of a weight, in another order
  using CopyPtr = std::shared_ptr<Copy>;
  struct Entry {
    Key key;
    CudaPlanPtr plan;
    bool output_is_nhwc = false;
    bool trusts_cublas_relu = false;
    std::vector<CopyPtr> copies;  // one for each of the plan's packs
  };
  class Call;

  std::shared_ptr<const Entry> plan_for(const Key& key, const Parameters& parameters, void* stream);
  CopyPtr copy_for(const PackSpec& pack, const Key& key);
  void retire_copies();

  const std::vector<StepSource>& steps_;
  const RunShape shape_;
  const std::string forced_kernel_;
  const bool checks_;
  std::deque<std::shared_ptr<const Entry>> plans_;  // most recent first
  std::vector<CopyPtr> copies_, retired_;           // retired: graphs may still read and repair them
  CudaPlanPtr last_plan_;
  int64_t plans_made_ = 0;
};

}  // namespace fastseq
