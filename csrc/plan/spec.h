// What a native run computes, as the binding describes it: layers with their sizes and the caller's weights, no torch types.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/storage.h"

namespace fastseq {

// Thrown while a plan is built: this input or these weights are not for the native run. The caller falls back to eager.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

struct Window {
  int64_t k_h = 1, k_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  bool ceil_mode = false;  // pools only
  int64_t dilation_h = 1, dilation_w = 1;

  bool is_dilated() const { return dilation_h != 1 || dilation_w != 1; }
  // From the first to the last row or column of a window, both included.
  int64_t reach_h() const { return dilation_h * (k_h - 1) + 1; }
  int64_t reach_w() const { return dilation_w * (k_w - 1) + 1; }
};

// Those that are neither kConv2d nor kLinear are in the tables of maps.cpp and rows.cpp. kScale2d, kScale: a BatchNorm or an
// activation that is a step of its own, of maps or of rows.
enum class Op {
  kConv2d,
  kLinear,
  kMaxPool2d,
  kAvgPool2d,
  kAdaptiveMaxPool2d,
  kAdaptiveAvgPool2d,
  kPad2d,
  kUpsampleNearest2d,
  kUpsampleBilinear2d,
  kPixelShuffle,
  kPixelUnshuffle,
  kScale2d,
  kGroupNorm,
  kScale,
  kLayerNorm,
  kSoftmax,
  kLogSoftmax,
};

// What a padding is made of.
enum class PadMode { kConstant, kReflect, kReplicate, kCircular };

// Rows of features, and not maps, come in and go out.
constexpr bool takes_rows(Op op) { return op == Op::kLinear || op >= Op::kScale; }
// By the mean and variance of what comes in: weight and bias, where there are any, are one number for each channel or feature.
constexpr bool normalizes(Op op) { return op == Op::kGroupNorm || op == Op::kLayerNorm; }

// An upsampling: to a size, or by factors, of which eager takes the source's pixels unless it computes them again from the sizes.
struct Resize {
  int64_t h = 0, w = 0;               // 0 where there are factors
  double factor_h = 0, factor_w = 0;  // 0 where there is a size
  bool recomputes_factors = false;
  bool aligns_corners = false;
};

struct ActivationSpec {
  Activation kind = Activation::kNone;
  float a = 0, b = 0;             // see Activation
  const float* slopes = nullptr;  // PReLU's: one, or as many as the step has output channels or features
  int64_t slope_count = 0;
};

// Whether max-pooling before it gives what max-pooling after it gives, NaN and infinities included.
bool commutes_with_max_pool(const ActivationSpec& activation);

// One fused step. weight: conv2d (c_out, c_in / groups, k_h, k_w), linear (n, k), contiguous; bias: (c_out) or (n), or null. Of
// scale2d and scale, groupnorm and layernorm: what is multiplied and what is added, (out) both, or null for nothing.
// Read only while the plan is built, as are slopes.
struct StepSpec {
  Op op = Op::kLinear;
  std::string name;  // the pattern, such as conv2d_relu_maxpool2d
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t out = 0, in = 0;  // channels or features of the weight
  // Where the weight is the layer's times a BatchNorm's scale: the layer's own, and the scale, (out).
  const float* unfolded = nullptr;
  const float* scale = nullptr;
  Window conv;
  int64_t groups = 1;  // of the channels of a convolution or of groupnorm
  double eps = 0;      // what groupnorm and layernorm add to a variance
  ActivationSpec activation;
  bool activation_is_in_place = false;  // the same values, but see how the memory format follows
  bool has_pool = false;
  bool pools_before_activation = false;  // with ReLU the same values, as above
  Window pool;
  int64_t pool_h = 0, pool_w = 0;  // output of an adaptive pool, 0 where it is that of the input
  // What an average divides by: the pixels of its window, those in the padding among them or not, or another number.
  bool counts_padding = true;
  int64_t divisor = 0;
  // Pixels that are added on the four sides; of a convolution zeros beside its own padding.
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  PadMode pad_mode = PadMode::kConstant;
  float pad_value = 0;
  Resize resize;
  int64_t factor = 1;                // of a pixel shuffle
  std::vector<int64_t> unflattened;  // channels, height and width that rows become before this step; empty where none come
  bool is_per_feature = false;       // of scale2d: a map's features are numbered as in a row that eager has made of them

  bool has_relu() const { return activation.kind == Activation::kRelu; }
  // A filter of its own for each channel.
  bool is_depthwise() const { return op == Op::kConv2d && groups > 1 && in == 1 && out == groups; }
};

// One image (or row) of the input; the batch size stays free.
struct InputSpec {
  bool is_spatial = false;
  int64_t channels = 0, h = 0, w = 0;  // spatial
  bool is_nhwc = false;                // how the caller's memory is laid out
  int64_t features = 0;                // not spatial
  Storage storage = Storage::kF32;     // of the input and of what each layer gives
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
struct Extent {
  int64_t h = 0, w = 0;
};
Extent conv_size(const Window& window, Extent src);
int64_t pool_size(int64_t in, int64_t k, int64_t stride, int64_t pad, bool ceil_mode, int64_t dilation = 1);

}  // namespace fastseq
