// Linear on a weight that is read where it lies: see kernels/cpu/in_place.inl.h.
#pragma once

#include <cstdint>

#include "plan/memory.h"
#include "plan/plan.h"

namespace fastseq {

// `rows` rows of the source through panels [first, last) of a step that packs no weight; `weight` is (n, k), contiguous.
void run_in_place(const cpu::KernelSet& kernels, const LinearStep& step, const float* weight, const float* src, float* dst,
                  int64_t rows, size_t first, size_t last, BufferPool& pool);

}  // namespace fastseq
