#include "plan/pack.h"

#include <algorithm>

namespace fastseq {

std::shared_ptr<PackedWeights> make_panels(const StepSpec& spec, const std::vector<int>& panels, int lanes, int64_t depth) {
  auto packed = std::make_shared<PackedWeights>();
  const int64_t outs = spec.out / spec.groups;  // of a group
  int64_t offset = 0, end = 0;
  for (int64_t group = 0; group < spec.groups; ++group) {
    int64_t first = group * outs;
    for (int vectors : panels) {
      const int width = vectors * lanes;
      // The last group's fill what its vectors have beyond the channels with zeros.
      const int64_t own = group + 1 == spec.groups ? width : std::min<int64_t>(width, (group + 1) * outs - first);
      packed->panels.push_back(
          {vectors, static_cast<int>(first), offset, static_cast<int>(own), static_cast<int>(group * spec.in)});
      first += width;
      offset += depth * width;
    }
    end = first;
  }
  packed->weight = std::make_unique<AlignedBuffer>(offset);
  packed->bias = std::make_unique<AlignedBuffer>(end);
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
    const int64_t filled = std::min<int64_t>(panel.lanes, spec.out - panel.first_lane);
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

namespace {

// The first input channel of an output channel's group.
int64_t source_channel(const StepSpec& spec, int64_t out) { return out / (spec.out / spec.groups) * spec.in; }

}  // namespace

bool can_shuffle_groups(const StepSpec& spec, int lanes) {
  for (int64_t first = 0; first < spec.out; first += lanes) {
    const int64_t last = std::min(spec.out, first + lanes) - 1;
    if (source_channel(spec, last) + spec.in - source_channel(spec, first) > lanes) return false;
  }
  return true;
}

PackedPtr pack_depthwise(const StepSpec& spec, int lanes) {
  const int64_t taps = spec.conv.k_h * spec.conv.k_w, vectors = divide_up(spec.out, lanes), terms = spec.in;
  auto packed = std::make_shared<PackedWeights>();
  packed->weight = std::make_unique<AlignedBuffer>(vectors * taps * terms * lanes);
  packed->bias = std::make_unique<AlignedBuffer>(vectors * lanes);
  for (int64_t c = 0; c < spec.out; ++c)
    for (int64_t i = 0; i < terms; ++i)
      for (int64_t t = 0; t < taps; ++t)
        packed->weight->data()[((c / lanes * taps + t) * terms + i) * lanes + c % lanes] = spec.weight[(c * terms + i) * taps + t];
  if (spec.bias) std::copy(spec.bias, spec.bias + spec.out, packed->bias->data());
  if (spec.is_depthwise()) return packed;

  static_assert(sizeof(int32_t) == sizeof(float));
  packed->index = std::make_unique<AlignedBuffer>(vectors * terms * lanes);
  int32_t* index = reinterpret_cast<int32_t*>(packed->index->data());
  for (int64_t first = 0; first < spec.out; first += lanes) {
    const int64_t first_channel = source_channel(spec, first);
    packed->first_channel.push_back(static_cast<int32_t>(first_channel));
    for (int64_t i = 0; i < terms; ++i)
      for (int64_t c = first; c < first + lanes; ++c)
        *index++ = c < spec.out ? static_cast<int32_t>(source_channel(spec, c) + i - first_channel) : 0;
  }
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
      kernels.transpose({src, spec.in, dst, width, spec.in, filled});
      continue;
    }
    for (int64_t lane = 0; lane < filled; ++lane)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t s = 0; s < spatial; ++s) dst[(s * channels + c) * width + lane] = src[lane * spec.in + c * spatial + s];
  }
  return packed;
}

PackedPtr pack_pairs(const PackedWeights& floats, const StepSpec& spec, int64_t taps, int64_t channels,
                     const cpu::KernelSet& kernels) {
  const int64_t pairs = (channels + 1) / 2;
  auto packed = std::make_shared<PackedWeights>();
  packed->panels = floats.panels;
  packed->weight = std::make_unique<AlignedBuffer>(floats.weight->size() / (taps * channels) * (taps * pairs));
  packed->bias = std::make_unique<AlignedBuffer>(floats.bias->size());
  std::copy_n(floats.bias->data(), floats.bias->size(), packed->bias->data());
  if (spec.scale) {
    packed->scale = std::make_unique<AlignedBuffer>(floats.bias->size());
    std::copy_n(spec.scale, spec.out, packed->scale->data());
  }
  std::vector<uint16_t> rows;
  for (Panel& panel : packed->panels) {
    const int64_t width = panel.vectors * kernels.lanes;
    const float* src = floats.weight->data() + panel.weight_offset;
    panel.weight_offset = panel.weight_offset / (taps * channels) * (taps * pairs);
    auto* dst = reinterpret_cast<uint16_t*>(packed->weight->data() + panel.weight_offset);
    rows.assign(static_cast<size_t>(2 * pairs * width), 0);
    for (int64_t tap = 0; tap < taps; ++tap, src += channels * width) {
      kernels.narrow[static_cast<int>(Storage::kBf16)]({src, rows.data(), 1, channels * width, 0, 0});
      for (const uint16_t* row = rows.data(); row < rows.data() + rows.size(); row += 2 * width)
        for (int64_t lane = 0; lane < width; ++lane, dst += 2) dst[0] = row[lane], dst[1] = row[width + lane];
    }
  }
  return packed;
}

PackedPtr pack_bias(const StepSpec& spec, const cpu::KernelSet& kernels) {
  const int64_t vectors = divide_up(spec.out, kernels.lanes);
  auto packed = make_panels(spec, split_vectors(static_cast<int>(vectors), kernels.tiles.preferred_vectors, kernels.tiles.max_rows),
                            kernels.lanes, 0);
  // The last tile reads the biases of rows that are not there.
  packed->bias = std::make_unique<AlignedBuffer>(vectors * kernels.lanes + cpu::kMaxRows);
  if (spec.bias) std::copy(spec.bias, spec.bias + spec.out, packed->bias->data());
  return packed;
}

}  // namespace fastseq
