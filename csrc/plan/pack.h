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
  int lanes;              // that are its own: in front of another group's fewer than the vectors have
  int first_channel;      // of its group's input channels
};

struct PackedWeights {
  std::vector<Panel> panels;
  std::unique_ptr<AlignedBuffer> weight;
  std::unique_ptr<AlignedBuffer> bias;   // padded to whole vectors, zero where the layer has none
  std::unique_ptr<AlignedBuffer> scale;  // of the sums, as the bias; empty for 1
  std::unique_ptr<AlignedBuffer> index;  // int32_t, of a grouped convolution
  std::vector<int32_t> first_channel;    // as well
  int64_t bytes() const {
    int64_t floats = 0;
    for (const AlignedBuffer* buffer : {weight.get(), bias.get(), scale.get(), index.get()}) floats += buffer ? buffer->size() : 0;
    return floats * static_cast<int64_t>(sizeof(float));
  }
};
using PackedPtr = std::shared_ptr<const PackedWeights>;

// How `vectors` vectors of output channels are cut into panels: `preferred` wide, the rest as evenly as `max_rows` allows.
std::vector<int> split_vectors(int vectors, int preferred, const int* max_rows);

// The same in panels of at most `preferred` that differ little and alternate, so that threads which share them out get equal parts.
std::vector<int> spread_vectors(int vectors, int preferred, const int* max_rows);

// `panels` for each group: zero weights of `depth` rows per panel, and the bias.
std::shared_ptr<PackedWeights> make_panels(const StepSpec& spec, const std::vector<int>& panels, int lanes, int64_t depth);

PackedPtr pack_conv2d(const StepSpec& spec, const std::vector<int>& panels, int lanes);

// [tap][out], for one input channel.
PackedPtr pack_plane(const StepSpec& spec);

// [vector of channels][tap][channel of the group][lane], and which channels of the source those are, see DepthwiseJob; empty where
// each output channel has its own one.
PackedPtr pack_depthwise(const StepSpec& spec, int lanes);

// Whether the groups of each vector of output channels have their input channels within one vector of the source.
bool can_shuffle_groups(const StepSpec& spec, int lanes);

// With spatial > 1 the features of the source are ordered pixel by pixel (NHWC) while the weight's are channel by channel.
PackedPtr pack_linear(const StepSpec& spec, const std::vector<int>& panels, int64_t spatial, const cpu::KernelSet& kernels);

// Panels of `taps` times `channels` rows as such of pairs of bfloat16 numbers, each of two channels of one tap; the partner of an
// odd last one is zero. With the step's scale, if it has one.
PackedPtr pack_pairs(const PackedWeights& floats, const StepSpec& spec, int64_t taps, int64_t channels,
                     const cpu::KernelSet& kernels);

// For a Linear whose weight is read in place: panels without weights, to share out, and the bias.
PackedPtr pack_bias(const StepSpec& spec, const cpu::KernelSet& kernels);

// Packed weights of one native run, shared by its plans. Key: step, panel width (0 for weights in place), and the spatial extent
// behind a Linear's features or, for a convolution, which kernels read them.
using PackCache = std::map<std::tuple<size_t, int, int64_t>, PackedPtr>;

}  // namespace fastseq
