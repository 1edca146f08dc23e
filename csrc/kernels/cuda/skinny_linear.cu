#include "kernels/cuda/skinny_linear.cuh"

#include "kernels/cuda/launch.h"

namespace fastseq::cuda {
namespace {

// A block for `outputs` outputs; in y the rows, where there are more than one block's.
Grid grid_of(const ChainArgs& args, int outputs, int rows) {
  const int64_t tiles = tiles_of(args, rows), most = 65535;
  return {static_cast<unsigned>((args.layers[0].n + outputs - 1) / outputs), static_cast<unsigned>(tiles < most ? tiles : most)};
}

// fp32. With fewer outputs than kFewOutputs four of a block would leave most of a GPU without work.
template <int kRows>
struct Ffma {
  static constexpr int kFewOutputs = 1024;
  static constexpr int kOutputs = 4;
  template <bool kFinishes>  // which takes registers, and 16 rows have none to spare
  static constexpr int kPieces = kRows == 8 || (kRows == 16 && kFinishes) ? 1 : 2;
  static constexpr int kPiecesOfOne = kRows <= 2 ? 8 : kRows == 4 ? 4 : 2;
  static int64_t shared_bytes(const ChainArgs& args) {
    return args.count == 1 ? int64_t{kSkinnyWarps} * kOutputs * kRows * 4 : kNotForThisKernel;
  }
  template <bool kFinishes>
  static Error prepare_one(int shared_bytes) {
    const Error error = cuda::prepare(skinny_linear<kRows, kOutputs, kPieces<kFinishes>, kFinishes>, shared_bytes);
    return error ? error : cuda::prepare(skinny_linear<kRows, 1, kPiecesOfOne, kFinishes>, shared_bytes);
  }
  static Error prepare(int shared_bytes) {
    const Error error = prepare_one<false>(shared_bytes);
    return error ? error : prepare_one<true>(shared_bytes);
  }
  template <bool kFinishes>
  static Error launch_one(const ChainArgs& args, void* stream) {
    const int bytes = static_cast<int>(shared_bytes(args));
    return args.layers[0].n < kFewOutputs ? cuda::launch(skinny_linear<kRows, 1, kPiecesOfOne, kFinishes>, grid_of(args, 1, kRows),
                                                         kSkinnyThreads, bytes, stream, args)
                                          : cuda::launch(skinny_linear<kRows, kOutputs, kPieces<kFinishes>, kFinishes>,
                                                         grid_of(args, kOutputs, kRows), kSkinnyThreads, bytes, stream, args);
  }
  static Error launch(const ChainArgs& args, void* stream) {
    return args.layers[0].finish.is_used ? launch_one<true>(args, stream) : launch_one<false>(args, stream);
  }
  static constexpr ChainKernel row(const char* name) {
    return {name, ChainOp::kSkinnyLinear, Math::kIeee, kRows, 0, kSkinnyThreads, 75, shared_bytes, prepare, launch};
  }
};

template <Math kMath, int kRows>
struct Mma {
  static int64_t shared_bytes(const ChainArgs& args) {
    return args.count == 1 ? int64_t{kSkinnyWarps} * kSkinnyMmaOutputs * kRows * 4 : kNotForThisKernel;
  }
  static Error prepare(int shared_bytes) {
    const Error error = cuda::prepare(skinny_linear_mma<kMath, kRows, false>, shared_bytes);
    return error ? error : cuda::prepare(skinny_linear_mma<kMath, kRows, true>, shared_bytes);
  }
  static Error launch(const ChainArgs& args, void* stream) {
    const auto kernel =
        args.layers[0].finish.is_used ? skinny_linear_mma<kMath, kRows, true> : skinny_linear_mma<kMath, kRows, false>;
    return cuda::launch(kernel, grid_of(args, kSkinnyMmaOutputs, kRows), kSkinnyThreads, static_cast<int>(shared_bytes(args)),
                        stream, args);
  }
  static constexpr ChainKernel row(const char* name) {
    return {name,           ChainOp::kSkinnyLinear,         kMath,        kRows,   0,
            kSkinnyThreads, kMath == Math::kBF16 ? 80 : 75, shared_bytes, prepare, launch};
  }
};

const ChainKernel kRows[] = {
    Ffma<1>::row("skinny_linear_f32__ffma_1"),
    Ffma<2>::row("skinny_linear_f32__ffma_2"),
    Ffma<4>::row("skinny_linear_f32__ffma_4"),
    Ffma<8>::row("skinny_linear_f32__ffma_8"),
    Ffma<16>::row("skinny_linear_f32__ffma_16"),
    Mma<Math::kF16, 8>::row("skinny_linear_f16__mma_8"),
    Mma<Math::kF16, 16>::row("skinny_linear_f16__mma_16"),
    Mma<Math::kBF16, 8>::row("skinny_linear_bf16__mma_8"),
    Mma<Math::kBF16, 16>::row("skinny_linear_bf16__mma_16"),
};

}  // namespace

Table<ChainKernel> skinny_linear_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
