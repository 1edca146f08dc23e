// The steps that take maps: where their maps lie, their weights and tables.
#include <algorithm>
#include <string>
#include <utility>

#include "plan/plan_builder.h"

namespace fastseq {
namespace {

// Weights beyond this are read once per call rather than once per block of rows: half of a common L2.
constexpr int64_t kCachedWeightBytes = int64_t{256} << 10;
// Weights beyond L2, or kFarthestWeightBytes, and the rows of products that hide their way from there: with fewer in an image,
// images are taken together.
constexpr int64_t kFarWeightBytes = int64_t{768} << 10;
constexpr int64_t kFarRows = 14, kFarthestRows = 28;
// Input channels from which on Winograd's products take narrower panels.
constexpr int64_t kDeepChannels = 128;
// A block holds about this many pixels: enough to amortise the call, little enough to stay in L1.
constexpr int64_t kBlockPixels = 192;
// Rows of a depthwise convolution's source that go through all filters one after the other: they come from L2, from L1 the next
// time.
constexpr int64_t kDepthwiseBytes = int64_t{128} << 10;
// Maps of an image that take more than this lie in each other's places: half of a common L2.
constexpr int64_t kSeparateFloats = int64_t{128} << 10;
// Floats that are converted together: few enough to stay in L1.
constexpr int64_t kStagedFloats = 4096;

// What the pack cache tells apart.
constexpr int64_t kPackedPooled = 0, kPackedDirect = 1, kPackedWinograd = 2, kPackedPlane = 3, kPackedDepthwise = 4;
// Added to the former.
constexpr int64_t kPackedPairs = 8;

}  // namespace

Map PlanBuilder::arena_map(MapSize size, const StepSpec* reader, bool packs_pixels) const {
  Map map;
  map.channels = size.channels, map.h = size.h, map.w = size.w;
  const bool is_read_by_conv = reader && reader->op == Op::kConv2d;
  const Window border = is_read_by_conv ? reader->conv : Window{};
  // A kernel row of a few channels is one contiguous stretch if the pixels are dense; more channels are stored in whole vectors.
  map.pitch = packs_pixels && size.channels < set_.lanes ? size.channels : round_up(size.channels, set_.lanes);
  map.row_stride = (border.pad_left + size.w + border.pad_right) * map.pitch;
  // Rows a multiple of 4 KiB apart would compete for the same few cache sets.
  if (map.row_stride * 4 % 4096 == 0) map.row_stride += 16;
  map.has_border = border.pad_top || border.pad_bottom || border.pad_left || border.pad_right;
  map.origin = border.pad_top * map.row_stride + border.pad_left * map.pitch;
  map.rows_kept = size.h;
  map.size = (border.pad_top + size.h + border.pad_bottom) * map.row_stride;
  return map;
}

Map PlanBuilder::paired_map(MapSize size, const StepSpec& reader) const {
  Map map = arena_map(size, &reader, false);
  const int64_t pitch = map.pitch / 2;
  map.channels = (size.channels + 1) / 2, map.pitch = pitch;
  map.row_stride = (reader.conv.pad_left + size.w + reader.conv.pad_right) * pitch;
  if (map.row_stride * 4 % 4096 == 0) map.row_stride += 16;
  map.origin = reader.conv.pad_top * map.row_stride + reader.conv.pad_left * pitch;
  map.size = (reader.conv.pad_top + size.h + reader.conv.pad_bottom) * map.row_stride;
  return map;
}

void PlanBuilder::claim(Map& map, size_t reader) {
  map.is_per_image = reader >= plan_.first_wide_ && plan_.first_wide_ < uses_winograd_.size();
  claims_.resize(reader + 1);
  map.offset = claims_[reader];
  claims_[reader] += round_up(map.size + kSlack, 16);
}

void PlanBuilder::place_maps() {
  const auto is_per_image = [&](size_t reader) { return reader >= plan_.first_wide_ && plan_.first_wide_ < uses_winograd_.size(); };
  int64_t all = 0, two = 0, before = 0;
  for (size_t i = 0; i < claims_.size() && !is_per_image(i); ++i) {
    all += claims_[i];
    two = std::max(two, before + claims_[i]);
    before = claims_[i];
  }
  const bool shares = all > kSeparateFloats;
  std::vector<int64_t> offsets(claims_.size());
  for (size_t i = 0; i < claims_.size(); ++i) {
    int64_t& floats = is_per_image(i) ? plan_.image_floats_ : plan_.arena_floats_;
    offsets[i] = !shares || is_per_image(i) ? floats : i % 2 ? two - claims_[i] : 0;
    floats += claims_[i];
  }
  if (shares) plan_.arena_floats_ = two;
  const auto place = [&](Map& map, size_t reader) {
    if (map.place != Map::Place::kArena || !map.size) return;
    map.offset += offsets[reader];
    map.is_shared = shares && !map.is_per_image;
  };
  place(plan_.entry_, 0), place(plan_.entry_paired_, 0);
  for (size_t i = 0; i < plan_.spatial_.size(); ++i) {
    place(plan_.spatial_[i].src, i);
    place(plan_.spatial_[i].dst, i + 1), place(plan_.spatial_[i].paired, i + 1);
  }
  place(plan_.exit_, plan_.spatial_.size());
}

size_t PlanBuilder::first_wide_step(const std::vector<StepSpec>& steps) const {
  for (size_t i = 0; i < uses_winograd_.size(); ++i) {
    if (steps[i].op != Op::kConv2d) continue;
    const ConvShape shape = conv_shape(steps[i], i);
    const int64_t points = uses_winograd_[i] ? cpu::kWinogradPoints : shape.window.k_h * shape.window.k_w;
    const int64_t bytes = uses_bf16_[i] ? 2 : static_cast<int64_t>(sizeof(float));
    const int64_t weights = points * shape.c_in * shape.c_out * bytes;
    const int64_t side = uses_winograd_[i] ? cpu::kWinogradPatch + 1 - shape.window.k_h : 1;
    const int64_t rows = divide_up(shape.h, side) * divide_up(shape.w, side);
    if (weights > kFarWeightBytes && rows < (weights > kFarthestWeightBytes ? kFarthestRows : kFarRows)) return i;
  }
  return uses_winograd_.size();
}

void PlanBuilder::place_spatial(const std::vector<StepSpec>& steps, size_t count) {
  if (count == 0) return;
  const InputSpec& input = plan_.input_;
  for (size_t i = 0; i < count; ++i) uses_winograd_.push_back(uses_winograd(steps[i], i));
  for (size_t i = 0; i < count; ++i) uses_plane_.push_back(!uses_winograd_[i] && uses_plane(steps[i], i));
  for (size_t i = 0; i < count; ++i) uses_depthwise_.push_back(uses_depthwise(steps[i], i));
  for (size_t i = 0; i < count; ++i)
    uses_bf16_.push_back(!uses_winograd_[i] && !uses_plane_[i] && !uses_depthwise_[i] && uses_bf16(steps[i], i));
  plan_.first_wide_ = first_wide_step(steps);
  const Window& first = steps[0].conv;
  const bool needs_border = steps[0].op == Op::kConv2d && (first.pad_top || first.pad_bottom || first.pad_left || first.pad_right);
  // These read whole vectors of channels, beyond the last pixel if need be.
  const bool overreads = uses_plane_[0] || ((uses_winograd_[0] || uses_depthwise_[0]) && input.channels % set_.lanes != 0) ||
                         (uses_depthwise_[0] && !steps[0].is_depthwise());
  const bool is_dense_nhwc = input.is_nhwc || input.channels == 1;

  Map current;
  if (is_dense_nhwc && !needs_border && !overreads && !is_narrow() && !uses_bf16_[0]) {
    current.place = Map::Place::kCallerSrc;
    current.channels = input.channels, current.h = input.h, current.w = input.w;
    current.pitch = input.channels;
    current.row_stride = input.w * input.channels;
    current.rows_kept = input.h;
  } else {
    plan_.copies_input_ = true;
    current = uses_bf16_[0] ? arena_map(sizes_[0], nullptr, false)
                            : arena_map(sizes_[0], &steps[0], steps[0].op == Op::kConv2d && !uses_depthwise_[0]);
    claim(current, 0);
    plan_.entry_ = current;
    if (uses_bf16_[0]) {
      current = paired_map(sizes_[0], steps[0]);
      claim(current, 0);
      plan_.entry_paired_ = current;
    }
    if (is_narrow()) stage(input.w);
  }

  const bool has_linear = count < steps.size();
  for (size_t i = 0; i < count; ++i) {
    const bool is_last = i + 1 == count;
    const MapSize size = sizes_[i + 1];
    Map dst, paired;
    if (!is_last) {
      dst = arena_map(size, uses_bf16_[i + 1] ? nullptr : &steps[i + 1], false);
      claim(dst, i + 1);
      if (uses_bf16_[i + 1]) {
        paired = paired_map(size, steps[i + 1]);
        claim(paired, i + 1);
      }
    } else {
      const bool is_dense = options_.output_is_nhwc || size.channels == 1 || size.h * size.w == 1;
      if (has_linear || (is_dense && !is_narrow())) {
        dst.place = has_linear ? Map::Place::kFeatures : Map::Place::kCallerDst;
        dst.channels = size.channels, dst.h = size.h, dst.w = size.w;
        // Features keep whole vectors per pixel; the caller's memory is exact.
        dst.pitch = has_linear ? round_up(size.channels, set_.lanes) : size.channels;
        dst.row_stride = size.w * dst.pitch;
        dst.rows_kept = size.h;
        if (has_linear) {
          plan_.features_ = round_up(size.h * dst.row_stride + kSlack, 16);
          if (linear_uses_bf16(steps[count], count)) {
            paired = dst;
            paired.channels = (size.channels + 1) / 2, paired.pitch = dst.pitch / 2, paired.row_stride = dst.row_stride / 2;
            paired.origin = plan_.linear_origin_ = plan_.features_;
            plan_.features_ += round_up(size.h * paired.row_stride + kSlack, 16);
          }
        }
      } else {
        dst = arena_map(size, nullptr, false);
        dst.row_stride = size.w * dst.pitch;  // so that a band of rows is one matrix to transpose
        dst.size = size.h * dst.row_stride;
        claim(dst, i + 1);
        plan_.copies_output_ = true;
        plan_.output_is_nhwc_ = options_.output_is_nhwc;
        plan_.exit_ = dst;
        if (is_narrow()) stage(size.w);
      }
    }
    // The result is rounded on its way to the caller's memory, pairs are as they are made.
    const Storage rounding = (is_last && !has_linear) || paired.pitch ? Storage::kF32 : input.storage;
    plan_.spatial_.push_back(make_spatial(steps[i], i, current, dst, rounding));
    plan_.spatial_.back().paired = paired;
    current = paired.pitch ? paired : dst;
  }
  place_maps();
  const MapSize last = sizes_.back();
  if (has_linear) return;
  plan_.output_ = {true, last.channels, last.h, last.w, 0};
  plan_.dst_image_ = last.channels * last.h * last.w;
}

void PlanBuilder::stage(int64_t width) {
  plan_.staged_floats_ = std::max({plan_.staged_floats_, kStagedFloats, 8 * (width + kStagedPixels)});
  plan_.thread_floats_ = std::max(plan_.thread_floats_, plan_.staged_floats_ + kSlack);
}

SpatialStep PlanBuilder::make_spatial(const StepSpec& spec, size_t index, const Map& src, const Map& dst, Storage rounding) {
  SpatialStep step;
  step.name = spec.name, step.note = note(index);
  step.src = src, step.dst = dst;
  step.lower = lower_bound(spec);
  step.conv = spec.conv, step.pool = spec.pool;
  step.has_conv = spec.op == Op::kConv2d;
  step.has_pool = spec.has_pool;
  if (!step.has_conv) {
    step.on_pooled = make_pass(spec, dst.channels, set_.lanes);
    if (step.on_pooled || !map_op(spec)->keeps_values) step.on_pooled.rounding = rounding;  // those are of the type already
    step.kernel = map_op(spec)->kernel;
    if (step.kernel.find("__") == std::string::npos)
      step.kernel += std::string("__") + set_.isa + "_1x" + std::to_string(set_.lanes);
    prepare_map(step, spec, sizes_[index], sizes_[index + 1]);
    plan_.thread_floats_ = std::max(plan_.thread_floats_, step.measured_floats);
    return step;
  }
  const ConvShape shape = conv_shape(spec, index);
  step.conv_h = shape.h, step.conv_w = shape.w;
  step.pools_in_registers = shape.pools_in_registers && !uses_depthwise_[index];
  step.groups = spec.groups, step.terms = spec.in;
  // Rounding is monotone: a pool of rounded values is the rounded pool.
  const bool pools_apart = step.has_pool && !step.pools_in_registers;
  (pools_apart && pools_first(spec) ? step.on_pooled : step.on_results) = make_pass(spec, dst.channels, set_.lanes);
  (pools_apart ? step.on_pooled : step.on_results).rounding = rounding;
  step.flops = 2.0 * step.conv_h * step.conv_w * spec.out * spec.in * spec.conv.k_h * spec.conv.k_w;

  if (uses_plane_[index]) {
    make_plane(step, spec, index);
    return step;
  }
  if (uses_depthwise_[index]) {
    make_depthwise(step, spec, index);
    return step;
  }
  const cpu::TileTable& table = tiles(uses_bf16_[index]);
  const int* max_rows = step.pools_in_registers ? table.pool_rows : table.max_rows;
  const char* op = step.pools_in_registers ? "conv2d_maxpool2d" : "conv2d";
  const Choice choice =
      choose(op, uses_bf16_[index], index, max_rows,
             step.pools_in_registers ? table.preferred_pool_vectors : table.preferred_vectors, spec.out / spec.groups);
  step.kernel = choice.kernel;
  step.is_bf16 = uses_bf16_[index];
  const int64_t taps_count = spec.conv.k_h * spec.conv.k_w;
  PackedPtr& packed = cache_[{number(index), choice.vectors,
                              (step.pools_in_registers ? kPackedPooled : kPackedDirect) + (step.is_bf16 ? kPackedPairs : 0)}];
  if (!packed) {
    const StepSpec source = step.is_bf16 ? paired_spec(spec) : spec;
    packed = pack_conv2d(source, choice.panels, set_.lanes);
    if (step.is_bf16) packed = pack_pairs(*packed, source, taps_count, spec.in, set_);
  }
  step.weights = packed;
  step.panels_outermost = packed->bytes() > kCachedWeightBytes;

  std::vector<int64_t> taps;
  for (int64_t y = 0; y < spec.conv.k_h; ++y)
    for (int64_t x = 0; x < spec.conv.k_w; ++x)
      taps.push_back(y * spec.conv.dilation_h * src.row_stride + x * spec.conv.dilation_w * src.pitch);
  step.runs = make_runs(taps, step.is_bf16 ? (spec.in + 1) / 2 : spec.in);

  if (uses_winograd_[index]) make_winograd(step, spec, index, shape);
  if (step.has_pool && !step.pools_in_registers) place_ring(step, spec);
  step.scratch_offset = step.ring.size ? round_up(step.ring.size + kSlack, 16) : 0;
  plan_.thread_floats_ = std::max(plan_.thread_floats_, step.scratch_offset + step.winograd.scratch_floats);
  make_tables(step);
  return step;
}

void PlanBuilder::make_plane(SpatialStep& step, const StepSpec& spec, size_t index) {
  step.is_plane = true;
  step.kernel = std::string("conv2d_plane_f32__") + set_.isa + "_1x" + std::to_string(2 * set_.lanes);
  PackedPtr& packed = cache_[{number(index), 1, kPackedPlane}];
  if (!packed) packed = pack_plane(spec);
  step.weights = packed;
  if (step.has_pool && !step.pools_in_registers) place_ring(step, spec);
  step.scratch_offset = step.ring.size ? round_up(step.ring.size + kSlack, 16) : 0;
  step.plane_stride = round_up(step.conv_w, 2 * set_.lanes);
  plan_.thread_floats_ =
      std::max(plan_.thread_floats_, step.scratch_offset + std::max<int64_t>(spec.out, 8) * step.plane_stride + kSlack);
}

void PlanBuilder::make_depthwise(SpatialStep& step, const StepSpec& spec, size_t index) {
  step.is_depthwise = true;
  step.kernel = std::string(depthwise_op(spec)) + "_f32__" + set_.isa + "_" + std::to_string(set_.depthwise_pixels) + "x" +
                std::to_string(set_.lanes);
  PackedPtr& packed = cache_[{number(index), 1, kPackedDepthwise}];
  if (!packed) packed = pack_depthwise(spec, set_.lanes);
  step.weights = packed;
  if (step.has_pool) place_ring(step, spec);
  plan_.thread_floats_ = std::max(plan_.thread_floats_, step.ring.size ? step.ring.size + kSlack : 0);
  const int64_t row_bytes = step.conv.stride_h * step.src.row_stride * static_cast<int64_t>(sizeof(float));
  if (!step.has_pool) step.block_rows = std::max<int64_t>(1, kDepthwiseBytes / row_bytes);
}

void PlanBuilder::make_winograd(SpatialStep& step, const StepSpec& spec, size_t index, const ConvShape& shape) {
  // The weights of one point and panel pass through L1 with the rows they meet: with more channels a panel is narrower.
  const int preferred = spec.in < kDeepChannels ? set_.tiles.preferred_vectors : std::min(set_.tiles.preferred_vectors, 3);
  const Choice choice =
      choose("conv2d_winograd", false, index, set_.product_rows, preferred, spec.out / spec.groups, spread_vectors);
  step.winograd = plan_winograd(shape, choice.vectors, set_);
  const bool is_small = step.winograd.has_few_channels;
  PackedPtr& packed = cache_[{number(index), choice.vectors, kPackedWinograd}];
  if (!packed) packed = pack_winograd(spec, choice.panels, set_.lanes, is_small);
  step.winograd.weights = packed;
  step.kernel = is_small ? std::string("conv2d_winograd_few_f32__") + set_.isa + "_1x" + std::to_string(set_.lanes) : choice.kernel;
}

void PlanBuilder::prepare_map(SpatialStep& step, const StepSpec& spec, const MapSize& src, const MapSize& dst) const {
  const MapOp& op = *map_op(spec);
  step.rows = op.rows;
  op.prepare(spec, src, dst, set_, step);
}

void PlanBuilder::place_ring(SpatialStep& step, const StepSpec& spec) {
  prepare_map(step, spec, {spec.out, step.conv_h, step.conv_w}, {spec.out, step.dst.h, step.dst.w});
  step.group_rows = step.panels_outermost || step.winograd ? step.dst.h : 1;
  Map& ring = step.ring;
  ring.channels = spec.out, ring.h = step.conv_h, ring.w = step.conv_w;
  ring.pitch = round_up(spec.out, set_.lanes);
  ring.row_stride = step.conv_w * ring.pitch;
  if (ring.row_stride * 4 % 4096 == 0) ring.row_stride += 16;
  const int64_t wanted = (step.group_rows - 1) * step.pool.stride_h + std::max(step.pool.reach_h(), step.pool.stride_h);
  ring.rows_kept = std::min(step.conv_h, wanted);
  ring.size = ring.rows_kept * ring.row_stride;
  ring.place = Map::Place::kRing;
}

void PlanBuilder::make_winograd_tables(SpatialStep& step, const Map& out, int64_t scale) const {
  Winograd& w = step.winograd;
  step.unit_rows = step.ring.pitch ? 1 : w.band_rows;
  const int64_t step_h = step.conv.dilation_h, step_w = step.conv.dilation_w;
  for (int64_t y = 0; y < w.side; ++y)
    for (int64_t x = 0; x < w.side; ++x) {
      w.dst_offset.push_back(to_offset(step_h * y * out.row_stride + step_w * x * out.pitch));
      for (int64_t i = 0; i < scale; ++i)
        for (int64_t j = 0; j < scale; ++j)
          w.src_offset.push_back(
              to_offset(step_h * (y * scale + i) * step.src.row_stride + step_w * (x * scale + j) * step.src.pitch));
    }
}

void PlanBuilder::make_tables(SpatialStep& step) const {
  const Map& out = step.ring.pitch ? step.ring : step.dst;
  const int64_t scale = step.pools_in_registers ? 2 : 1;
  const int64_t w_out = step.conv_w / scale, h_out = step.conv_h / scale;
  step.block_rows = step.ring.pitch ? 1 : std::max<int64_t>(1, std::min(h_out, kBlockPixels / (w_out * scale * scale)));
  if (step.winograd) make_winograd_tables(step, out, scale);
  const int64_t step_h = step.conv.stride_h * step.src.row_stride, step_w = step.conv.stride_w * step.src.pitch;
  for (int64_t y = 0; y < step.block_rows; ++y)
    for (int64_t x = 0; x < w_out; ++x) {
      step.dst_offset.push_back(to_offset(y * out.row_stride + x * out.pitch));
      for (int64_t i = 0; i < scale; ++i)
        for (int64_t j = 0; j < scale; ++j)
          step.src_offset.push_back(to_offset((y * scale + i) * step_h + (x * scale + j) * step_w));
    }
}

}  // namespace fastseq
