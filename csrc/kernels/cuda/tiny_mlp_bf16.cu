// fastseq-min-arch: 80
#include "kernels/cuda/tiny_mlp_kernels.cuh"

namespace fastseq::cuda {

static const ChainKernel kRows[] = {FASTSEQ_TINY_ROWS(Math::kBF16, "tiny_mlp_bf16__ffma")};

Table<ChainKernel> tiny_mlp_kernels_bf16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
