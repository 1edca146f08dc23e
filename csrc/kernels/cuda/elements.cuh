// The element type that a kind of arithmetic reads and writes.
#pragma once

#include <type_traits>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

template <Math kMath>
using ElementOf = std::conditional_t<kMath == Math::kF16, Half, std::conditional_t<kMath == Math::kBF16, BFloat16, float>>;

}  // namespace fastseq::cuda
