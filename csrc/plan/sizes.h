// The sizes of the maps between the steps of a run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/spec.h"

namespace fastseq {

struct MapSize {
  int64_t channels = 0, h = 0, w = 0;
};

struct StepSizes {
  std::vector<MapSize> maps;   // before each step and after the last
  std::vector<MapSize> convs;  // between a convolution and its pool
};

// Of the first `count` steps, which are spatial. Throws Refusal where eager would raise.
StepSizes infer_sizes(const InputSpec& input, const std::vector<StepSpec>& steps, size_t count);

// How many of the steps from `first` on are one plan's: up to the next one for which rows become maps.
size_t own_steps(const std::vector<StepSpec>& steps, size_t first);

// The maps that rows become before `step`. Throws Refusal where they have another number of features.
InputSpec unflatten(const OutputSpec& rows, const StepSpec& step, Storage storage);

// Whether a step's pool, where it has one, comes before its activation: because it is so or because nobody can tell. A
// convolution's results can then be pooled in registers.
bool pools_first(const StepSpec& step);

// What the speed of a convolution or Linear depends on, in words: equal keys, equal layers. `src` is the map that the step reads,
// nothing for Linear.
std::string layer_key(const std::string& isa, const StepSpec& step, const MapSize& src);

}  // namespace fastseq
