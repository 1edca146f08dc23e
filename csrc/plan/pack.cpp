#include "plan/pack.h"

#include <algorithm>

namespace fastseq {

std::shared_ptr<PackedWeights> make_panels(const StepSpec& spec, const std::vector<int>& panels, int lanes, int64_t depth) {
  auto packed = std::make_shared<PackedWeights>();
  int first_lane = 0;
  int64_t offset = 0;
  for (int vectors : panels) {
    packed->panels.push_back({vectors, first_lane, offset});
    first_lane += vectors * lanes;
    offset += depth * vectors * lanes;
  }
  packed->weight = std::make_unique<AlignedBuffer>(offset);
  packed->bias = std::make_unique<AlignedBuffer>(first_lane);
  if (spec.bias) std::copy(spec.bias, spec.bias + spec.out, packed->bias->data());
  return packed;
}

std::vector<int> split_vectors(int vectors, int preferred, const int* max_rows) {
  std::vector<int> panels;
  while (vectors > 0) {
    int take = std::min(preferred, vectors);
    // A lone vector at the end would have too few sums in flight: widen the last panel, or even out the last two.
    if (vectors == preferred + 1)
      take = preferred + 1 <= cpu::kMaxVectors && max_rows[preferred + 1] ? preferred + 1 : (preferred + 2) / 2;
    while (take > 1 && !max_rows[take]) --take;
    panels.push_back(take);
    vectors -= take;
  }
  return panels;
}

std::vector<int> spread_vectors(int vectors, int preferred, const int* max_rows) {
  const int count = (vectors + preferred - 1) / preferred;
  std::vector<int> panels;
  for (int i = 0; i < count; ++i) panels.push_back((vectors * (i + 1) + count - 1) / count - (vectors * i + count - 1) / count);
  const bool has_all = std::all_of(panels.begin(), panels.end(), [&](int width) { return max_rows[width] > 0; });
  return has_all && vectors != preferred + 1 ? panels : split_vectors(vectors, preferred, max_rows);
}

PackedPtr pack_conv2d(const StepSpec& spec, const std::vector<int>& panels, int lanes) {
  const int64_t taps = spec.conv.k_h * spec.conv.k_w, c_in = spec.in;
  auto packed = make_panels(spec, panels, lanes, taps * c_in);
  for (const Panel& panel : packed->panels) {
    const int64_t width = panel.vectors * lanes;
    const int64_t filled = std::min<int64_t>(width, spec.out - panel.first_lane);
    float* dst = packed->weight->data() + panel.weight_offset;
    // Each lane's weights are read in order; written are whole rows of lanes.
    const float* const src = spec.weight + panel.first_lane * c_in * taps;
    for (int64_t c = 0; c < c_in; ++c)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t lane = 0; lane < filled; ++lane) dst[(t * c_in + c) * width + lane] = src[(lane * c_in + c) * taps + t];
  }
  return packed;
}

PackedPtr pack_plane(const StepSpec& spec) {
  const int64_t taps = spec.conv.k_h * spec.conv.k_w;
  auto packed = std::make_shared<PackedWeights>();
  packed->weight = std::make_unique<AlignedBuffer>(taps * spec.out);
  packed->bias = std::make_unique<AlignedBuffer>(spec.out);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t out = 0; out < spec.out; ++out) packed->weight->data()[t * spec.out + out] = spec.weight[out * taps + t];
  if (spec.bias) std::copy(spec.bias, spec.bias + spec.out, packed->bias->data());
  return packed;
}

PackedPtr pack_linear(const StepSpec& spec, const std::vector<int>& panels, int64_t spatial, const cpu::KernelSet& kernels) {
  const int64_t channels = spec.in / spatial;
  auto packed = make_panels(spec, panels, kernels.lanes, spec.in);
  for (const Panel& panel : packed->panels) {
    const int64_t width = panel.vectors * kernels.lanes;
    const int64_t filled = std::min<int64_t>(width, spec.out - panel.first_lane);
    const float* src = spec.weight + panel.first_lane * spec.in;
    float* dst = packed->weight->data() + panel.weight_offset;
    if (spatial == 1) {
      kernels.transpose(src, spec.in, dst, width, spec.in, filled, false);
      continue;
    }
    for (int64_t lane = 0; lane < filled; ++lane)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t s = 0; s < spatial; ++s) dst[(s * channels + c) * width + lane] = src[lane * spec.in + c * spatial + s];
  }
  return packed;
}

PackedPtr pack_bias(const StepSpec& spec, const cpu::KernelSet& kernels) {
  const int64_t vectors = (spec.out + kernels.lanes - 1) / kernels.lanes;
  auto packed =
      make_panels(spec, split_vectors(static_cast<int>(vectors), kernels.preferred_vectors, kernels.max_rows), kernels.lanes, 0);
  // The last tile reads the biases of rows that are not there.
  packed->bias = std::make_unique<AlignedBuffer>(vectors * kernels.lanes + cpu::kMaxRows);
  if (spec.bias) std::copy(spec.bias, spec.bias + spec.out, packed->bias->data());
  return packed;
}

}  // namespace fastseq
