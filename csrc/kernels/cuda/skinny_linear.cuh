// skinny_linear: one wide Linear layer for up to 16 rows, at the speed of memory: see ChainArgs in kernels.h (count is 1). More
// rows are done 16 (kRows) at a time, which reads the weights again.
//
// Idea. Every weight is used a few times only, so all that counts is how many bytes are on their way: at least four loads of 16
// bytes a lane, no shared memory between memory and the arithmetic. The 8 warps of a block split k and add up through shared
// memory, in a fixed order. The input is small and read through L1, once a block.
//   fp32: a block makes kOutputs outputs, a lane of a warp one piece of each. With few outputs a block makes one, so that more
//     blocks share the work; what is added in which order stays the same.
//   16-bit: a block makes 16 outputs on tensor cores, where the weight is the operand of 16 rows and the input that of 8. A lane
//     loads pieces of 8 k and multiplies their first and second half as the k of two mma: both operands are permuted alike, so no
//     exchange is needed. As memory-bound with 16 rows as with one.
// A BatchNorm or another activation than ReLU (kFinishes) is an instantiation of its own: it would take registers of the loops.
// Rows and outputs that do not exist read the last that does, and are not written.
//
// Order of summation of an output: depends on k alone, not on the rows nor on kRows.
// Source: matrix-vector kernels of llama.cpp (mmvf.cu) and GEMV kernels of FasterTransformer; the permuted k is Marlin's
// (IST-DASLab).
#pragma once

#include <type_traits>

#include "kernels/cuda/chain.cuh"

namespace fastseq::cuda {

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyThreads = 32 * kSkinnyWarps;

// Adds the sums of the warps pairwise, item by item, and writes the outputs. `sums` has kItems floats a warp; item i is output
// i / kRows of the block and row i % kRows.
template <typename Element, int kRows, int kItems, bool kFinishes>
FS_DEVICE void write_skinny(const ChainArgs& args, const float* sums, int first_n, int64_t first_row) {
  const int item = thread_index();
  if (item >= kItems) return;
  float all[kSkinnyWarps];
#pragma unroll
  for (int warp = 0; warp < kSkinnyWarps; ++warp) all[warp] = sums[warp * kItems + item];
#pragma unroll
  for (int apart = 1; apart < kSkinnyWarps; apart *= 2)
#pragma unroll
    for (int warp = 0; warp < kSkinnyWarps; warp += 2 * apart) all[warp] += all[warp + apart];
  const int n = first_n + item / kRows;
  const int64_t row = first_row + item % kRows;
  if (n >= args.layers[0].n || row >= args.rows) return;
  const ChainArgs::Layer& layer = args.layers[0];
  const float bias = bias_at<Element>(layer, n);
  float value = all[0] + bias;
  if constexpr (kFinishes) {
    value = finished<Element>(layer.finish, all[0], bias, n);
  } else {
    if (layer.has_relu) value = relu(value);
  }
  static_cast<Element*>(args.dst)[row * args.dst_row_stride + n] = from_float<Element>(value);
}

FS_DEVICE int last_of(int index, int count) { return index < count ? index : count - 1; }
FS_DEVICE int64_t last_of(int64_t index, int64_t count) { return index < count ? index : count - 1; }

// IEEE fp32 -----------------------------------------------------------------------------------------------------------------------

template <int kLoadBytes, int kRows, int kOutputs, int kPieces>
FS_DEVICE void multiply_skinny(const ChainArgs& args, int first_n, int64_t first_row, float (&sums)[kOutputs * kRows]) {
  const ChainArgs::Layer& layer = args.layers[0];
  using Offset = std::conditional_t<kLoadBytes == 16, int, int64_t>;  // of rows: 16 of 64 bits would take 32 registers
  const float* const src = static_cast<const float*>(args.src) + first_row * args.src_row_stride;
  const int rows = static_cast<int>(last_of(args.rows - first_row, int64_t{kRows + 1}));  // more than kRows is as good as kRows
  const float* const weight = static_cast<const float*>(layer.weight);
  constexpr int kApart = kSkinnyThreads * 4;  // pieces of a lane
  for (int first_k = thread_index() * 4; first_k < layer.k; first_k += kPieces * kApart) {
    Words w[kPieces][kOutputs];
#pragma unroll
    for (int u = 0; u < kPieces; ++u)
#pragma unroll
      for (int p = 0; p < kOutputs; ++p) {
        const int k = first_k + u * kApart;
        w[u][p] =
            load_piece<float, kLoadBytes>(weight + static_cast<int64_t>(last_of(first_n + p, layer.n)) * layer.k + k, layer.k - k);
      }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int k = first_k + u * kApart;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const Words x =
            load_piece<float, kLoadBytes>(src + last_of(row, rows) * static_cast<Offset>(args.src_row_stride) + k, layer.k - k);
#pragma unroll
        for (int p = 0; p < kOutputs; ++p)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sums[p * kRows + row] =
                fused_multiply_add(float_of_bits(w[u][p].words[i]), float_of_bits(x.words[i]), sums[p * kRows + row]);
      }
    }
  }
}

template <int kRows, int kOutputs, int kPieces, bool kFinishes>
FS_KERNEL(kSkinnyThreads, (kRows <= 8 ? 2 : 1))
skinny_linear(FS_ARGS ChainArgs args) {
  constexpr int kItems = kOutputs * kRows;
  using Sums = LaneSums<32, kItems>;
  const ChainArgs::Layer& layer = args.layers[0];
  const int first_n = static_cast<int>(blockIdx.x) * kOutputs;
  const bool has_pieces = load_bytes<float>(layer.weight, layer.k, layer.k) == 16 &&
                          load_bytes<float>(args.src, args.src_row_stride, layer.k) == 16 &&
                          args.src_row_stride <= (1 << 30) / kRows;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  for (int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows; first_row < args.rows;
       first_row += static_cast<int64_t>(gridDim.y) * kRows) {
    float sums[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums[i] = 0.0f;
    if (has_pieces) {
      multiply_skinny<16, kRows, kOutputs, kPieces>(args, first_n, first_row, sums);
    } else {
      multiply_skinny<4, kRows, kOutputs, kPieces>(args, first_n, first_row, sums);
    }
    const int lane = lane_index();
    Sums::add(sums, lane);
    if (Sums::is_keeper(lane)) {
#pragma unroll
      for (int i = 0; i < Sums::kKept; ++i) shared[warp_index() * kItems + Sums::first_item(lane) + i] = sums[i];
    }
    block_barrier();
    write_skinny<float, kRows, kItems, kFinishes>(args, shared, first_n, first_row);
    block_barrier();
  }
}

// 16 bits -------------------------------------------------------------------------------------------------------------------------

constexpr int kSkinnyMmaOutputs = 16;  // of a block

template <int kLoadBytes, Math kMath, int kRows>
FS_DEVICE void multiply_skinny_mma(const ChainArgs& args, int first_n, int64_t first_row, float (&sums)[kRows / 8][2][4]) {
  using Element = ElementOf<kMath>;
  constexpr int kPieces = 4;                 // of a row, lane and step: two for each 128 bytes of a row
  constexpr int kApart = kSkinnyWarps * 64;  // a warp's 64 k, and its next 64
  const ChainArgs::Layer& layer = args.layers[0];
  const int g = lane_index() / 4, t = lane_index() % 4;
  const Element* const weight = static_cast<const Element*>(layer.weight);
  const Element* const low = weight + static_cast<int64_t>(last_of(first_n + g, layer.n)) * layer.k;
  const Element* const high = weight + static_cast<int64_t>(last_of(first_n + g + 8, layer.n)) * layer.k;
  for (int warp_k = warp_index() * 64; warp_k < layer.k; warp_k += kPieces / 2 * kApart) {
    Words a[kPieces][2], b[kPieces][kRows / 8];
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int k = warp_k + u / 2 * kApart + u % 2 * 32 + 8 * t;
      a[u][0] = load_piece<Element, kLoadBytes>(low + k, layer.k - k);
      a[u][1] = load_piece<Element, kLoadBytes>(high + k, layer.k - k);
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
      const int k = warp_k + u / 2 * kApart + u % 2 * 32 + 8 * t;
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        const Element* const row =
            static_cast<const Element*>(args.src) + last_of(first_row + 8 * j + g, args.rows) * args.src_row_stride;
        b[u][j] = load_piece<Element, kLoadBytes>(row + k, layer.k - k);
      }
    }
#pragma unroll
    for (int u = 0; u < kPieces; ++u)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a_half[4] = {a[u][0].words[2 * half], a[u][1].words[2 * half], a[u][0].words[2 * half + 1],
                                    a[u][1].words[2 * half + 1]};
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const uint32_t b_half[2] = {b[u][j].words[2 * half], b[u][j].words[2 * half + 1]};
          multiply_add<kMath>(sums[j][half], a_half, b_half);
        }
      }
  }
}

template <Math kMath, int kRows, bool kFinishes>
FS_KERNEL(kSkinnyThreads, 2)
skinny_linear_mma(FS_ARGS ChainArgs args) {
  using Element = ElementOf<kMath>;
  constexpr int kItems = kSkinnyMmaOutputs * kRows;
  const ChainArgs::Layer& layer = args.layers[0];
  const int first_n = static_cast<int>(blockIdx.x) * kSkinnyMmaOutputs;
  const int weight_unit = load_bytes<Element>(layer.weight, layer.k, layer.k);
  const int src_unit = load_bytes<Element>(args.src, args.src_row_stride, layer.k);
  const int unit = weight_unit < src_unit ? weight_unit : src_unit;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  for (int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows; first_row < args.rows;
       first_row += static_cast<int64_t>(gridDim.y) * kRows) {
    float sums[kRows / 8][2][4];  // of the first and the second halves of pieces
#pragma unroll
    for (int i = 0; i < kRows; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
    if (unit == 16) {
      multiply_skinny_mma<16, kMath, kRows>(args, first_n, first_row, sums);
    } else if (unit == 4) {
      multiply_skinny_mma<4, kMath, kRows>(args, first_n, first_row, sums);
    } else {
      multiply_skinny_mma<2, kMath, kRows>(args, first_n, first_row, sums);
    }
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = g + i / 2 * 8, row = 8 * j + 2 * t + i % 2;
        shared[warp_index() * kItems + output * kRows + row] = sums[j][0][i] + sums[j][1][i];
      }
    block_barrier();
    write_skinny<Element, kRows, kItems, kFinishes>(args, shared, first_n, first_row);
    block_barrier();
  }
}

}  // namespace fastseq::cuda
