// fastseq-min-arch: 80
#include "kernels/cuda/fused_mlp_kernels.cuh"

namespace fastseq::cuda {

static const ChainKernel kRows[] = {
    Registers64<Math::kTf32>::row("fused_mlp_tf32__mma_registers_64"),
    RegistersOf64Rows<Math::kTf32, 128>::row("fused_mlp_tf32__mma_registers_128"),
    SharedVariant<SharedTile<Math::kTf32, 2, 4, 2, 8, 64>>::row("fused_mlp_tf32__mma_shared_256"),
    SharedVariant<SharedTile<Math::kTf32, 2, 8, 2, 8, 64>>::row("fused_mlp_tf32__mma_shared_512"),
};

Table<ChainKernel> fused_mlp_kernels_tf32() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
