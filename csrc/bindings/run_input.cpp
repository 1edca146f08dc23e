#include "bindings/run_input.h"

#include <string>

namespace fastseq {
namespace {

constexpr Reason kOtherRows = "view() or reshape() to rows that are not one image each";

// Whether eager's result is in channels_last order: a convolution takes the order of its input or weight, and BatchNorm and an
// activation out of place give the contiguous one where both orders are the same in memory. Those that are clamps for eager keep
// the strides, and so does PReLU.
class FormatTracker {
 public:
  explicit FormatTracker(const Signature& s) : channels_(s.channels), h_(s.h), w_(s.w), is_nhwc_(s.is_nhwc) {}

  void step(const StepSpec& spec, bool weight_is_nhwc, bool has_norm) {
    if (spec.op == Op::kConv2d) {
      is_nhwc_ = is_nhwc_ || weight_is_nhwc;
      channels_ = spec.out;
      h_ = conv_size(h_, spec.conv.k_h, spec.conv.stride_h, spec.conv.pad_top, spec.conv.pad_bottom);
      w_ = conv_size(w_, spec.conv.k_w, spec.conv.stride_w, spec.conv.pad_left, spec.conv.pad_right);
    }
    if (has_norm) give_new_strides();
    if (!spec.pools_before_activation) activate(spec);
    if (spec.has_pool || spec.op == Op::kMaxPool2d) {
      h_ = pool_size(h_, spec.pool.k_h, spec.pool.stride_h, spec.pool.pad_top, spec.pool.ceil_mode);
      w_ = pool_size(w_, spec.pool.k_w, spec.pool.stride_w, spec.pool.pad_left, spec.pool.ceil_mode);
    }
    if (spec.pools_before_activation) activate(spec);
    // The strides of a single element are those of both orders, and eager takes that for contiguous.
    if (channels_ * h_ * w_ == 1) is_nhwc_ = false;
  }
  bool is_nhwc() const { return is_nhwc_; }

  // The maps become rows here.
  void flatten(const RunShape& shape) const {
    if (shape.flattens_by_view && is_nhwc_) throw Refusal("view() of a channels_last map");
    if (shape.rows_features && shape.rows_features != channels_ * h_ * w_) throw Refusal(kOtherRows);
  }

 private:
  void activate(const StepSpec& spec) {
    const Activation kind = spec.activation.kind;
    const bool keeps_strides =
        kind == Activation::kNone || kind == Activation::kHardtanh || kind == Activation::kPrelu || spec.activation_is_in_place;
    if (!keeps_strides) give_new_strides();
  }
  void give_new_strides() {
    if (channels_ == 1 || h_ * w_ == 1) is_nhwc_ = false;
  }

  int64_t channels_, h_, w_;
  bool is_nhwc_;
};

}  // namespace

bool is_channels_last(const at::Tensor& tensor) {
  return tensor.dim() == 4 && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

Reason read_input(const at::Tensor& input, const RunShape& shape, InputView& view) {
  Signature& signature = view.signature;
  const int64_t rank = input.dim();
  if (input.numel() == 0) return "the input is empty";
  if (shape.is_first_spatial) {
    if (rank != 3 && rank != 4) return "the input of a convolution or pool has neither 3 nor 4 dimensions";
    view.is_unbatched = rank == 3;
    if (view.is_unbatched && shape.needs_batch) return "an unbatched input to BatchNorm or PReLU";
    view.batch = view.is_unbatched ? 1 : input.size(0);
    signature.is_spatial = true;
    signature.is_nhwc = is_channels_last(input);
    signature.channels = input.size(rank - 3), signature.h = input.size(rank - 2), signature.w = input.size(rank - 1);
  } else if (shape.flattens_input) {
    if (rank < 2) return "Flatten needs an input of at least 2 dimensions";
    view.batch = input.size(0);
    signature.features = input.numel() / view.batch;
    if (shape.flattens_by_view && !input.is_contiguous()) return "view() of a non-contiguous input";
    if (shape.rows_features && shape.rows_features != signature.features) return kOtherRows;
  } else {
    if (rank < 1) return "linear needs an input of at least 1 dimension";
    if (rank != 2 && shape.needs_batch) return "an input to Linear and BatchNorm or PReLU that does not have 2 dimensions";
    if (rank > 2 && !input.is_contiguous()) return "a non-contiguous input of more than 2 dimensions to linear";
    signature.features = input.size(rank - 1);
    view.batch = input.numel() / signature.features;
  }
  return nullptr;
}

Sizes output_sizes(const at::Tensor& input, const InputView& view, const RunShape& shape, const OutputSpec& output) {
  Sizes sizes;
  if (output.is_spatial && !shape.flattens_output) {
    if (!view.is_unbatched) sizes.push_back(view.batch);
    sizes.append({output.channels, output.h, output.w});
  } else if (output.is_spatial) {
    sizes.append({view.batch, output.channels * output.h * output.w});
  } else {
    if (shape.is_first_spatial || shape.flattens_input) {
      sizes.push_back(view.batch);
    } else {
      sizes.append(input.sizes().begin(), input.sizes().end() - 1);
    }
    sizes.push_back(output.features);
  }
  return sizes;
}

void check_unbatched(const InputView& view, const RunShape& shape, const OutputSpec& output, bool output_is_nhwc) {
  // Eager drops the batch dimension of a channels_last result and keeps its strides.
  if (view.is_unbatched && (output_is_nhwc || shape.flattens_output || !output.is_spatial))
    throw Refusal("an unbatched input with channels_last weights or Flatten");
}

SizedSteps size_steps(const std::vector<StepSource>& steps, const std::vector<at::Tensor>& weights,
                      const std::vector<at::Tensor>& biases, const Signature& signature, const RunShape& shape) {
  SizedSteps result;
  FormatTracker format(signature);
  bool is_spatial = signature.is_spatial;
  for (size_t i = 0; i < steps.size(); ++i) {
    StepSpec spec = steps[i].spec;
    const at::Tensor &weight = weights[i], &bias = biases[i];
    bool weight_is_nhwc = false;
    if (weight.defined()) {
      const int64_t rank = spec.op == Op::kConv2d ? 4 : 2;
      if (weight.dim() != rank) throw Refusal(spec.name + " weight has " + std::to_string(weight.dim()) + " dimensions");
      spec.out = weight.size(0), spec.in = weight.size(1);
      if (bias.defined() && (bias.dim() != 1 || bias.size(0) != spec.out))
        throw Refusal(spec.name + " bias does not fit its weight");
      if (spec.op == Op::kConv2d) {
        spec.conv.k_h = weight.size(2), spec.conv.k_w = weight.size(3);
        if (steps[i].pads_same) {
          if (spec.conv.stride_h != 1 || spec.conv.stride_w != 1)
            throw Refusal("padding='same' with a stride, which eager rejects");
          // An even kernel pads one more behind than before, as F.conv2d does.
          spec.conv.pad_top = (spec.conv.k_h - 1) / 2, spec.conv.pad_bottom = spec.conv.k_h - 1 - spec.conv.pad_top;
          spec.conv.pad_left = (spec.conv.k_w - 1) / 2, spec.conv.pad_right = spec.conv.k_w - 1 - spec.conv.pad_left;
        }
        weight_is_nhwc = is_channels_last(weight);
      }
    }
    if (is_spatial && spec.op == Op::kLinear) {
      format.flatten(shape);
      is_spatial = false;
    }
    if (is_spatial) format.step(spec, weight_is_nhwc, steps[i].norm >= 0);
    result.specs.push_back(std::move(spec));
  }
  if (is_spatial && shape.flattens_output) format.flatten(shape);
  result.output_is_nhwc = format.is_nhwc();
  return result;
}

}  // namespace fastseq
