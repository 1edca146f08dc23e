// Launchers and table rows of fused_mlp, for the .cu files, one for each kind of arithmetic.
#pragma once

#include "kernels/cuda/fused_mlp.cuh"
#include "kernels/cuda/launch.h"

namespace fastseq::cuda {

// Blocks of the kernels in registers take tile after tile, so that weights stay and the next rows are on their way. 12 for each of
// 132 multiprocessors: whole rounds whether 1, 2 or 3 of them run at a time, and rounds enough for other GPUs.
constexpr int64_t kMostRegisterBlocks = 1584;
// With fewer large tiles than this a large GPU is not full, and small tiles are faster. Both give the same bits.
constexpr int64_t kFewTiles = 128;

template <typename Large, typename Small>
struct RegisterVariant {
  static constexpr Math kMath = Large::kMath;

  template <typename Tile>
  static int64_t bytes_of(const ChainArgs& args) {
    return register_layout<Tile>(args).bytes();
  }
  static int64_t shared_bytes(const ChainArgs& args) {
    if (widest(args) > Large::kWidth) return kNotForThisKernel;
    const int64_t large = bytes_of<Large>(args), small = bytes_of<Small>(args);
    return large > small ? large : small;
  }
  static Error prepare(int shared_bytes) {
    const Error error = cuda::prepare(fused_mlp_registers<Large>, shared_bytes);
    return error ? error : cuda::prepare(fused_mlp_registers<Small>, shared_bytes);
  }
  template <typename Tile>
  static Error launch_tile(const ChainArgs& args, void* stream) {
    const int64_t tiles = tiles_of(args, Tile::kRows);
    return cuda::launch(fused_mlp_registers<Tile>,
                        Grid{static_cast<unsigned>(tiles < kMostRegisterBlocks ? tiles : kMostRegisterBlocks)}, Tile::kThreads,
                        static_cast<int>(bytes_of<Tile>(args)), stream, args);
  }
  static Error launch(const ChainArgs& args, void* stream) {
    return tiles_of(args, Large::kRows) < kFewTiles ? launch_tile<Small>(args, stream) : launch_tile<Large>(args, stream);
  }
  static constexpr ChainKernel row(const char* name) {
    return {name,
            ChainOp::kFusedMlp,
            kMath,
            Large::kRows,
            Large::kWidth,
            Large::kThreads,
            kMath == Math::kF16 ? 75 : 80,
            shared_bytes,
            prepare,
            launch};
  }
};

template <typename Tile>
struct SharedVariant {
  static int64_t shared_bytes(const ChainArgs& args) {
    return widest(args) > Tile::kWidth ? kNotForThisKernel : shared_layout<Tile>(args).bytes();
  }
  static Error prepare(int shared_bytes) { return cuda::prepare(fused_mlp_shared<Tile>, shared_bytes); }
  static Error launch(const ChainArgs& args, void* stream) {
    return cuda::launch(fused_mlp_shared<Tile>, grid_of_tiles(tiles_of(args, Tile::kRows)), Tile::kThreads,
                        static_cast<int>(shared_bytes(args)), stream, args);
  }
  static constexpr ChainKernel row(const char* name) {
    constexpr int arch = Tile::kMath == Math::kTf32 || Tile::kMath == Math::kBF16 ? 80 : 75;
    return {name, ChainOp::kFusedMlp, Tile::kMath, Tile::kRows, Tile::kWidth, Tile::kThreads, arch, shared_bytes, prepare, launch};
  }
};

// Width, m16 tiles of a warp, threads of a block: as many as registers and 99 KiB of shared memory, which most GPUs have, allow.
template <Math math>
using Registers64 = RegisterVariant<RegisterTile<math, 64, 2, 128>, RegisterTile<math, 64, 1, 128>>;
template <Math math>
using Registers128 = RegisterVariant<RegisterTile<math, 128, 2, 256>, RegisterTile<math, 128, 1, 128>>;
template <Math math, int width>
using RegistersOf64Rows = RegisterVariant<RegisterTile<math, width, 1, 128>, RegisterTile<math, width, 1, 128>>;

// The rows of each file.
Table<ChainKernel> fused_mlp_kernels_f32();
Table<ChainKernel> fused_mlp_kernels_tf32();
Table<ChainKernel> fused_mlp_kernels_f16();
Table<ChainKernel> fused_mlp_kernels_bf16();

}  // namespace fastseq::cuda
