// fastseq-min-arch: 75
#include "kernels/cuda/tiny_mlp_kernels.cuh"

namespace fastseq::cuda {

static const ChainKernel kRows[] = {FASTSEQ_TINY_ROWS(Math::kF16, "tiny_mlp_f16__ffma")};

Table<ChainKernel> tiny_mlp_kernels_f16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
