// Launchers and table rows of tiny_mlp, for the .cu files, one for each type of elements.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/cuda/tiny_mlp.cuh"

namespace fastseq::cuda {

template <Math kMath, int kRows>
struct TinyVariant {
  using Element = ElementOf<kMath>;

  static int64_t shared_bytes(const ChainArgs& args) {
    const int64_t floats =
        static_cast<int64_t>(tiny_row_stride(args, 0, sizeof(Element))) + tiny_row_stride(args, 1, sizeof(Element));
    return floats * kRows * 4;
  }
  static Error prepare(int shared_bytes) { return cuda::prepare(tiny_mlp<Element, kRows>, shared_bytes); }
  static Error launch(const ChainArgs& args, void* stream) {
    return cuda::launch(tiny_mlp<Element, kRows>, grid_of_tiles(tiles_of(args, kRows)), kTinyThreads,
                        static_cast<int>(shared_bytes(args)), stream, args);
  }
  static constexpr ChainKernel row(const char* name) {
    return {name, ChainOp::kTinyMlp, kMath, kRows, 0, kTinyThreads, kMath == Math::kBF16 ? 80 : 75, shared_bytes, prepare, launch};
  }
};

#define FASTSEQ_TINY_ROWS(math, prefix)                                                                                   \
  TinyVariant<math, 1>::row(prefix "_1"), TinyVariant<math, 2>::row(prefix "_2"), TinyVariant<math, 4>::row(prefix "_4"), \
      TinyVariant<math, 8>::row(prefix "_8")

// The rows of each file.
Table<ChainKernel> tiny_mlp_kernels_f32();
Table<ChainKernel> tiny_mlp_kernels_f16();
Table<ChainKernel> tiny_mlp_kernels_bf16();

}  // namespace fastseq::cuda
