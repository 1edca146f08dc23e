// fastseq-min-arch: 80
#include "kernels/cuda/conv_pool_kernels.cuh"

namespace fastseq::cuda {

static const ConvKernel kRows[] = {FASTSEQ_CONV_ROWS(Math::kTf32, "conv2d_tf32__mma")};

Table<ConvKernel> conv_kernels_tf32() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
