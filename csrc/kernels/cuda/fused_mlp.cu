// The table of fused_mlp; the kernels are in fused_mlp_*.cu.
#include "kernels/cuda/chain_tables.h"
#include "kernels/cuda/fused_mlp_kernels.cuh"

namespace fastseq::cuda {

Table<ChainKernel> fused_mlp_kernels() {
  static const std::vector<ChainKernel> rows =
      join_tables({fused_mlp_kernels_f32(), fused_mlp_kernels_tf32(), fused_mlp_kernels_f16(), fused_mlp_kernels_bf16()});
  return table_of(rows);
}

}  // namespace fastseq::cuda
