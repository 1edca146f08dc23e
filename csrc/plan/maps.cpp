#include "plan/maps.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>

namespace fastseq {
namespace {

// Averages of more pixels are sums of sums.
constexpr int64_t kLongestSum = 64;

MapSize pooled_size(const StepSpec& spec, const MapSize& src) {
  const Window& w = spec.pool;
  return {src.channels, pool_size(src.h, w.k_h, w.stride_h, w.pad_top, w.ceil_mode, w.dilation_h),
          pool_size(src.w, w.k_w, w.stride_w, w.pad_left, w.ceil_mode, w.dilation_w)};
}

MapSize adaptive_size(const StepSpec& spec, const MapSize& src) {
  if (spec.pool_h < 0 || spec.pool_w < 0 || src.h < 1 || src.w < 1) throw Refusal("an adaptive pool has a size eager rejects");
  return {src.channels, spec.pool_h ? spec.pool_h : src.h, spec.pool_w ? spec.pool_w : src.w};
}

// Windows along one axis, cut at the image's edge: at every `stride` pixels, of `k` pixels that are `dilation` apart.
std::vector<cpu::PoolSpan> spans(int64_t in, int64_t out, int64_t k, int64_t stride, int64_t pad, int64_t dilation,
                                 bool counts_padding) {
  std::vector<cpu::PoolSpan> result;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t first = i * stride - pad, behind = first + dilation * (k - 1) + 1;
    const int64_t skipped = first < 0 ? divide_up(-first, dilation) : 0;
    const int64_t begin = first + skipped * dilation, end = std::min(in, behind);
    if (begin >= end) throw Refusal("a window of a pool lies wholly in the padding");
    const int64_t pixels = divide_up(end - begin, dilation);
    const int64_t counted = counts_padding ? std::min(behind, in + pad) - first : pixels;
    result.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(pixels), static_cast<float>(counted)});
  }
  return result;
}

// As many windows as there is output, each from the pixel under its first share of the input to that under its last.
std::vector<cpu::PoolSpan> adaptive_spans(int64_t in, int64_t out) {
  std::vector<cpu::PoolSpan> result;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t begin = i / out * in + i % out * in / out, end = 1 + ((i + 1) * in - 1) / out;
    result.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end - begin), static_cast<float>(end - begin)});
  }
  return result;
}

void prepare_windows(const StepSpec& spec, const MapSize& src, const MapSize& dst, SpatialStep& step) {
  const Window& w = spec.pool;
  step.row_spans = spans(src.h, dst.h, w.k_h, w.stride_h, w.pad_top, w.dilation_h, spec.counts_padding);
  step.column_spans = spans(src.w, dst.w, w.k_w, w.stride_w, w.pad_left, w.dilation_w, spec.counts_padding);
}

void prepare_max(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set, SpatialStep& step) {
  step.pool_row = set.pool_row;
  prepare_windows(spec, src, dst, step);
}

// Eager divides by the product of both counts, or by the divisor.
void prepare_average(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set, SpatialStep& step) {
  prepare_windows(spec, src, dst, step);
  step.pool_row = set.average_row[spec.pool.k_h * spec.pool.k_w > kLongestSum];
  if (!spec.divisor) return;
  for (cpu::PoolSpan& span : step.row_spans) span.count = static_cast<float>(spec.divisor);
  for (cpu::PoolSpan& span : step.column_spans) span.count = 1;
}

void prepare_adaptive(const MapSize& src, const MapSize& dst, SpatialStep& step) {
  if (std::max(dst.h, dst.w) > std::numeric_limits<int32_t>::max()) throw Refusal("an adaptive pool has a size eager rejects");
  step.row_spans = adaptive_spans(src.h, dst.h), step.column_spans = adaptive_spans(src.w, dst.w);
}

void prepare_adaptive_max(const StepSpec&, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set, SpatialStep& step) {
  prepare_adaptive(src, dst, step);
  step.pool_row = set.pool_row;
}

void prepare_adaptive_average(const StepSpec&, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set,
                              SpatialStep& step) {
  prepare_adaptive(src, dst, step);
  // A window has at most one row and column more than its share.
  step.pool_row = set.average_row[(src.h / dst.h + 2) * (src.w / dst.w + 2) > kLongestSum];
}

void pool_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last, const float*) {
  cpu::PoolRowJob job = {};
  job.w_out = static_cast<int32_t>(step.dst.w);
  job.columns = step.column_spans.data(), job.column_step = step.pool.dilation_w;
  job.src_pitch = from.pitch, job.dst_pitch = step.dst.pitch;
  job.channels = static_cast<int32_t>(from.channels);
  job.can_overread = from.place != Map::Place::kCallerSrc;
  job.lower = step.lower;
  job.row_stride = step.pool.dilation_h * from.row_stride;
  job.ring_end = src + from.rows_kept * from.row_stride, job.ring_floats = from.rows_kept * from.row_stride;
  for (int64_t y = first; y < last; ++y) {
    const cpu::PoolSpan& rows = step.row_spans[static_cast<size_t>(y)];
    job.src = src + rows.begin % from.rows_kept * from.row_stride;
    job.row_count = rows.pixels;
    job.row_divisor = rows.count;
    job.dst = dst + y * step.dst.row_stride;
    step.pool_row(job);
  }
}

MapSize same_size(const StepSpec&, const MapSize& src) { return src; }

// Numbers of eager's features, channel by channel, as those of our pixels: each with whole vectors.
std::vector<float> by_pixels(const std::vector<float>& features, const MapSize& map, int64_t pitch) {
  std::vector<float> pixels(static_cast<size_t>(map.h * map.w * pitch));
  for (int64_t c = 0; c < map.channels; ++c)
    for (int64_t i = 0; i < map.h * map.w; ++i) pixels[i * pitch + c] = features[c * map.h * map.w + i];
  return pixels;
}

void prepare_scale(const StepSpec& spec, const MapSize& src, const MapSize&, const cpu::KernelSet& set, SpatialStep& step) {
  step.has_scale_per_feature = spec.is_per_feature && spec.weight;
  step.scale = make_scale(spec, step.has_scale_per_feature ? src.channels * src.h * src.w : src.channels, set);
  if (!step.has_scale_per_feature) return;
  const int64_t pitch = round_up(src.channels, set.lanes);
  step.scale.scale = by_pixels(step.scale.scale, src, pitch), step.scale.shift = by_pixels(step.scale.shift, src, pitch);
}

// function(job, y) for each row; its numbers are for the function to fill in.
template <typename Function>
void for_scaled_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                     const Function& function) {
  const Map& to = step.dst;
  cpu::ScaleJob job = {};
  job.src_stride = from.pitch, job.dst_stride = to.pitch;
  job.can_overread = from.place != Map::Place::kCallerSrc;
  // Whole vectors where both sides have them, and nothing else's values in what no channel fills.
  const bool has_room = job.can_overread && to.place != Map::Place::kCallerDst && !from.is_shared && !to.is_shared;
  job.lanes = has_room ? to.pitch : to.channels, job.lower = step.lower;
  for (int64_t y = first; y < last; ++y) {
    job.rows = from.w, job.src = src + y * from.row_stride, job.dst = dst + y * to.row_stride;
    function(job, y);
  }
}

void scale_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last, const float*) {
  const int64_t pitch = static_cast<int64_t>(step.scale.scale.size()) / (step.dst.h * step.dst.w);
  for_scaled_rows(step, from, src, dst, first, last, [&](cpu::ScaleJob& job, int64_t y) {
    const float *scale = step.scale.scale.data(), *shift = step.scale.shift.data();
    job.scale = scale, job.shift = shift;
    if (!step.has_scale_per_feature) return step.scale.kernel(job);
    job.rows = 1;
    for (int64_t x = 0; x < from.w; ++x, job.src += job.src_stride, job.dst += job.dst_stride) {
      job.scale = scale + (y * from.w + x) * pitch, job.shift = shift + (y * from.w + x) * pitch;
      step.scale.kernel(job);
    }
  });
}

MapSize grouped_size(const StepSpec& spec, const MapSize& src) {
  if (spec.groups < 1 || src.channels % spec.groups) throw Refusal("groupnorm has channels that do not divide into its groups");
  // Eager raises, unless there are more images.
  if (src.channels == spec.groups && src.h * src.w == 1) throw Refusal("groupnorm of groups of one number");
  return src;
}

// What a map's groups come to, each array in whole vectors.
struct Measured {
  float *center, *scale, *shift, *mean, *square;
  static constexpr int64_t kArrays = 5;
  Measured(float* found, int64_t lanes)
      : center(found), scale(center + lanes), shift(scale + lanes), mean(shift + lanes), square(mean + lanes) {}
};

void measure_groups(const SpatialStep& step, const Map& from, const float* src, float* found) {
  const auto lanes = static_cast<int64_t>(step.scale.scale.size());
  const Measured of(found, lanes);
  std::fill(found, found + 3 * lanes, 0.0f);
  const int64_t channels = from.channels / step.norm.groups;
  const double pixels = static_cast<double>(channels * from.h * from.w);
  cpu::MomentsJob job = {};
  job.src = src, job.row_stride = from.row_stride, job.pitch = from.pitch;
  job.rows = from.h, job.width = from.w, job.channels = from.channels;
  job.can_overread = from.place != Map::Place::kCallerSrc;
  job.center = of.center, job.share = static_cast<float>(1 / pixels), job.mean = of.mean, job.square = of.square;
  const auto sum = [&](const float* values, int64_t first) {
    return std::accumulate(values + first, values + first + channels, 0.0);
  };
  step.norm.moments(job);
  for (int64_t first = 0; first < from.channels; first += channels)
    std::fill_n(of.center + first, channels, static_cast<float>(sum(of.mean, first)));
  // Of small differences: what the mean lacks, and a variance in which it does not cancel.
  step.norm.moments(job);
  for (int64_t first = 0; first < from.channels; first += channels) {
    const double rest = sum(of.mean, first), variance = sum(of.square, first) - rest * rest;
    const double inverse = 1 / std::sqrt(std::max(variance, 0.0) + step.norm.eps);
    for (int64_t c = first; c < first + channels; ++c) {
      const double scale = inverse * static_cast<double>(step.scale.scale[static_cast<size_t>(c)]);
      of.scale[c] = static_cast<float>(scale);
      of.shift[c] = static_cast<float>(static_cast<double>(step.scale.shift[static_cast<size_t>(c)]) - rest * scale);
    }
  }
}

void prepare_group_norm(const StepSpec& spec, const MapSize& src, const MapSize&, const cpu::KernelSet& set, SpatialStep& step) {
  step.scale = make_scale(spec, src.channels, set);
  step.norm = {spec.groups, spec.eps, set.channel_moments, set.centered_rows};
  step.measure = measure_groups;
  step.measured_floats = Measured::kArrays * static_cast<int64_t>(step.scale.scale.size());
}

void group_norm_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                     const float* measured) {
  const auto lanes = static_cast<int64_t>(step.scale.scale.size());
  const float* const center = measured;
  for_scaled_rows(step, from, src, dst, first, last, [&](cpu::ScaleJob& job, int64_t) {
    job.scale = center + lanes, job.shift = center + 2 * lanes;
    step.norm.kernel(job, center);
  });
}

MapSize padded_size(const StepSpec& spec, const MapSize& src) {
  if (std::min({spec.pad_top, spec.pad_bottom, spec.pad_left, spec.pad_right}) < 0) throw Refusal("a padding crops");
  const auto check = [&](int64_t in, int64_t before, int64_t behind) {
    const int64_t most = std::max(before, behind);
    const bool fits = spec.pad_mode == PadMode::kReflect ? most < in : spec.pad_mode != PadMode::kCircular || most <= in;
    if (in < 1 || !fits) throw Refusal("a padding is larger than what it is made of");
    if (in + before + behind > std::numeric_limits<int32_t>::max()) throw Refusal("a padded map is too large");
    return in + before + behind;
  };
  return {src.channels, check(src.h, spec.pad_top, spec.pad_bottom), check(src.w, spec.pad_left, spec.pad_right)};
}

// Where each of `out` rows or columns comes from, -1 for the value.
std::vector<int32_t> pad_sources(PadMode mode, int64_t in, int64_t out, int64_t before) {
  std::vector<int32_t> sources;
  for (int64_t i = 0; i < out; ++i) {
    int64_t at = i - before;
    if (at < 0 || at >= in) switch (mode) {
        case PadMode::kConstant:
          at = -1;
          break;
        case PadMode::kReflect:
          at = at < 0 ? -at : 2 * (in - 1) - at;
          break;
        case PadMode::kReplicate:
          at = at < 0 ? 0 : in - 1;
          break;
        case PadMode::kCircular:
          at = at < 0 ? at + in : at - in;
          break;
      }
    sources.push_back(static_cast<int32_t>(at));
  }
  return sources;
}

void prepare_pad(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet&, SpatialStep& step) {
  step.row_sources = pad_sources(spec.pad_mode, src.h, dst.h, spec.pad_top);
  step.column_sources = pad_sources(spec.pad_mode, src.w, dst.w, spec.pad_left);
  step.pad_value = spec.pad_value;
}

void pad_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last, const float*) {
  const Map& to = step.dst;
  const bool is_alike = from.pitch == to.pitch;  // then a stretch of pixels is one of memory
  for (int64_t y = first; y < last; ++y) {
    const int32_t row = step.row_sources[static_cast<size_t>(y)];
    float* const dst_row = dst + y * to.row_stride;
    for (int64_t x = 0; x < to.w;) {
      const int32_t column = row < 0 ? -1 : step.column_sources[static_cast<size_t>(x)];
      float* const pixel = dst_row + x * to.pitch;
      if (column < 0) {
        std::fill(pixel, pixel + to.channels, step.pad_value);
        ++x;
        continue;
      }
      int64_t count = 1;
      while (is_alike && x + count < to.w && step.column_sources[static_cast<size_t>(x + count)] == column + count) ++count;
      const float* const source = src + row * from.row_stride + column * from.pitch;
      std::copy(source, source + (count - 1) * from.pitch + to.channels, pixel);
      x += count;
    }
  }
}

// As eager converts sizes: in double precision, and downwards. 0, which eager rejects, where nothing is left.
int64_t resized(int64_t in, int64_t out, double factor) {
  const double size = out ? static_cast<double>(out) : static_cast<double>(in) * factor;
  return size > 0 && size <= std::numeric_limits<int32_t>::max() ? static_cast<int64_t>(size) : 0;
}

MapSize resized_size(const StepSpec& spec, const MapSize& src) {
  const MapSize dst{src.channels, resized(src.h, spec.resize.h, spec.resize.factor_h),
                    resized(src.w, spec.resize.w, spec.resize.factor_w)};
  if (src.h < 1 || src.w < 1 || dst.h < 1 || dst.w < 1) throw Refusal("an upsampling has a size eager rejects");
  return dst;
}

// Pixels of the source for one of the result, in float as eager computes it. `factor`: 0 where the sizes alone count.
float source_step(int64_t in, int64_t out, double factor) {
  return factor > 0 ? static_cast<float>(1.0 / factor) : static_cast<float>(in) / static_cast<float>(out);
}

double given_factor(const Resize& resize, double factor) { return resize.recomputes_factors ? 0 : factor; }

// Eager takes these two shortcuts, whatever the factor.
std::vector<int32_t> nearest_sources(int64_t in, int64_t out, double factor) {
  const float step = source_step(in, out, factor);
  std::vector<int32_t> sources;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t floored = static_cast<int64_t>(std::floor(static_cast<float>(i) * step));
    const int64_t source = out == in ? i : out == 2 * in ? i / 2 : std::min(floored, in - 1);
    sources.push_back(static_cast<int32_t>(source));
  }
  return sources;
}

void prepare_nearest(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet&, SpatialStep& step) {
  step.row_sources = nearest_sources(src.h, dst.h, given_factor(spec.resize, spec.resize.factor_h));
  step.column_sources = nearest_sources(src.w, dst.w, given_factor(spec.resize, spec.resize.factor_w));
}

void nearest_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                  const float*) {
  const Map& to = step.dst;
  for (int64_t y = first; y < last; ++y) {
    const int32_t row = step.row_sources[static_cast<size_t>(y)];
    float* const dst_row = dst + y * to.row_stride;
    if (y > first && row == step.row_sources[static_cast<size_t>(y) - 1]) {
      const float* const above = dst_row - to.row_stride;
      std::copy(above, above + (to.w - 1) * to.pitch + to.channels, dst_row);
      continue;
    }
    const float* const src_row = src + row * from.row_stride;
    for (int64_t x = 0; x < to.w; ++x) {
      const float* const pixel = src_row + step.column_sources[static_cast<size_t>(x)] * from.pitch;
      std::copy(pixel, pixel + to.channels, dst_row + x * to.pitch);
    }
  }
}

// The two pixels around each of the result's and their weights. All in float, and eager's multiply-add is fused: where a weight is
// zero and where it is not, infinities tell.
std::vector<cpu::Blend> blends(int64_t in, int64_t out, double factor, bool aligns_corners) {
  std::vector<cpu::Blend> result;
  const float step = !aligns_corners ? source_step(in, out, factor)
                     : out > 1       ? static_cast<float>(in - 1) / static_cast<float>(out - 1)
                                     : 0.0f;
  for (int64_t i = 0; i < out; ++i) {
    if (in == out) {
      result.push_back({static_cast<int32_t>(i), static_cast<int32_t>(i), 1, 0});
      continue;
    }
    const float index = static_cast<float>(i);
    const float at = aligns_corners ? step * index : std::max(std::fma(step, index + 0.5f, -0.5f), 0.0f);
    const int64_t first = std::min(static_cast<int64_t>(std::floor(at)), in - 1), second = std::min(first + 1, in - 1);
    const float weight = std::clamp(at - static_cast<float>(first), 0.0f, 1.0f);
    result.push_back({static_cast<int32_t>(first), static_cast<int32_t>(second), 1 - weight, weight});
  }
  return result;
}

void prepare_bilinear(const StepSpec& spec, const MapSize& src, const MapSize& dst, const cpu::KernelSet& set, SpatialStep& step) {
  const Resize& resize = spec.resize;
  step.row_blends = blends(src.h, dst.h, given_factor(resize, resize.factor_h), resize.aligns_corners);
  step.column_blends = blends(src.w, dst.w, given_factor(resize, resize.factor_w), resize.aligns_corners);
  step.blend_row = set.blend_row;
}

void bilinear_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                   const float*) {
  cpu::BlendRowJob job = {};
  job.columns = step.column_blends.data(), job.w_out = static_cast<int32_t>(step.dst.w);
  job.channels = static_cast<int32_t>(from.channels);
  job.src_pitch = from.pitch, job.dst_pitch = step.dst.pitch;
  job.can_overread = from.place != Map::Place::kCallerSrc;
  for (int64_t y = first; y < last; ++y) {
    const cpu::Blend& row = step.row_blends[static_cast<size_t>(y)];
    job.top = src + row.first * from.row_stride, job.bottom = src + row.second * from.row_stride;
    job.top_weight = row.first_weight, job.bottom_weight = row.second_weight;
    job.dst = dst + y * step.dst.row_stride;
    step.blend_row(job);
  }
}

MapSize shuffled_size(const StepSpec& spec, const MapSize& src) {
  const int64_t r = spec.factor;
  if (r < 1 || r > src.channels || src.channels % (r * r)) throw Refusal("a pixel shuffle has channels that do not divide");
  if (std::max(src.h, src.w) * r > std::numeric_limits<int32_t>::max()) throw Refusal("a shuffled map is too large");
  return {src.channels / (r * r), src.h * r, src.w * r};
}

MapSize unshuffled_size(const StepSpec& spec, const MapSize& src) {
  const int64_t r = spec.factor;
  if (r < 1 || src.h % r || src.w % r) throw Refusal("a pixel unshuffle has rows or columns that do not divide");
  if (src.channels > std::numeric_limits<int32_t>::max() / r / r) throw Refusal("an unshuffled map has too many channels");
  return {src.channels * r * r, src.h / r, src.w / r};
}

void prepare_shuffle(const StepSpec& spec, const MapSize&, const MapSize& dst, const cpu::KernelSet&, SpatialStep& step) {
  const int64_t square = spec.factor * spec.factor;
  step.factor = spec.factor;
  for (int64_t i = 0; i < square; ++i)
    for (int64_t c = 0; c < dst.channels; ++c) step.channel_sources.push_back(static_cast<int32_t>(c * square + i));
}

void shuffle_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                  const float*) {
  const Map& to = step.dst;
  const int64_t r = step.factor, channels = to.channels;
  for (int64_t y = first; y < last; ++y) {
    const float* pixel = src + y / r * from.row_stride;
    const int32_t* const sources = step.channel_sources.data() + y % r * r * channels;
    float* to_pixel = dst + y * to.row_stride;
    for (int64_t x = 0; x < from.w; ++x, pixel += from.pitch) {
      const int32_t* source = sources;
      for (int64_t j = 0; j < r; ++j, to_pixel += to.pitch, source += channels)
        for (int64_t c = 0; c < channels; ++c) to_pixel[c] = pixel[source[c]];
    }
  }
}

void prepare_unshuffle(const StepSpec& spec, const MapSize&, const MapSize&, const cpu::KernelSet&, SpatialStep& step) {
  step.factor = spec.factor;
}

void unshuffle_rows(const SpatialStep& step, const Map& from, const float* src, float* dst, int64_t first, int64_t last,
                    const float*) {
  const Map& to = step.dst;
  const int64_t r = step.factor, square = r * r;
  for (int64_t y = first; y < last; ++y)
    for (int64_t x = 0; x < to.w; ++x)
      for (int64_t i = 0; i < square; ++i) {
        const float* const pixel = src + (y * r + i / r) * from.row_stride + (x * r + i % r) * from.pitch;
        float* const to_pixel = dst + y * to.row_stride + x * to.pitch + i;
        for (int64_t c = 0; c < from.channels; ++c) to_pixel[c * square] = pixel[c];
      }
}

constexpr MapOp kMapOps[] = {
    {Op::kMaxPool2d, "maxpool2d_f32", pooled_size, prepare_max, pool_rows, true},
    {Op::kAvgPool2d, "avgpool2d_f32", pooled_size, prepare_average, pool_rows},
    {Op::kAdaptiveMaxPool2d, "maxpool2d_f32", adaptive_size, prepare_adaptive_max, pool_rows, true},
    {Op::kAdaptiveAvgPool2d, "avgpool2d_f32", adaptive_size, prepare_adaptive_average, pool_rows},
    {Op::kPad2d, "pad2d_f32__copy", padded_size, prepare_pad, pad_rows},
    {Op::kUpsampleNearest2d, "upsamplenearest2d_f32__copy", resized_size, prepare_nearest, nearest_rows, true},
    {Op::kUpsampleBilinear2d, "upsamplebilinear2d_f32", resized_size, prepare_bilinear, bilinear_rows},
    {Op::kPixelShuffle, "pixelshuffle_f32__copy", shuffled_size, prepare_shuffle, shuffle_rows, true},
    {Op::kPixelUnshuffle, "pixelunshuffle_f32__copy", unshuffled_size, prepare_unshuffle, unshuffle_rows, true},
    {Op::kScale2d, "scale_f32", same_size, prepare_scale, scale_rows},
    {Op::kGroupNorm, "groupnorm_f32", grouped_size, prepare_group_norm, group_norm_rows},
};

}  // namespace

bool gives_contiguous(const StepSpec& step) { return step.op == Op::kPad2d && step.pad_mode == PadMode::kCircular; }

const MapOp* map_op(const StepSpec& step) {
  const Op op = step.op == Op::kConv2d && step.has_pool ? Op::kMaxPool2d : step.op;
  const auto found = std::find_if(std::begin(kMapOps), std::end(kMapOps), [op](const MapOp& entry) { return entry.op == op; });
  return found == std::end(kMapOps) ? nullptr : found;
}

}  // namespace fastseq
