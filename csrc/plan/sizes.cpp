#include "plan/sizes.h"

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
      if (step.in != size.channels) throw Refusal("conv2d weight expects another number of channels");
      size = {step.out, conv_size(size.h, w.k_h, w.stride_h, w.pad_top, w.pad_bottom),
              conv_size(size.w, w.k_w, w.stride_w, w.pad_left, w.pad_right)};
      if (size.channels < 1) throw Refusal("conv2d has no output channels");
      sizes.convs[i] = size;
    }
    if (step.has_pool || step.op == Op::kMaxPool2d) {
      const Window& w = step.pool;
      size.h = pool_size(size.h, w.k_h, w.stride_h, w.pad_top, w.ceil_mode);
      size.w = pool_size(size.w, w.k_w, w.stride_w, w.pad_left, w.ceil_mode);
    }
    sizes.maps.push_back(size);
  }
  return sizes;
}

bool pools_first(const StepSpec& step) {
  return step.op == Op::kMaxPool2d || step.pools_before_activation || commutes_with_max_pool(step.activation);
}

std::string layer_key(const std::string& isa, const StepSpec& step, const MapSize& src) {
  const auto pair = [](const char* name, int64_t a, int64_t b) { return std::string(name) + shape_text({a, b}); };
  if (step.op == Op::kLinear) return isa + " linear " + shape_text({step.in, step.out});
  std::string key = isa + (step.op == Op::kConv2d ? " conv2d " : " maxpool2d ") + shape_text({src.channels, src.h, src.w});
  if (step.op == Op::kConv2d) {
    const Window& w = step.conv;
    key += " to " + std::to_string(step.out) + pair(" kernel ", w.k_h, w.k_w) + pair(" stride ", w.stride_h, w.stride_w) +
           " padding " + shape_text({w.pad_top, w.pad_bottom, w.pad_left, w.pad_right});
  }
  if (step.has_pool || step.op == Op::kMaxPool2d) {
    const Window& w = step.pool;
    key += pair(" pool ", w.k_h, w.k_w) + pair(" stride ", w.stride_h, w.stride_w) + pair(" padding ", w.pad_top, w.pad_left) +
           (w.ceil_mode ? " ceil" : "");
    if (!pools_first(step)) key += " after the activation";  // not in registers
  }
  return key;
}

}  // namespace fastseq
