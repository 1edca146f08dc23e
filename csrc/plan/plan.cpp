// Builds plans: shape inference, tile choice, scratch layout. Cheap beside packing the weights.
#include "plan/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fastseq {
namespace {

// Weights beyond this are read once per call rather than once per block of rows: half of a common L2.
constexpr int64_t kCachedWeightBytes = int64_t{256} << 10;
// Weights beyond L2, or beyond a share of L3, and the rows of products that hide their way from there: with fewer in an image,
// images are taken together.
constexpr int64_t kFarWeightBytes = int64_t{768} << 10, kFarthestWeightBytes = int64_t{12} << 20;
constexpr int64_t kFarRows = 14, kFarthestRows = 28;
// Linear weights from this size on are not packed: a copy takes as much memory again, and time to make. One row reads packed
// weights at 31 GB/s and these at 21 (one core of a Zen 4), so that smaller ones are worth their copy; from eight rows on both are
// equal.
constexpr int64_t kInPlaceBytes = int64_t{256} << 20;
// Linear weights beyond this are worth a pass of their own over the batch.
constexpr int64_t kSplitWeightBytes = int64_t{1} << 20;
// Input channels from which on Winograd's products take narrower panels.
constexpr int64_t kDeepChannels = 128;
// A block holds about this many pixels: enough to amortise the call, little enough to stay in L1.
constexpr int64_t kBlockPixels = 192;
// Longest chain of additions into one accumulator, and the shortest worth ending.
constexpr int64_t kLongestSum = 128, kShortestPartialSum = 64;
// Elements behind a map: vector reads may run past its last pixel.
constexpr int64_t kSlack = 48;

// What the pack cache tells apart.
constexpr int64_t kPackedPooled = 0, kPackedDirect = 1, kPackedWinograd = 2, kPackedPlane = 3;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int32_t to_offset(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max()) throw Refusal("a row of the activations has more than 2^31 elements");
  return static_cast<int32_t>(value);
}

float lower_bound(const StepSpec& spec) { return spec.has_relu() ? 0.0f : -std::numeric_limits<float>::infinity(); }

// channels: of the step's output.
ActivationPass make_pass(const StepSpec& spec, int64_t channels, int lanes) {
  const ActivationSpec& from = spec.activation;
  ActivationPass pass;
  if (from.kind == Activation::kNone || from.kind == Activation::kRelu) return pass;
  pass.kind = from.kind, pass.a = from.a, pass.b = from.b;
  if (from.kind != Activation::kPrelu) return pass;
  if (from.slope_count == 1) {
    pass.kind = Activation::kLeakyRelu, pass.a = from.slopes[0];
    return pass;
  }
  if (from.slope_count != channels) throw Refusal("prelu expects another number of channels");
  pass.slopes.resize(static_cast<size_t>(round_up(channels, lanes)));
  std::copy(from.slopes, from.slopes + channels, pass.slopes.begin());
  return pass;
}

// An infinite bias makes NaN of a sum that is infinite the other way, which pooling the sums before the bias would hide.
bool has_infinity(const float* values, int64_t count) {
  return values && std::any_of(values, values + count, [](float v) { return std::isinf(v); });
}

// The reduction as contiguous stretches: `taps` stretches of `length` at the given offsets. Partial sums end at the same places
// however the source is laid out, so layouts give the same bits.
std::vector<cpu::Run> make_runs(const std::vector<int64_t>& taps, int64_t length) {
  const int64_t total = static_cast<int64_t>(taps.size()) * length;
  std::vector<cpu::Run> runs;
  int64_t summed = 0, done = 0;
  for (int64_t tap : taps)
    for (int64_t start = 0; start < length; start += kLongestSum) {
      const int64_t piece = std::min(kLongestSum, length - start);
      const int32_t offset = to_offset(tap + start);
      summed += piece, done += piece;
      const bool ends = total > kLongestSum && summed >= kShortestPartialSum && done < total;
      if (ends) summed = 0;
      const bool extends = !runs.empty() && !runs.back().ends_partial_sum && runs.back().offset + runs.back().length == offset;
      if (extends) {
        runs.back().length = to_offset(runs.back().length + piece);
        runs.back().ends_partial_sum = ends;
      } else {
        runs.push_back({offset, static_cast<int32_t>(piece), ends});
      }
    }
  return runs;
}

}  // namespace

class PlanBuilder {
 public:
  PlanBuilder(Plan& plan, const PlanOptions& options, PackCache& cache)
      : plan_(plan), options_(options), set_(*options.kernels), cache_(cache) {}

  void build(const InputSpec& input, const std::vector<StepSpec>& steps) {
    plan_.kernels_ = &set_;
    plan_.input_ = input;
    size_t first_linear = 0;
    while (first_linear < steps.size() && steps[first_linear].op != Op::kLinear) ++first_linear;
    if (first_linear > 0 && !input.is_spatial) throw Refusal("convolution and pooling need an input of shape (N, C, H, W)");
    // Kernels count pixels and channels of one row in 32 bits.
    to_offset(input.channels * input.w);
    to_offset(input.h);
    StepSizes sizes = infer_sizes(input, steps, first_linear);
    sizes_ = std::move(sizes.maps), conv_sizes_ = std::move(sizes.convs);
    plan_.src_image_ = input.is_spatial ? input.channels * input.h * input.w : input.features;
    look_up_timings(steps, first_linear);
    place_spatial(steps, first_linear);
    build_linear(steps, first_linear);
    lay_out_arena();
    for (const SpatialStep& step : plan_.spatial_)
      plan_.flops_ += step.flops, count_weights(step.winograd ? step.winograd.weights : step.weights);
    for (const LinearStep& step : plan_.linear_) plan_.flops_ += step.flops, plan_.weight_bytes_ += step.weight_bytes();
  }

 private:
  void count_weights(const PackedPtr& weights) {
    if (weights) plan_.weight_bytes_ += weights->bytes();
  }

  void look_up_timings(const std::vector<StepSpec>& steps, size_t first_linear) {
    timed_.resize(steps.size());
    if (!options_.timings || !options_.forced_kernel.empty()) return;
    for (size_t i = 0; i < steps.size(); ++i) {
      const auto found = options_.timings->find(layer_key(set_.isa, steps[i], i < first_linear ? sizes_[i] : MapSize{}));
      if (found != options_.timings->end() && (found->second.empty() || find_row("", found->second)))
        timed_[i] = {true, found->second};
    }
  }

  // Where the choice of a step's kernel comes from, for the report.
  std::string note(size_t index) const {
    const Timed& timed = timed_[index];
    return !timed.is_known        ? ""
           : timed.kernel.empty() ? "timed: its own choice is the fastest"
                                  : "timed: faster than its own choice";
  }

  // What of a convolution is computed, and whether its pool happens in the tile's registers.
  ConvShape conv_shape(const StepSpec& spec, size_t index) const {
    const MapSize full = conv_sizes_[index], dst = sizes_[index + 1];
    ConvShape shape{spec.in, spec.out, full.h, full.w, spec.conv, false};
    if (spec.has_pool) {
      const Window& w = spec.pool;
      shape.h = std::min(full.h, (dst.h - 1) * w.stride_h - w.pad_top + w.k_h);
      shape.w = std::min(full.w, (dst.w - 1) * w.stride_w - w.pad_left + w.k_w);
      shape.pools_in_registers = w.k_h == 2 && w.k_w == 2 && w.stride_h == 2 && w.stride_w == 2 && !w.pad_top && !w.pad_left &&
                                 2 * dst.h <= full.h && 2 * dst.w <= full.w && !has_infinity(spec.bias, spec.out) &&
                                 pools_first(spec);
    }
    return shape;
  }

  bool uses_winograd(const StepSpec& spec, size_t index) const {
    if (spec.op != Op::kConv2d || !options_.allows_winograd) return false;
    const ConvShape shape = conv_shape(spec, index);
    const bool asks_for_direct = wanted_row(shape.pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index) != nullptr;
    const bool asks_for_winograd = wanted_row("conv2d_winograd", index) != nullptr;
    if (asks_for_direct != asks_for_winograd) return asks_for_winograd && can_use_winograd(shape, spec);
    return is_winograd_faster(shape, set_) && can_use_winograd(shape, spec);
  }

  // One input channel, and so few output channels that lanes of pixels are better filled. Only the first step's pixels are dense.
  bool uses_plane(const StepSpec& spec, size_t index) const {
    if (index > 0 || spec.op != Op::kConv2d || spec.in != 1 || spec.conv.stride_h != 1 || spec.conv.stride_w != 1) return false;
    const int64_t taps = spec.conv.k_h * spec.conv.k_w;
    if (taps > kLongestSum) return false;
    const ConvShape shape = conv_shape(spec, index);
    const bool asks_for_tile = wanted_row(shape.pools_in_registers ? "conv2d_maxpool2d" : "conv2d", index) != nullptr;
    const bool asks_for_plane = wanted_row("conv2d_plane", index) != nullptr;
    if (asks_for_tile != asks_for_plane) return asks_for_plane;
    const int64_t plane = round_up(shape.w, 2 * set_.lanes) / set_.lanes * shape.c_out * taps;
    const int64_t tile = shape.w * (round_up(shape.c_out, set_.lanes) / set_.lanes) * taps;
    // Rows to pixels, as if an element were a third of a multiply-add: 1-20 5x5 on 28x28, where both are near, takes 1.12 times as
    // long by tiles.
    return plane + shape.w * shape.c_out / 3 < tile;
  }

  // An arena map for `size`, with room for the zero border that the step which reads it wants.
  Map arena_map(MapSize size, const StepSpec* reader, bool packs_pixels) const {
    Map map;
    map.channels = size.channels, map.h = size.h, map.w = size.w;
    const bool is_read_by_conv = reader && reader->op == Op::kConv2d;
    const Window border = is_read_by_conv ? reader->conv : Window{};
    // A kernel row of a few channels is one contiguous stretch if the pixels are dense; more channels are stored in whole vectors.
    map.pitch = packs_pixels && size.channels < set_.lanes ? size.channels : round_up(size.channels, set_.lanes);
    map.row_stride = (border.pad_left + size.w + border.pad_right) * map.pitch;
    // Rows a multiple of 4 KiB apart would compete for the same few cache sets.
    if (map.row_stride * 4 % 4096 == 0) map.row_stride += 16;
    map.origin = border.pad_top * map.row_stride + border.pad_left * map.pitch;
    map.rows_kept = size.h;
    map.size = (border.pad_top + size.h + border.pad_bottom) * map.row_stride;
    return map;
  }

  // For the map that step `reader` reads, or the last one.
  void claim(Map& map, size_t reader) {
    map.is_per_image = reader >= plan_.first_wide_ && plan_.first_wide_ < uses_winograd_.size();
    int64_t& floats = map.is_per_image ? plan_.image_floats_ : plan_.arena_floats_;
    map.offset = floats;
    floats += round_up(map.size + kSlack, 16);
  }

  // The first step whose weights come from far away and serve so few tiles of an image that this takes longer than the products.
  size_t first_wide_step(const std::vector<StepSpec>& steps) const {
    for (size_t i = 0; i < uses_winograd_.size(); ++i) {
      if (steps[i].op != Op::kConv2d) continue;
      const ConvShape shape = conv_shape(steps[i], i);
      const int64_t points = uses_winograd_[i] ? cpu::kWinogradPoints : shape.window.k_h * shape.window.k_w;
      const int64_t weights = points * shape.c_in * shape.c_out * static_cast<int64_t>(sizeof(float));
      const int64_t side = uses_winograd_[i] ? cpu::kWinogradPatch + 1 - shape.window.k_h : 1;
      const int64_t rows = ((shape.h + side - 1) / side) * ((shape.w + side - 1) / side);
      if (weights > kFarWeightBytes && rows < (weights > kFarthestWeightBytes ? kFarthestRows : kFarRows)) return i;
    }
    return uses_winograd_.size();
  }

  void place_spatial(const std::vector<StepSpec>& steps, size_t count) {
    if (count == 0) return;
    const InputSpec& input = plan_.input_;
    for (size_t i = 0; i < count; ++i) uses_winograd_.push_back(uses_winograd(steps[i], i));
    for (size_t i = 0; i < count; ++i) uses_plane_.push_back(!uses_winograd_[i] && uses_plane(steps[i], i));
    plan_.first_wide_ = first_wide_step(steps);
    const Window& first = steps[0].conv;
    const bool needs_border =
        steps[0].op == Op::kConv2d && (first.pad_top || first.pad_bottom || first.pad_left || first.pad_right);
    // Transforms read whole vectors of channels, beyond the last pixel if need be.
    const bool overreads = uses_plane_[0] || (uses_winograd_[0] && input.channels % set_.lanes != 0);
    const bool is_dense_nhwc = input.is_nhwc || input.channels == 1;

    Map current;
    if (is_dense_nhwc && !needs_border && !overreads) {
      current.place = Map::Place::kCallerSrc;
      current.channels = input.channels, current.h = input.h, current.w = input.w;
      current.pitch = input.channels;
      current.row_stride = input.w * input.channels;
      current.rows_kept = input.h;
    } else {
      plan_.copies_input_ = true;
      current = arena_map(sizes_[0], &steps[0], steps[0].op == Op::kConv2d);
      claim(current, 0);
      plan_.entry_ = current;
    }

    const bool has_linear = count < steps.size();
    for (size_t i = 0; i < count; ++i) {
      const bool is_last = i + 1 == count;
      const MapSize size = sizes_[i + 1];
      Map dst;
      if (!is_last) {
        dst = arena_map(size, &steps[i + 1], false);
        claim(dst, i + 1);
      } else {
        const bool is_dense = has_linear || options_.output_is_nhwc || size.channels == 1 || size.h * size.w == 1;
        if (is_dense) {
          dst.place = has_linear ? Map::Place::kFeatures : Map::Place::kCallerDst;
          dst.channels = size.channels, dst.h = size.h, dst.w = size.w;
          // Features keep whole vectors per pixel; the caller's memory is exact.
          dst.pitch = has_linear ? round_up(size.channels, set_.lanes) : size.channels;
          dst.row_stride = size.w * dst.pitch;
          dst.rows_kept = size.h;
        } else {
          dst = arena_map(size, nullptr, false);
          dst.row_stride = size.w * dst.pitch;  // so that a band of rows is one matrix to transpose
          dst.size = size.h * dst.row_stride;
          claim(dst, i + 1);
          plan_.transposes_output_ = true;
          plan_.exit_ = dst;
        }
      }
      plan_.spatial_.push_back(make_spatial(steps[i], i, current, dst));
      current = dst;
    }
    const MapSize last = sizes_.back();
    if (has_linear) {
      plan_.features_ = round_up(last.h * current.row_stride + kSlack, 16);
    } else {
      plan_.output_ = {true, last.channels, last.h, last.w, 0};
      plan_.dst_image_ = last.channels * last.h * last.w;
    }
  }

  SpatialStep make_spatial(const StepSpec& spec, size_t index, const Map& src, const Map& dst) {
    SpatialStep step;
    step.name = spec.name, step.note = note(index);
    step.src = src, step.dst = dst;
    step.lower = lower_bound(spec);
    step.activation = make_pass(spec, dst.channels, set_.lanes);
    step.conv = spec.conv, step.pool = spec.pool;
    step.has_conv = spec.op == Op::kConv2d;
    step.has_pool = spec.has_pool || spec.op == Op::kMaxPool2d;
    if (!step.has_conv) {
      if (!spec.pools_before_activation && !commutes_with_max_pool(spec.activation))
        throw Refusal("maxpool2d alone takes no activation before it");
      step.activates_pooled = true;
      step.kernel = std::string("maxpool2d_f32__") + set_.isa + "_1x" + std::to_string(set_.lanes);
      return step;
    }
    const ConvShape shape = conv_shape(spec, index);
    step.conv_h = shape.h, step.conv_w = shape.w;
    step.pools_in_registers = shape.pools_in_registers;
    step.activates_pooled = step.has_pool && !step.pools_in_registers && pools_first(spec);
    step.flops = 2.0 * step.conv_h * step.conv_w * spec.out * spec.in * spec.conv.k_h * spec.conv.k_w;

    if (uses_plane_[index]) {
      make_plane(step, spec, index);
      return step;
    }
    const int* max_rows = step.pools_in_registers ? set_.pool_rows : set_.max_rows;
    const char* op = step.pools_in_registers ? "conv2d_maxpool2d" : "conv2d";
    const Choice choice =
        choose(op, index, max_rows, step.pools_in_registers ? set_.preferred_pool_vectors : set_.preferred_vectors, spec.out);
    step.kernel = choice.kernel;
    PackedPtr& packed = cache_[{index, choice.vectors, step.pools_in_registers ? kPackedPooled : kPackedDirect}];
    if (!packed) packed = pack_conv2d(spec, choice.panels, set_.lanes);
    step.weights = packed;
    step.panels_outermost = packed->bytes() > kCachedWeightBytes;

    std::vector<int64_t> taps;
    for (int64_t y = 0; y < spec.conv.k_h; ++y)
      for (int64_t x = 0; x < spec.conv.k_w; ++x) taps.push_back(y * src.row_stride + x * src.pitch);
    step.runs = make_runs(taps, spec.in);

    if (uses_winograd_[index]) make_winograd(step, spec, index, shape);
    if (step.has_pool && !step.pools_in_registers) place_ring(step, spec);
    step.scratch_offset = step.ring.size ? round_up(step.ring.size + kSlack, 16) : 0;
    plan_.thread_floats_ = std::max(plan_.thread_floats_, step.scratch_offset + step.winograd.scratch_floats);
    make_tables(step);
    return step;
  }

  void make_plane(SpatialStep& step, const StepSpec& spec, size_t index) {
    step.is_plane = true;
    step.kernel = std::string("conv2d_plane_f32__") + set_.isa + "_1x" + std::to_string(2 * set_.lanes);
    PackedPtr& packed = cache_[{index, 1, kPackedPlane}];
    if (!packed) packed = pack_plane(spec);
    step.weights = packed;
    if (step.has_pool && !step.pools_in_registers) place_ring(step, spec);
    step.scratch_offset = step.ring.size ? round_up(step.ring.size + kSlack, 16) : 0;
    step.plane_stride = round_up(step.conv_w, 2 * set_.lanes);
    plan_.thread_floats_ =
        std::max(plan_.thread_floats_, step.scratch_offset + std::max<int64_t>(spec.out, 8) * step.plane_stride + kSlack);
  }

  void make_winograd(SpatialStep& step, const StepSpec& spec, size_t index, const ConvShape& shape) {
    // The weights of one point and panel pass through L1 with the rows they meet: with more channels a panel is narrower.
    const int preferred = spec.in < kDeepChannels ? set_.preferred_vectors : std::min(set_.preferred_vectors, 3);
    const Choice choice = choose("conv2d_winograd", index, set_.product_rows, preferred, spec.out, spread_vectors);
    step.winograd = plan_winograd(shape, choice.vectors, set_);
    const bool is_small = step.winograd.has_few_channels;
    PackedPtr& packed = cache_[{index, choice.vectors, kPackedWinograd}];
    if (!packed) packed = pack_winograd(spec, choice.panels, set_.lanes, is_small);
    step.winograd.weights = packed;
    step.kernel =
        is_small ? std::string("conv2d_winograd_few_f32__") + set_.isa + "_1x" + std::to_string(set_.lanes) : choice.kernel;
  }

  // The rows of the convolution that wait for their pool. With weights that exceed the cache, all rows are made first.
  void place_ring(SpatialStep& step, const StepSpec& spec) {
    step.group_rows = step.panels_outermost || step.winograd ? step.dst.h : 1;
    Map& ring = step.ring;
    ring.channels = spec.out, ring.h = step.conv_h, ring.w = step.conv_w;
    ring.pitch = round_up(spec.out, set_.lanes);
    ring.row_stride = step.conv_w * ring.pitch;
    if (ring.row_stride * 4 % 4096 == 0) ring.row_stride += 16;
    const int64_t wanted = (step.group_rows - 1) * step.pool.stride_h + std::max(step.pool.k_h, step.pool.stride_h);
    ring.rows_kept = std::min(step.conv_h, wanted);
    ring.size = ring.rows_kept * ring.row_stride;
    ring.place = Map::Place::kRing;
  }

  // Offsets of the pixels of one tile of Winograd's, in the order of make_tables.
  void make_winograd_tables(SpatialStep& step, const Map& out, int64_t scale) const {
    Winograd& w = step.winograd;
    step.unit_rows = step.ring.pitch ? 1 : w.side;
    for (int64_t y = 0; y < w.side; ++y)
      for (int64_t x = 0; x < w.side; ++x) {
        w.dst_offset.push_back(to_offset(y * out.row_stride + x * out.pitch));
        for (int64_t i = 0; i < scale; ++i)
          for (int64_t j = 0; j < scale; ++j)
            w.src_offset.push_back(to_offset((y * scale + i) * step.src.row_stride + (x * scale + j) * step.src.pitch));
      }
  }

  // Offsets of the pixels of one block of output rows: row by row, or window by window for a pool in registers.
  void make_tables(SpatialStep& step) const {
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

  void build_linear(const std::vector<StepSpec>& steps, size_t first) {
    if (first == steps.size()) return;
    int64_t width = plan_.input_.is_spatial ? sizes_.back().channels * sizes_.back().h * sizes_.back().w : plan_.input_.features;
    const bool follows_spatial = first > 0;
    if (first == 0 && plan_.input_.is_spatial) throw Refusal("linear takes rows of features");
    int64_t src_stride = follows_spatial ? plan_.features_ : width;
    int64_t linear_bytes = 0;
    for (size_t i = first; i < steps.size(); ++i) {
      const StepSpec& spec = steps[i];
      if (spec.in != width) throw Refusal("linear weight expects another number of features");
      if (spec.in < 1 || spec.out < 1) throw Refusal("linear has no features");
      LinearStep step;
      step.name = spec.name, step.note = note(i);
      step.n = spec.out, step.k = spec.in;
      step.lower = lower_bound(spec);
      step.activation = make_pass(spec, spec.out, set_.lanes);
      step.flops = 2.0 * spec.out * spec.in;
      const bool reads_map = follows_spatial && i == first;
      const int64_t spatial = reads_map ? sizes_.back().h * sizes_.back().w : 1;
      const int64_t pitch = reads_map ? plan_.spatial_.back().dst.pitch : 0;
      const cpu::KernelRow* const packs = wanted_row("linear", i);
      const cpu::KernelRow* const in_place = wanted_row("linear_in_place", i);
      if (in_place || (!packs && step.weight_bytes() >= kInPlaceBytes)) {
        read_in_place(step, spec, i);
        step.spatial = spatial, step.pixel_pitch = pitch;
      } else {
        // Weights from memory: a higher tile reads them once for more rows, and a narrower panel streams as fast.
        const bool is_far = step.weight_bytes() > kFarthestWeightBytes && set_.preferred_vectors > 2;
        const Choice choice = choose("linear", i, set_.max_rows, is_far ? 2 : set_.preferred_vectors, spec.out);
        step.kernel = choice.kernel;
        PackedPtr& packed = cache_[{i, choice.vectors, spatial}];
        if (!packed) packed = pack_linear(spec, choice.panels, spatial, set_);
        step.weights = packed;
        std::vector<int64_t> taps;
        for (int64_t s = 0; s < spatial; ++s) taps.push_back(s * pitch);
        step.runs = make_runs(taps, spec.in / spatial);
      }
      linear_bytes += step.weight_bytes();

      const bool is_last = i + 1 == steps.size();
      step.src_stride = src_stride;
      step.dst_stride = is_last ? spec.out : round_up(spec.out, set_.lanes);
      to_offset(kRowBlock * std::max(step.src_stride, step.dst_stride));
      if (!is_last) plan_.rows_stride_ = std::max(plan_.rows_stride_, step.dst_stride);
      src_stride = step.dst_stride;
      width = spec.out;
      plan_.linear_.push_back(std::move(step));
    }
    plan_.output_ = {false, 0, 0, 0, width};
    plan_.dst_image_ = width;
    plan_.splits_at_linear_ = follows_spatial && linear_bytes > kSplitWeightBytes;
  }

  void read_in_place(LinearStep& step, const StepSpec& spec, size_t index) {
    step.kernel = std::string("linear_in_place_f32__") + set_.isa + "_" + std::to_string(set_.in_place_rows) + "x" +
                  std::to_string(set_.lanes);
    PackedPtr& shared = cache_[{index, 0, 0}];
    if (!shared) shared = pack_bias(spec, set_);
    step.weights = shared;
    step.runs = make_runs({0}, spec.in);
    step.in_place = static_cast<int>(plan_.in_place_.size());
    plan_.in_place_.push_back(index);
  }

  void lay_out_arena() {
    const bool groups_at_linear = plan_.features_ && !plan_.splits_at_linear_;
    plan_.group_images_ = groups_at_linear || plan_.first_wide_ < plan_.spatial_.size() ? kMostGroupImages : 1;
    plan_.features_offset_ = plan_.arena_floats_;
    if (!plan_.splits_at_linear_) plan_.arena_floats_ += plan_.group_images_ * plan_.features_;
    for (int64_t& offset : plan_.rows_offset_) {
      offset = plan_.arena_floats_;
      plan_.arena_floats_ += round_up(kRowBlock * plan_.rows_stride_, 16);
    }
    plan_.arena_floats_ += 16;
  }

  struct Timed {
    bool is_known = false;
    std::string kernel;  // empty for the engine's own choice
  };

  struct Choice {
    int vectors;  // of the widest panel, which names the kernel
    std::vector<int> panels;
    std::string kernel;
  };

  // The first kernel of this operation that FASTSEQ_KERNEL may mean, or timing has chosen for this step.
  const cpu::KernelRow* wanted_row(const std::string& op, size_t index) const {
    const std::string& wanted = options_.forced_kernel.empty() ? timed_[index].kernel : options_.forced_kernel;
    return wanted.empty() ? nullptr : find_row(op, wanted);
  }

  // The first kernel with `part` in its name, of any operation where `op` is empty.
  const cpu::KernelRow* find_row(const std::string& op, const std::string& part) const {
    static const std::vector<cpu::KernelRow> rows = cpu::kernel_rows();
    for (const cpu::KernelRow& row : rows)
      if ((op.empty() || row.op == op) && row.isa == set_.isa && row.name.find(part) != std::string::npos) return &row;
    return nullptr;
  }

  // The instruction set's preferred tile, or the wanted one if it is of this operation.
  Choice choose(const std::string& op, size_t index, const int* max_rows, int preferred, int64_t out,
                std::vector<int> (*split)(int, int, const int*) = split_vectors) const {
    Choice choice{preferred, {}, ""};
    if (const cpu::KernelRow* const wanted = wanted_row(op, index)) choice.vectors = wanted->vectors;
    const int vectors = static_cast<int>((out + set_.lanes - 1) / set_.lanes);
    choice.panels = split(vectors, choice.vectors, max_rows);
    choice.vectors = *std::max_element(choice.panels.begin(), choice.panels.end());
    choice.kernel = op + "_f32__" + set_.isa + "_" + std::to_string(max_rows[choice.vectors]) + "x" +
                    std::to_string(choice.vectors * set_.lanes);
    return choice;
  }

  Plan& plan_;
  const PlanOptions& options_;
  const cpu::KernelSet& set_;
  PackCache& cache_;
  std::vector<Timed> timed_;  // of all steps
  std::vector<bool> uses_winograd_, uses_plane_;
  std::vector<MapSize> sizes_, conv_sizes_;  // see StepSizes
};

std::shared_ptr<const Plan> Plan::build(const InputSpec& input, const std::vector<StepSpec>& steps, const PlanOptions& options,
                                        PackCache& cache) {
  auto plan = std::make_shared<Plan>();
  PlanBuilder(*plan, options, cache).build(input, steps);
  return plan;
}

namespace {

int64_t packed_bytes(const SpatialStep& step) {
  return (step.weights ? step.weights->bytes() : 0) + (step.winograd ? step.winograd.weights->bytes() : 0);
}

}  // namespace

std::vector<StepInfo> Plan::describe() const {
  std::vector<StepInfo> infos;
  for (const SpatialStep& step : spatial_)
    infos.push_back({step.name, step.kernel, shape_text({step.dst.channels, step.dst.h, step.dst.w}), step.flops,
                     packed_bytes(step), step.note});
  for (const LinearStep& step : linear_)
    infos.push_back({step.name, step.kernel, shape_text({step.n}), step.flops, step.weights->bytes(), step.note});
  return infos;
}

}  // namespace fastseq
