// conv_pool: dst = pool(relu(bias + conv(src, weight))), an implicit GEMM whose rows are the sums of output pixels, whose columns
// are output channels, and whose epilogue pools: see ConvPoolArgs in kernels.h.
//
// Rows. With 2x2 windows of stride 2 the rows are numbered window by window so that a window's four sums land in one thread:
// row r of a 32-row group is element (r / 8) of window (r % 8), and the accumulators of two m16 tiles hold rows g, g+8, g+16, g+24.
// Other windows: a block makes all sums of a tile of pooled outputs, halo included, and pools them through shared memory. Sums that
// no window reads are not made in the first case, and are -inf to the pool in the second.
//
// Loads. A stage of the pipeline holds kStepBytes of k for each row of both operands. Vector kernels copy 16 bytes along the
// channels of one tap. Gather kernels take single elements of any strides through a table from k to (offset, tap), made one step
// ahead. Rows are kStepBytes + 16 bytes apart: eight of them touch different banks, for ldmatrix and for 16-byte loads alike.
//
// Arithmetic. All kinds keep their accumulators where mma.m16n8 does, so there is one epilogue. Warps may share a tile and split k
// (kWarpsK): their sums are added in warp order. Accumulates in fp32, k ascending within a warp; bias, pool and ReLU, or what else
// finishes a layer, in fp32, one rounding at the end. NaN and infinities as torch: a zero that pads k meets a zero, never a weight.
//
// Epilogues with a BatchNorm or another activation (Finish) take all sums through shared memory, where calls work on them when the
// accumulators are gone: so there is no instantiation for them, and the kernel has the registers that it has without.
//
// Sources: implicit GEMM, Chetlur et al., cuDNN (arXiv:1410.0759); fragment layouts, PTX ISA 8.x, "Matrix Fragments for mma".
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/finish.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

template <Math math, bool is_vector, int tile_m, int tile_n, int warps_m, int warps_n, int warps_k, int step_bytes, int stages>
struct ConvTile {
  static constexpr Math kMath = math;
  static constexpr bool kIsVector = is_vector;
  static constexpr int kTileM = tile_m, kTileN = tile_n;
  static constexpr int kWarpsM = warps_m, kWarpsN = warps_n, kWarpsK = warps_k;
  static constexpr int kStepBytes = step_bytes, kStages = stages;

  using Element = ElementOf<math>;
  static constexpr int kElementBytes = sizeof(Element);
  static constexpr int kStep = kStepBytes / kElementBytes;  // elements of k in a stage
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
  static constexpr int kRowStride = kStepBytes + 16;
  static constexpr int kStageBytes = (kTileM + kTileN) * kRowStride;
  static constexpr int kTableBytes = kIsVector ? 0 : 2 * kStep * 16;
  static constexpr int kMT = kTileM / kWarpsM / 16;  // m16 tiles of a warp
  static constexpr int kNT = kTileN / kWarpsN / 8;   // n8 tiles of a warp
  static constexpr int kSumStride = kTileN + 4;      // of sums on their way to a pool, in floats
  static constexpr int kEpilogueBytes = kTileM * kSumStride * 4;
  static constexpr int kReductionBytes = (kWarpsK - 1) * kTileM * kTileN * 4;

  static constexpr int max_of(int a, int b) { return a > b ? a : b; }
  static constexpr int kSharedBytes = max_of(kStages * kStageBytes + kTableBytes, max_of(kEpilogueBytes, kReductionBytes));

  static_assert(kTileM % (32 * kWarpsM) == 0, "a warp holds whole groups of 8 windows");
  static_assert(kTileN % (16 * kWarpsN) == 0, "ldmatrix.x4 loads two n8 tiles");
  static_assert(kStepBytes % (32 * kWarpsK) == 0, "an mma takes 32 bytes of k");
  static_assert(kThreads % kTileN == 0, "a thread finishes sums of one channel");
  static_assert(kStages >= 2 && kSharedBytes <= 64 * 1024, "Turing has 64 KiB");
};

// Where things are -------------------------------------------------------------------------------------------------------------

// A pixel of the convolution (before pooling) or of the output.
struct Pixel {
  int image = 0, y = 0, x = 0;
  bool is_valid = false;
};

FS_DEVICE Pixel pixel_of(const ConvPoolArgs& args, int64_t index) {
  Pixel pixel;
  const int plane = args.h_out * args.w_out;
  pixel.image = static_cast<int>(index / plane);
  const int rest = static_cast<int>(index % plane);
  pixel.y = rest / args.w_out;
  pixel.x = rest % args.w_out;
  pixel.is_valid = pixel.image < args.batch;
  return pixel;
}

// The tile of pooled outputs that a block makes where windows go through shared memory.
struct PoolTile {
  int image, y, x;   // its first output
  int sum_y, sum_x;  // its first sum, which may lie in the pool's padding
  int sums_w, sums;  // a row of sums, and all of them
};

FS_DEVICE PoolTile pool_tile(const ConvPoolArgs& args, int tile) {
  const int across = (args.w_out + args.tile_w - 1) / args.tile_w;
  const int down = (args.h_out + args.tile_h - 1) / args.tile_h;
  PoolTile result;
  result.image = tile / (across * down);
  const int rest = tile % (across * down);
  result.y = rest / across * args.tile_h;
  result.x = rest % across * args.tile_w;
  result.sum_y = result.y * args.pool_stride_h - args.pool_top;
  result.sum_x = result.x * args.pool_stride_w - args.pool_left;
  result.sums_w = (args.tile_w - 1) * args.pool_stride_w + args.pool_w;
  result.sums = ((args.tile_h - 1) * args.pool_stride_h + args.pool_h) * result.sums_w;
  return result;
}

// Which sum row `row` of tile `tile` is.
template <typename Tile>
FS_DEVICE Pixel sum_of_row(const ConvPoolArgs& args, int tile, int row) {
  if (args.pool_mode == PoolMode::kNone) return pixel_of(args, static_cast<int64_t>(tile) * Tile::kTileM + row);
  if (args.pool_mode == PoolMode::kRegisters) {
    const int window = row / 32 * 8 + row % 8, element = row % 32 / 8;
    Pixel pixel = pixel_of(args, static_cast<int64_t>(tile) * (Tile::kTileM / 4) + window);
    pixel.y = 2 * pixel.y + element / 2;
    pixel.x = 2 * pixel.x + element % 2;
    return pixel;
  }
  const PoolTile pool = pool_tile(args, tile);
  Pixel pixel;
  pixel.image = pool.image;
  pixel.y = pool.sum_y + row / pool.sums_w;
  pixel.x = pool.sum_x + row % pool.sums_w;
  pixel.is_valid = row < pool.sums && static_cast<unsigned>(pixel.y) < static_cast<unsigned>(args.conv_h) &&
                   static_cast<unsigned>(pixel.x) < static_cast<unsigned>(args.conv_w);
  return pixel;
}

// A sum's first tap in the source. Rows without a sum lie so far outside that every tap is padding.
struct Tap {
  int64_t offset = 0;
  int y = -(1 << 29), x = 0;
};

template <typename Tile>
FS_DEVICE Tap first_tap(const ConvPoolArgs& args, int tile, int row) {
  const Pixel pixel = sum_of_row<Tile>(args, tile, row);
  Tap tap;
  if (!pixel.is_valid) return tap;
  tap.y = pixel.y * args.stride_h - args.pad_top;
  tap.x = pixel.x * args.stride_w - args.pad_left;
  tap.offset = pixel.image * args.src_image_stride + tap.y * args.src_h_stride + tap.x * args.src_w_stride;
  return tap;
}

FS_DEVICE bool is_inside(const ConvPoolArgs& args, int y, int x) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(args.h_in) && static_cast<unsigned>(x) < static_cast<unsigned>(args.w_in);
}

// Loads ------------------------------------------------------------------------------------------------------------------------

// 16 bytes along the channels of one tap. begin() is called for step 0, 1, 2, ... in order.
template <typename Tile>
struct VectorLoader {
  using Element = typename Tile::Element;
  static constexpr int kPieces = Tile::kStepBytes / 16;  // of a row and step
  static constexpr int kRows = Tile::kThreads / kPieces;
  static constexpr int kPassesM = Tile::kTileM / kRows, kPassesN = Tile::kTileN / kRows;
  static constexpr int kElements = 16 / Tile::kElementBytes;
  static_assert(Tile::kTileM % kRows == 0 && Tile::kTileN % kRows == 0, "each thread loads the same number of pieces");

  const ConvPoolArgs& args;
  unsigned char* const stages;
  const int piece, row, first_n;
  Tap taps[kPassesM];
  int c, ky = 0, kx = 0, k;

  FS_DEVICE VectorLoader(const ConvPoolArgs& a, unsigned char* memory, int tile, int n)
      : args(a),
        stages(memory),
        piece(static_cast<int>(threadIdx.x) % kPieces),
        row(static_cast<int>(threadIdx.x) / kPieces),
        first_n(n),
        c(piece * kElements),
        k(piece * kElements) {
#pragma unroll
    for (int i = 0; i < kPassesM; ++i) taps[i] = first_tap<Tile>(args, tile, row + i * kRows);
    carry();
  }

  FS_DEVICE int length() const { return args.k_h * args.k_w * args.c_pitch; }

  FS_DEVICE void carry() {
    while (c >= args.c_pitch) {
      c -= args.c_pitch;
      if (++kx == args.k_w) kx = 0, ++ky;
    }
  }

  FS_DEVICE void prepare(int) {}

  FS_DEVICE void begin(int step) {
    unsigned char* const stage = stages + step % Tile::kStages * Tile::kStageBytes + piece * 16;
    const Element* const src = static_cast<const Element*>(args.src);
    const Element* const weight = static_cast<const Element*>(args.weight);
    const bool is_k = ky < args.k_h;
#pragma unroll
    for (int i = 0; i < kPassesM; ++i) {
      const bool is_valid = is_k && is_inside(args, taps[i].y + ky, taps[i].x + kx);
      const int64_t offset = taps[i].offset + ky * args.src_h_stride + kx * args.src_w_stride + c;
      cp_async_16(stage + (row + i * kRows) * Tile::kRowStride, src + (is_valid ? offset : 0), is_valid);
    }
#pragma unroll
    for (int i = 0; i < kPassesN; ++i) {
      const int n = first_n + row + i * kRows;
      const bool is_valid = is_k && n < args.c_out;
      const int64_t offset = static_cast<int64_t>(n) * length() + k;
      cp_async_16(stage + (Tile::kTileM + row + i * kRows) * Tile::kRowStride, weight + (is_valid ? offset : 0), is_valid);
    }
    k += Tile::kStep, c += Tile::kStep;
    carry();
  }
  FS_DEVICE void end(int) {}
};

// Single elements, two to a word where they are 16 bits wide.
template <typename Tile>
struct GatherLoader {
  using Element = typename Tile::Element;
  static constexpr int kWords = Tile::kStepBytes / 4;  // of a row and step
  static constexpr int kElements = 4 / Tile::kElementBytes;
  static constexpr int kRowThreads = Tile::kThreads / Tile::kTileM;  // that share a row of the source
  static constexpr int kWordsM = kWords / kRowThreads;
  static constexpr int kRowsN = Tile::kThreads / kWords;
  static constexpr int kPassesN = Tile::kTileN / kRowsN;
  static_assert(Tile::kThreads % Tile::kTileM == 0 && kWords % kRowThreads == 0, "each thread loads the same number of words");
  static_assert(Tile::kThreads % kWords == 0 && Tile::kTileN % kRowsN == 0, "each thread loads the same number of words");

  struct alignas(16) Entry {
    int offset, y, x, unused;
  };

  const ConvPoolArgs& args;
  unsigned char* const stages;
  Entry* const table;  // two steps
  const int row, word, row_n, word_n, first_n;
  const Tap tap;
  const bool has_word_weights;
  uint32_t words_m[kWordsM], words_n[kPassesN];  // 16-bit elements on their way

  FS_DEVICE GatherLoader(const ConvPoolArgs& a, unsigned char* memory, int tile, int n)
      : args(a),
        stages(memory),
        table(reinterpret_cast<Entry*>(memory + Tile::kStages * Tile::kStageBytes)),
        row(static_cast<int>(threadIdx.x) % Tile::kTileM),
        word(static_cast<int>(threadIdx.x) / Tile::kTileM),
        row_n(static_cast<int>(threadIdx.x) / kWords),
        word_n(static_cast<int>(threadIdx.x) % kWords),
        first_n(n),
        tap(first_tap<Tile>(a, tile, row)),
        has_word_weights(Tile::kElementBytes == 4 || (length() % 2 == 0 && reinterpret_cast<uintptr_t>(a.weight) % 4 == 0)) {}

  FS_DEVICE int length() const { return args.c_in * args.k_h * args.k_w; }

  // The table for `step`. A barrier must separate it from begin(step), and from begin(step - 2) before it.
  FS_DEVICE void prepare(int step) {
    const int taps = args.k_h * args.k_w;
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kStep; i += Tile::kThreads) {
      const int k = step * Tile::kStep + i;
      const int c = k / taps, ky = k % taps / args.k_w, kx = k % args.k_w;
      Entry entry{0, 1 << 30, 0, 0};  // behind the last: outside, also of rows without a sum
      if (c < args.c_in) {
        entry.offset = static_cast<int>(c * args.src_c_stride + ky * args.src_h_stride + kx * args.src_w_stride);
        entry.y = ky, entry.x = kx;
      }
      table[step % 2 * Tile::kStep + i] = entry;
    }
  }

  FS_DEVICE uint32_t source_bits(const Entry& entry) const {
    if (!is_inside(args, tap.y + entry.y, tap.x + entry.x)) return 0;
    return static_cast<const uint16_t*>(args.src)[tap.offset + entry.offset];
  }

  FS_DEVICE void begin(int step) {
    unsigned char* const stage = stages + step % Tile::kStages * Tile::kStageBytes;
    const Entry* const entries = table + step % 2 * Tile::kStep;
#pragma unroll
    for (int i = 0; i < kWordsM; ++i) {
      const int at = word + i * kRowThreads;
      if constexpr (Tile::kElementBytes == 4) {
        const Entry entry = entries[at];
        const bool is_valid = is_inside(args, tap.y + entry.y, tap.x + entry.x);
        const float* const src = static_cast<const float*>(args.src) + (is_valid ? tap.offset + entry.offset : 0);
        cp_async_4(stage + row * Tile::kRowStride + at * 4, src, is_valid);
      } else {
        words_m[i] = source_bits(entries[2 * at]) | source_bits(entries[2 * at + 1]) << 16;
      }
    }
#pragma unroll
    for (int i = 0; i < kPassesN; ++i) {
      const int n = first_n + row_n + i * kRowsN;
      const int k = step * Tile::kStep + word_n * kElements;
      const bool is_valid = n < args.c_out && k < length();
      const int64_t offset = is_valid ? static_cast<int64_t>(n) * length() + k : 0;
      unsigned char* const target = stage + (Tile::kTileM + row_n + i * kRowsN) * Tile::kRowStride + word_n * 4;
      if (Tile::kElementBytes == 4 || has_word_weights) {
        cp_async_4(target, static_cast<const Element*>(args.weight) + offset, is_valid);
      } else {
        const uint16_t* const weight = static_cast<const uint16_t*>(args.weight) + offset;
        words_n[i] = is_valid ? weight[0] : 0;
        if (is_valid && k + 1 < length()) words_n[i] |= static_cast<uint32_t>(weight[1]) << 16;
      }
    }
  }

  // After the arithmetic of another step, so that the loads had time.
  FS_DEVICE void end(int step) {
    if constexpr (Tile::kElementBytes == 2) {
      unsigned char* const stage = stages + step % Tile::kStages * Tile::kStageBytes;
#pragma unroll
      for (int i = 0; i < kWordsM; ++i)
        *reinterpret_cast<uint32_t*>(stage + row * Tile::kRowStride + (word + i * kRowThreads) * 4) = words_m[i];
      if (has_word_weights) return;
#pragma unroll
      for (int i = 0; i < kPassesN; ++i)
        *reinterpret_cast<uint32_t*>(stage + (Tile::kTileM + row_n + i * kRowsN) * Tile::kRowStride + word_n * 4) = words_n[i];
    }
  }
};

// Arithmetic -------------------------------------------------------------------------------------------------------------------

// A warp's sums: [m16 tile][n8 tile][element of the mma fragment].
template <typename Tile>
using Sums = float[Tile::kMT][Tile::kNT][4];

template <typename Tile>
FS_DEVICE void multiply_on_tensor_cores(Sums<Tile>& sums, const unsigned char* rows_m, const unsigned char* rows_n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t a[Tile::kMT][4], b[Tile::kNT][2];
#pragma unroll
  for (int m = 0; m < Tile::kMT; ++m) ldmatrix_x4(a[m], rows_m + (m * 16 + lane % 16) * Tile::kRowStride + lane / 16 * 16);
#pragma unroll
  for (int n = 0; n < Tile::kNT; n += 2) {
    uint32_t two[4];
    ldmatrix_x4(two, rows_n + (n * 8 + lane / 16 * 8 + lane % 8) * Tile::kRowStride + lane / 8 % 2 * 16);
    b[n][0] = two[0], b[n][1] = two[1], b[n + 1][0] = two[2], b[n + 1][1] = two[3];
  }
  if constexpr (Tile::kMath == Math::kTf32) {
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = round_bits_to_tf32(a[m][i]);
#pragma unroll
    for (int n = 0; n < Tile::kNT; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) b[n][i] = round_bits_to_tf32(b[n][i]);
  }
#pragma unroll
  for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kNT; ++n) {
      if constexpr (Tile::kMath == Math::kF16) mma_f16(sums[m][n], a[m], b[n]);
      if constexpr (Tile::kMath == Math::kBF16) mma_bf16(sums[m][n], a[m], b[n]);
      if constexpr (Tile::kMath == Math::kTf32) mma_tf32(sums[m][n], a[m], b[n]);
    }
}

// IEEE fp32 in the layout of the fragments: a thread multiplies rows g, g+8 by columns 2t, 2t+1, four k per 16-byte load. The
// threads of a warp read 8 and 4 different rows at a time, so that each load is one access of the banks.
template <typename Tile>
FS_DEVICE void multiply_in_fp32(Sums<Tile>& sums, const unsigned char* rows_m, const unsigned char* rows_n) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 a[Tile::kMT][2];
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[m][i] = *reinterpret_cast<const float4*>(rows_m + (m * 16 + i * 8 + g) * Tile::kRowStride + half * 16);
#pragma unroll
    for (int n = 0; n < Tile::kNT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 b = *reinterpret_cast<const float4*>(rows_n + (n * 8 + 2 * t + j) * Tile::kRowStride + half * 16);
#pragma unroll
        for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& sum = sums[m][n][2 * i + j];
            sum = fused_multiply_add(a[m][i].x, b.x, sum);
            sum = fused_multiply_add(a[m][i].y, b.y, sum);
            sum = fused_multiply_add(a[m][i].z, b.z, sum);
            sum = fused_multiply_add(a[m][i].w, b.w, sum);
          }
      }
  }
}

// Adds the sums of the warps that share a tile, in warp order, into those of the first.
template <typename Tile>
FS_DEVICE void add_over_warps(Sums<Tile>& sums, unsigned char* memory, int warp_k, int warp_mn) {
  constexpr int kFloats = Tile::kMT * Tile::kNT * 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const all = reinterpret_cast<float*>(memory);
  const auto slot = [&](int k, int i) -> float& {
    return all[((k * Tile::kWarpsM * Tile::kWarpsN + warp_mn) * kFloats + i) * 32 + lane];
  };
  if (warp_k > 0) {
#pragma unroll
    for (int i = 0; i < kFloats; ++i) slot(warp_k - 1, i) = sums[i / (Tile::kNT * 4)][i / 4 % Tile::kNT][i % 4];
  }
  block_barrier();
  if (warp_k == 0) {
#pragma unroll
    for (int k = 1; k < Tile::kWarpsK; ++k)
#pragma unroll
      for (int i = 0; i < kFloats; ++i) sums[i / (Tile::kNT * 4)][i / 4 % Tile::kNT][i % 4] += slot(k - 1, i);
  }
}

// Epilogue ---------------------------------------------------------------------------------------------------------------------

// Writes channels n and n+1 of one output pixel.
template <typename Element>
struct Output {
  const ConvPoolArgs& args;
  const bool writes_pairs;

  FS_DEVICE explicit Output(const ConvPoolArgs& a)
      : args(a),
        writes_pairs(a.dst_c_stride == 1 && (a.dst_image_stride | a.dst_h_stride | a.dst_w_stride) % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(a.dst) % (2 * sizeof(Element)) == 0) {}

  FS_DEVICE int64_t offset(const Pixel& pixel) const {
    return pixel.image * args.dst_image_stride + pixel.y * args.dst_h_stride + pixel.x * args.dst_w_stride;
  }
  FS_DEVICE float finish(float value, int n) const { return n >= args.c_out ? 0.0f : args.has_relu ? relu(value) : value; }

  FS_DEVICE void write(int64_t at, int n, float value) const {
    if (n < args.dst_channels) static_cast<Element*>(args.dst)[at + n * args.dst_c_stride] = from_float<Element>(finish(value, n));
  }
  FS_DEVICE void write_two(int64_t at, int n, float first, float second) const {
    if (!writes_pairs || n + 1 >= args.dst_channels) {
      write(at, n, first);
      write(at, n + 1, second);
      return;
    }
    Element* const target = static_cast<Element*>(args.dst) + at + n;
    if constexpr (sizeof(Element) == 4) {
      *reinterpret_cast<float2*>(target) = float2{finish(first, n), finish(second, n + 1)};
    } else {
      *reinterpret_cast<uint32_t*>(target) = pack2<Element>(finish(first, n), finish(second, n + 1));
    }
  }
};

template <typename Element>
FS_DEVICE float bias_of(const ConvPoolArgs& args, int n) {
  return args.bias && n < args.c_out ? to_float(static_cast<const Element*>(args.bias)[n]) : 0.0f;
}

// No pool, or windows in registers. `row`, `n`: the warp's first.
template <typename Tile>
FS_DEVICE void write_sums(const ConvPoolArgs& args, const Sums<Tile>& sums, int tile, int row, int n) {
  using Element = typename Tile::Element;
  const Output<Element> output(args);
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  float bias[Tile::kNT][2];
#pragma unroll
  for (int j = 0; j < Tile::kNT; ++j)
#pragma unroll
    for (int q = 0; q < 2; ++q) bias[j][q] = bias_of<Element>(args, n + j * 8 + 2 * t + q);

  if (args.pool_mode == PoolMode::kNone) {
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pixel pixel = pixel_of(args, static_cast<int64_t>(tile) * Tile::kTileM + row + m * 16 + i * 8 + g);
        if (!pixel.is_valid) continue;
        const int64_t at = output.offset(pixel);
#pragma unroll
        for (int j = 0; j < Tile::kNT; ++j)
          output.write_two(at, n + j * 8 + 2 * t, sums[m][j][2 * i] + bias[j][0], sums[m][j][2 * i + 1] + bias[j][1]);
      }
    return;
  }
#pragma unroll
  for (int m = 0; m < Tile::kMT; m += 2) {
    const Pixel pixel = pixel_of(args, static_cast<int64_t>(tile) * (Tile::kTileM / 4) + (row + m * 16) / 4 + g);
    if (!pixel.is_valid) continue;
    const int64_t at = output.offset(pixel);
#pragma unroll
    for (int j = 0; j < Tile::kNT; ++j) {
      float largest[2];
      // The bias first: an infinite one may make NaN of a sum that would not win.
#pragma unroll
      for (int q = 0; q < 2; ++q)
        largest[q] = max_nan(max_nan(sums[m][j][q] + bias[j][q], sums[m][j][q + 2] + bias[j][q]),
                             max_nan(sums[m + 1][j][q] + bias[j][q], sums[m + 1][j][q + 2] + bias[j][q]));
      output.write_two(at, n + j * 8 + 2 * t, largest[0], largest[1]);
    }
  }
}

// The largest of a window of the tile, of which output (tile_y, tile_x) is made.
template <typename Tile>
FS_DEVICE float largest_of_window(const ConvPoolArgs& args, const PoolTile& pool, const float* shared, int tile_y, int tile_x,
                                  int column, float bias) {
  float largest = -INFINITY;
  for (int y = tile_y * args.pool_stride_h; y < tile_y * args.pool_stride_h + args.pool_h; ++y) {
    if (static_cast<unsigned>(pool.sum_y + y) >= static_cast<unsigned>(args.conv_h)) continue;
    for (int x = tile_x * args.pool_stride_w; x < tile_x * args.pool_stride_w + args.pool_w; ++x) {
      if (static_cast<unsigned>(pool.sum_x + x) >= static_cast<unsigned>(args.conv_w)) continue;
      largest = max_nan(largest, shared[(y * pool.sums_w + x) * Tile::kSumStride + column] + bias);
    }
  }
  return largest;
}

// Windows through shared memory: the sums of the whole block lie in `shared`, rows kSumStride apart.
template <typename Tile>
FS_DEVICE void pool_sums(const ConvPoolArgs& args, const float* shared, int tile, int n) {
  using Element = typename Tile::Element;
  const Output<Element> output(args);
  const PoolTile pool = pool_tile(args, tile);
  const int pixels = args.tile_h * args.tile_w;
  // Neighbouring threads write neighbouring elements.
  const bool is_channel_fastest = args.dst_c_stride == 1;
  for (int i = static_cast<int>(threadIdx.x); i < pixels * Tile::kTileN; i += Tile::kThreads) {
    const int column = is_channel_fastest ? i % Tile::kTileN : i / pixels;
    const int index = is_channel_fastest ? i / Tile::kTileN : i % pixels;
    const int tile_y = index / args.tile_w, tile_x = index % args.tile_w;
    const Pixel pixel{pool.image, pool.y + tile_y, pool.x + tile_x, true};
    if (pixel.y >= args.h_out || pixel.x >= args.w_out) continue;
    const float bias = bias_of<Element>(args, n + column);
    const float largest = largest_of_window<Tile>(args, pool, shared, tile_y, tile_x, column, bias);
    output.write(output.offset(pixel), n + column, largest);
  }
}

// Bias, BatchNorm and an activation in front of the pool, of all sums of the block. A thread keeps to a channel.
template <typename Tile>
FS_DEVICE_CALL void finish_sums(const ConvPoolArgs& args, float* shared, int first_n) {
  using Element = typename Tile::Element;
  const int column = static_cast<int>(threadIdx.x) % Tile::kTileN, n = first_n + column;
  if (n >= args.c_out) return;
  const ChannelFinish<Element> channel(args.finish, bias_of<Element>(args, n), n);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / Tile::kTileN; row < Tile::kTileM; row += Tile::kThreads / Tile::kTileN) {
    float& sum = shared[row * Tile::kSumStride + column];
    const float value = channel.norm(sum);
    sum = args.finish.is_after_pool ? value : channel.activate(args.finish, value);
  }
}

// The pool, an activation behind it, and the output, of finished sums.
template <typename Tile>
FS_DEVICE_CALL void write_finished(const ConvPoolArgs& args, const float* shared, int tile, int n) {
  using Element = typename Tile::Element;
  const Output<Element> output(args);
  const bool is_windowed = args.pool_mode == PoolMode::kShared, has_four = args.pool_mode == PoolMode::kRegisters;
  PoolTile pool = {};
  if (is_windowed) pool = pool_tile(args, tile);
  const int pixels = is_windowed ? args.tile_h * args.tile_w : has_four ? Tile::kTileM / 4 : Tile::kTileM;
  const bool is_channel_fastest = args.dst_c_stride == 1;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < pixels * Tile::kTileN; i += Tile::kThreads) {
    const int column = is_channel_fastest ? i % Tile::kTileN : i / pixels;
    const int index = is_channel_fastest ? i / Tile::kTileN : i % pixels;
    Pixel pixel;
    float value;
    if (is_windowed) {
      const int tile_y = index / args.tile_w, tile_x = index % args.tile_w;
      pixel = {pool.image, pool.y + tile_y, pool.x + tile_x, true};
      if (pixel.y >= args.h_out || pixel.x >= args.w_out) continue;
      value = largest_of_window<Tile>(args, pool, shared, tile_y, tile_x, column, -0.0f);
    } else {
      pixel = pixel_of(args, static_cast<int64_t>(tile) * pixels + index);
      if (!pixel.is_valid) continue;
      // Window by window, the four sums of one are 8 rows apart.
      const float* const sum = shared + (has_four ? index / 8 * 32 + index % 8 : index) * Tile::kSumStride + column;
      value = *sum;
      if (has_four) {
        for (int element = 1; element < 4; ++element) value = max_nan(value, sum[element * 8 * Tile::kSumStride]);
      }
    }
    if (args.finish.is_after_pool && n + column < args.c_out)
      value = ChannelFinish<Element>(args.finish, 0.0f, n + column).activate(args.finish, value);
    output.write(output.offset(pixel), n + column, value);
  }
}

// The kernel -------------------------------------------------------------------------------------------------------------------

template <typename Tile>
FS_DEVICE void conv_pool_block(const ConvPoolArgs& args, int block) {
  const int tiles_n = (args.dst_channels + Tile::kTileN - 1) / Tile::kTileN;
  const int tile = block / tiles_n, first_n = block % tiles_n * Tile::kTileN;
  unsigned char* const memory = shared_memory();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_k = warp / (Tile::kWarpsM * Tile::kWarpsN), warp_mn = warp % (Tile::kWarpsM * Tile::kWarpsN);
  const int row = warp_mn / Tile::kWarpsN * (Tile::kMT * 16), column = warp_mn % Tile::kWarpsN * (Tile::kNT * 8);

  using Loader = std::conditional_t<Tile::kIsVector, VectorLoader<Tile>, GatherLoader<Tile>>;
  Loader loader(args, memory, tile, first_n);
  const int steps = (loader.length() + Tile::kStep - 1) / Tile::kStep;

  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (!Tile::kIsVector) {
      loader.prepare(step);
      block_barrier();
    }
    if (step < steps) loader.begin(step), loader.end(step);
    cp_async_commit();
  }
  loader.prepare(Tile::kStages - 1);

  Sums<Tile> sums = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    block_barrier();
    const int next = step + Tile::kStages - 1;
    if (next < steps) loader.begin(next);
    cp_async_commit();
    const unsigned char* const stage = memory + step % Tile::kStages * Tile::kStageBytes;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kStepBytes / 32; chunk += Tile::kWarpsK) {
      const int at = (chunk + warp_k) * 32;
      const unsigned char* const rows_m = stage + row * Tile::kRowStride + at;
      const unsigned char* const rows_n = stage + (Tile::kTileM + column) * Tile::kRowStride + at;
      if constexpr (Tile::kMath == Math::kIeee) {
        multiply_in_fp32<Tile>(sums, rows_m, rows_n);
      } else {
        multiply_on_tensor_cores<Tile>(sums, rows_m, rows_n);
      }
    }
    if (next < steps) loader.end(next);
    loader.prepare(next + 1);
  }

  if constexpr (Tile::kWarpsK > 1) {
    cp_async_wait<0>();
    block_barrier();
    add_over_warps<Tile>(sums, memory, warp_k, warp_mn);
  }
  if (args.pool_mode != PoolMode::kShared && !args.finish.is_used) {
    if (warp_k == 0) write_sums<Tile>(args, sums, tile, row, first_n + column);
    return;
  }
  cp_async_wait<0>();
  block_barrier();
  float* const shared = reinterpret_cast<float*>(memory);
  if (warp_k == 0) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int j = 0; j < Tile::kNT; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared[(row + m * 16 + i / 2 * 8 + g) * Tile::kSumStride + column + j * 8 + 2 * t + i % 2] = sums[m][j][i];
  }
  block_barrier();
  if (!args.finish.is_used) {
    pool_sums<Tile>(args, shared, tile, first_n);
    return;
  }
  finish_sums<Tile>(args, shared, first_n);
  block_barrier();
  write_finished<Tile>(args, shared, tile, first_n);
}

template <typename Tile>
FS_HOST_DEVICE inline int conv_pool_blocks(const ConvPoolArgs& args) {
  const int64_t tiles_n = (args.dst_channels + Tile::kTileN - 1) / Tile::kTileN;
  if (args.pool_mode == PoolMode::kShared) {
    const int64_t across = (args.w_out + args.tile_w - 1) / args.tile_w, down = (args.h_out + args.tile_h - 1) / args.tile_h;
    return static_cast<int>(args.batch * across * down * tiles_n);
  }
  const int64_t pixels = static_cast<int64_t>(args.batch) * args.h_out * args.w_out;
  const int64_t rows = args.pool_mode == PoolMode::kRegisters ? Tile::kTileM / 4 : Tile::kTileM;
  return static_cast<int>((pixels + rows - 1) / rows * tiles_n);
}

template <typename Tile>
FS_KERNEL(Tile::kThreads, 1)
conv_pool(FS_ARGS ConvPoolArgs args) {
  const int blocks = conv_pool_blocks<Tile>(args);
  const int block = static_cast<int>(blockIdx.x);
  if (block < blocks) {
    conv_pool_block<Tile>(args, block);
  } else {
    pack_block(args.pack, block - blocks);
  }
}

}  // namespace fastseq::cuda
