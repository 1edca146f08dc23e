// BatchNorm in eval mode as part of the layer before it: its scale goes into the weights, its shift into the bias.
#pragma once

#include <cstdint>

namespace fastseq {

// Of `channels` outputs; weight and bias may be null for 1 and 0.
struct NormSpec {
  const float* weight = nullptr;
  const float* bias = nullptr;
  const float* mean = nullptr;
  const float* variance = nullptr;
  double eps = 0;
};

// weight: `channels` rows of `length`, bias: `channels` or null, both read; to_weight, to_bias and to_scale as large, written. In
// double precision, rounded once. Throws Refusal where a scale is so large or small that the products would not be the float
// numbers that eager multiplies one after the other.
void fold_batch_norm(const NormSpec& norm, int64_t channels, int64_t length, const float* weight, const float* bias,
                     float* to_weight, float* to_bias, float* to_scale);

}  // namespace fastseq
