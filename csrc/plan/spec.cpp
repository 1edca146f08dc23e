#include "plan/spec.h"

#include <algorithm>
#include <cmath>

namespace fastseq {
namespace {

// A slope of 0 makes NaN of -inf, an infinite one of 0: a pool might have left either out.
bool is_increasing_slope(float slope) { return slope > 0 && std::isfinite(slope); }

// From here on softplus in float32 is its argument, so that taking that instead is no step down.
constexpr float kSoftplusIsLinear = 17;

int64_t conv_size_1d(int64_t in, int64_t k, int64_t dilation, int64_t stride, int64_t pad_before, int64_t pad_after) {
  if (k < 1 || stride < 1 || pad_before < 0 || pad_after < 0) throw Refusal("conv2d has a kernel, stride or padding eager rejects");
  const int64_t left = in + pad_before + pad_after - 1;  // behind the first tap's pixel
  // By division: a dilation may be as large as an int64 is.
  if (in < 1 || left < 0 || (k > 1 && left / (k - 1) < dilation)) throw Refusal("conv2d kernel is larger than the padded input");
  return (left - dilation * (k - 1)) / stride + 1;
}

}  // namespace

bool commutes_with_max_pool(const ActivationSpec& activation) {
  const float a = activation.a, b = activation.b;
  switch (activation.kind) {
    case Activation::kNone:
    case Activation::kRelu:
    case Activation::kSelu:
    case Activation::kHardsigmoid:
    case Activation::kSigmoid:
    case Activation::kTanh:
      return true;
    case Activation::kLeakyRelu:
      return is_increasing_slope(a);
    case Activation::kPrelu:
      return std::all_of(activation.slopes, activation.slopes + activation.slope_count, is_increasing_slope);
    case Activation::kElu:
      return a >= 0 && std::isfinite(a);
    case Activation::kCelu:
      return is_increasing_slope(a) && std::isfinite(1 / a);
    case Activation::kHardtanh:
      return a <= b;
    case Activation::kSoftplus:
      return is_increasing_slope(a) && b >= kSoftplusIsLinear;
    case Activation::kHardswish:
    case Activation::kSilu:
    case Activation::kGelu:
    case Activation::kGeluTanh:
    case Activation::kMish:
      return false;
  }
  return false;
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

Extent conv_size(const Window& w, Extent src) {
  if (w.dilation_h < 1 || w.dilation_w < 1) throw Refusal("conv2d has a dilation eager rejects");
  return {conv_size_1d(src.h, w.k_h, w.dilation_h, w.stride_h, w.pad_top, w.pad_bottom),
          conv_size_1d(src.w, w.k_w, w.dilation_w, w.stride_w, w.pad_left, w.pad_right)};
}

int64_t pool_size(int64_t in, int64_t k, int64_t stride, int64_t pad, bool ceil_mode, int64_t dilation) {
  if (k < 1 || stride < 1 || dilation < 1 || pad < 0 || 2 * pad > k)
    throw Refusal("a pool has a kernel, stride, padding or dilation eager rejects");
  const int64_t span = in + 2 * pad - dilation * (k - 1) - 1;
  if (in < 1 || (span < 0 && !ceil_mode)) throw Refusal("the window of a pool is larger than its input");
  int64_t out = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (span + (ceil_mode ? stride - 1 : 0) < 0) throw Refusal("the window of a pool is larger than its input");
  // A window that would start in the padding behind the image is dropped.
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;
  if (out < 1) throw Refusal("the output of a pool would be empty");
  return out;
}

}  // namespace fastseq
