// The spatial steps of a plan: convolution, directly or by Winograd, and pooling.
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

// The caller's pixels lie close together; everywhere else there is room for whole vectors, `all` lanes.
int64_t lanes_of(const Map& map, int64_t all) { return map.place == Map::Place::kCallerDst ? map.channels : all; }

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
  const int64_t blocks = (rows + set.product_rows[vectors] - 1) / set.product_rows[vectors];
  const int64_t size = rows / blocks, larger = rows % blocks;
  if (larger) {
    set.product[vectors][size + 1](job, larger);
    job.src += larger * (size + 1) * job.src_stride;
    job.dst += larger * (size + 1) * vectors * set.lanes;
  }
  set.product[vectors][size](job, blocks - larger);
}

}  // namespace

const float* Executor::source(const Map& map, const Workspace& at) const {
  return map.place == Map::Place::kCallerSrc ? at.src : target(map, at);
}

float* Executor::target(const Map& map, const Workspace& at) const {
  if (map.place == Map::Place::kCallerDst) return at.dst;
  if (map.place == Map::Place::kFeatures) return at.features;
  if (map.place == Map::Place::kRing) return at.scratch;
  return (map.is_per_image ? at.own : at.arena) + map.offset + map.origin;
}

void Executor::copy_input(const Workspace& at, int64_t first, int64_t last) const {
  const Map& to = plan_.entry_;
  float* const dst = target(to, at);
  for (int64_t y = first; y < last; ++y) {
    float* const row = dst + y * to.row_stride;
    if (plan_.input_.is_nhwc) {
      const float* src = at.src + y * to.w * to.channels;
      if (to.pitch == to.channels) {
        std::copy(src, src + to.w * to.channels, row);
      } else {
        for (int64_t x = 0; x < to.w; ++x) std::copy(src + x * to.channels, src + (x + 1) * to.channels, row + x * to.pitch);
      }
    } else {
      // Planes to pixels: in the source a channel is a row of h * w elements.
      kernels_.transpose(at.src + y * to.w, to.h * to.w, row, to.pitch, to.w, to.channels, false);
    }
  }
}

void Executor::copy_output(const Workspace& at, int64_t first, int64_t last) const {
  const Map& from = plan_.exit_;
  const int64_t plane = from.h * from.w;
  kernels_.transpose(source(from, at) + first * from.row_stride, from.pitch, at.dst + first * from.w, plane, from.channels,
                     (last - first) * from.w, true);
}

void Executor::run_step(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const {
  if (!step.has_conv) {
    pool_rows(step, at, first, last);
    return;
  }
  if (!step.has_pool || step.pools_in_registers) {
    if (step.winograd) {
      const int64_t side = step.winograd.side;
      run_winograd(step, &at, 1, step.dst, step.lower, first / side, (last + side - 1) / side, {}, at.scratch);
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
    const int64_t end_conv = std::min(step.conv_h, (end - 1) * step.pool.stride_h - step.pool.pad_top + step.pool.k_h);
    made = std::max(made, begin_conv);
    if (step.winograd) {
      const int64_t side = step.winograd.side;
      run_winograd(step, &at, 1, step.ring, kNoLower, made / side, (end_conv + side - 1) / side, {}, at.scratch);
    } else if (made < end_conv) {
      conv_rows(step, at, step.ring, kNoLower, made, end_conv, {});
    }
    made = std::max(made, end_conv);
    pool_rows(step, at, row, end);
    row = end;
  }
}

// All rows of some panels, of all images.
void Executor::run_share(const SpatialStep& step, const Workspace* images, int64_t count, Share share, float* own_scratch) const {
  if (step.winograd) {
    run_winograd(step, images, count, step.dst, step.lower, 0, step.winograd.bands, share, own_scratch);
  } else {
    for (int64_t i = 0; i < count; ++i) conv_rows(step, images[i], step.dst, step.lower, 0, step.dst.h, share);
  }
}

void Executor::activate(const ActivationPass& pass, cpu::ActivationJob job, int64_t first_channel) const {
  if (pass.slopes.empty()) {
    // Dense rows are one: only the last has lanes that fill no vector.
    if (job.row_stride == job.lanes) job.lanes *= job.rows, job.rows = 1;
  } else {
    job.slopes = pass.slopes.data() + first_channel;
  }
  job.a = pass.a, job.b = pass.b;
  kernels_.activation[static_cast<int>(pass.kind)](job);
}

void Executor::activate_rows(const SpatialStep& step, const Workspace& at, const Map& dst, int64_t row, int64_t rows,
                             int64_t first_lane, int64_t end_lane) const {
  cpu::ActivationJob job = {};
  job.rows = dst.w, job.row_stride = dst.pitch, job.lanes = end_lane - first_lane;
  for (int64_t y = row; y < row + rows; ++y) {
    job.data = target(dst, at) + (y % dst.rows_kept) * dst.row_stride + first_lane;
    activate(step.activation, job, first_lane);
  }
}

void Executor::conv_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first, int64_t last,
                         Share share) const {
  if (step.is_plane) {
    plane_rows(step, at, dst, lower, first, last);
    return;
  }
  const bool activates = step.activation && !step.activates_pooled;
  const int64_t room = lanes_of(dst, step.weights->bias->size());
  if (step.panels_outermost) {
    for (const Panel& panel : step.weights->panels)
      for (int64_t row = first; share.has(panel) && row < last; row += step.block_rows) {
        const int64_t rows = std::min(step.block_rows, last - row);
        conv_panel(step, at, dst, lower, panel, row, rows);
        if (activates)
          activate_rows(step, at, dst, row, rows, panel.first_lane,
                        std::min<int64_t>(room, panel.first_lane + panel.vectors * kernels_.lanes));
      }
  } else {
    for (int64_t row = first; row < last; row += step.block_rows) {
      const int64_t rows = std::min(step.block_rows, last - row);
      for (const Panel& panel : step.weights->panels) conv_panel(step, at, dst, lower, panel, row, rows);
      if (activates) activate_rows(step, at, dst, row, rows, 0, room);
    }
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
    if (step.activation && !step.activates_pooled) activate_planes(step, job.dst);
    kernels_.transpose(job.dst, job.dst_stride, target(dst, at) + (row % dst.rows_kept) * dst.row_stride, dst.pitch,
                       step.conv_w / scale, channels, true);
  }
}

// A row of each channel, on its way from plane_row to pixels.
void Executor::activate_planes(const SpatialStep& step, float* planes) const {
  cpu::ActivationJob job = {};
  job.data = planes, job.rows = step.dst.channels, job.row_stride = step.plane_stride;
  job.lanes = step.pools_in_registers ? step.plane_stride / 2 : step.plane_stride;  // whole vectors: all that plane_row writes
  if (step.activation.slopes.empty()) {
    activate(step.activation, job, 0);
    return;
  }
  ActivationPass channel;
  channel.kind = Activation::kLeakyRelu;
  job.rows = 1;
  for (int64_t c = 0; c < step.dst.channels; ++c, job.data += step.plane_stride) {
    channel.a = step.activation.slopes[static_cast<size_t>(c)];
    activate(channel, job, 0);
  }
}

void Executor::conv_panel(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, const Panel& panel,
                          int64_t row, int64_t rows) const {
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  cpu::TileJob job = conv_job(step, at, lower, panel, row * scale * step.conv.stride_h, 0);
  job.src_offset = step.src_offset.data();
  const int64_t room = lanes_of(dst, step.weights->bias->size());
  job.lanes = static_cast<int32_t>(std::min<int64_t>(panel.vectors * kernels_.lanes, room - panel.first_lane));
  job.dst = target(dst, at) + (row % dst.rows_kept) * dst.row_stride + panel.first_lane;
  job.dst_offset = step.dst_offset.data();
  run_conv(step, panel, job, rows * (step.conv_w / scale));
}

// All but the pixels and where they go; the source is the window of the input that belongs to row y and column x before padding.
cpu::TileJob Executor::conv_job(const SpatialStep& step, const Workspace& at, float lower, const Panel& panel, int64_t y,
                                int64_t x) const {
  cpu::TileJob job = {};
  job.src = source(step.src, at) + (y - step.conv.pad_top) * step.src.row_stride + (x - step.conv.pad_left) * step.src.pitch;
  job.runs = step.runs.data();
  job.run_count = static_cast<int32_t>(step.runs.size());
  job.weight = step.weights->weight->data() + panel.weight_offset;
  job.bias = step.weights->bias->data() + panel.first_lane;
  job.lower = lower;
  return job;
}

void Executor::run_conv(const SpatialStep& step, const Panel& panel, const cpu::TileJob& job, int64_t count) const {
  if (step.pools_in_registers) {
    run_tiles(kernels_.pool_tile[panel.vectors], kernels_.pool_rows[panel.vectors] / 4, job, count, 4);
  } else {
    run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, count, 1);
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
  const int64_t total = image_count * (last - first) * w.tiles_x;
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  const int64_t last_row = dst.h - w.side, last_column = dst.w - w.side;

  struct Place {
    int64_t image, row, column;  // of the first result
  };
  Place places[kMostGroupTiles];
  int64_t image = 0, band = first, x = 0;  // of the next tile
  const float* src[kMostGroupTiles];
  cpu::WinogradTile tiles[kMostGroupTiles];

  const int64_t groups = (total + w.group - 1) / w.group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = total * g / groups, count = total * (g + 1) / groups - begin;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t wanted_row = band * w.side, wanted_column = x * w.side;
      const int64_t row = std::min(wanted_row, last_row), column = std::min(wanted_column, last_column);
      const Workspace& at = images[image];
      places[t] = {image, row, column};
      src[t] = source(step.src, at) + (row * scale - step.conv.pad_top) * step.src.row_stride +
               (column * scale - step.conv.pad_left) * step.src.pitch;
      tiles[t] = {target(dst, at) + row * dst.row_stride + column * dst.pitch, static_cast<int32_t>(wanted_row - row),
                  static_cast<int32_t>(wanted_column - column)};
      if (++x < w.tiles_x) continue;
      x = 0;
      if (++band == last) band = first, ++image;
    }

    cpu::WinogradInputJob in = {};
    in.src = src, in.tiles = static_cast<int32_t>(count);
    in.src_row_stride = step.src.row_stride, in.src_pitch = step.src.pitch;
    in.channels = static_cast<int32_t>(step.src.channels);
    in.dst = v, in.dst_point_stride = w.v_point_stride, in.dst_tile_stride = w.v_tile_stride;
    (w.has_few_channels ? kernels_.winograd_small_input : kernels_.winograd_input)(in);

    cpu::WinogradOutputJob out = {};
    out.lower = lower;
    out.tile = tiles, out.tiles = static_cast<int32_t>(count);
    out.dst_row_stride = dst.row_stride, out.dst_pitch = dst.pitch;
    out.poison = poison;
    const int64_t room = lanes_of(dst, weights.bias->size());
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
      if (!step.activation || step.activates_pooled) return;
      cpu::ActivationJob job = {};
      job.row_stride = dst.pitch, job.lanes = end_lane - first_lane;
      for (const cpu::WinogradTile* tile = tiles; tile < tiles + count; ++tile)
        for (int64_t y = tile->skip_rows; y < w.side; ++y) {
          job.data = tile->dst + y * dst.row_stride + tile->skip_columns * dst.pitch + first_lane;
          job.rows = w.side - tile->skip_columns;
          activate(step.activation, job, first_lane);
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
        const float* const u = weights.weight->data() + panel.weight_offset + point * step.src.channels * width;
        run_products(kernels_, panel.vectors,
                     {v + point * w.v_point_stride, w.v_tile_stride, u, in.channels, w.chain, w.chain_group, m + point * m_stride},
                     count);
      }
      out.src = m, out.src_point_stride = m_stride, out.src_tile_stride = width;
      out.bias = weights.bias->data() + panel.first_lane;
      out.first_lane = panel.first_lane;
      out.lanes = static_cast<int32_t>(std::min(width, room - panel.first_lane));
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
  for (const Panel& panel : step.weights->panels) {
    const int64_t width = panel.vectors * kernels_.lanes;
    const int64_t begin = std::max<int64_t>(panel.first_lane, first_lane), end = std::min(panel.first_lane + width, end_lane);
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

void Executor::pool_rows(const SpatialStep& step, const Workspace& at, int64_t first, int64_t last) const {
  const Map& from = step.has_conv ? step.ring : step.src;
  const float* const src = source(from, at);
  float* const dst = target(step.dst, at);
  cpu::PoolRowJob job = {};
  job.w_in = static_cast<int32_t>(from.w), job.w_out = static_cast<int32_t>(step.dst.w);
  job.k_w = static_cast<int32_t>(step.pool.k_w), job.stride_w = static_cast<int32_t>(step.pool.stride_w);
  job.pad_w = static_cast<int32_t>(step.pool.pad_left);
  job.src_pitch = from.pitch, job.dst_pitch = step.dst.pitch;
  job.channels = static_cast<int32_t>(from.channels);
  job.can_overread = from.place != Map::Place::kCallerSrc;
  job.lower = step.lower;
  job.row_stride = from.row_stride;
  // The pool writes channels only. In the arena nothing else does, so that what is there stays one of a function's values;
  // elsewhere other data may have become subnormal from call to call.
  const int64_t lanes = step.dst.place == Map::Place::kArena ? step.dst.pitch : step.dst.channels;
  job.ring_begin = src, job.ring_end = src + from.rows_kept * from.row_stride;
  for (int64_t y = first; y < last; ++y) {
    const int64_t top = y * step.pool.stride_h - step.pool.pad_top;
    const int64_t begin = std::max<int64_t>(0, top), end = std::min(from.h, top + step.pool.k_h);
    job.src = src + begin % from.rows_kept * from.row_stride;
    job.row_count = static_cast<int32_t>(end - begin);
    job.dst = dst + y * step.dst.row_stride;
    kernels_.pool_row(job);
    if (step.activation && step.activates_pooled) activate_rows(step, at, step.dst, y, 1, 0, lanes);
  }
}

}  // namespace fastseq
