// Convolution by Winograd's minimal filtering: when it pays, how an image is cut into tiles, and the transformed weights.
// The kernels are in kernels/cpu/winograd.inl.h.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "plan/pack.h"
#include "plan/spec.h"

namespace fastseq {

// The tiling of one convolution, and where its buffers lie in a thread's scratch. Offsets and strides count floats.
struct Winograd {
  int64_t out = 0;   // results of a tile and side: 4 for 3x3, 2 for 5x5
  int64_t side = 0;  // the same after pooling in registers
  bool has_few_channels = false;
  // A tile of a dilated convolution has every so-manieth row and column. The tiles that a row is in are those of a band: side times
  // the dilation rows of the result, and as many rows of tiles as the dilation.
  int64_t bands = 0, band_rows = 0;
  int64_t tiles_x = 0;                 // tiles in a row of them
  int64_t group = 0;                   // tiles that go through all three phases together
  int32_t chain = 0, chain_group = 0;  // terms of a partial sum over the channels, and of a sum of those
  int64_t v_point_stride = 0, v_tile_stride = 0;
  int64_t m_offset = 0;
  int64_t poison_offset = 0;
  int64_t scratch_floats = 0;
  PackedPtr weights;
  // Pixels of a tile from its first, for the tiles that have to be computed directly; windows of four where it pools.
  std::vector<int32_t> src_offset, dst_offset;

  explicit operator bool() const { return out > 0; }
  int64_t band_tiles() const { return band_rows / side * tiles_x; }
};

// Tiles beyond this many in a group would only grow the buffers.
constexpr int64_t kMostGroupTiles = 56;

struct ConvShape {
  int64_t c_in, c_out;  // c_in: of a group
  int64_t groups;
  int64_t h, w;  // of the convolution, as far as it is computed
  Window window;
  bool pools_in_registers;
};

// One thread's part of a convolution: all input channels of some tiles (or pixels) and vectors of output channels.
struct ConvPart {
  int64_t places;      // tiles; pixels where it is direct
  int64_t c_in, taps;  // c_in: that each output has; taps: of a direct one
  int64_t out_vectors;
  int lanes;
  int64_t groups = 1;
};

// Estimates in fused multiply-adds of one vector.
double direct_time(const ConvPart& part);
double winograd_time(const ConvPart& part, bool has_few_channels);

// Whether the transforms exist for this convolution, and whether they are estimated to be faster than the direct kernels.
bool can_use_winograd(const ConvShape& shape, const StepSpec& spec);
// direct_speed: of those kernels, in float32's.
bool is_winograd_faster(const ConvShape& shape, const cpu::KernelSet& set, double direct_speed);

Winograd plan_winograd(const ConvShape& shape, int panel_vectors, const cpu::KernelSet& set);

// Panels of [point][c_in][lane], or of [vector][point][c_in][lane] with few channels.
PackedPtr pack_winograd(const StepSpec& spec, const std::vector<int>& panels, int lanes, bool has_few_channels);

}  // namespace fastseq
