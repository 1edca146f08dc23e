#include "plan/sizes.h"

#include "plan/maps.h"

namespace fastseq {

StepSizes infer_sizes(const InputSpec& input, const std::vector<StepSpec>& steps, size_t count) {
  StepSizes sizes;
  sizes.maps.push_back({input.channels, input.h, input.w});
  sizes.convs.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const StepSpec& step = steps[i];
    MapSize size = sizes.maps.back();
    if (step.op == Op::kConv2d) {
      const Window& w = step.conv;
      if (step.groups < 1 || size.channels % step.groups || step.in != size.channels / step.groups)
        throw Refusal("conv2d weight expects another number of channels");
      if (step.out % step.groups) throw Refusal("conv2d has output channels that do not divide into its groups");
      const Extent conv = conv_size(w, {size.h, size.w});
      size = {step.out, conv.h, conv.w};
      if (size.channels < 1) throw Refusal("conv2d has no output channels");
      sizes.convs[i] = size;
    }
    if (const MapOp* const op = map_op(step)) size = op->size(step, size);
    sizes.maps.push_back(size);
  }
  return sizes;
}

size_t own_steps(const std::vector<StepSpec>& steps, size_t first) {
  size_t end = first + 1;
  while (end < steps.size() && steps[end].unflattened.empty()) ++end;
  return end - first;
}

InputSpec unflatten(const OutputSpec& rows, const StepSpec& step, Storage storage) {
  const std::vector<int64_t>& sizes = step.unflattened;
  if (rows.is_spatial || sizes.size() != 3 || sizes[0] * sizes[1] * sizes[2] != rows.features)
    throw Refusal("Unflatten to another number of features");
  return {true, sizes[0], sizes[1], sizes[2], false, 0, storage};
}

bool pools_first(const StepSpec& step) { return step.pools_before_activation || commutes_with_max_pool(step.activation); }

std::string layer_key(const std::string& isa, const StepSpec& step, const MapSize& src) {
  const auto pair = [](const char* name, int64_t a, int64_t b) { return std::string(name) + shape_text({a, b}); };
  if (step.op == Op::kLinear) return isa + " linear " + shape_text({step.in, step.out});
  const Window& conv = step.conv;
  std::string key = isa + " conv2d " + shape_text({src.channels, src.h, src.w}) + " to " + std::to_string(step.out) +
                    pair(" kernel ", conv.k_h, conv.k_w) + pair(" stride ", conv.stride_h, conv.stride_w) + " padding " +
                    shape_text({conv.pad_top, conv.pad_bottom, conv.pad_left, conv.pad_right});
  if (conv.is_dilated()) key += pair(" dilation ", conv.dilation_h, conv.dilation_w);
  if (step.groups > 1) key += " groups " + std::to_string(step.groups);
  if (step.has_pool) {
    const Window& w = step.pool;
    key += pair(" pool ", w.k_h, w.k_w) + pair(" stride ", w.stride_h, w.stride_w) + pair(" padding ", w.pad_top, w.pad_left) +
           (w.ceil_mode ? " ceil" : "");
    if (w.is_dilated()) key += pair(" dilation ", w.dilation_h, w.dilation_w);
    if (!pools_first(step)) key += " after the activation";  // not in registers
  }
  return key;
}

}  // namespace fastseq
