#include "plan/executor.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "plan/in_place.h"
#include "plan/threads.h"

namespace fastseq {
namespace {

// Rough rates to decide how many threads a call is worth, not to predict its time.
constexpr double kFlopsPerMicrosecond = 80e3, kBytesPerMicrosecond = 20e3;
// Of work for each thread, and no second thread for less than twice that: one of OpenMP's waits already, another has to be started.
constexpr double kMicrosecondsPerThread = 10, kMicrosecondsPerNewThread = 100;
// From this many rows per thread a Linear chain is split by rows: weights are then read often enough to hide their way from memory.
constexpr int64_t kRowsPerThread = 24;

constexpr float kNoLower = -std::numeric_limits<float>::infinity();

// Blocks of at most `most` rows, nearly equal, and where there are few a multiple of the threads.
int64_t block_count(int64_t rows, int64_t most, int threads) {
  int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
  if (blocks < 4 * threads) blocks = std::min(rows, (blocks + threads - 1) / threads * threads);
  return blocks;
}

// Weights of a step whose rows are not divided further than into one part a thread: each part reads them all.
constexpr int64_t kHeavyWeightBytes = int64_t{768} << 10;
// Floats of an input that one thread copies in less time than it takes to meet.
constexpr int64_t kSmallCopy = 1024;
// Tiles that Winograd's products want at a time.
constexpr int64_t kProductTiles = 14;

// A panel of weights that tiles of rows would each bring from beyond L2, and the floats of it that they take together instead.
constexpr int64_t kFarPanelFloats = int64_t{128} << 10, kStretchFloats = int64_t{64} << 10;

// Rows that stay together where threads share `rows` of them, a multiple of `unit`: up to `most` parts a thread, of at least
// `least` rows, so that there is something to take over from a thread that comes late, but not at the price of idle threads at the
// end.
int64_t shared_rows(int64_t rows, int64_t unit, int64_t least, int threads, int most) {
  int64_t best = 0, best_time = 0;
  for (int parts = most; parts >= 1; parts /= 2) {
    const int64_t count = static_cast<int64_t>(threads) * parts, size = ((rows + count - 1) / count + unit - 1) / unit * unit;
    if (size < least && parts > 1) continue;
    const int64_t time = ((rows + size - 1) / size + threads - 1) / threads * size;
    if (!best || time < best_time) best = size, best_time = time;
  }
  return best;
}

// `count` rows (or windows) through tiles of at most `most`, as evenly as possible: a tail of one row would wait for its own sums.
void run_tiles(const cpu::TileLoop* loops, int most, cpu::TileJob job, int64_t count, int src_entries) {
  const int64_t tiles = (count + most - 1) / most;
  const int64_t size = count / tiles, larger = count % tiles;
  if (larger) {
    loops[size + 1](job, larger);
    job.src_offset += larger * (size + 1) * src_entries;
    job.dst_offset += larger * (size + 1);
    if (job.sums) job.sums += larger * (size + 1) * job.sums_stride;
  }
  loops[size](job, tiles - larger);
}

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

void Plan::run(const float* src, float* dst, int64_t batch, int threads, const float* const* weights) const {
  if (batch > 0) Executor(*this, weights).run(src, dst, batch, threads);
}

double Plan::microseconds(int64_t batch) const {
  return std::max(static_cast<double>(batch) * flops_ / kFlopsPerMicrosecond,
                  static_cast<double>(weight_bytes_) / kBytesPerMicrosecond);
}

int Executor::useful_threads(int64_t batch, int threads) const {
  if (threads <= 1) return 1;
  const double micros = plan_.microseconds(batch);
  const double per_thread = starts_threads() ? kMicrosecondsPerNewThread : kMicrosecondsPerThread;
  if (micros < 2 * per_thread || (threads = usable_threads(threads)) == 1) return 1;
  return static_cast<int>(std::min<double>(threads, micros / per_thread));
}

void Executor::run(const float* src, float* dst, int64_t batch, int threads) const {
  const int useful = useful_threads(batch, threads);
  // Whole images (or blocks of rows) per thread need no barrier; with few of them the rows inside are shared out instead.
  bool by_image = useful == 1;
  if (plan_.spatial_.empty()) {
    by_image = by_image || batch >= kRowsPerThread * useful;
  } else {
    by_image = by_image || batch >= 4 * useful || batch % useful == 0;
  }
  if (by_image) {
    run_by_image(src, dst, batch, useful);
  } else {
    run_by_row(src, dst, batch, useful);
  }
}

void Executor::run_by_image(const float* src, float* dst, int64_t batch, int threads) const {
  const bool has_spatial = !plan_.spatial_.empty(), has_linear = !plan_.linear_.empty();
  const bool splits = plan_.splits_at_linear_;
  Lease arenas(plan_.arenas_), scratch(plan_.scratch_);
  Workspace alone;  // a short call should not allocate
  std::vector<Workspace> several(static_cast<size_t>(threads > 1 ? threads : 0));
  Workspace* const at = threads > 1 ? several.data() : &alone;
  for (int thread = 0; thread < threads; ++thread) {
    at[thread].arena = arenas.add(plan_.arena_floats_ + std::min(batch, plan_.group_images_) * plan_.image_floats_);
    if (plan_.thread_floats_) at[thread].scratch = scratch.add(plan_.thread_floats_);
  }
  float* const all_features = splits ? scratch.add(batch * plan_.features_) : nullptr;

  // Whole images or blocks of rows first. Linear steps with large weights follow for all of them: panel by panel where the rows are
  // few, block by block otherwise.
  const int64_t groups = block_count(batch, has_spatial ? plan_.group_images_ : kRowBlock, threads);
  const bool chain_by_panel = splits && threads > 1 && batch < kRowsPerThread * threads;
  const int64_t row_blocks = block_count(batch, kRowBlock, threads);
  float* hidden[2] = {nullptr, nullptr};
  if (chain_by_panel)
    for (float*& h : hidden) h = scratch.add(batch * plan_.rows_stride_);

  const auto run_group = [&](int64_t first, int64_t last, Workspace own) {
    if (!has_spatial) {
      run_chain(own.arena, src + first * plan_.src_image_, dst + first * plan_.dst_image_, last - first);
      return;
    }
    float* const group = splits ? all_features + first * plan_.features_ : own.arena + plan_.features_offset_;
    Workspace images[kMostGroupImages];
    for (int64_t i = first; i < last; ++i) {
      own.src = src + i * plan_.src_image_, own.dst = dst + i * plan_.dst_image_;
      own.features = group + (i - first) * plan_.features_;
      own.own = own.arena + plan_.arena_floats_ + (i - first) * plan_.image_floats_;
      images[i - first] = own;
    }
    run_images(images, last - first);
    if (has_linear && !splits) run_chain(own.arena, group, dst + first * plan_.dst_image_, last - first);
  };
  const auto units = [&](int phase) {
    if (phase == 0) return groups;
    return chain_by_panel ? panel_count(static_cast<size_t>(phase - 1)) : row_blocks;
  };
  const auto run = [&](int phase, int64_t first, int64_t last, int thread) {
    if (phase > 0 && chain_by_panel) {
      run_panels(static_cast<size_t>(phase - 1), all_features, dst, hidden, batch, first, last);
      return;
    }
    for (int64_t u = first; u < last; ++u) {
      if (phase == 0) {
        run_group(batch * u / groups, batch * (u + 1) / groups, at[thread]);
      } else {
        const int64_t row = batch * u / row_blocks, end = batch * (u + 1) / row_blocks;
        run_chain(at[thread].arena, all_features + row * plan_.features_, dst + row * plan_.dst_image_, end - row);
      }
    }
  };
  const int chain_phases = !splits ? 0 : chain_by_panel ? static_cast<int>(plan_.linear_.size()) : 1;
  run_phases(threads, 1 + chain_phases, units, run);
}

void Executor::run_by_row(const float* src, float* dst, int64_t batch, int threads) const {
  Lease arenas(plan_.arenas_), scratch(plan_.scratch_);
  const bool has_spatial = !plan_.spatial_.empty();
  float* const all_features = plan_.features_ ? scratch.add(batch * plan_.features_) : nullptr;
  std::vector<Workspace> at(static_cast<size_t>(has_spatial ? batch : 0));
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t image = static_cast<int64_t>(i);
    at[i].arena = arenas.add(plan_.arena_floats_ + plan_.image_floats_);
    at[i].own = at[i].arena + plan_.arena_floats_;
    at[i].src = src + image * plan_.src_image_, at[i].dst = dst + image * plan_.dst_image_;
    if (all_features) at[i].features = all_features + image * plan_.features_;
  }
  std::vector<float*> own_scratch(static_cast<size_t>(plan_.thread_floats_ ? threads : 0));
  for (float*& s : own_scratch) s = scratch.add(plan_.thread_floats_);
  float* hidden[2] = {nullptr, nullptr};
  if (plan_.linear_.size() > 1)
    for (float*& h : hidden) h = scratch.add(batch * plan_.rows_stride_);

  // The rows of all images, one after the other, are what threads share; those of a step that makes several together stay so.
  const int copies = plan_.copies_input_ ? 1 : 0, steps = static_cast<int>(plan_.spatial_.size());
  const auto rows_of = [&](int phase) { return phase < copies ? plan_.entry_.h : plan_.spatial_[phase - copies].dst.h; };
  std::vector<int64_t> unit(static_cast<size_t>(copies + steps));
  for (int phase = 0; phase < copies + steps; ++phase) {
    // What a part costs anew, the way of its weights or the rows that its pool shares with the next part's, should be little.
    const SpatialStep* const step = phase < copies ? nullptr : &plan_.spatial_[phase - copies];
    const PackedWeights* const weights = !step ? nullptr : step->winograd ? step->winograd.weights.get() : step->weights.get();
    const int parts = weights && weights->bytes() > kHeavyWeightBytes ? 1 : step && step->ring.size ? 2 : 4;
    const int64_t rows = rows_of(phase);
    if (!step && rows * plan_.entry_.row_stride < kSmallCopy) {
      unit[phase] = rows;  // others would come too late
      continue;
    }
    const int64_t together = step ? step->unit_rows : 1;
    int64_t least = together;
    if (step && step->winograd) least *= (kProductTiles + step->winograd.tiles_x - 1) / step->winograd.tiles_x;
    unit[phase] = shared_rows(rows, together, least, threads, parts);
  }
  const auto per_image = [&](int phase) { return (rows_of(phase) + unit[phase] - 1) / unit[phase]; };
  const auto units = [&](int phase) {
    return phase < copies + steps ? batch * per_image(phase) : panel_count(static_cast<size_t>(phase - copies - steps));
  };
  const auto run = [&](int phase, int64_t first, int64_t last, int thread) {
    if (phase >= copies + steps) {
      run_panels(static_cast<size_t>(phase - copies - steps), has_spatial ? all_features : src, dst, hidden, batch, first, last);
      return;
    }
    const int64_t units_per_image = per_image(phase), rows = rows_of(phase);
    while (first < last) {
      const int64_t image = first / units_per_image, unit_first = first % units_per_image;
      const int64_t unit_last = std::min(units_per_image, unit_first + last - first);
      const int64_t row = unit_first * unit[phase], end = std::min(rows, unit_last * unit[phase]);
      Workspace own = at[static_cast<size_t>(image)];
      if (!own_scratch.empty()) own.scratch = own_scratch[static_cast<size_t>(thread)];
      if (phase < copies) {
        copy_input(own, row, end);
      } else {
        const SpatialStep& step = plan_.spatial_[static_cast<size_t>(phase - copies)];
        run_step(step, own, row, end);
        if (phase + 1 == copies + steps && plan_.transposes_output_) copy_output(own, row, end);
      }
      first += unit_last - unit_first;
    }
  };
  run_phases(threads, copies + steps + static_cast<int>(plan_.linear_.size()), units, run);
}

const float* Executor::source(const Map& map, const Workspace& at) const {
  return map.place == Map::Place::kCallerSrc ? at.src : target(map, at);
}

float* Executor::target(const Map& map, const Workspace& at) const {
  if (map.place == Map::Place::kCallerDst) return at.dst;
  if (map.place == Map::Place::kFeatures) return at.features;
  if (map.place == Map::Place::kRing) return at.scratch;
  return (map.is_per_image ? at.own : at.arena) + map.offset + map.origin;
}

void Executor::run_images(const Workspace* images, int64_t count) const {
  const size_t steps = plan_.spatial_.size();
  for (int64_t i = 0; i < count; ++i) {
    if (plan_.copies_input_) copy_input(images[i], 0, plan_.entry_.h);
    for (size_t s = 0; s < plan_.first_wide_; ++s) run_step(plan_.spatial_[s], images[i], 0, plan_.spatial_[s].dst.h);
    if (plan_.first_wide_ == steps && plan_.transposes_output_) copy_output(images[i], 0, plan_.exit_.h);
  }
  if (plan_.first_wide_ == steps) return;
  for (size_t s = plan_.first_wide_; s < steps; ++s) {
    const SpatialStep& step = plan_.spatial_[s];
    if (step.winograd && !step.ring.pitch) {
      run_winograd(step, images, count, step.dst, step.lower, 0, step.winograd.bands);
    } else {
      for (int64_t i = 0; i < count; ++i) run_step(step, images[i], 0, step.dst.h);
    }
  }
  if (plan_.transposes_output_)
    for (int64_t i = 0; i < count; ++i) copy_output(images[i], 0, plan_.exit_.h);
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
      run_winograd(step, &at, 1, step.dst, step.lower, first / side, (last + side - 1) / side);
    } else {
      conv_rows(step, at, step.dst, step.lower, first, last);
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
      run_winograd(step, &at, 1, step.ring, kNoLower, made / side, (end_conv + side - 1) / side);
    } else if (made < end_conv) {
      conv_rows(step, at, step.ring, kNoLower, made, end_conv);
    }
    made = std::max(made, end_conv);
    pool_rows(step, at, row, end);
    row = end;
  }
}

void Executor::conv_rows(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t first,
                         int64_t last) const {
  if (step.is_plane) {
    plane_rows(step, at, dst, lower, first, last);
  } else if (step.panels_outermost) {
    for (const Panel& panel : step.weights->panels)
      for (int64_t row = first; row < last; row += step.block_rows)
        conv_panel(step, at, dst, lower, panel, row, std::min(step.block_rows, last - row));
  } else {
    for (int64_t row = first; row < last; row += step.block_rows)
      for (const Panel& panel : step.weights->panels)
        conv_panel(step, at, dst, lower, panel, row, std::min(step.block_rows, last - row));
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
    kernels_.transpose(job.dst, job.dst_stride, target(dst, at) + (row % dst.rows_kept) * dst.row_stride, dst.pitch,
                       step.conv_w / scale, channels, true);
  }
}

void Executor::conv_panel(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, const Panel& panel,
                          int64_t row, int64_t rows) const {
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  cpu::TileJob job = conv_job(step, at, dst, lower, panel, row * scale * step.conv.stride_h, 0);
  job.src_offset = step.src_offset.data();
  job.dst = target(dst, at) + (row % dst.rows_kept) * dst.row_stride + panel.first_lane;
  job.dst_offset = step.dst_offset.data();
  run_conv(step, panel, job, rows * (step.conv_w / scale));
}

// All but the offsets of the pixels; the source is the window of the input that belongs to row y and column x before padding.
cpu::TileJob Executor::conv_job(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, const Panel& panel,
                                int64_t y, int64_t x) const {
  const int width = panel.vectors * kernels_.lanes;
  cpu::TileJob job = {};
  job.src = source(step.src, at) + (y - step.conv.pad_top) * step.src.row_stride + (x - step.conv.pad_left) * step.src.pitch;
  job.runs = step.runs.data();
  job.run_count = static_cast<int32_t>(step.runs.size());
  job.weight = step.weights->weight->data() + panel.weight_offset;
  job.bias = step.weights->bias->data() + panel.first_lane;
  job.lower = lower;
  // The caller's pixels lie close together; everywhere else there is room for whole vectors.
  const bool is_exact = dst.place == Map::Place::kCallerDst;
  job.lanes = is_exact ? static_cast<int32_t>(std::min<int64_t>(width, dst.channels - panel.first_lane)) : width;
  return job;
}

void Executor::run_conv(const SpatialStep& step, const Panel& panel, const cpu::TileJob& job, int64_t count) const {
  if (step.pools_in_registers) {
    run_tiles(kernels_.pool_tile[panel.vectors], kernels_.pool_rows[panel.vectors] / 4, job, count, 4);
  } else {
    run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, count, 1);
  }
}

// Bands [first, last) of each image, a group of tiles at a time: transform, products, and results panel by panel.
void Executor::run_winograd(const SpatialStep& step, const Workspace* images, int64_t image_count, const Map& dst, float lower,
                            int64_t first, int64_t last) const {
  const Winograd& w = step.winograd;
  const PackedWeights& weights = *w.weights;
  float* const scratch = images[0].scratch + step.scratch_offset;
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
    std::fill(poison, poison + count * kernels_.lanes, 0.0f);

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
    // As in conv_job.
    const int64_t room = dst.place == Map::Place::kCallerDst ? dst.channels : weights.bias->size();
    if (w.has_few_channels) {
      out.src = v, out.src_tile_stride = w.v_tile_stride;
      out.weight = weights.weight->data(), out.bias = weights.bias->data();
      out.lanes = static_cast<int32_t>(room);
      kernels_.winograd_small_output[step.pools_in_registers][step.src.channels](out);
    } else {
      for (const Panel& panel : weights.panels) {
        const int64_t width = panel.vectors * kernels_.lanes;
        const int64_t m_stride = count * width + 16;
        for (int64_t point = 0; point < cpu::kWinogradPoints; ++point) {
          const float* const u = weights.weight->data() + panel.weight_offset + point * step.src.channels * width;
          run_products(
              kernels_, panel.vectors,
              {v + point * w.v_point_stride, w.v_tile_stride, u, in.channels, w.chain, w.chain_group, m + point * m_stride}, count);
        }
        out.src = m, out.src_point_stride = m_stride, out.src_tile_stride = width;
        out.bias = weights.bias->data() + panel.first_lane;
        out.first_lane = panel.first_lane;
        out.lanes = static_cast<int32_t>(std::min(width, room - panel.first_lane));
        kernels_.winograd_output[w.out == 2][step.pools_in_registers](out);
      }
    }

    if (!has_nan(poison, count * kernels_.lanes)) continue;
    for (int64_t t = 0; t < count; ++t)
      if (has_nan(poison + t * kernels_.lanes, kernels_.lanes))
        run_tile_directly(step, images[places[t].image], dst, lower, places[t].row, places[t].column, tiles[t]);
  }
}

// A tile with sums that are not finite: the transforms spread NaN and infinity over pixels that eager's sums do not reach.
void Executor::run_tile_directly(const SpatialStep& step, const Workspace& at, const Map& dst, float lower, int64_t row,
                                 int64_t column, const cpu::WinogradTile& tile) const {
  const Winograd& w = step.winograd;
  const int64_t scale = step.pools_in_registers ? 2 : 1, entries = scale * scale;
  int32_t src_offset[cpu::kWinogradPoints], dst_offset[cpu::kWinogradPoints];
  int64_t count = 0;
  for (int64_t y = tile.skip_rows; y < w.side; ++y)
    for (int64_t x = tile.skip_columns; x < w.side; ++x, ++count) {
      const int64_t pixel = y * w.side + x;
      dst_offset[count] = w.dst_offset[static_cast<size_t>(pixel)];
      std::copy_n(&w.src_offset[static_cast<size_t>(pixel * entries)], entries, &src_offset[count * entries]);
    }
  for (const Panel& panel : step.weights->panels) {
    cpu::TileJob job = conv_job(step, at, dst, lower, panel, row * scale, column * scale);
    job.src_offset = src_offset, job.dst_offset = dst_offset;
    job.dst = tile.dst + panel.first_lane;
    run_conv(step, panel, job, count);
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
  job.ring_begin = src, job.ring_end = src + from.rows_kept * from.row_stride;
  for (int64_t y = first; y < last; ++y) {
    const int64_t top = y * step.pool.stride_h - step.pool.pad_top;
    const int64_t begin = std::max<int64_t>(0, top), end = std::min(from.h, top + step.pool.k_h);
    job.src = src + begin % from.rows_kept * from.row_stride;
    job.row_count = static_cast<int32_t>(end - begin);
    job.dst = dst + y * step.dst.row_stride;
    kernels_.pool_row(job);
  }
}

void Executor::run_linear(const LinearStep& step, const float* src, float* dst, int64_t rows, size_t first, size_t last) const {
  if (step.in_place >= 0) {
    run_in_place(kernels_, step, weights_[step.in_place], src, dst, rows, first, last, plan_.scratch_);
    return;
  }
  const PackedWeights& weights = *step.weights;
  int32_t src_offset[kRowBlock], dst_offset[kRowBlock];
  const int64_t blocks = block_count(rows, kRowBlock, 1);
  const int64_t most = (rows + blocks - 1) / blocks;
  for (int64_t i = 0; i < most; ++i) {
    src_offset[i] = static_cast<int32_t>(i * step.src_stride);
    dst_offset[i] = static_cast<int32_t>(i * step.dst_stride);
  }
  cpu::TileJob job = {};
  job.src_offset = src_offset, job.dst_offset = dst_offset;
  job.runs = step.runs.data();
  job.run_count = static_cast<int32_t>(step.runs.size());
  job.lower = step.lower;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
    job.src = src + row * step.src_stride;
    const int widest = weights.panels.front().vectors;
    if (count > kernels_.max_rows[widest] && step.k * widest * kernels_.lanes > kFarPanelFloats) {
      run_stretches(step, job, dst + row * step.dst_stride, count, first, last);
      continue;
    }
    for (size_t p = first; p < last;) {
      const Panel& panel = weights.panels[p];
      job.weight = weights.weight->data() + panel.weight_offset;
      job.bias = weights.bias->data() + panel.first_lane;
      job.dst = dst + row * step.dst_stride + panel.first_lane;
      size_t side_by_side = 1;
      if (count <= 3 && panel.vectors == kernels_.preferred_vectors) {
        const size_t most_panels = static_cast<size_t>(kernels_.row_panels[count]);
        while (side_by_side < most_panels && p + side_by_side < last && weights.panels[p + side_by_side].vectors == panel.vectors)
          ++side_by_side;
        job.panel_stride = step.k * panel.vectors * kernels_.lanes;
      }
      const Panel& end = weights.panels[p + side_by_side - 1];
      // Hidden rows have room for whole vectors, the result's last panel may not.
      job.lanes = static_cast<int32_t>(std::min<int64_t>(end.vectors * kernels_.lanes, step.dst_stride - end.first_lane));
      if (count <= 3 && panel.vectors == kernels_.preferred_vectors) {
        kernels_.row_tile[count][side_by_side](job, 1);
      } else {
        run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, count, 1);
      }
      p += side_by_side;
    }
  }
}

// A block of rows through one stretch of the reduction after the other, panels inside: a stretch of a panel stays in the cache
// until all tiles have met it, and of the rows it is the same for all panels. The sums are added in the same order as without.
void Executor::run_stretches(const LinearStep& step, cpu::TileJob job, float* dst, int64_t rows, size_t first, size_t last) const {
  const std::vector<Panel>& panels = step.weights->panels;
  const int64_t first_lane = panels[first].first_lane;
  const int64_t lanes = panels[last - 1].first_lane + panels[last - 1].vectors * kernels_.lanes - first_lane;
  const int64_t length = std::max<int64_t>(1, kStretchFloats / (panels.front().vectors * kernels_.lanes));
  Lease lease(plan_.scratch_);
  float* const sums = lease.add(rows * lanes);
  std::vector<cpu::Run> runs;
  int64_t done = 0;
  for (size_t begin = 0; begin < step.runs.size();) {
    // Between partial sums, so that none is cut.
    int64_t taken = 0;
    runs.clear();
    size_t end = begin;
    do {
      runs.push_back(step.runs[end]);
      taken += step.runs[end].length;
    } while (++end < step.runs.size() && (taken < length || !step.runs[end - 1].ends_partial_sum));
    runs.back().ends_partial_sum = false;
    job.runs = runs.data(), job.run_count = static_cast<int32_t>(runs.size());
    job.has_sums = begin > 0, job.is_last = end == step.runs.size();
    for (size_t p = first; p < last; ++p) {
      const Panel& panel = panels[p];
      const int width = panel.vectors * kernels_.lanes;
      job.weight = step.weights->weight->data() + panel.weight_offset + done * width;
      job.bias = step.weights->bias->data() + panel.first_lane;
      job.dst = dst + panel.first_lane;
      job.lanes = static_cast<int32_t>(std::min<int64_t>(width, step.dst_stride - panel.first_lane));
      job.sums = sums + rows * (panel.first_lane - first_lane), job.sums_stride = width;
      run_tiles(kernels_.tile[panel.vectors], kernels_.max_rows[panel.vectors], job, rows, 1);
    }
    done += taken;
    begin = end;
  }
}

void Executor::run_chain(float* arena, const float* src, float* dst, int64_t rows) const {
  for (size_t i = 0; i < plan_.linear_.size(); ++i) {
    const LinearStep& step = plan_.linear_[i];
    float* const to = i + 1 == plan_.linear_.size() ? dst : arena + plan_.rows_offset_[i % 2];
    run_linear(step, src, to, rows, 0, step.weights->panels.size());
    src = to;
  }
}

int64_t Executor::panel_count(size_t step) const { return static_cast<int64_t>(plan_.linear_[step].weights->panels.size()); }

void Executor::run_panels(size_t step, const float* src, float* dst, float* const (&hidden)[2], int64_t rows, int64_t first,
                          int64_t last) const {
  const bool is_last = step + 1 == plan_.linear_.size();
  run_linear(plan_.linear_[step], step ? hidden[(step - 1) % 2] : src, is_last ? dst : hidden[step % 2], rows,
             static_cast<size_t>(first), static_cast<size_t>(last));
}

}  // namespace fastseq
