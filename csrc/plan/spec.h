// What a native run computes, as the binding describes it: layers with their sizes and the caller's weights, no torch types.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/activation.h"

namespace fastseq {

// Thrown while a plan is built: this input or these weights are not for the native run. The caller falls back to eager.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Window {
  int64_t k_h = 1, k_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  bool ceil_mode = false;  // max-pool only
};

enum class Op { kConv2d, kMaxPool2d, kLinear };

struct ActivationSpec {
  Activation kind = Activation::kNone;
  float a = 0, b = 0;             // see Activation
  const float* slopes = nullptr;  // PReLU's: one, or as many as the step has output channels or features
  int64_t slope_count = 0;
};

// Whether max-pooling before it gives what max-pooling after it gives, NaN and infinities included.
bool commutes_with_max_pool(const ActivationSpec& activation);

// One fused step. weight: conv2d (c_out, c_in, k_h, k_w), linear (n, k), contiguous; bias: (c_out) or (n), or null.
// Read only while the plan is built, as are slopes.
struct StepSpec {
  Op op = Op::kLinear;
  std::string name;  // the pattern, such as conv2d_relu_maxpool2d
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t out = 0, in = 0;  // channels or features of the weight
  Window conv;
  ActivationSpec activation;
  bool activation_is_in_place = false;  // the same values, but see how the memory format follows
  bool has_pool = false;
  bool pools_before_activation = false;  // with ReLU the same values, as above
  Window pool;

  bool has_relu() const { return activation.kind == Activation::kRelu; }
};

// One image (or row) of the input; the batch size stays free.
struct InputSpec {
  bool is_spatial = false;
  int64_t channels = 0, h = 0, w = 0;  // spatial
  bool is_nhwc = false;                // how the caller's memory is laid out
  int64_t features = 0;                // not spatial
};

struct OutputSpec {
  bool is_spatial = false;
  int64_t channels = 0, h = 0, w = 0;
  int64_t features = 0;
};

// What became of a step, for the report.
struct StepInfo {
  std::string name, kernel, output;
  double flops = 0;  // per image or row
  int64_t packed_bytes = 0;
  std::string note;  // why this kernel, where that is not plain
};

std::string shape_text(const std::vector<int64_t>& sizes);  // 64x10x10

// eager's output sizes; Refusal where eager raises.
int64_t conv_size(int64_t in, int64_t k, int64_t stride, int64_t pad_before, int64_t pad_after);
int64_t pool_size(int64_t in, int64_t k, int64_t stride, int64_t pad, bool ceil_mode);

}  // namespace fastseq
