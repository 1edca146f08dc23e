// fastseq-min-arch: 75
#include "kernels/cuda/fused_mlp_kernels.cuh"

namespace fastseq::cuda {

static const ChainKernel kRows[] = {
    Registers64<Math::kF16>::row("fused_mlp_f16__mma_registers_64"),
    Registers128<Math::kF16>::row("fused_mlp_f16__mma_registers_128"),
    RegistersOf64Rows<Math::kF16, 256>::row("fused_mlp_f16__mma_registers_256"),
    SharedVariant<SharedTile<Math::kF16, 2, 8, 2, 8, 64>>::row("fused_mlp_f16__mma_shared_512"),
};

Table<ChainKernel> fused_mlp_kernels_f16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
