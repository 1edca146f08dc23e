#include "kernels/cuda/pack.cuh"

#include "kernels/cuda/launch.h"

namespace fastseq::cuda {
namespace {

FS_KERNEL(256, 1)
pack(FS_ARGS PackArgs args) { pack_block(args, static_cast<int>(blockIdx.x)); }

}  // namespace

Error pack_weights(const PackArgs& args, void* stream) {
  return launch(pack, Grid{static_cast<unsigned>(pack_slices(args))}, 256, 128, stream, args);
}

}  // namespace fastseq::cuda
