// Kernels chosen by timing instead of by the cost model: for optimize(example_input=...).
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace fastseq {

// Times each convolution and Linear of a run alone, on synthetic values, on every kernel that it can run on, and says which is the
// fastest; layers that options.timings knows already are left out. batch, threads: as Plan::run takes them. Throws what Plan::build
// throws. With a forced kernel there is nothing to choose.
KernelTimings time_kernels(const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options, int64_t batch,
                           int threads);

}  // namespace fastseq
