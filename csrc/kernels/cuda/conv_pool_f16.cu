// fastseq-min-arch: 75
#include "kernels/cuda/conv_pool_kernels.cuh"

namespace fastseq::cuda {

static const ConvKernel kRows[] = {FASTSEQ_CONV_ROWS(Math::kF16, "conv2d_f16__mma")};

Table<ConvKernel> conv_kernels_f16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
