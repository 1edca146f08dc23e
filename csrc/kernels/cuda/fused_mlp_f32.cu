#include "kernels/cuda/fused_mlp_kernels.cuh"

namespace fastseq::cuda {

//                                                 warps  tiles  bytes of k
static const ChainKernel kRows[] = {
    SharedVariant<SharedTile<Math::kIeee, 2, 2, 4, 4, 32>>::row("fused_mlp_f32__ffma_shared_64"),
    SharedVariant<SharedTile<Math::kIeee, 1, 4, 4, 4, 32>>::row("fused_mlp_f32__ffma_shared_128"),
    SharedVariant<SharedTile<Math::kIeee, 1, 8, 4, 4, 32>>::row("fused_mlp_f32__ffma_shared_256"),
    SharedVariant<SharedTile<Math::kIeee, 1, 8, 2, 8, 32>>::row("fused_mlp_f32__ffma_shared_512"),
};

Table<ChainKernel> fused_mlp_kernels_f32() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
