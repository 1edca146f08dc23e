// For test_planted_faults.py: a few rows of each family, compiled from a copy of the kernels in which faults are planted, each
// behind `fault == i`, which fastseq_plant() sets.
namespace fastseq::cuda {
static int fault = 0;
}

#include "kernels/cuda/conv_pool_kernels.cuh"
#include "kernels/cuda/fused_mlp_kernels.cuh"
#include "kernels/cuda/skinny_linear.cuh"
#include "kernels/cuda/tiny_mlp_kernels.cuh"

namespace fastseq::cuda {
namespace {

// tf32 has fragments of its own; gather and vector kernels, and warps that share a tile or do not, other loads and barriers.
const ConvKernel kConvF16[] = {conv_row<ConvTile128x32<Math::kF16, true>>("conv2d_f16__mma_128x32_vector"),
                               conv_row<ConvTile32x32<Math::kF16, false>>("conv2d_f16__mma_32x32_gather")};
const ConvKernel kConvTf32[] = {conv_row<ConvTile32x32<Math::kTf32, true>>("conv2d_tf32__mma_32x32_vector")};

const ChainKernel kTiny[] = {TinyVariant<Math::kF16, 2>::row("tiny_mlp_f16__ffma_2")};
const ChainKernel kFused[] = {
    RegistersOf64Rows<Math::kF16, 64>::row("fused_mlp_f16__mma_registers_64"),
    RegistersOf64Rows<Math::kTf32, 64>::row("fused_mlp_tf32__mma_registers_64"),
    SharedVariant<SharedTile<Math::kF16, 2, 4, 1, 4, 64>>::row("fused_mlp_f16__mma_shared_128"),
};

// Blocks that take more rows than one at a time, as they do of very many.
template <void (*kernel)(ChainArgs), void (*finishing)(ChainArgs), int outputs>
Error launch_skinny(const ChainArgs& args, void* stream) {
  const Grid grid{static_cast<unsigned>((args.layers[0].n + outputs - 1) / outputs)};
  return launch(args.layers[0].finish.is_used ? finishing : kernel, grid, kSkinnyThreads, 16 << 10, stream, args);
}
int64_t skinny_bytes(const ChainArgs&) { return 16 << 10; }
Error prepare_nothing(int) { return nullptr; }
const ChainKernel kSkinny[] = {
    {"skinny_linear_f16__mma_8", ChainOp::kSkinnyLinear, Math::kF16, 8, 0, kSkinnyThreads, 75, skinny_bytes, prepare_nothing,
     launch_skinny<skinny_linear_mma<Math::kF16, 8, false>, skinny_linear_mma<Math::kF16, 8, true>, kSkinnyMmaOutputs>},
    {"skinny_linear_f32__ffma_2", ChainOp::kSkinnyLinear, Math::kIeee, 2, 0, kSkinnyThreads, 75, skinny_bytes, prepare_nothing,
     launch_skinny<skinny_linear<2, 4, 2, false>, skinny_linear<2, 4, 2, true>, 4>}};

template <typename T, int count>
Table<T> table(const T (&rows)[count]) {
  return {rows, count};
}

FS_KERNEL(256, 1) pack(FS_ARGS PackArgs args) { pack_block(args, static_cast<int>(blockIdx.x)); }

}  // namespace

Table<ConvKernel> conv_kernels_f32() { return {nullptr, 0}; }
Table<ConvKernel> conv_kernels_tf32() { return table(kConvTf32); }
Table<ConvKernel> conv_kernels_f16() { return table(kConvF16); }
Table<ConvKernel> conv_kernels_bf16() { return {nullptr, 0}; }
Table<PoolKernel> max_pool_kernels() { return {nullptr, 0}; }
Table<ChainKernel> tiny_mlp_kernels() { return table(kTiny); }
Table<ChainKernel> fused_mlp_kernels() { return table(kFused); }
Table<ChainKernel> skinny_linear_kernels() { return table(kSkinny); }
Error prepare_pack_weights() { return nullptr; }
Error pack_weights(const PackArgs& args, void* stream) {
  return launch(pack, Grid{static_cast<unsigned>(pack_slices(args))}, 256, 128, stream, args);
}

}  // namespace fastseq::cuda

#include "conv_harness.cpp"

extern "C" void fastseq_plant(int fault) { fastseq::cuda::fault = fault; }

// As linear_harness.cpp has it.
namespace {

const ChainKernel& chain_row(int row) {
  for (const Table<ChainKernel>& table : {tiny_mlp_kernels(), fused_mlp_kernels(), skinny_linear_kernels()}) {
    if (row < table.count) return table.rows[row];
    row -= table.count;
  }
  std::abort();
}

}  // namespace

extern "C" Error fastseq_linear_launch(int row, const ChainArgs* args) {
  const ChainKernel& kernel = chain_row(row);
  const Error error = kernel.prepare(static_cast<int>(kernel.shared_bytes(*args)));
  return error ? error : kernel.launch(*args, nullptr);
}

// fused_mlp in registers with so few blocks that each does several tiles.
extern "C" Error fastseq_linear_launch_registers(int math, const ChainArgs* args, int blocks) {
  const auto run = [&](auto* tile) {
    using Tile = std::remove_reference_t<decltype(*tile)>;
    const int bytes = register_layout<Tile>(*args).bytes();
    const Error error = prepare(fused_mlp_registers<Tile>, bytes);
    return error ? error
                 : launch(fused_mlp_registers<Tile>, Grid{static_cast<unsigned>(blocks)}, Tile::kThreads, bytes, nullptr, *args);
  };
  if (static_cast<Math>(math) == Math::kTf32) return run(static_cast<RegisterTile<Math::kTf32, 64, 1, 128>*>(nullptr));
  return run(static_cast<RegisterTile<Math::kF16, 64, 1, 128>*>(nullptr));
}
