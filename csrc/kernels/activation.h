// The activation functions that may follow a layer, as torch defines them.
#pragma once

namespace fastseq {

// a, b: what the module takes, in this order.
enum class Activation {
  kNone,
  kRelu,
  kLeakyRelu,  // a: slope
  kPrelu,      // a slope, or one per channel
  kElu,        // a: alpha
  kSelu,
  kCelu,      // a: alpha
  kHardtanh,  // a, b: the least and the greatest value; ReLU6 is one
  kHardswish,
  kHardsigmoid,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kGeluTanh,  // its approximation by tanh
  kSoftplus,  // a, b: beta and threshold
  kMish,
};
constexpr int kActivations = static_cast<int>(Activation::kMish) + 1;

}  // namespace fastseq
