#include "kernels/cuda/max_pool.cuh"

#include "kernels/cuda/launch.h"

namespace fastseq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;  // more work than that is a loop in each thread

template <typename Element>
bool can_use_vectors(const MaxPoolArgs& args) {
  constexpr int64_t count = Piece<Element>::kCount;
  const int64_t strides = args.src_image_stride | args.src_h_stride | args.src_w_stride | args.dst_image_stride |
                          args.dst_h_stride | args.dst_w_stride | args.channels;
  return args.src_c_stride == 1 && args.dst_c_stride == 1 && strides % count == 0 &&
         (reinterpret_cast<uintptr_t>(args.src) | reinterpret_cast<uintptr_t>(args.dst)) % 16 == 0;
}

template <typename Element>
Error prepare_max_pool() {
  Error error = prepare(max_pool<Element, true, false>, 0);
  if (!error) error = prepare(max_pool<Element, false, false>, 0);
  return error ? error : prepare(max_pool<Element, false, true>, 0);
}

template <typename Element>
Error launch_max_pool(const MaxPoolArgs& args, void* stream) {
  const bool is_vector = can_use_vectors<Element>(args) && !args.finish.is_used;
  const int64_t threads =
      static_cast<int64_t>(args.batch) * args.h_out * args.w_out * args.channels / (is_vector ? Piece<Element>::kCount : 1);
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  const Grid grid{static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks)};
  const auto run = [&](auto* kernel) { return launch(kernel, grid, kThreads, 0, stream, args); };
  if (args.finish.is_used) return run(max_pool<Element, false, true>);
  return is_vector ? run(max_pool<Element, true, false>) : run(max_pool<Element, false, false>);
}

const PoolKernel kRows[] = {
    {"maxpool2d_f32__cuda", Math::kIeee, prepare_max_pool<float>, launch_max_pool<float>},
    {"maxpool2d_f16__cuda", Math::kF16, prepare_max_pool<Half>, launch_max_pool<Half>},
    {"maxpool2d_bf16__cuda", Math::kBF16, prepare_max_pool<BFloat16>, launch_max_pool<BFloat16>},
};

}  // namespace

Table<PoolKernel> max_pool_kernels() { return {kRows, sizeof kRows / sizeof *kRows}; }

}  // namespace fastseq::cuda
