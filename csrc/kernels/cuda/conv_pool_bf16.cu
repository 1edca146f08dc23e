// fastseq-min-arch: 80
#include "kernels/cuda/conv_pool_kernels.cuh"

namespace fastseq::cuda {

static const ConvKernel kRows[] = {FASTSEQ_CONV_ROWS(Math::kBF16, "conv2d_bf16__mma")};

Table<ConvKernel> conv_kernels_bf16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
