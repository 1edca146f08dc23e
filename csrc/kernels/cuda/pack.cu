#include "kernels/cuda/pack.cuh"

#include "kernels/cuda/launch.h"

namespace fastseq::cuda {
namespace {

FS_KERNEL(256, 1)
pack(FS_ARGS PackArgs args) { pack_block(args, static_cast<int>(blockIdx.x)); }

}  // namespace

constexpr int kSharedBytes = 128;  // for the votes of up to 32 warps

Error prepare_pack_weights() { return prepare(pack, kSharedBytes); }

Error pack_weights(const PackArgs& args, void* stream) {
  return launch(pack, Grid{static_cast<unsigned>(pack_slices(args))}, 256, kSharedBytes, stream, args);
}

}  // namespace fastseq::cuda
