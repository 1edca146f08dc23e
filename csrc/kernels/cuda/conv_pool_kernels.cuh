// The instantiations of conv_pool for one kind of arithmetic. Best first: the planner takes the first row that suits a shape.
#pragma once

#include "kernels/cuda/conv_pool.cuh"
#include "kernels/cuda/launch.h"

namespace fastseq::cuda {

template <typename Tile>
Error prepare_conv_pool() {
  return prepare(conv_pool<Tile>, Tile::kSharedBytes);
}

template <typename Tile>
Error launch_conv_pool(const ConvPoolArgs& args, void* stream) {
  const unsigned blocks = static_cast<unsigned>(conv_pool_blocks<Tile>(args) + pack_slices(args.pack));
  return launch(conv_pool<Tile>, Grid{blocks}, Tile::kThreads, Tile::kSharedBytes, stream, args);
}

template <typename Tile>
constexpr ConvKernel conv_row(const char* name) {
  constexpr int arch = Tile::kMath == Math::kTf32 || Tile::kMath == Math::kBF16 ? 80 : 75;
  return {name,
          Tile::kMath,
          Tile::kIsVector,
          Tile::kTileM,
          Tile::kTileN,
          Tile::kThreads,
          Tile::kSharedBytes,
          arch,
          prepare_conv_pool<Tile>,
          launch_conv_pool<Tile>};
}

//                                                          tile     warps    k bytes, stages
template <Math math, bool is_vector>
using ConvTile128x64 = ConvTile<math, is_vector, 128, 64, 4, 2, 1, 64, 4>;
template <Math math, bool is_vector>
using ConvTile128x32 = ConvTile<math, is_vector, 128, 32, 4, 1, 1, 64, 4>;
template <Math math, bool is_vector>
using ConvTile32x32 = ConvTile<math, is_vector, 32, 32, 1, 1, 8, 256, 3>;

#define FASTSEQ_CONV_ROWS(math, prefix)                                                                                            \
  conv_row<ConvTile128x64<math, true>>(prefix "_128x64_vector"), conv_row<ConvTile128x32<math, true>>(prefix "_128x32_vector"),    \
      conv_row<ConvTile32x32<math, true>>(prefix "_32x32_vector"), conv_row<ConvTile128x64<math, false>>(prefix "_128x64_gather"), \
      conv_row<ConvTile128x32<math, false>>(prefix "_128x32_gather"), conv_row<ConvTile32x32<math, false>>(prefix "_32x32_gather")

}  // namespace fastseq::cuda
