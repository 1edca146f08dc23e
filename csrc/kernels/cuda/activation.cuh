// activation: the functions of kernels/activation.h, of single values in float32, as torch's own CUDA kernels compute them but for
// GELU's approximation, which keeps its digits below zero here.
// NaN stays NaN, and x * f(x) of -inf is NaN where f is 0 there. A launch has one kind, so the switch is a branch that all threads
// take together. Against float64, with the functions of ptx.h correctly rounded: 4 units in the last place, 12 for the tanh form of
// GELU, of the result or, where that is less, of 2^-20; powers of e that are too large for float32 make it 0.
#pragma once

#include "kernels/activation.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

FS_DEVICE float from_zero_to_six(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }  // keeps NaN

// a, b: see Activation; of PReLU, a is the channel's slope.
FS_DEVICE float activate(Activation kind, float x, float a, float b) {
  constexpr float kSixth = 1.0f / 6.0f;
  switch (kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return relu(x);
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return x > 0.0f ? x : x * a;
    case Activation::kElu:
      return x > 0.0f ? x : expm1_of(x) * a;
    case Activation::kSelu: {
      constexpr float kAlpha = 1.67326324235437728f, kScale = 1.05070098735548049f;
      return x > 0.0f ? x * kScale : expm1_of(x) * (kAlpha * kScale);
    }
    case Activation::kCelu:
      return x > 0.0f ? x : expm1_of(x / a) * a;
    case Activation::kHardtanh:
      return x < a ? a : x > b ? b : x;
    case Activation::kHardswish:
      return x * from_zero_to_six(x + 3.0f) * kSixth;
    case Activation::kHardsigmoid:
      return from_zero_to_six(x + 3.0f) * kSixth;
    case Activation::kSigmoid:
      return 1.0f / (1.0f + exp_of(-x));
    case Activation::kTanh:
      return tanh_of(x);
    case Activation::kSilu:
      return x / (1.0f + exp_of(-x));
    case Activation::kGelu:
      return x * normal_distribution(x);
    case Activation::kGeluTanh: {
      // 0.5 * x * (1 + tanh(u)) = x / (1 + exp(-2 u)).
      constexpr float kLinear = 1.5957691216057308f, kCubic = 0.071354816272600241f;  // 2 sqrt(2 / pi), and times 0.044715
      return x / (1.0f + exp_of(-x * (x * x * kCubic + kLinear)));
    }
    case Activation::kSoftplus:
      return x * a > b ? x : log1p_of(exp_of(x * a)) / a;
    case Activation::kMish:
      return x * tanh_of(log1p_of(exp_of(x)));
  }
  return x;
}

}  // namespace fastseq::cuda
