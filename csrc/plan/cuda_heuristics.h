// Which CUDA kernel for which shape: every number that decides, in one place. The planner (cuda_plan.cpp) asks these questions and
// writes the answer into the report. They were derived from bandwidths and occupancy, not yet measured: CUDA has not run on
// hardware.
#pragma once

#include <cstdint>

#include "kernels/cuda/kernels.h"

namespace fastseq {

// Convolution. A large tile does the most arithmetic per byte loaded; a small one, whose warps split k, finishes sooner while there
// are fewer large tiles than multiprocessors.
constexpr bool is_enough_blocks(int64_t blocks, int multiprocessors) { return 4 * blocks >= 3 * multiprocessors; }
// Columns that a wide tile would compute for nothing cost more than its better reuse of rows gives.
constexpr bool prefers_narrow_tile(int64_t channels) { return (channels + 63) / 64 * 64 - channels >= 32; }
// Sums made per sum that is needed, when overlapping windows are pooled in a block: above this a pass of its own is cheaper.
constexpr double kMostRecomputation = 2.5;

// Handing over to cuDNN: long sums over many pixels, where its wgmma kernels reach what mma.sync cannot, and where the arithmetic
// hides a pass over the result. Eight channels are what its channels_last kernels want.
constexpr bool is_for_cudnn(int64_t terms, int64_t pixels, int64_t c_in, int64_t c_out) {
  return terms >= 1152 && pixels >= 4096 && c_in % 8 == 0 && c_out % 8 == 0;
}
// Handing over to cuBLAS: matrices large enough to be bound by arithmetic or by their weights, with more rows than a stream takes.
constexpr bool is_for_cublas(int64_t rows, int64_t n, int64_t k) { return rows > 16 && n >= 512 && k >= 512; }

// Linear chains in one launch. Each block of tiny_mlp reads all weights through L2, at about 50 GB/s: 256 KiB are 5 us, as long as
// the two launches that it saves.
constexpr int64_t kTinyWeightBytes = int64_t{256} << 10;
// With more rows than this the tensor cores, or register tiles, pay for staging weights.
constexpr int64_t most_tiny_rows(int multiprocessors) { return 16 * int64_t{multiprocessors}; }
// As few rows a block as keep every multiprocessor busy: latency first.
constexpr int64_t tiny_rows_of_a_block(int64_t rows, int multiprocessors) { return (rows + multiprocessors - 1) / multiprocessors; }
constexpr int64_t kWidestFused = 512;
// Below this a block of fused_mlp would leave most multiprocessors without work.
constexpr int64_t kFewestFusedRows = 1024;
// A stream of weights: up to 16 rows cost no more than reading the weights once.
constexpr int64_t kMostSkinnyRows = 16;
constexpr int64_t kSkinnyWeightBytes = int64_t{32} << 10;

// Elements of a slice of packed weights that are compared with the original at each call; all of them in tensors up to the size
// that the CPU engine reads whole, and in captured graphs, which nobody can tell of a change.
constexpr int kPackSamples = 16;
constexpr int64_t kExactPackBytes = int64_t{64} << 10;

}  // namespace fastseq
