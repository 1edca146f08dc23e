#include "bindings/run_input.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "plan/maps.h"

namespace fastseq {
namespace {

// Beyond this eager raises.
constexpr int64_t kLargestSize = std::numeric_limits<int32_t>::max();

constexpr Reason kOtherFeatures = "Unflatten to another number of features";
constexpr Reason kOtherRows = "view() or reshape() to rows that are not one image each";

// Of (N, C, L) or (C, L): whether eager, for which it is a map of one row, takes it for channels_last. What its layers make of that
// is not told apart here.
bool has_channels_last(const at::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, length = tensor.size(last), stride = tensor.stride(last);
  const int64_t channels = tensor.size(last - 1), channel_stride = tensor.stride(last - 1);
  const bool is_batched = last == 2;
  const int64_t sizes[] = {is_batched ? tensor.size(0) : 1, channels, 1, length};
  const int64_t strides[] = {is_batched ? tensor.stride(0) : channels * channel_stride, channel_stride, length * stride, stride};
  return c10::is_channels_last_strides_2d(at::IntArrayRef(sizes), at::IntArrayRef(strides));
}

// Whether eager's result is in channels_last order: a convolution takes the order of its input or weight, and BatchNorm and an
// activation out of place give the contiguous one where both orders are the same in memory. Those that are clamps for eager keep
// the strides, and so does PReLU.
class FormatTracker {
 public:
  explicit FormatTracker(const Signature& s) : size_{s.channels, s.h, s.w}, is_nhwc_(s.is_nhwc) {}

  void step(const StepSpec& spec, bool weight_is_nhwc, bool has_norm) {
    if (spec.op == Op::kConv2d) {
      is_nhwc_ = is_nhwc_ || weight_is_nhwc;
      const Extent conv = conv_size(spec.conv, {size_.h, size_.w});
      size_ = {spec.out, conv.h, conv.w};
    }
    if (has_norm) give_new_strides();
    if (!spec.pools_before_activation) activate(spec);
    if (const MapOp* const op = map_op(spec)) size_ = op->size(spec, size_);
    if (gives_contiguous(spec)) is_nhwc_ = false;
    if (spec.pools_before_activation) activate(spec);
    // The strides of a single element are those of both orders, and eager takes that for contiguous.
    if (size_.channels * size_.h * size_.w == 1) is_nhwc_ = false;
  }
  bool is_nhwc() const { return is_nhwc_; }

  // The maps become rows here. A view is the first Flatten of a run.
  void flatten(const RunShape& shape) {
    if (std::exchange(has_flattened_, true)) return;
    if (shape.flattens_by_view && is_nhwc_) throw Refusal("view() of a channels_last map");
    if (shape.rows_features && shape.rows_features != size_.channels * size_.h * size_.w) throw Refusal(kOtherRows);
  }
  // And rows become maps, by a view of contiguous ones.
  void unflatten(const std::vector<int64_t>& sizes) { size_ = {sizes[0], sizes[1], sizes[2]}, is_nhwc_ = false; }

 private:
  void activate(const StepSpec& spec) {
    const Activation kind = spec.activation.kind;
    const bool keeps_strides =
        kind == Activation::kNone || kind == Activation::kHardtanh || kind == Activation::kPrelu || spec.activation_is_in_place;
    if (!keeps_strides) give_new_strides();
  }
  void give_new_strides() {
    if (size_.channels == 1 || size_.h * size_.w == 1) is_nhwc_ = false;
  }

  MapSize size_;
  bool is_nhwc_, has_flattened_ = false;
};

// Puts the size in the place of the -1 that may be among them. False where `features` cannot be divided so.
bool complete(std::vector<int64_t>& sizes, int64_t features) {
  int64_t known = 1;
  for (int64_t size : sizes) {
    if (size > 0 && size > features / known) return false;
    if (size > 0) known *= size;
  }
  const auto unknown = std::find(sizes.begin(), sizes.end(), -1);
  if (unknown == sizes.end()) return known == features;
  *unknown = features / known;
  return features % known == 0;
}

}  // namespace

bool is_channels_last(const at::Tensor& tensor) {
  return tensor.dim() == 4 && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

Reason read_input(const at::Tensor& input, const RunShape& shape, InputView& view) {
  Signature& signature = view.signature;
  const int64_t rank = input.dim(), maps_rank = shape.has_one_dimension ? 3 : 4;
  if (input.numel() == 0) return "the input is empty";
  signature.dtype = input.scalar_type();
  if (!shape.unflattened.empty()) {
    if (rank != 2) return "an input to Unflatten that does not have 2 dimensions";
    std::vector<int64_t> sizes = shape.unflattened;
    if (!complete(sizes, input.size(1))) return kOtherFeatures;
    view.batch = input.size(0);
    signature.is_spatial = true;
    signature.channels = sizes[0], signature.h = sizes[1], signature.w = sizes[2];
  } else if (shape.is_first_spatial) {
    if (rank != maps_rank && rank != maps_rank - 1)
      return shape.has_one_dimension ? "the input of a convolution or pool of one dimension has neither 2 nor 3 dimensions"
                                     : "the input of a convolution or pool has neither 3 nor 4 dimensions";
    view.is_unbatched = rank != maps_rank;
    if (view.is_unbatched && shape.needs_batch) return "an unbatched input to BatchNorm, GroupNorm, PReLU, Upsample or Unflatten";
    view.batch = view.is_unbatched ? 1 : input.size(0);
    signature.is_spatial = true;
    signature.is_nhwc = is_channels_last(input);
    signature.channels = input.size(rank == maps_rank ? 1 : 0);
    if (shape.has_one_dimension && (signature.channels == 1 || !shape.begins_with_conv) && has_channels_last(input))
      return "an input of one dimension in channels_last order";
    signature.h = shape.has_one_dimension ? 1 : input.size(rank - 2), signature.w = input.size(rank - 1);
  } else if (shape.flattens_input) {
    if (rank < 2) return "Flatten needs an input of at least 2 dimensions";
    view.batch = input.size(0);
    signature.features = input.numel() / view.batch;
    if (shape.flattens_by_view && !input.is_contiguous()) return "view() of a non-contiguous input";
    if (shape.rows_features && shape.rows_features != signature.features) return kOtherRows;
  } else {
    if (rank < 1) return "linear needs an input of at least 1 dimension";
    if (rank != 2 && shape.needs_batch)
      return "an input to Linear and BatchNorm, PReLU, Unflatten or a softmax over dimension 1 that does not have 2 dimensions";
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
    sizes.push_back(output.channels);
    if (!shape.has_one_dimension) sizes.push_back(output.h);
    sizes.push_back(output.w);
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
  int64_t features = signature.features;  // of rows
  for (size_t i = 0; i < steps.size(); ++i) {
    StepSpec spec = steps[i].spec;
    const at::Tensor &weight = weights[i], &bias = biases[i];
    bool weight_is_nhwc = false;
    if (normalizes(spec.op)) {
      for (const at::Tensor* values : {&weight, &bias}) {
        if (!values->defined()) continue;
        if (values->dim() != 1 || (spec.out && values->size(0) != spec.out))
          throw Refusal(spec.name + " weight or bias does not fit");
        spec.out = values->size(0);
      }
    } else if (weight.defined()) {
      const int64_t rank = spec.op != Op::kConv2d ? 2 : shape.has_one_dimension ? 3 : 4;
      if (weight.dim() != rank) throw Refusal(spec.name + " weight has " + std::to_string(weight.dim()) + " dimensions");
      spec.out = weight.size(0), spec.in = weight.size(1);
      if (bias.defined() && (bias.dim() != 1 || bias.size(0) != spec.out))
        throw Refusal(spec.name + " bias does not fit its weight");
      if (spec.op == Op::kConv2d) {
        if (rank == 3 && has_channels_last(weight)) throw Refusal("a weight of one dimension in channels_last order");
        spec.conv.k_h = rank == 3 ? 1 : weight.size(2), spec.conv.k_w = weight.size(rank - 1);
        if (steps[i].pads_same) {
          if (spec.conv.stride_h != 1 || spec.conv.stride_w != 1)
            throw Refusal("padding='same' with a stride, which eager rejects");
          // An even kernel pads one more behind than before, as F.conv2d does.
          Window& w = spec.conv;
          if (w.dilation_h > kLargestSize || w.dilation_w > kLargestSize) throw Refusal("conv2d has a dilation eager rejects");
          w.pad_top = (w.reach_h() - 1) / 2, w.pad_bottom = w.reach_h() - 1 - w.pad_top;
          w.pad_left = (w.reach_w() - 1) / 2, w.pad_right = w.reach_w() - 1 - w.pad_left;
        }
        spec.conv.pad_top += spec.pad_top, spec.conv.pad_bottom += spec.pad_bottom;
        spec.conv.pad_left += spec.pad_left, spec.conv.pad_right += spec.pad_right;
        weight_is_nhwc = is_channels_last(weight);
      }
    }
    if (is_spatial && takes_rows(spec.op)) {
      format.flatten(shape);
      is_spatial = false;
    }
    if (spec.op == Op::kLinear) features = spec.out;
    if (!spec.unflattened.empty() && i > 0) {
      if (!complete(spec.unflattened, features)) throw Refusal(kOtherFeatures);
      format.unflatten(spec.unflattened);
      is_spatial = true;
    }
    if (is_spatial) format.step(spec, weight_is_nhwc, steps[i].norm >= 0);
    result.specs.push_back(std::move(spec));
  }
  if (is_spatial && shape.flattens_output) format.flatten(shape);
  result.output_is_nhwc = format.is_nhwc();
  return result;
}

}  // namespace fastseq
