// Weights in the order the tiles read them: panels of a few vectors of output channels, the reduction outermost.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "plan/memory.h"
#include "plan/spec.h"

namespace fastseq {

struct Panel {
  int vectors;
  int first_lane;         // of the output channels
  int64_t weight_offset;  // in elements
};

struct PackedWeights {
  std::vector<Panel> panels;
  std::unique_ptr<AlignedBuffer> weight;
  std::unique_ptr<AlignedBuffer> bias;  // padded to whole vectors, zero where the layer has none
  int64_t bytes() const { return (weight->size() + bias->size()) * static_cast<int64_t>(sizeof(float)); }
};
using PackedPtr = std::shared_ptr<const PackedWeights>;

// How `vectors` vectors of output channels are cut into panels: `preferred` wide, the rest as evenly as `max_rows` allows.
std::vector<int> split_vectors(int vectors, int preferred, const int* max_rows);

// The same in panels of at most `preferred` that differ little and alternate, so that threads which share them out get equal parts.
std::vector<int> spread_vectors(int vectors, int preferred, const int* max_rows);

// Zero weights of `depth` rows per panel, and the bias.
std::shared_ptr<PackedWeights> make_panels(const StepSpec& spec, const std::vector<int>& panels, int lanes, int64_t depth);

PackedPtr pack_conv2d(const StepSpec& spec, const std::vector<int>& panels, int lanes);

// [tap][out], for one input channel.
PackedPtr pack_plane(const StepSpec& spec);

// With spatial > 1 the features of the source are ordered pixel by pixel (NHWC) while the weight's are channel by channel.
PackedPtr pack_linear(const StepSpec& spec, const std::vector<int>& panels, int64_t spatial, const cpu::KernelSet& kernels);

// For a Linear whose weight is read in place: panels without weights, to share out, and the bias.
PackedPtr pack_bias(const StepSpec& spec, const cpu::KernelSet& kernels);

// Packed weights of one native run, shared by its plans. Key: step, panel width (0 for weights in place), and the spatial extent
// behind a Linear's features or, for a convolution, which kernels read them.
using PackCache = std::map<std::tuple<size_t, int, int64_t>, PackedPtr>;

}  // namespace fastseq
