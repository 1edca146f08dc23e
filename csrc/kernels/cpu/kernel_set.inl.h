// Constant: no code of this region may run before the CPU was asked what it can do.
// Fills the table of one instruction set from the templates above. Expects kLanes, kIsa and the tile limits as constexpr values in
// the enclosing namespace. The limits say which tiles keep every accumulator, the weights and a broadcast in registers.

#include "kernels/cpu/activation.inl.h"
#include "kernels/cpu/convert.inl.h"
#include "kernels/cpu/depthwise.inl.h"
#include "kernels/cpu/fingerprint.inl.h"
#include "kernels/cpu/fma_probe.inl.h"
#include "kernels/cpu/gemm_tile.inl.h"
#include "kernels/cpu/in_place.inl.h"
#include "kernels/cpu/layout.inl.h"
#include "kernels/cpu/plane.inl.h"
#include "kernels/cpu/pool.inl.h"
#include "kernels/cpu/rows.inl.h"
#include "kernels/cpu/scale.inl.h"
#include "kernels/cpu/softmax.inl.h"
#include "kernels/cpu/statistics.inl.h"
#include "kernels/cpu/upsample.inl.h"
#include "kernels/cpu/winograd.inl.h"

template <int kRowsT>
static constexpr void add_in_place(KernelSet& set) {
  set.in_place[kRowsT] = in_place_loop<kRowsT>;
  if constexpr (kRowsT > 1) add_in_place<kRowsT - 1>(set);
}

template <int kVec, int kRowsT>
static constexpr void add_products(KernelSet& set) {
  set.product[kVec][kRowsT] = product_loop<kRowsT, kVec>;
  if constexpr (kRowsT > 1) add_products<kVec, kRowsT - 1>(set);
}

template <int kChannels>
static constexpr void add_small_winograd(KernelSet& set) {
  set.winograd_small_output[0][kChannels] = winograd_small_output<4, false, kChannels>;
  set.winograd_small_output[1][kChannels] = winograd_small_output<4, true, kChannels>;
  if constexpr (kChannels > 1) add_small_winograd<kChannels - 1>(set);
}

static constexpr KernelSet make_kernel_set() {
  KernelSet set = {};
  set.isa = kIsa;
  set.lanes = kLanes;
  set.tiles = make_tile_table<FloatProduct>();
  set.in_place_rows = kInPlaceRows;
  add_in_place<kInPlaceRows>(set);
  set.in_place_tile[1] = in_place_tile_loop<kRows1, 1>, set.in_place_tile[2] = in_place_tile_loop<kRows2, 2>;
  set.in_place_tile[3] = in_place_tile_loop<kRows3, 3>, set.in_place_tile[4] = in_place_tile_loop<kRows4, 4>;
  set.product_rows[1] = kProductRows1, set.product_rows[2] = kProductRows2;
  set.product_rows[3] = kProductRows3, set.product_rows[4] = kProductRows4;
  add_products<1, kProductRows1>(set), add_products<2, kProductRows2>(set);
  add_products<3, kProductRows3>(set), add_products<4, kProductRows4>(set);
  set.winograd_input = winograd_input, set.winograd_small_input = winograd_small_input;
  set.winograd_output[0][0] = winograd_output<4, false>, set.winograd_output[0][1] = winograd_output<4, true>;
  set.winograd_output[1][0] = winograd_output<2, false>, set.winograd_output[1][1] = winograd_output<2, true>;
  add_small_winograd<kMostSmallChannels>(set);
  set.plane_row[0] = plane_row<false>, set.plane_row[1] = plane_row<true>;
  set.depthwise_rows = depthwise_rows, set.depthwise_pixels = kDepthwisePixels;
  add_pools(set);
  set.blend_row = blend_row;
  set.scale_rows = scale_rows;
  set.centered_rows = centered_rows, set.channel_moments = channel_moments, set.layer_norm_rows = layer_norm_rows;
  set.softmax_rows[0] = softmax_rows<false>, set.softmax_rows[1] = softmax_rows<true>;
  add_activations(set);
  add_conversions<Bf16>(set, Storage::kBf16), add_conversions<F16>(set, Storage::kF16);
  set.transpose = transpose;
  set.fingerprint = fingerprint, set.fingerprint_sample = fingerprint_sample;
  set.fma_probe = fma_probe;
  return set;
}
