// The CPU kernels as the plan sees them: plain structs of sizes, offsets and pointers, and one table of function pointers per
// instruction set. Offsets and strides count elements (floats). A kernel call runs on one thread and allocates nothing.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/storage.h"

namespace fastseq::cpu {

// Upper limits over all instruction sets, for table dimensions.
constexpr int kMaxVectors = 4;      // vectors of output channels in a register tile
constexpr int kMaxRows = 32;        // rows (pixels) in a register tile
constexpr int kMaxPanels = 4;       // weight panels that a row kernel takes side by side
constexpr int kLineFloats = 16;     // of a cache line
constexpr int kLongestRun = 192;    // of a reduction over weights that are read in place
constexpr int kMaxInPlaceRows = 8;  // rows of the source in a tile that transposes weights as it reads them

// A stretch of the reduction that is contiguous in the source: `length` elements from `offset`.
// After a run that ends a partial sum the accumulators are added to the total and start again from zero: long sums lose less.
struct Run {
  int32_t offset;
  int32_t length;
  int32_t ends_partial_sum;
};

// dst[i][lane] = max(lower, bias[lane] + sum_k src[src_offset[i] + k] * weight[k][lane]) for every row i of `tiles` register tiles.
// For the pooled variant four consecutive rows form one 2x2 window, and dst has one entry per window.
struct TileJob {
  const float* src;
  const int32_t* src_offset;  // one per row; for a pooled tile the four rows of a window are consecutive
  const Run* runs;
  int32_t run_count;
  const float* weight;   // one panel, [k][vectors * lanes], 64-byte aligned
  int64_t panel_stride;  // to the next panel of the same width (row kernels only)
  const float* bias;     // vectors * lanes values per panel, zero-filled
  const float* scale;    // as the bias: what the sum is multiplied by before; null for 1, as always but for pairs
  float lower;           // 0 for ReLU, -inf for none
  float* dst;
  const int32_t* dst_offset;  // one per row, or one per window
  int32_t lanes;              // how many of the (last) panel's lanes are stored
  // Where the reduction is cut into stretches, of which `runs` are one: what all rows' sums come to, [row][panel], on their way
  // from one to the next. Null where there is one stretch; not for pooled tiles and row kernels.
  float* sums;
  int32_t sums_stride;  // from a row to the next
  bool has_sums;        // of stretches before
  bool is_last;         // dst is written then and only then
};
using TileLoop = void (*)(const TileJob& job, int64_t tiles);

// Winograd, see winograd.inl.h: 6x6 patches of the input, 36 points.
constexpr int kWinogradPoints = 36;
constexpr int kWinogradPatch = 6;
constexpr int kMostSmallChannels = 4;  // of the variant without intermediate buffer

struct WinogradInputJob {
  const float* const* src;  // one patch per tile: its top left pixel
  int64_t src_row_stride, src_pitch;
  int32_t channels;  // read in whole vectors
  int32_t tiles;
  float* dst;  // [point][tile][channel] at these strides; with few channels [tile][point][4]
  int64_t dst_point_stride, dst_tile_stride;
};
using WinogradInput = void (*)(const WinogradInputJob& job);

// dst[row][lane] = sum_k src[row][k] * weight[k][lane], nothing added and nothing clamped.
struct ProductJob {
  const float* src;
  int64_t src_stride;   // from a row to the next
  const float* weight;  // [k][vectors * lanes], 64-byte aligned
  int32_t depth;        // at least 1
  int32_t chain;        // of this many terms are partial sums, and sums of those
  int32_t group;        // of this many: a multiple of the former
  float* dst;           // rows of vectors * lanes, dense
};
using ProductLoop = void (*)(const ProductJob& job, int64_t blocks);

struct WinogradTile {
  float* dst;  // its first pixel, whether that is stored or not
  // Rows and columns of the result that an earlier tile has: the last tile of a row or column is moved back inside the image.
  int32_t skip_rows, skip_columns;
};

struct WinogradOutputJob {
  const float* src;  // [point][tile][lane] at these strides; with few channels the patches [tile][point][4]
  int64_t src_point_stride, src_tile_stride;
  const float* weight;  // with few channels: [vector][point][channel][lane]
  const float* bias;
  float lower;
  const WinogradTile* tile;
  int32_t tiles;
  int32_t first_lane;  // of the panel
  int32_t lanes;       // stored: all of a panel but for the last one in the caller's memory
  int64_t dst_row_stride, dst_pitch;
  float* poison;  // a vector per tile, to which NaN is added where a sum is not finite
};
using WinogradOutput = void (*)(const WinogradOutputJob& job);

// linear on weights as they lie: dst[i][n] = max(lower, bias[n] + sum_k src[i][k] * weight[n][k]) for all weight rows n and as many
// rows i as the tile has. The runs say where partial sums end; their offsets are positions in k, and every one but the last ends
// one.
struct InPlaceJob {
  const float* weight;
  int64_t weight_stride;  // from a row to the next
  int64_t weight_rows;
  const float* src;
  int64_t src_stride;
  const Run* runs;
  int32_t run_count;
  const float* bias;  // zero-filled up to whole vectors
  float lower;
  float* dst;
  int64_t dst_stride;
};
using InPlaceLoop = void (*)(const InPlaceJob& job);

// The same for panels of as many source rows as a register tile has, packed as [k][row], and a stretch of the reduction.
struct InPlaceTileJob {
  const float* weight;
  int64_t weight_stride;
  int64_t weight_rows;
  const float* panel;  // at the first run's k, aligned to whole vectors
  int32_t panels;
  int64_t panel_stride, sums_stride;  // to the next panel of as many rows, and to its sums
  const Run* runs;
  int32_t run_count;
  const float* bias;  // one per weight row, and room to read a tile's rows more
  float lower;
  float* sums;    // [weight row][source row], with room for a tile's rows more
  bool has_sums;  // of the stretches before
  bool is_last;   // the last stretch: bias and lower follow
};
using InPlaceTileLoop = void (*)(const InPlaceTileJob& job);

// One output row (or row of 2x2 windows) of a convolution of one input channel: dst[out][x], see plane.inl.h.
struct PlaneJob {
  const float* src;  // the pixel under the first tap of the first output
  int64_t src_row_stride;
  int32_t k_h, k_w;
  const float* weight;  // [tap][out]
  const float* bias;    // [out]
  float lower;
  int32_t width;  // of the convolution, even where it pools; read and written in whole pairs of vectors
  int32_t outs;
  float* dst;
  int64_t dst_stride;
};
using PlaneRow = void (*)(const PlaneJob& job);

// Rows of a depthwise convolution, each channel with a filter of its own, or of one with a few input channels (terms) for each
// output channel. Lanes are output channels.
struct DepthwiseJob {
  const float* src;                   // the pixel under the first tap of the first output
  int64_t src_row_stride, src_pitch;  // elements from an output's row or pixel to the next one's
  int64_t tap_row_stride, tap_pitch;  // from a tap to the next
  int32_t k_h, k_w;
  int32_t terms;         // of a tap: 1 where it is depthwise
  const int32_t* index;  // else [vector of channels][term][lane], aligned: where behind first_channel[vector] a lane's term is
  const int32_t* first_channel;  // [vector of channels]
  const float* weight;           // [vector of channels][tap][term][lane]
  const float* bias;             // zero-filled up to whole vectors, as the source is readable
  float lower;
  int32_t rows, width;  // of the output
  int32_t channels;     // that are written
  float* dst;
  int64_t dst_row_stride, dst_pitch;
};
using DepthwiseRows = void (*)(const DepthwiseJob& job);

// A window's pixels in a row or column, those inside the image: the first, and how many, at least one. count: how many an average
// takes them for.
struct PoolSpan {
  int32_t begin, pixels;
  float count;
};

// One output row of a pool over NHWC rows: dst[x][c] = max(lower, the window's maximum, NaN kept as eager keeps it, or its sum
// divided by both counts).
struct PoolRowJob {
  const float* src;     // the first of the window's rows inside the image, at x = 0
  int64_t row_stride;   // from one of the window's rows to the next
  int32_t row_count;    // at least 1
  float row_divisor;    // of an average, their count
  int64_t ring_floats;  // a row that would start at ring_end or behind starts as much before it
  const float* ring_end;
  int32_t w_out;
  int64_t column_step;           // pixels from one of a window to the next
  const PoolSpan* columns;       // one per output pixel
  int64_t src_pitch, dst_pitch;  // elements from a pixel to the next
  int32_t channels;
  int32_t can_overread;  // the source may be read up to the next multiple of the vector width
  float lower;
  float* dst;
};
using PoolRow = void (*)(const PoolRowJob& job);

// Of which two pixels of a row a pixel is the sum, and with which weights.
struct Blend {
  int32_t first, second;
  float first_weight, second_weight;
};

// One output row of a bilinear upsampling over NHWC rows: dst[x][c] = the sum of the column's two pixels of both rows, weighted.
struct BlendRowJob {
  const float *top, *bottom;  // the two rows
  float top_weight, bottom_weight;
  const Blend* columns;  // one per output pixel
  int32_t w_out;
  int32_t channels;
  int64_t src_pitch, dst_pitch;  // elements from a pixel to the next
  bool can_overread;             // the source may be read up to the next multiple of the vector width
  float* dst;
};
using BlendRow = void (*)(const BlendRowJob& job);

// dst[row][lane] = max(lower, src[row][lane] * scale[lane] + shift[lane]).
struct ScaleJob {
  const float* src;
  float* dst;
  int64_t src_stride, dst_stride;  // from a row to the next
  int64_t rows, lanes;
  bool can_overread;           // the source's rows may be read up to whole vectors
  const float *scale, *shift;  // whole vectors
  float lower;
};
using ScaleRows = void (*)(const ScaleJob& job);

// The same of (src[row][lane] - center[lane]).
using CenteredRows = void (*)(const ScaleJob& job, const float* center);
// The same of each row less its mean, divided by the root of its variance and eps.
using LayerNormRows = void (*)(const ScaleJob& job, double eps);

// Of the pixels of a map, by channel: the sums of (pixel - center) * share, and of their squares times share.
struct MomentsJob {
  const float* src;
  int64_t row_stride, pitch;
  int64_t rows, width, channels;
  bool can_overread;    // as in ScaleJob
  const float* center;  // whole vectors, as the sums
  float share;
  float *mean, *square;
};
using ChannelMoments = void (*)(const MomentsJob& job);

// dst[row][lane] = the softmax of the row, or its logarithm. dst may be src.
struct SoftmaxJob {
  const float* src;
  float* dst;
  int64_t src_stride, dst_stride;  // from a row to the next
  int64_t rows, lanes;
  bool can_overread;  // as in ScaleJob
};
using SoftmaxRows = void (*)(const SoftmaxJob& job);

// data[row][lane] = the activation of itself, see activation.inl.h.
struct ActivationJob {
  float* data;
  int64_t rows, row_stride;
  int64_t lanes;        // of a row, no others are read or written; all the same to these functions, but for slopes
  float a, b;           // see Activation
  const float* slopes;  // of PReLU only: one per lane, readable in whole vectors; one for all lanes is kLeakyRelu
};
using ActivationLoop = void (*)(const ActivationJob& job);

// Rows of numbers from one type to another, see convert.inl.h. What lies between the rows is neither read nor written.
struct ConvertJob {
  const void* src;
  void* dst;
  int64_t rows, lanes;             // numbers in a row
  int64_t src_stride, dst_stride;  // from a row to the next, in numbers of the type that each holds
};
using ConvertLoop = void (*)(const ConvertJob& job);

// dst[i * dst_stride + j] = src[j * src_stride + i] for i < rows, j < columns; then the same for the next of `count` matrices.
// With can_overread, source rows (over i) may be read up to the next multiple of 8 elements.
struct TransposeJob {
  const float* src;
  int64_t src_stride;
  float* dst;
  int64_t dst_stride, rows, columns;
  bool can_overread = false;
  int64_t count = 1, src_step = 0, dst_step = 0;
};
using Transpose = void (*)(const TransposeJob& job);

// A 64-bit hash of `count` floats in which every bit and every position counts; the sample's is of kSampleLines lines of
// kLineFloats among them, the first and the last included.
using Fingerprint = uint64_t (*)(const float* src, int64_t count);
constexpr int kSampleLines = 64;

// Multiply-adds at full rate for `iterations` rounds; returns the floating point operations done. For measuring the machine's peak.
using FmaProbe = double (*)(int64_t iterations, float* sink);

// The register tiles of one instruction set and product.
struct TileTable {
  int max_rows[kMaxVectors + 1];   // largest tile height for 1..kMaxVectors vectors, 0 where that width has none
  int pool_rows[kMaxVectors + 1];  // the same for pooled tiles, a multiple of 4
  int preferred_vectors;           // tile width for layers with many channels
  int preferred_pool_vectors;      // the same for pooled tiles
  TileLoop tile[kMaxVectors + 1][kMaxRows + 1];
  TileLoop pool_tile[kMaxVectors + 1][kMaxRows / 4 + 1];  // by windows in the tile
  TileLoop row_tile[4][kMaxPanels + 1];                   // 1..3 rows, several panels of preferred_vectors at once
  int row_panels[4];                                      // how many panels that is
};

// Everything that one instruction set offers.
struct KernelSet {
  const char* isa;
  int lanes;  // floats in a vector
  TileTable tiles;
  InPlaceLoop in_place[kMaxInPlaceRows + 1];       // by rows of the source
  InPlaceTileLoop in_place_tile[kMaxVectors + 1];  // by vectors of rows of the source, tiles.max_rows weight rows at a time
  int in_place_rows;                               // how many rows of the source the former take
  int product_rows[kMaxVectors + 1];               // as max_rows
  ProductLoop product[kMaxVectors + 1][kMaxRows + 1];
  WinogradInput winograd_input, winograd_small_input;
  WinogradOutput winograd_output[2][2];                             // by 3x3 or 5x5, by whether it pools
  WinogradOutput winograd_small_output[2][kMostSmallChannels + 1];  // 3x3 only, by whether it pools
  PlaneRow plane_row[2];                                            // by whether it pools
  DepthwiseRows depthwise_rows;
  int depthwise_pixels;  // of a row that it takes together
  PoolRow pool_row;
  PoolRow average_row[2];  // by whether long sums are taken in parts
  BlendRow blend_row;
  ScaleRows scale_rows;
  CenteredRows centered_rows;
  ChannelMoments channel_moments;
  LayerNormRows layer_norm_rows;
  SoftmaxRows softmax_rows[2];                      // by whether it is the logarithm
  ActivationLoop activation[kActivations];          // by Activation; null for none and for ReLU, which is a clamp wherever lower is
  ConvertLoop widen[kStorages], narrow[kStorages];  // by Storage, to and from floats; null for float32
  ActivationLoop round[kStorages];                  // to numbers of that type; null for float32
  Transpose transpose;
  Fingerprint fingerprint, fingerprint_sample;
  FmaProbe fma_probe;
};

// Tiles that take the places of a KernelSet's, on pairs of bfloat16 numbers: wherever TileJob has a float of
// the source or of a weight there is a pair, and offsets, lengths and strides count pairs. Biases, sums and results are floats.
struct Bf16Tiles {
  const char* isa;
  double speed;  // of a convolution, against one in float32
  TileTable tiles;
};

// An entry of the kernel list: what can be chosen, forced by FASTSEQ_KERNEL and is walked by the tests.
struct KernelRow {
  std::string name;  // <op>_<dtype>__<isa>_<rows>x<lanes>
  std::string op;
  std::string isa;
  int rows;
  int vectors;
  bool is_bf16;
  bool is_supported;  // by this CPU
  bool is_test_only;  // never chosen unless asked for by name
};

struct Isa {
  const KernelSet* kernels;
  bool is_supported;
  bool is_test_only;
  struct Bf16 {
    const Bf16Tiles* tiles;
    bool is_supported;
  };
  std::vector<Bf16> bf16 = {};  // that may take the places of its tiles, the best first
};

// Best first; the portable one, which every CPU runs, is the last that is not test only.
const std::vector<Isa>& isas();
std::vector<KernelRow> kernel_rows();

// The best supported instruction set not above `cap` ("" for no cap), which may be that of bfloat16 tiles. Null if the cap names
// none.
const KernelSet* select_isa(const std::string& cap);
// The best bfloat16 tiles beside it. Null where there are none, this CPU has not the instruction, or the cap is below it.
const Bf16Tiles* select_bf16(const std::string& cap);

const KernelSet& kernels_avx512();
const KernelSet& kernels_avx2();
const KernelSet& kernels_portable();
const KernelSet& kernels_emulated512();
const Bf16Tiles& bf16_tiles_avx512();
const Bf16Tiles& bf16_tiles_amx();
const Bf16Tiles& bf16_tiles_emulated512();
const Bf16Tiles& bf16_tiles_emulated_amx();

}  // namespace fastseq::cpu
