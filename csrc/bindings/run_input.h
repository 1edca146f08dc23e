// What a native run makes of a tensor: sizes of one image or row, the batch, and the sizes and memory format of the result.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "bindings/gate.h"
#include "plan/spec.h"

namespace fastseq {

// One fused step as the matcher describes it.
struct StepSource {
  StepSpec spec;   // all but the weights
  int layer = -1;  // index of the watch that holds weight and bias
  int norm = -1;   // of that of a BatchNorm behind it, if there is one
  double norm_eps = 0;
  int slopes = -1;                 // of that of a PReLU
  bool pads_same = false;          // padding='same': from the weight's size at call time
  bool has_one_dimension = false;  // maps are (N, C, L), for the plan images of one row
  bool needs_batch = false;        // the first dimension must be the batch: the next is that of channels, or is unflattened
};

// How a run takes and gives tensors. flattens_by_view: eager makes the run's Flatten by Tensor.view, which some memory formats do
// not allow; rows_features: it gives rows of that many features, 0 for one row an image.
struct RunShape {
  bool is_first_spatial = false, flattens_input = false, flattens_output = false, flattens_by_view = false;
  int64_t rows_features = 0;
  bool needs_batch = false;        // as in StepSource, of any step
  bool has_one_dimension = false;  // as in StepSource
  bool begins_with_conv = false;
  std::vector<int64_t> unflattened = {};  // as in StepSpec, of the first step: the input is rows
};

struct Signature {
  bool is_spatial = false, is_nhwc = false;
  int64_t channels = 0, h = 0, w = 0, features = 0;
  at::ScalarType dtype = at::kFloat;
  bool operator==(const Signature& o) const {
    return is_spatial == o.is_spatial && is_nhwc == o.is_nhwc && channels == o.channels && h == o.h && w == o.w &&
           features == o.features && dtype == o.dtype;
  }
  InputSpec input_spec() const { return {is_spatial, channels, h, w, is_nhwc, features, storage()}; }
  Storage storage() const { return dtype == at::kBFloat16 ? Storage::kBf16 : dtype == at::kHalf ? Storage::kF16 : Storage::kF32; }
  at::MemoryFormat format() const { return is_nhwc ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous; }
};

struct InputView {
  Signature signature;
  int64_t batch = 1;
  bool is_unbatched = false;
  bool operator==(const InputView& o) const {
    return signature == o.signature && batch == o.batch && is_unbatched == o.is_unbatched;
  }
};

// Null, or why no native run takes such a shape.
Reason read_input(const at::Tensor& input, const RunShape& shape, InputView& view);

using Sizes = c10::SmallVector<int64_t, 5>;
Sizes output_sizes(const at::Tensor& input, const InputView& view, const RunShape& shape, const OutputSpec& output);

// Refusal for unbatched inputs whose result would need strides that eager alone gives; rare enough.
void check_unbatched(const InputView& view, const RunShape& shape, const OutputSpec& output, bool output_is_nhwc);

bool is_channels_last(const at::Tensor& tensor);

// The steps with the sizes that `weights` have (undefined tensors for steps without), and whether eager's result would be in
// channels_last order. Throws Refusal where eager would raise.
struct SizedSteps {
  std::vector<StepSpec> specs;
  bool output_is_nhwc = false;
};
SizedSteps size_steps(const std::vector<StepSource>& steps, const std::vector<at::Tensor>& weights,
                      const std::vector<at::Tensor>& biases, const Signature& signature, const RunShape& shape);

}  // namespace fastseq
