// fastseq-min-arch: 75
#include "kernels/cuda/conv_pool_kernels.cuh"

namespace fastseq::cuda {

static const ConvKernel kRows[] = {FASTSEQ_CONV_ROWS(Math::kIeee, "conv2d_f32__ffma")};

Table<ConvKernel> conv_kernels_f32() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
