// Spatial steps that are no convolution: each makes rows of its output from rows of its input. A new one is an Op, an entry in the
// table of maps.cpp, a kernel, and the reading of its numbers in bindings/from_python.cpp.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "plan/plan.h"
#include "plan/sizes.h"
#include "plan/spec.h"

namespace fastseq {

struct MapOp {
  Op op;
  const char* kernel;  // the name before the instruction set, whole where it has none
  // The size of its output. Refusal where eager would raise.
  MapSize (*size)(const StepSpec& spec, const MapSize& src);
  // Fills in what `rows` reads of a step, for maps of these sizes. Refusal as above.
  void (*prepare)(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set, SpatialStep& step);
  MapRows rows;
  bool keeps_values = false;  // each of its results is one of the values that it reads
};

// Whether eager's result is contiguous whatever the memory format of its input.
bool gives_contiguous(const StepSpec& step);

// What the step does behind its convolution, or instead of one: null for a convolution without a pool and for Linear.
const MapOp* map_op(const StepSpec& step);

}  // namespace fastseq
