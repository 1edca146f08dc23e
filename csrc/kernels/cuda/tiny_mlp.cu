// The table of tiny_mlp; the kernels are in tiny_mlp_*.cu.
#include "kernels/cuda/chain_tables.h"
#include "kernels/cuda/tiny_mlp_kernels.cuh"

namespace fastseq::cuda {

Table<ChainKernel> tiny_mlp_kernels() {
  static const std::vector<ChainKernel> rows =
      join_tables({tiny_mlp_kernels_f32(), tiny_mlp_kernels_f16(), tiny_mlp_kernels_bf16()});
  return table_of(rows);
}

}  // namespace fastseq::cuda
