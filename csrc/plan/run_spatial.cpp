// The spatial steps of a plan: convolution, directly or by Winograd, and what is behind one or stands alone.
#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "plan/executor.h"
#include "plan/tiles.h"

namespace fastseq {
namespace {

constexpr float kNoLower = -std::numeric_limits<float>::infinity();
constexpr int64_t kMostLanes = 16;  // of a vector

// By their bits, which the compiler can take several at a time.
bool has_nan(const float* values, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    found |= (bits & 0x7fffffffu) > 0x7f800000u;
  }
  return found != 0;
}

// `rows` rows through products of nearly equal height.
void run_products(const cpu::KernelSet& set, int vectors, cpu::ProductJob job, int64_t rows) {
  const int64_t blocks = divide_up(rows, set.product_rows[vectors]);
  const int64_t size = rows / blocks, larger = rows % blocks;
  if (larger) {
    set.product[vectors][size + 1](job, larger);
    job.src += larger * (size + 1) * job.src_stride;
    job.dst += larger * (size + 1) * vectors * set.lanes;
  }
  set.product[vectors][size](job, blocks - larger);
}

// Blocks of rows [first, last) and of channels, of as many numbers as `room` has: a few vectors of pixels, then whole channels.
template <typename Function>
void for_staged(int64_t room, const Map& map, int64_t first, int64_t last, const Function& function) {
  const int64_t block = std::min(last - first, divide_up(kStagedPixels, map.w));
  int64_t most = room / (block * map.w);
  if (most < map.channels) most = most / 8 * 8;  // of the blocks that are transposed
  assert(block > 0 && most > 0);
  for (int64_t row = first; row < last; row += block)
    for (int64_t channel = 0; channel < map.channels; channel += most)
      function(row, std::min(block, last - row), channel, std::min(most, map.channels - channel));
}

}  // namespace

// The caller's pixels lie close together; everywhere else there is room for whole vectors.
int64_t Executor::lanes_of(const Map& map) const {
  if (map.place == Map::Place::kCallerDst) return map.channels;
  return round_up(map.channels, kernels_.lanes);
}

const float* Executor::source(const Map& map, const Workspace& at) const {
  return map.place == Map::Place::kCallerSrc ? static_cast<const float*>(at.src) : target(map, at);
}

float* Executor::target(const Map& map, const Workspace& at) const {
  if (map.place == Map::Place::kCallerDst) return static_cast<float*>(at.dst);
  if (map.place == Map::Place::kFeatures) return at.features + map.origin;
  if (map.place == Map::Place::kRing) return at.scratch;
  return (map.is_per_image ? at.own : at.arena) + map.offset + map.origin;
}

void Executor::take_input(const Workspace& at, int64_t first, int64_t last) const {
  renew_border(plan_.entry_, at, first, last);
  if (is_narrow()) {
    widen_input(at, first, last);
  } else {
    copy_input(at, first, last);
  }
  if (!plan_.entry_paired_.pitch) return;
  renew_border(plan_.entry_paired_, at, first, last);
  pair_map(plan_.entry_, plan_.entry_paired_, at, first, last, 0, plan_.entry_.channels);
}

void Executor::pair_map(const Map& from, const Map& to, const Workspace& at, int64_t first, int64_t last, int64_t first_lane,
                        int64_t end_lane) const {
  const int64_t end = std::min(end_lane, from.channels);
  if (first_lane >= end) return;
  const bool is_dense = first_lane == 0 && end == from.pitch;  // pixels without lanes between them
  for (int64_t y = first; y < last; ++y) {
    const float* const src = source(from, at) + y * from.row_stride + first_lane;
    float* const row = target(to, at) + y * to.row_stride;
    auto* const dst = reinterpret_cast<uint16_t*>(row);
    kernels_.narrow[static_cast<int>(Storage::kBf16)](
        {src, dst + first_lane, is_dense ? 1 : from.w, is_dense ? from.w * end : end - first_lane, from.pitch, 2 * to.pitch});
    if (end % 2)  // its partner, where memory may have been another's
      for (int64_t x = 0; x < from.w; ++x) dst[2 * x * to.pitch + end] = 0;
  }
}

void Executor::copy_input(const Workspace& at, int64_t first, int64_t last) const {
  const Map& to = plan_.entry_;
  const float* const all = static_cast<const float*>(at.src);
  float* const dst = target(to, at);
  if (!plan_.input_.is_nhwc) {
    // Planes to pixels: in the source a channel is a row of h * w elements.
    kernels_.transpose({all + first * to.w, to.h * to.w, dst + first * to.row_stride, to.pitch, to.w, to.channels, false,
                        last - first, to.w, to.row_stride});
    return;
  }
  for (int64_t y = first; y < last; ++y) {
    float* const row = dst + y * to.row_stride;
    const float* const src = all + y * to.w * to.channels;
    if (to.pitch == to.channels) {
      std::copy(src, src + to.w * to.channels, row);
    } else {
      for (int64_t x = 0; x < to.w; ++x) std::copy(src + x * to.channels, src + (x + 1) * to.channels, row + x * to.pitch);
    }
  }
}

void Executor::renew_border(const Map& map, const Workspace& at, int64_t first, int64_t last) const {
  if (!map.is_shared || !map.has_border) return;
  float* const pixels = target(map, at);
  float* const begin = pixels - map.origin;
  if (first == 0) std::fill(begin, pixels, 0.0f);
  for (int64_t y = first; y < last; ++y) {
    float* const end_of_row = pixels + y * map.row_stride + map.w * map.pitch;
    std::fill(end_of_row, y + 1 == map.h ? begin + map.size : pixels + (y + 1) * map.row_stride, 0.0f);
  }
}

// From 16-bit numbers: pixels where they go, planes by way of a buffer, as many rows at a time as it holds.
void Executor::widen_input(const Workspace& at, int64_t first, int64_t last) const {
  const Map& to = plan_.entry_;
  const uint16_t* const src = static_cast<const uint16_t*>(at.src);
  const cpu::ConvertLoop widen = kernels_.widen[static_cast<int>(plan_.input_.storage)];
  float* const dst = target(to, at);
  if (plan_.input_.is_nhwc || to.channels == 1) {
    for (int64_t y = first; y < last; ++y) {
      const bool is_dense = to.pitch == to.channels;
      widen({src + y * to.w * to.channels, dst + y * to.row_stride, is_dense ? 1 : to.w,
             is_dense ? to.w * to.channels : to.channels, to.channels, to.pitch});
    }
    return;
  }
  const int64_t plane = to.h * to.w;
  for_staged(plan_.staged_floats_, to, first, last, [&](int64_t row, int64_t rows, int64_t channel, int64_t channels) {
    const int64_t length = rows * to.w;
    widen({src + channel * plane + row * to.w, at.scratch, channels, length, plane, length});
    kernels_.transpose(
        {at.scratch, length, dst + row * to.row_stride + channel, to.pitch, to.w, channels, true, rows, to.w, to.row_stride});
  });
}

void Executor::copy_output(const Workspace& at, int64_t first, int64_t last) const {
  if (is_narrow()) {
    narrow_output(at, first, last);
    return;
  }
  const Map& from = plan_.exit_;
  const int64_t plane = from.h * from.w;
  kernels_.transpose({source(from, at) + first * from.row_stride, from.pitch, static_cast<float*>(at.dst) + first * from.w, plane,
                      from.channels, (last - first) * from.w, true});
}

// To 16-bit numbers, as widen_input.
void Executor::narrow_output(const Workspace& at, int64_t first, int64_t last) const {
  const Map& from = plan_.exit_;
  const float* const src = source(from, at);
  uint16_t* const dst = static_cast<uint16_t*>(at.dst);
  const cpu::ConvertLoop narrow = kernels_.narrow[static_cast<int>(plan_.input_.storage)];
  if (plan_.output_is_nhwc_) {
    narrow({src + first * from.row_stride, dst + first * from.w * from.channels, (last - first) * from.w, from.channels, from.pitch,
            from.channels});
    return;
  }
  const int64_t plane = from.h * from.w;
  for_staged(plan_.staged_floats_, from, first, last, [&](int64_t row, int64_t rows, int64_t channel, int64_t channels) {
    const int64_t length = rows * from.w;
    kernels_.transpose({src + row * from.row_stride + channel, from.pitch, at.scratch, length, channels, length, true});
    narrow({at.scratch, dst + channel * plane + row * from.w, channels, length, length, plane});
  });
}

void Executor::run_step(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const {
  make_rows(step, at, first, last);
  if (!step.paired.pitch) return;
  renew_border(step.paired, at, first, last);
  pair_map(step.dst, step.paired, at, first, last, 0, step.dst.channels);
}

void Executor::make_rows(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const {
  renew_border(step.dst, at, first, last);
  if (!step.has_conv) {
    map_rows(step, at, step.src, first, last);
    return;
  }
  if (!step.has_pool || step.pools_in_registers) {
    if (step.winograd) {
      const int64_t rows = step.winograd.band_rows;
      run_winograd(step, &at, 1, step.dst, step.lower, first / rows, divide_up(last, rows), {}, at.scratch);
    } else {
      conv_rows(step, at, step.dst, step.lower, first, last, {});
    }
    return;
  }
  // Through the ring: the rows a group of pooled rows needs and that are not there yet, then the pool.
  int64_t made = 0;
  for (int64_t row = first; row < last;) {
    const int64_t end = std::min(last, row + step.group_rows);
    const int64_t begin_conv = std::max<int64_t>(0, row * step.pool.stride_h - step.pool.pad_top);
    const int64_t end_conv = std::min(step.conv_h, (end - 1) * step.pool.stride_h - step.pool.pad_top + step.pool.reach_h());
    made = std::max(made, begin_conv);
    if (step.winograd) {
      const int64_t rows = step.winograd.band_rows;
      run_winograd(step, &at, 1, step.ring, kNoLower, made / rows, divide_up(end_conv, rows), {}, at.scratch);
    } else if (made < end_conv) {
      conv_rows(step, at, step.ring, kNoLower, made, end_conv, {});
    }
    made = std::max(made, end_conv);
    map_rows(step, at, step.ring, row, end);
    row = end;
  }
}

// All rows of some panels, of all images.
void Executor::run_share(const SpatialStep& step, const Workspace* images, int64_t count, Share share, float* own_scratch) const {
  // Borders are one share's: what the others would write, too, they would write at the same time.
  for (int64_t i = 0; share.begin == 0 && i < count; ++i) {
    renew_border(step.dst, images[i], 0, step.dst.h);
    if (step.paired.pitch) renew_border(step.paired, images[i], 0, step.dst.h);
  }
  if (step.winograd) {
    run_winograd(step, images, count, step.dst, step.lower, 0, step.winograd.bands, share, own_scratch);
  } else {
    for (int64_t i = 0; i < count; ++i) conv_rows(step, images[i], step.dst, step.lower, 0, step.dst.h, share);
  }
  if (!step.paired.pitch) return;
  int64_t first_lane = std::numeric_limits<int64_t>::max(), end_lane = 0;
  for (const Panel& panel : (step.winograd ? step.winograd.weights : step.weights)->panels) {
    if (!share.has(panel)) continue;
    first_lane = std::min<int64_t>(first_lane, panel.first_lane);
    end_lane = panel.first_lane + panel.lanes;
  }
  for (int64_t i = 0; i < count; ++i) pair_map(step.dst, step.paired, images[i], 0, step.dst.h, first_lane, end_lane);
}

void Executor::activate(const Pass& pass, cpu::ActivationJob job, int64_t first_channel) const {
  if (pass.slopes.empty()) {
    // Dense rows are one: only the last has lanes that fill no vector.
    if (job.row_stride == job.lanes) job.lanes *= job.rows, job.rows = 1;
  } else {
    job.slopes = pass.slopes.data() + first_channel;
  }
  job.a = pass.a, job.b = pass.b;
  if (pass.kind != Activation::kNone) kernels_.activation[static_cast<int>(pass.kind)](job);
  if (pass.rounding != Storage::kF32) kernels_.round[static_cast<int>(pass.rounding)](job);
}

void Executor::activate_rows(const Pass& pass, const Workspace& at, const Map& dst, int64_t row, int64_t rows, int64_t first_lane,
                             int64_t end_lane) const {
  cpu::ActivationJob job = {};
  job.rows = dst.w, job.row_stride = dst.pitch, job.lanes = end_lane - first_lane;
  for (int64_t y = row; y < row + rows; ++y) {
    job.data = target(dst, at) + (y % dst.rows_kept) * dst.row_stride + first_lane;
    activate(pass, job, first_lane);
  }
}

void Executor::conv_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first, int64_t last,
                         Share share) const {
  if (step.is_plane) {
    plane_rows(step, at, dst, lower, first, last);
    return;
  }
  if (step.is_depthwise) {
    depthwise_rows(step, at, dst, lower, first, last);
    return;
  }
  const int64_t room = lanes_of(dst);
  if (step.panels_outermost) {
    for (const Panel& panel : step.weights->panels)
      for (int64_t row = first; share.has(panel) && row < last; row += step.block_rows) {
        const int64_t rows = std::min(step.block_rows, last - row);
        conv_panel(step, at, dst, lower, panel, row, rows);
        if (step.on_results)
          activate_rows(step.on_results, at, dst, row, rows, panel.first_lane,
                        std::min<int64_t>(room, panel.first_lane + panel.lanes));
      }
  } else {
    for (int64_t row = first; row < last; row += step.block_rows) {
      const int64_t rows = std::min(step.block_rows, last - row);
      for (const Panel& panel : step.weights->panels) conv_panel(step, at, dst, lower, panel, row, rows);
      if (step.on_results) activate_rows(step.on_results, at, dst, row, rows, 0, room);
    }
  }
}

void Executor::depthwise_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first,
                              int64_t last) const {
  const Window& window = step.conv;
  cpu::DepthwiseJob job = {};
  job.src_row_stride = window.stride_h * step.src.row_stride, job.src_pitch = window.stride_w * step.src.pitch;
  job.tap_row_stride = window.dilation_h * step.src.row_stride, job.tap_pitch = window.dilation_w * step.src.pitch;
  job.k_h = static_cast<int32_t>(window.k_h), job.k_w = static_cast<int32_t>(window.k_w);
  job.weight = step.weights->weight->data(), job.bias = step.weights->bias->data();
  job.terms = 1;
  if (step.weights->index) {
    job.terms = static_cast<int32_t>(step.terms);
    job.index = reinterpret_cast<const int32_t*>(step.weights->index->data());
    job.first_channel = step.weights->first_channel.data();
  }
  job.lower = lower;
  job.width = static_cast<int32_t>(step.conv_w);
  job.channels = static_cast<int32_t>(lanes_of(dst));
  job.dst_row_stride = dst.row_stride, job.dst_pitch = dst.pitch;
  for (int64_t row = first; row < last; row += step.block_rows) {
    const int64_t rows = std::min(step.block_rows, last - row);
    job.rows = static_cast<int32_t>(rows);
    job.src =
        source(step.src, at) + (row * window.stride_h - window.pad_top) * step.src.row_stride - window.pad_left * step.src.pitch;
    job.dst = target(dst, at) + (row % dst.rows_kept) * dst.row_stride;
    kernels_.depthwise_rows(job);
    if (step.on_results) activate_rows(step.on_results, at, dst, row, rows, 0, job.channels);
  }
}

void Executor::plane_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first,
                          int64_t last) const {
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  cpu::PlaneJob job = {};
  job.src_row_stride = step.src.row_stride;
  job.k_h = static_cast<int32_t>(step.conv.k_h), job.k_w = static_cast<int32_t>(step.conv.k_w);
  job.weight = step.weights->weight->data(), job.bias = step.weights->bias->data();
  job.lower = lower;
  job.width = static_cast<int32_t>(step.conv_w), job.outs = static_cast<int32_t>(dst.channels);
  job.dst = at.scratch + step.scratch_offset, job.dst_stride = step.plane_stride;
  // A block of eight at least is faster, where a pixel has the room.
  const int64_t channels =
      dst.place != Map::Place::kCallerDst && dst.pitch >= 8 ? std::max<int64_t>(dst.channels, 8) : dst.channels;
  for (int64_t row = first; row < last; ++row) {
    job.src = source(step.src, at) + (row * scale - step.conv.pad_top) * step.src.row_stride - step.conv.pad_left;
    kernels_.plane_row[step.pools_in_registers](job);
    if (step.on_results) activate_planes(step, job.dst);
    kernels_.transpose({job.dst, job.dst_stride, target(dst, at) + (row % dst.rows_kept) * dst.row_stride, dst.pitch,
                        step.conv_w / scale, channels, true});
  }
}

// A row of each channel, on its way from plane_row to pixels.
void Executor::activate_planes(const SpatialStep& step, float* planes) const {
  cpu::ActivationJob job = {};
  job.data = planes, job.rows = step.dst.channels, job.row_stride = step.plane_stride;
  job.lanes = step.pools_in_registers ? step.plane_stride / 2 : step.plane_stride;  // whole vectors: all that plane_row writes
  if (step.on_results.slopes.empty()) {
    activate(step.on_results, job, 0);
    return;
  }
  Pass channel;
  channel.kind = Activation::kLeakyRelu, channel.rounding = step.on_results.rounding;
  job.rows = 1;
  for (int64_t c = 0; c < step.dst.channels; ++c, job.data += step.plane_stride) {
    channel.a = step.on_results.slopes[static_cast<size_t>(c)];
    activate(channel, job, 0);
  }
}

void Executor::conv_panel(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, const Panel& panel,
                          int64_t row, int64_t rows) const {
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  cpu::TileJob job = conv_job(step, at, lower, panel, row * scale * step.conv.stride_h, 0);
  job.src_offset = step.src_offset.data();
  job.lanes = static_cast<int32_t>(std::min<int64_t>(panel.lanes, lanes_of(dst) - panel.first_lane));
  job.dst = target(dst, at) + (row % dst.rows_kept) * dst.row_stride + panel.first_lane;
  job.dst_offset = step.dst_offset.data();
  run_conv(step, panel, job, rows * (step.conv_w / scale));
}

// All but the pixels and where they go; the source is the window of the input that belongs to row y and column x before padding.
cpu::TileJob Executor::conv_job(const SpatialStep& step, const Workspace& at, float lower, const Panel& panel, int64_t y,
                                int64_t x) const {
  cpu::TileJob job = {};
  job.src = source(step.src, at) + (y - step.conv.pad_top) * step.src.row_stride + (x - step.conv.pad_left) * step.src.pitch +
            panel.first_channel;
  job.runs = step.runs.data();
  job.run_count = static_cast<int32_t>(step.runs.size());
  job.weight = step.weights->weight->data() + panel.weight_offset;
  job.bias = step.weights->bias->data() + panel.first_lane;
  job.scale = step.weights->scale ? step.weights->scale->data() + panel.first_lane : nullptr;
  job.lower = lower;
  return job;
}

void Executor::run_conv(const SpatialStep& step, const Panel& panel, const cpu::TileJob& job, int64_t count) const {
  const cpu::TileTable& table = tiles(step.is_bf16);
  if (step.pools_in_registers) {
    run_tiles(table.pool_tile[panel.vectors], table.pool_rows[panel.vectors] / 4, job, count, 4);
  } else {
    run_tiles(table.tile[panel.vectors], table.max_rows[panel.vectors], job, count, 1);
  }
}

// Bands [first, last) of each image, a group of tiles at a time: transform, products, and results panel by panel of the share.
void Executor::run_winograd(const SpatialStep& step, const Workspace* images, int64_t image_count, const Map& dst, float lower,
                            int64_t first, int64_t last, Share share, float* own_scratch) const {
  const Winograd& w = step.winograd;
  const PackedWeights& weights = *w.weights;
  float* const scratch = own_scratch + step.scratch_offset;
  float* const v = scratch;
  float* const m = scratch + w.m_offset;
  float* const poison = scratch + w.poison_offset;
  const int64_t dilation_h = step.conv.dilation_h, dilation_w = step.conv.dilation_w;
  const int64_t total = image_count * (last - first) * w.band_tiles();
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  const int64_t src_row_stride = dilation_h * step.src.row_stride, src_pitch = dilation_w * step.src.pitch;
  const int64_t dst_row_stride = dilation_h * dst.row_stride, dst_pitch = dilation_w * dst.pitch;

  struct Place {
    int64_t image, row, column;  // of the first result
  };
  Place places[kMostGroupTiles];
  int64_t image = 0, tile_row = first * dilation_h, x = 0;  // of the next tile
  const float* src[kMostGroupTiles];
  cpu::WinogradTile tiles[kMostGroupTiles];
  // Of rows or columns phase, phase + step, ... the one that a tile begins with, and how many of its are an earlier tile's: the
  // last tile is moved back inside.
  const auto begin_of = [&](int64_t length, int64_t tile, int64_t phase, int64_t step_between, int32_t& skip) {
    const int64_t count = divide_up(length - phase, step_between), wanted = tile * w.side;
    const int64_t index = std::min(wanted, count - w.side);
    skip = static_cast<int32_t>(wanted - index);
    return phase + index * step_between;
  };

  const int64_t groups = divide_up(total, w.group);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = total * g / groups, count = total * (g + 1) / groups - begin;
    for (int64_t t = 0; t < count; ++t) {
      cpu::WinogradTile& tile = tiles[t];
      const int64_t row = begin_of(dst.h, tile_row / dilation_h, tile_row % dilation_h, dilation_h, tile.skip_rows);
      const int64_t column = begin_of(dst.w, x / dilation_w, x % dilation_w, dilation_w, tile.skip_columns);
      const Workspace& at = images[image];
      places[t] = {image, row, column};
      src[t] = source(step.src, at) + (row * scale - step.conv.pad_top) * step.src.row_stride +
               (column * scale - step.conv.pad_left) * step.src.pitch;
      tile.dst = target(dst, at) + row * dst.row_stride + column * dst.pitch;
      if (++x < w.tiles_x) continue;
      x = 0;
      if (++tile_row == last * dilation_h) tile_row = first * dilation_h, ++image;
    }

    cpu::WinogradInputJob in = {};
    in.src = src, in.tiles = static_cast<int32_t>(count);
    in.src_row_stride = src_row_stride, in.src_pitch = src_pitch;
    in.channels = static_cast<int32_t>(step.src.channels);
    in.dst = v, in.dst_point_stride = w.v_point_stride, in.dst_tile_stride = w.v_tile_stride;
    (w.has_few_channels ? kernels_.winograd_small_input : kernels_.winograd_input)(in);

    cpu::WinogradOutputJob out = {};
    out.lower = lower;
    out.tile = tiles, out.tiles = static_cast<int32_t>(count);
    out.dst_row_stride = dst_row_stride, out.dst_pitch = dst_pitch;
    out.poison = poison;
    const int64_t room = lanes_of(dst);
    // Sums that are not finite: the transforms spread NaN and infinity over pixels that eager's sums do not reach. Panel by panel,
    // since panels are what threads share: what is computed again must not depend on who computed what.
    const auto mend = [&](int64_t first_lane, int64_t end_lane) {
      if (!has_nan(poison, count * kernels_.lanes)) return;
      for (int64_t t = 0; t < count; ++t)
        if (has_nan(poison + t * kernels_.lanes, kernels_.lanes))
          run_tile_directly(step, images[places[t].image], lower, places[t].row, places[t].column, tiles[t], first_lane, end_lane);
    };
    // The pixels that these tiles have stored, each of which belongs to one tile.
    const auto activate_tiles = [&](int64_t first_lane, int64_t end_lane) {
      if (!step.on_results) return;
      cpu::ActivationJob job = {};
      job.row_stride = dst_pitch, job.lanes = end_lane - first_lane;
      for (const cpu::WinogradTile* tile = tiles; tile < tiles + count; ++tile)
        for (int64_t y = tile->skip_rows; y < w.side && tile->skip_columns < w.side; ++y) {
          job.data = tile->dst + y * dst_row_stride + tile->skip_columns * dst_pitch + first_lane;
          job.rows = w.side - tile->skip_columns;
          activate(step.on_results, job, first_lane);
        }
    };
    if (w.has_few_channels) {
      std::fill(poison, poison + count * kernels_.lanes, 0.0f);
      out.src = v, out.src_tile_stride = w.v_tile_stride;
      out.weight = weights.weight->data(), out.bias = weights.bias->data();
      out.lanes = static_cast<int32_t>(room);
      kernels_.winograd_small_output[step.pools_in_registers][step.src.channels](out);
      mend(0, room);
      activate_tiles(0, room);
      continue;
    }
    for (const Panel& panel : weights.panels) {
      if (!share.has(panel)) continue;
      std::fill(poison, poison + count * kernels_.lanes, 0.0f);
      const int64_t width = panel.vectors * kernels_.lanes;
      const int64_t m_stride = count * width + 16;
      for (int64_t point = 0; point < cpu::kWinogradPoints; ++point) {
        const float* const u = weights.weight->data() + panel.weight_offset + point * step.terms * width;
        run_products(kernels_, panel.vectors,
                     {v + point * w.v_point_stride + panel.first_channel, w.v_tile_stride, u, static_cast<int32_t>(step.terms),
                      w.chain, w.chain_group, m + point * m_stride},
                     count);
      }
      out.src = m, out.src_point_stride = m_stride, out.src_tile_stride = width;
      out.bias = weights.bias->data() + panel.first_lane;
      out.first_lane = panel.first_lane;
      out.lanes = static_cast<int32_t>(std::min<int64_t>(panel.lanes, room - panel.first_lane));
      kernels_.winograd_output[w.out == 2][step.pools_in_registers](out);
      mend(panel.first_lane, panel.first_lane + out.lanes);
      activate_tiles(panel.first_lane, panel.first_lane + out.lanes);
    }
  }
}

// Lanes [first_lane, end_lane) of a tile of Winograd's. The direct kernels' panels are others: they go by way of a buffer.
void Executor::run_tile_directly(const SpatialStep& step, const Workspace& at, float lower, int64_t row, int64_t column,
                                 const cpu::WinogradTile& tile, int64_t first_lane, int64_t end_lane) const {
  constexpr int64_t kPixels = 16;
  const Winograd& w = step.winograd;
  assert(w.side * w.side <= kPixels);
  const int64_t scale = step.pools_in_registers ? 2 : 1, entries = scale * scale;
  int32_t src_offset[cpu::kWinogradPoints], dst_offset[kPixels], buffer_offset[kPixels];
  float buffer[kPixels * cpu::kMaxVectors * kMostLanes];
  int64_t count = 0;
  for (int64_t y = tile.skip_rows; y < w.side; ++y)
    for (int64_t x = tile.skip_columns; x < w.side; ++x, ++count) {
      const int64_t pixel = y * w.side + x;
      dst_offset[count] = w.dst_offset[static_cast<size_t>(pixel)];
      std::copy_n(&w.src_offset[static_cast<size_t>(pixel * entries)], entries, &src_offset[count * entries]);
    }
  if (count == 0) return;
  for (const Panel& panel : step.weights->panels) {
    const int64_t width = panel.vectors * kernels_.lanes;
    const int64_t begin = std::max<int64_t>(panel.first_lane, first_lane);
    const int64_t end = std::min<int64_t>(panel.first_lane + panel.lanes, end_lane);
    if (begin >= end) continue;
    for (int64_t i = 0; i < count; ++i) buffer_offset[i] = static_cast<int32_t>(i * width);
    cpu::TileJob job = conv_job(step, at, lower, panel, row * scale, column * scale);
    job.src_offset = src_offset, job.dst_offset = buffer_offset;
    job.dst = buffer, job.lanes = static_cast<int32_t>(width);
    run_conv(step, panel, job, count);
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(buffer + i * width + begin - panel.first_lane, end - begin, tile.dst + dst_offset[i] + begin);
  }
}

// What is behind a convolution, or is none: maps.h.
void Executor::map_rows(const SpatialStep& step, const Workspace& at, const Map& from, int64_t first, int64_t last) const {
  const float* const src = source(from, at);
  float* const dst = target(step.dst, at);
  if (step.measure) step.measure(step, from, src, at.scratch);
  if (!step.on_pooled) {
    step.rows(step, from, src, dst, first, last, at.scratch);
    return;
  }
  // Channels only are written. In the arena nothing else does, so that what is there stays one of a function's values;
  // elsewhere other data may have become subnormal from call to call.
  const bool is_own = step.dst.place == Map::Place::kArena && !step.dst.is_shared;
  const int64_t lanes = is_own ? step.dst.pitch : step.dst.channels;
  for (int64_t y = first; y < last; ++y) {
    step.rows(step, from, src, dst, y, y + 1, at.scratch);
    activate_rows(step.on_pooled, at, step.dst, y, 1, 0, lanes);
  }
}

}  // namespace fastseq
