#include "plan/fold.h"

#include <cmath>

#include "plan/spec.h"

namespace fastseq {
namespace {

// Beyond these a product with a weight of ordinary size may leave the range of normal floats.
constexpr double kLargestScale = 0x1p60, kSmallestScale = 0x1p-60;

}  // namespace

void fold_batch_norm(const NormSpec& norm, int64_t channels, int64_t length, const float* weight, const float* bias,
                     float* to_weight, float* to_bias, float* to_scale) {
  for (int64_t c = 0; c < channels; ++c) {
    const double gain = norm.weight ? norm.weight[c] : 1.0;
    const double scale = gain / std::sqrt(static_cast<double>(norm.variance[c]) + norm.eps);
    const double shift = (norm.bias ? norm.bias[c] : 0.0) + ((bias ? bias[c] : 0.0) - static_cast<double>(norm.mean[c])) * scale;
    const double size = std::fabs(scale);
    if (!(size == 0 || (size >= kSmallestScale && size <= kLargestScale)) || !std::isfinite(shift))
      throw Refusal("BatchNorm has a scale or shift beyond what folds into weights");
    to_bias[c] = static_cast<float>(shift), to_scale[c] = static_cast<float>(scale);
    const float* const from = weight + c * length;
    float* const to = to_weight + c * length;
    for (int64_t i = 0; i < length; ++i) {
      to[i] = static_cast<float>(from[i] * scale);
      if (std::isinf(to[i]) && std::isfinite(from[i])) throw Refusal("BatchNorm times a weight is beyond the largest float");
    }
  }
}

}  // namespace fastseq
