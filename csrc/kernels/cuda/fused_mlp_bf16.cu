// fastseq-min-arch: 80
#include "kernels/cuda/fused_mlp_kernels.cuh"

namespace fastseq::cuda {

static const ChainKernel kRows[] = {
    Registers64<Math::kBF16>::row("fused_mlp_bf16__mma_registers_64"),
    Registers128<Math::kBF16>::row("fused_mlp_bf16__mma_registers_128"),
    RegistersOf64Rows<Math::kBF16, 256>::row("fused_mlp_bf16__mma_registers_256"),
    SharedVariant<SharedTile<Math::kBF16, 2, 8, 2, 8, 64>>::row("fused_mlp_bf16__mma_shared_512"),
};

Table<ChainKernel> fused_mlp_kernels_bf16() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
