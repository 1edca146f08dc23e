#include "plan/winograd.h"

#include <algorithm>
#include <cmath>

namespace fastseq {
namespace {

constexpr int64_t kMostLanes = 16, kBlockChannels = 16;
constexpr int kPatch = cpu::kWinogradPatch, kPoints = cpu::kWinogradPoints;

// Costs in fused multiply-adds of one vector, measured on Zen 4 with AVX-512 (the ratios hold for AVX2): a patch and vector of
// input channels, a tile and vector of output channels, and the share of the peak that the products and the direct tiles reach.
constexpr double kInputCost = 220, kOutputCost = 190, kProductShare = 0.96, kDirectShare = 0.93;
// A sum of the products is stored, added to the inverse transform's input: as much as this many of its terms.
constexpr double kStoreCost = 2;
// The same with few channels; with few registers as well, most of what waits for the second half of the transform is spilled.
constexpr double kFewInputCost = 90, kFewOutputCost = 170, kFewSpilledOutputCost = 360;
// Weights that are used for few tiles arrive at this many floats per multiply-add, from L3.
constexpr double kStreamFloats = 6;
// Groups: small where the transformed weights stay in L2, larger where each group streams them again.
constexpr int64_t kSmallGroup = 14, kLargeGroup = 28, kLargeWeightFloats = int64_t{256} << 10;
// The error of longer chains of additions would outgrow the transforms'.
constexpr int64_t kLongestChain = 24, kChainsOfGroup = 5;
// A stride of a multiple of 4 KiB would put all points of a tile in the same few cache sets.
constexpr int64_t kStridePad = 16;

int64_t results_per_side(const Window& window) { return kPatch + 1 - window.k_h; }

bool has_few_channels(const ConvShape& shape) {
  return shape.groups == 1 && shape.c_in <= cpu::kMostSmallChannels && results_per_side(shape.window) == 4;
}

// Powers of the points, divided by what Lagrange interpolation divides them by: the rows of G.
void weight_rows(int taps, double (&g)[kPatch][5]) {
  const double half = 1 / std::sqrt(2.0), root = std::sqrt(2.0);
  const double points[5] = {0, half, -half, root, -root}, divisors[5] = {1, -1.5, -1.5, 6, 6};
  for (int p = 0; p < 5; ++p) {
    double power = 1;
    for (int t = 0; t < taps; ++t, power *= points[p]) g[p][t] = power / divisors[p];
  }
  for (int t = 0; t < taps; ++t) g[5][t] = t == taps - 1;
}

// U = G g G^T for one vector of output channels and one input channel, in double precision and in loops over lanes that the
// compiler can vectorise. `filled` lanes have a kernel, src_stride apart; the others become zero.
void transform_weights(const double (&g)[kPatch][5], int taps, const float* src, int64_t src_stride, int64_t filled, float* dst,
                       int64_t point_stride, int64_t lanes) {
  double tap[25][kMostLanes] = {}, half[kPatch][5][kMostLanes] = {};
  for (int64_t lane = 0; lane < filled; ++lane)
    for (int t = 0; t < taps * taps; ++t) tap[t][lane] = src[lane * src_stride + t];
  for (int i = 0; i < kPatch; ++i)
    for (int x = 0; x < taps; ++x)
      for (int y = 0; y < taps; ++y)
        for (int64_t lane = 0; lane < kMostLanes; ++lane) half[i][x][lane] += g[i][y] * tap[y * taps + x][lane];
  for (int i = 0; i < kPatch; ++i)
    for (int j = 0; j < kPatch; ++j) {
      double sum[kMostLanes] = {};
      for (int x = 0; x < taps; ++x)
        for (int64_t lane = 0; lane < kMostLanes; ++lane) sum[lane] += half[i][x][lane] * g[j][x];
      float* const to = dst + (i * kPatch + j) * point_stride;
      for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = static_cast<float>(sum[lane]);
    }
}

bool has_transforms(const ConvShape& shape) {
  const Window& w = shape.window;
  if (w.k_h != w.k_w || (w.k_h != 3 && w.k_h != 5) || w.stride_h != 1 || w.stride_w != 1) return false;
  if (w.is_dilated() && shape.pools_in_registers) return false;  // neighbours are of different tiles
  const int64_t out = results_per_side(w);
  return shape.h >= out * w.dilation_h && shape.w >= out * w.dilation_w;  // whole tiles fit
}

int64_t bands_of(const ConvShape& shape) {
  return divide_up(divide_up(shape.h, shape.window.dilation_h), results_per_side(shape.window));
}

int64_t tiles_across(const ConvShape& shape) {
  const int64_t dilation = shape.window.dilation_w;
  return dilation * divide_up(divide_up(shape.w, dilation), results_per_side(shape.window));
}

}  // namespace

bool can_use_winograd(const ConvShape& shape, const StepSpec& spec) {
  const Window& w = shape.window;
  if (!has_transforms(shape)) return false;
  // A weight that is not finite would make every tile a case for the direct kernels.
  const float* const end = spec.weight + shape.c_out * shape.c_in * w.k_h * w.k_w;
  float poison = 0;
  for (const float* p = spec.weight; p < end; ++p) poison += *p * 0.0f;
  return poison == 0;
}

double direct_time(const ConvPart& part) {
  const double weights = static_cast<double>(part.c_in * part.taps * part.out_vectors);
  return weights * std::max(static_cast<double>(part.places) / kDirectShare, part.lanes / kStreamFloats);
}

double winograd_time(const ConvPart& part, bool has_few_channels) {
  const double tiles = static_cast<double>(part.places), out_vectors = static_cast<double>(part.out_vectors);
  const double c_in = static_cast<double>(part.c_in);
  const double products = tiles * kPoints * (c_in + kStoreCost) * out_vectors / kProductShare;
  if (has_few_channels)
    return products + tiles * (kFewInputCost + out_vectors * (part.lanes < kMostLanes ? kFewSpilledOutputCost : kFewOutputCost));
  const double stream = kPoints * c_in * out_vectors * part.lanes / kStreamFloats;
  const double in_vectors = static_cast<double>(divide_up(part.c_in * part.groups, part.lanes));
  return std::max(products, stream) + tiles * (in_vectors * kInputCost + out_vectors * kOutputCost);
}

bool is_winograd_faster(const ConvShape& shape, const cpu::KernelSet& set, double direct_speed) {
  if (!has_transforms(shape)) return false;
  const int64_t taps = shape.window.k_h * shape.window.k_w;
  const int64_t out_vectors = shape.groups * divide_up(shape.c_out / shape.groups, set.lanes);
  const ConvPart pixels{shape.h * shape.w, shape.c_in, taps, out_vectors, set.lanes, shape.groups};
  const int64_t count = bands_of(shape) * shape.window.dilation_h * tiles_across(shape);
  const ConvPart tiles{count, shape.c_in, taps, out_vectors, set.lanes, shape.groups};
  return winograd_time(tiles, has_few_channels(shape)) < direct_time(pixels) / direct_speed;
}

Winograd plan_winograd(const ConvShape& shape, int panel_vectors, const cpu::KernelSet& set) {
  Winograd plan;
  plan.out = results_per_side(shape.window);
  plan.side = shape.pools_in_registers ? plan.out / 2 : plan.out;
  plan.has_few_channels = has_few_channels(shape);
  plan.bands = bands_of(shape), plan.band_rows = plan.side * shape.window.dilation_h;
  plan.tiles_x = tiles_across(shape);

  plan.chain = static_cast<int32_t>(divide_up(shape.c_in, divide_up(shape.c_in, kLongestChain)));
  plan.chain_group = static_cast<int32_t>(kChainsOfGroup) * plan.chain;

  const int64_t floats = kPoints * shape.c_in * shape.c_out;
  const int64_t wanted = floats > kLargeWeightFloats ? kLargeGroup : kSmallGroup;
  const int64_t tiles = plan.bands * plan.band_tiles();
  plan.group = std::min(kMostGroupTiles, divide_up(tiles, divide_up(tiles, wanted)));
  // Few tiles in an image: groups span images.
  if (tiles < wanted) plan.group = wanted;

  const int64_t width = panel_vectors * set.lanes;
  int64_t v_floats;
  if (plan.has_few_channels) {
    plan.v_tile_stride = kPoints * cpu::kMostSmallChannels;
    v_floats = plan.group * plan.v_tile_stride;
    plan.m_offset = v_floats;
    plan.poison_offset = v_floats;
  } else {
    plan.v_tile_stride = round_up(shape.c_in * shape.groups, set.lanes);
    plan.v_point_stride = plan.group * plan.v_tile_stride;
    if (plan.v_point_stride % 64 == 0) plan.v_point_stride += kStridePad;
    v_floats = kPoints * plan.v_point_stride;
    plan.m_offset = v_floats;
    plan.poison_offset = plan.m_offset + kPoints * (plan.group * width + kStridePad);
  }
  plan.scratch_floats = plan.poison_offset + plan.group * set.lanes;
  return plan;
}

PackedPtr pack_winograd(const StepSpec& spec, const std::vector<int>& panels, int lanes, bool has_few_channels) {
  const int taps = static_cast<int>(spec.conv.k_h);
  const int64_t c_in = spec.in, kernel = spec.conv.k_h * spec.conv.k_w;
  double g[kPatch][5];
  weight_rows(taps, g);
  auto packed = make_panels(spec, panels, lanes, kPoints * c_in);
  std::vector<float> block;  // [point][channel][lane] of a few channels: rows of all points at once would miss every cache
  for (const Panel& panel : packed->panels) {
    const int64_t width = panel.vectors * lanes;
    float* const dst = packed->weight->data() + panel.weight_offset;
    block.resize(static_cast<size_t>(kPoints * kBlockChannels * width));
    for (int64_t begin = 0; begin < c_in; begin += kBlockChannels) {
      const int64_t count = std::min(kBlockChannels, c_in - begin);
      for (int64_t c = begin; c < begin + count; ++c)
        for (int64_t first = 0; first < width; first += lanes) {
          const int64_t out = panel.first_lane + first;
          const float* const src = spec.weight + (out * c_in + c) * kernel;
          const int64_t filled = std::min({int64_t{lanes}, panel.lanes - first, spec.out - out});
          if (has_few_channels) {
            transform_weights(g, taps, src, c_in * kernel, filled, dst + first * kPoints * c_in + c * lanes, c_in * lanes, lanes);
          } else {
            transform_weights(g, taps, src, c_in * kernel, filled, &block[static_cast<size_t>((c - begin) * width + first)],
                              kBlockChannels * width, lanes);
          }
        }
      if (has_few_channels) continue;
      for (int64_t point = 0; point < kPoints; ++point)
        std::copy_n(&block[static_cast<size_t>(point * kBlockChannels * width)], count * width,
                    dst + (point * c_in + begin) * width);
    }
  }
  return packed;
}

}  // namespace fastseq
