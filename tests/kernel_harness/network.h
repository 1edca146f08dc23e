// Networks for whole plans, and what they compute in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"
#include "plan/maps.h"
#include "plan/spec.h"

namespace fastseq::harness {

// An image or a row of features in double precision, and how far a float result may be off.
struct Tensor {
  int64_t channels = 0, h = 1, w = 1;
  std::vector<double> value, error;
  Tensor(int64_t c, int64_t height, int64_t width)
      : channels(c), h(height), w(width), value(static_cast<size_t>(c * height * width)), error(value.size()) {}
  size_t at(int64_t c, int64_t y, int64_t x) const { return static_cast<size_t>((c * h + y) * w + x); }
};

// A step with its own weights.
struct Layer {
  StepSpec spec;
  std::vector<float> weight, bias, slopes;
};

class Network {
 public:
  Network(std::string name, int64_t channels, int64_t h, int64_t w) : name_(std::move(name)) {
    input_.is_spatial = true, input_.channels = channels, input_.h = h, input_.w = w;
    width_ = channels;
  }
  Network(std::string name, int64_t features) : name_(std::move(name)), width_(features) { input_.features = features; }

  Network& conv(int64_t out, int64_t k_h, int64_t k_w, int64_t stride = 1, int64_t pad = 0, bool has_bias = true) {
    StepSpec& spec = add(Op::kConv2d, "conv2d", out, width_ * k_h * k_w, has_bias);
    spec.in = width_, width_ = out;
    spec.conv = {k_h, k_w, stride, stride, pad, pad, pad, pad, false};
    return *this;
  }
  // A square kernel, each group of output channels on a group of input channels.
  Network& grouped(int64_t out, int64_t k, int64_t groups, int64_t stride = 1, int64_t pad = 0, int64_t dilation = 1) {
    const int64_t in = width_ / groups;
    StepSpec& spec = add(Op::kConv2d, "conv2d", out, in * k * k, true);
    spec.in = in, spec.groups = groups, width_ = out;
    spec.conv = {k, k, stride, stride, pad, pad, pad, pad, false};
    spec.conv.dilation_h = spec.conv.dilation_w = dilation;
    return *this;
  }
  // A Linear behind an image reads all of it: features = channels * h * w.
  Network& linear(int64_t out, int64_t features = 0, bool has_bias = true) {
    const int64_t in = features ? features : width_;
    add(Op::kLinear, "linear", out, in, has_bias).in = in;
    width_ = out;
    return *this;
  }
  Network& relu() { return act(Activation::kRelu); }
  Network& act(Activation kind, float a = 0, float b = 0) {
    StepSpec& spec = layers_.back().spec;
    spec.activation.kind = kind, spec.activation.a = a, spec.activation.b = b;
    spec.pools_before_activation = spec.has_pool || (spec.op != Op::kConv2d && spec.op != Op::kLinear);
    return *this;
  }
  // Slopes in [least, least + 1).
  Network& prelu(int64_t slopes, float least) {
    act(Activation::kPrelu);
    layers_.back().slopes = random_.values(slopes);
    for (float& slope : layers_.back().slopes) slope = least + (slope + 1) / 2;
    return *this;
  }
  Network& pool(int64_t k, int64_t stride, int64_t pad = 0, bool ceil_mode = false) {
    const Window window = {k, k, stride, stride, pad, pad, pad, pad, ceil_mode};
    const bool joins = !layers_.empty() && layers_.back().spec.op == Op::kConv2d && !layers_.back().spec.has_pool;
    if (!joins) {
      add_layer();
      layers_.back().spec.op = Op::kMaxPool2d, layers_.back().spec.name = "maxpool2d";
    }
    layers_.back().spec.has_pool = joins, layers_.back().spec.pool = window;
    return *this;
  }
  Network& average(int64_t k, int64_t stride, int64_t pad = 0, bool ceil_mode = false, bool counts_padding = true,
                   int64_t divisor = 0) {
    StepSpec& spec = add_map(Op::kAvgPool2d, "avgpool2d");
    spec.pool = {k, k, stride, stride, pad, pad, pad, pad, ceil_mode};
    spec.counts_padding = counts_padding, spec.divisor = divisor;
    return *this;
  }
  Network& adaptive(bool averages, int64_t h, int64_t w) {
    StepSpec& spec =
        averages ? add_map(Op::kAdaptiveAvgPool2d, "adaptiveavgpool2d") : add_map(Op::kAdaptiveMaxPool2d, "adaptivemaxpool2d");
    spec.pool_h = h, spec.pool_w = w;
    return *this;
  }
  // A BatchNorm, or without one what an activation behind it is a step of, of maps or of rows.
  Network& scale(bool has_norm, bool has_rows = false) {
    StepSpec& spec = add_map(has_rows ? Op::kScale : Op::kScale2d, "scale");
    spec.out = width_;
    if (has_norm) layers_.back().weight = random_.values(width_), layers_.back().bias = random_.values(width_);
    return *this;
  }
  // groupnorm or layernorm. features: of a layernorm behind an image, as of a Linear.
  Network& norm(Op op, int64_t groups = 1, bool has_weight = true, int64_t features = 0) {
    StepSpec& spec = add_map(op, op == Op::kGroupNorm ? "groupnorm" : "layernorm");
    if (features) width_ = features;
    spec.groups = groups, spec.in = spec.out = width_, spec.eps = 1e-5;
    if (has_weight) layers_.back().weight = random_.values(width_);
    if (has_weight || random_.coin()) layers_.back().bias = random_.values(width_);
    return *this;
  }
  Network& softmax(bool is_log) {
    is_log ? add_map(Op::kLogSoftmax, "logsoftmax") : add_map(Op::kSoftmax, "softmax");
    return *this;
  }
  Network& pad(PadMode mode, int64_t top, int64_t bottom, int64_t left, int64_t right, float value = 0) {
    StepSpec& spec = add_map(Op::kPad2d, "pad2d");
    spec.pad_top = top, spec.pad_bottom = bottom, spec.pad_left = left, spec.pad_right = right;
    spec.pad_mode = mode, spec.pad_value = value;
    return *this;
  }
  // To a size, as if by factors.
  Network& upsample(bool is_bilinear, int64_t h, int64_t w, bool aligns_corners = false) {
    StepSpec& spec = add_map(is_bilinear ? Op::kUpsampleBilinear2d : Op::kUpsampleNearest2d, "upsample");
    spec.resize.h = h, spec.resize.w = w, spec.resize.aligns_corners = aligns_corners;
    return *this;
  }
  Network& shuffle(bool is_back, int64_t factor) {
    add_map(is_back ? Op::kPixelUnshuffle : Op::kPixelShuffle, "pixelshuffle").factor = factor;
    width_ = is_back ? width_ * factor * factor : width_ / factor / factor;
    return *this;
  }
  // What the next layer takes rows for.
  Network& unflatten(int64_t channels, int64_t h, int64_t w) {
    unflattened_ = {channels, h, w};
    width_ = channels;
    return *this;
  }
  // A BatchNorm of the features that the map is flattened to.
  Network& scale_features(int64_t features) {
    StepSpec& spec = add_map(Op::kScale2d, "batchnorm1d");
    spec.out = features, spec.is_per_feature = true;
    layers_.back().weight = random_.values(features), layers_.back().bias = random_.values(features);
    return *this;
  }
  Network& special() {
    has_special_ = true;
    return *this;
  }
  Network& bias_value(float value) {
    layers_.back().bias[0] = value;
    return *this;
  }

  const std::string& name() const { return name_; }
  const InputSpec& input() const { return input_; }
  bool has_special() const { return has_special_; }
  int64_t elements() const { return input_.is_spatial ? input_.channels * input_.h * input_.w : input_.features; }

  std::vector<StepSpec> steps() const {
    std::vector<StepSpec> result;
    for (const Layer& layer : layers_) {
      result.push_back(layer.spec);
      result.back().weight = layer.weight.empty() ? nullptr : layer.weight.data();
      result.back().bias = layer.bias.empty() ? nullptr : layer.bias.data();
      result.back().activation.slopes = layer.slopes.data();
      result.back().activation.slope_count = static_cast<int64_t>(layer.slopes.size());
    }
    return result;
  }

  // One image in NCHW order, or one row. storage: what each layer's result is rounded to. has_bf16: sources and weights may be
  // rounded to bfloat16 before they are multiplied.
  Tensor reference(const float* src, Storage storage, bool has_bf16) const {
    Tensor x = input_.is_spatial ? Tensor(input_.channels, input_.h, input_.w) : Tensor(input_.features, 1, 1);
    std::copy_n(src, x.value.size(), x.value.begin());
    for (const Layer& layer : layers_) {
      const StepSpec& spec = layer.spec;
      if (!spec.unflattened.empty()) x.channels = spec.unflattened[0], x.h = spec.unflattened[1], x.w = spec.unflattened[2];
      if (has_bf16 && spec.op != Op::kMaxPool2d)
        for (size_t i = 0; i < x.value.size(); ++i) {
          // The weight's rounding is as much as another one of the source.
          const double rounding = rounding_error(Storage::kBf16, std::fabs(x.value[i]) + x.error[i]);
          x.error[i] += 2 * rounding * (1 + 0x1p-8);
        }
      if (spec.op == Op::kLinear) {
        // As a convolution over the whole image: the features of an image are its elements in NCHW order.
        Window all;
        all.k_h = x.h, all.k_w = x.w;
        x = convolve(x, layer, all);
      } else if (spec.op == Op::kConv2d) {
        x = convolve(x, layer, spec.conv);
      }
      if (!spec.pools_before_activation) activate(x, layer);
      if (spec.op == Op::kPad2d) {
        x = pad(x, spec);
      } else if (spec.op == Op::kUpsampleNearest2d || spec.op == Op::kUpsampleBilinear2d) {
        x = upsample(x, spec);
      } else if (spec.op == Op::kPixelShuffle || spec.op == Op::kPixelUnshuffle) {
        x = shuffle(x, spec);
      } else if (spec.op == Op::kScale2d || spec.op == Op::kScale) {
        scale(x, layer);
      } else if (spec.op == Op::kGroupNorm) {
        normalize(x, spec.groups, spec.eps);
        scale(x, layer);
      } else if (takes_rows(spec.op) && spec.op != Op::kLinear) {
        x.channels *= x.h * x.w, x.h = x.w = 1;
        if (spec.op == Op::kLayerNorm) {
          normalize(x, 1, spec.eps);
          scale(x, layer);
        } else {
          softmax(x, spec.op == Op::kLogSoftmax);
        }
      } else if (spec.op == Op::kAvgPool2d || spec.op == Op::kAdaptiveAvgPool2d || spec.op == Op::kAdaptiveMaxPool2d) {
        x = pool(x, spec);
      } else if (spec.has_pool || spec.op == Op::kMaxPool2d) {
        x = max_pool(x, spec.pool);
      }
      if (spec.pools_before_activation) activate(x, layer);
      for (size_t i = 0; i < x.value.size(); ++i) x.error[i] += rounding_error(storage, std::fabs(x.value[i]) + x.error[i]);
    }
    return x;
  }

 private:
  Layer& add_layer() {
    layers_.emplace_back();
    layers_.back().spec.unflattened = std::exchange(unflattened_, {});
    return layers_.back();
  }

  StepSpec& add(Op op, const char* name, int64_t out, int64_t terms, bool has_bias) {
    Layer& layer = add_layer();
    layer.weight = random_.values(out * terms);
    for (float& w : layer.weight) w /= std::sqrt(static_cast<float>(terms));
    if (has_bias) layer.bias = random_.values(out);
    layer.spec.op = op, layer.spec.name = name, layer.spec.out = out;
    return layer.spec;
  }

  StepSpec& add_map(Op op, const char* name) {
    add_layer();
    layers_.back().spec.op = op, layers_.back().spec.name = name;
    return layers_.back().spec;
  }

  // Averages, and whatever is adaptive.
  static Tensor pool(const Tensor& x, const StepSpec& spec) {
    const MapSize size = map_op(spec)->size(spec, {x.channels, x.h, x.w});
    Tensor y(x.channels, size.h, size.w);
    const Window& w = spec.pool;
    const bool is_adaptive = spec.op != Op::kAvgPool2d, averages = spec.op != Op::kAdaptiveMaxPool2d;
    for (int64_t oy = 0; oy < y.h; ++oy)
      for (int64_t ox = 0; ox < y.w; ++ox) {
        int64_t top = oy * w.stride_h - w.pad_top, left = ox * w.stride_w - w.pad_left;
        int64_t bottom = std::min(top + w.k_h, x.h + w.pad_top), right = std::min(left + w.k_w, x.w + w.pad_left);
        if (is_adaptive) {
          top = oy * x.h / y.h, left = ox * x.w / y.w;
          bottom = ((oy + 1) * x.h + y.h - 1) / y.h, right = ((ox + 1) * x.w + y.w - 1) / y.w;
        }
        int64_t count = (bottom - top) * (right - left);
        top = std::max<int64_t>(top, 0), left = std::max<int64_t>(left, 0);
        bottom = std::min(bottom, x.h), right = std::min(right, x.w);
        if (!spec.counts_padding) count = (bottom - top) * (right - left);
        if (spec.divisor) count = spec.divisor;
        for (int64_t c = 0; c < y.channels; ++c) {
          double sum = 0, magnitude = 0, error = 0, max = -std::numeric_limits<double>::infinity(), largest_error = 0;
          for (int64_t iy = top; iy < bottom; ++iy)
            for (int64_t ix = left; ix < right; ++ix) {
              const double value = x.value[x.at(c, iy, ix)];
              sum += value, magnitude += std::fabs(value), error += x.error[x.at(c, iy, ix)];
              if (value > max || std::isnan(value)) max = value;
              largest_error = std::max(largest_error, x.error[x.at(c, iy, ix)]);
            }
          const double divisor = static_cast<double>(count);
          const double value = averages ? sum / divisor : max;
          const double own = (error + sum_error((bottom - top) * (right - left)) * (magnitude + error)) / std::fabs(divisor);
          y.value[y.at(c, oy, ox)] = value;
          y.error[y.at(c, oy, ox)] = !std::isfinite(value) ? 0 : averages ? own : largest_error;
        }
      }
    return y;
  }

  static Tensor pad(const Tensor& x, const StepSpec& spec) {
    Tensor y(x.channels, x.h + spec.pad_top + spec.pad_bottom, x.w + spec.pad_left + spec.pad_right);
    const auto source = [&](int64_t at, int64_t size) {
      if (at >= 0 && at < size) return at;
      if (spec.pad_mode == PadMode::kReflect) return at < 0 ? -at : 2 * size - 2 - at;
      if (spec.pad_mode == PadMode::kCircular) return (at + size) % size;
      return spec.pad_mode == PadMode::kReplicate ? std::clamp<int64_t>(at, 0, size - 1) : -1;
    };
    for (int64_t oy = 0; oy < y.h; ++oy)
      for (int64_t ox = 0; ox < y.w; ++ox) {
        const int64_t iy = source(oy - spec.pad_top, x.h), ix = source(ox - spec.pad_left, x.w);
        for (int64_t c = 0; c < y.channels; ++c) {
          const bool is_value = iy < 0 || ix < 0;
          y.value[y.at(c, oy, ox)] = is_value ? spec.pad_value : x.value[x.at(c, iy, ix)];
          y.error[y.at(c, oy, ox)] = is_value ? 0 : x.error[x.at(c, iy, ix)];
        }
      }
    return y;
  }

  static Tensor upsample(const Tensor& x, const StepSpec& spec) {
    Tensor y(x.channels, spec.resize.h, spec.resize.w);
    const bool is_bilinear = spec.op == Op::kUpsampleBilinear2d, aligns = spec.resize.aligns_corners;
    // The pixel before, the one behind it, and the latter's share.
    const auto around = [&](int64_t i, int64_t in, int64_t out, int64_t (&at)[2]) -> double {
      const double where = !is_bilinear ? static_cast<double>(i * in / out)
                           : aligns     ? (out > 1 ? static_cast<double>(i * (in - 1)) / static_cast<double>(out - 1) : 0)
                                        : std::max((static_cast<double>(i) + 0.5) * in / static_cast<double>(out) - 0.5, 0.0);
      at[0] = std::min(static_cast<int64_t>(where), in - 1), at[1] = std::min(at[0] + 1, in - 1);
      return in == out || !is_bilinear ? 0 : where - static_cast<double>(at[0]);
    };
    for (int64_t oy = 0; oy < y.h; ++oy)
      for (int64_t ox = 0; ox < y.w; ++ox) {
        int64_t rows[2], columns[2];
        const double down = around(oy, x.h, y.h, rows), right = around(ox, x.w, y.w, columns);
        for (int64_t c = 0; c < y.channels; ++c) {
          double value = 0, magnitude = 0, error = 0;
          for (int i = 0; i < (is_bilinear ? 4 : 1); ++i) {
            const double weight = (i / 2 ? down : 1 - down) * (i % 2 ? right : 1 - right);
            const size_t at = x.at(c, rows[i / 2], columns[i % 2]);
            value += weight * x.value[at], magnitude += std::fabs(x.value[at]), error += weight * x.error[at];
          }
          // Weights are as exact as a position in the map.
          const double own = is_bilinear ? 4 * static_cast<double>(x.h + x.w) * kRounding * magnitude : 0;
          y.value[y.at(c, oy, ox)] = value;
          y.error[y.at(c, oy, ox)] = std::isfinite(value) ? error + own : 0;
        }
      }
    return y;
  }

  static Tensor shuffle(const Tensor& x, const StepSpec& spec) {
    const int64_t r = spec.factor;
    const bool is_back = spec.op == Op::kPixelUnshuffle;
    Tensor y(is_back ? x.channels * r * r : x.channels / r / r, is_back ? x.h / r : x.h * r, is_back ? x.w / r : x.w * r);
    const Tensor& large = is_back ? x : y;
    const Tensor& deep = is_back ? y : x;
    for (int64_t c = 0; c < large.channels; ++c)
      for (int64_t row = 0; row < large.h; ++row)
        for (int64_t column = 0; column < large.w; ++column) {
          const size_t one = large.at(c, row, column);
          const size_t other = deep.at(c * r * r + row % r * r + column % r, row / r, column / r);
          y.value[is_back ? other : one] = x.value[is_back ? one : other];
          y.error[is_back ? other : one] = x.error[is_back ? one : other];
        }
    return y;
  }

  static void scale(Tensor& x, const Layer& layer) {
    const int64_t pixels = layer.spec.is_per_feature ? 1 : x.h * x.w;
    for (size_t i = 0; i < x.value.size(); ++i) {
      const size_t channel = i / static_cast<size_t>(pixels);
      const double weight = layer.weight.empty() ? 1 : layer.weight[channel], bias = layer.bias.empty() ? 0 : layer.bias[channel];
      const double product = x.value[i] * weight, sum = product + bias;
      const double own = layer.weight.empty() && layer.bias.empty() ? 0 : 2 * kRounding * (std::fabs(product) + std::fabs(bias));
      x.error[i] = std::isfinite(sum) ? std::fabs(weight) * x.error[i] + own : 0;
      x.value[i] = sum;
    }
  }

  // Each group of channels less its mean, divided by the root of its variance and eps.
  static void normalize(Tensor& x, int64_t groups, double eps) {
    const size_t size = x.value.size() / static_cast<size_t>(groups);
    for (size_t first = 0; first < x.value.size(); first += size) {
      const double count = static_cast<double>(size);
      double mean = 0, variance = 0, error = 0;
      for (size_t i = first; i < first + size; ++i) mean += x.value[i] / count, error = std::max(error, x.error[i]);
      for (size_t i = first; i < first + size; ++i) variance += (x.value[i] - mean) * (x.value[i] - mean) / count;
      const double inverse = 1 / std::sqrt(variance + eps);
      for (size_t i = first; i < first + size; ++i) {
        const double result = (x.value[i] - mean) * inverse, magnitude = std::fabs(result) + 1;
        // The derivative by all numbers together is below 2 + |result|; twice that for what is behind it in the series.
        const double inherited = 2 * (1 + magnitude) * inverse * error;
        x.error[i] = std::isfinite(result) ? inherited + sum_error(static_cast<int64_t>(size)) * magnitude : 0;
        x.value[i] = result;
      }
    }
  }

  static void softmax(Tensor& x, bool is_log) {
    const double max = *std::max_element(x.value.begin(), x.value.end());
    const double error = *std::max_element(x.error.begin(), x.error.end());
    double sum = 0;
    for (const double value : x.value) sum += std::exp(value - max);
    for (size_t i = 0; i < x.value.size(); ++i) {
      const double log = x.value[i] - max - std::log(sum), result = is_log ? log : std::exp(log);
      const double own = 8 * kRounding * (is_log ? 1 + std::fabs(result) : result);
      x.error[i] = std::isfinite(result) ? own + (is_log ? 2 * error : result * std::expm1(2 * error)) : 0;
      x.value[i] = result;
    }
  }

  static Tensor convolve(const Tensor& x, const Layer& layer, const Window& window) {
    const int64_t h = (x.h + window.pad_top + window.pad_bottom - window.reach_h()) / window.stride_h + 1;
    const int64_t w = (x.w + window.pad_left + window.pad_right - window.reach_w()) / window.stride_w + 1;
    Tensor y(layer.spec.out, h, w);
    const int64_t channels = x.channels / layer.spec.groups;  // of a group
    const double own_error = sum_error(channels * window.k_h * window.k_w);
    for (int64_t o = 0; o < y.channels; ++o)
      for (int64_t oy = 0; oy < h; ++oy)
        for (int64_t ox = 0; ox < w; ++ox) {
          double value = layer.bias.empty() ? 0 : layer.bias[o], magnitude = std::fabs(value), inherited = 0;
          const int64_t first_channel = o / (y.channels / layer.spec.groups) * channels;
          for (int64_t c = 0; c < channels; ++c)
            for (int64_t ky = 0; ky < window.k_h; ++ky)
              for (int64_t kx = 0; kx < window.k_w; ++kx) {
                const int64_t iy = oy * window.stride_h - window.pad_top + ky * window.dilation_h;
                const int64_t ix = ox * window.stride_w - window.pad_left + kx * window.dilation_w;
                if (iy < 0 || iy >= x.h || ix < 0 || ix >= x.w) continue;
                const double weight = layer.weight[((o * channels + c) * window.k_h + ky) * window.k_w + kx];
                const size_t at = x.at(first_channel + c, iy, ix);
                const double product = weight * x.value[at];
                value += product, magnitude += std::fabs(product);
                inherited += std::fabs(weight) * x.error[at];
              }
          y.value[y.at(o, oy, ox)] = value;
          y.error[y.at(o, oy, ox)] = std::isfinite(value) ? inherited + own_error * (magnitude + inherited) : 0;
        }
    return y;
  }

  static void activate(Tensor& x, const Layer& layer) {
    const ActivationSpec& spec = layer.spec.activation;
    if (spec.kind == Activation::kNone) return;
    constexpr double kSteepest = 2, kOwnError = 16 * kRounding;  // what fits all functions in use here
    const int64_t pixels = x.h * x.w;
    for (size_t i = 0; i < x.value.size(); ++i) {
      const size_t channel = i / static_cast<size_t>(pixels);
      const double slope = layer.slopes.empty() ? spec.a : layer.slopes[layer.slopes.size() == 1 ? 0 : channel];
      x.value[i] = activation_value(spec.kind, slope, spec.b, x.value[i]);
      if (spec.kind == Activation::kRelu) continue;
      x.error[i] = std::isfinite(x.value[i]) ? kSteepest * x.error[i] + kOwnError * std::fabs(x.value[i]) : 0;
    }
  }

  static Tensor max_pool(const Tensor& x, const Window& window) {
    Tensor y(x.channels, pool_size(x.h, window.k_h, window.stride_h, window.pad_top, window.ceil_mode),
             pool_size(x.w, window.k_w, window.stride_w, window.pad_left, window.ceil_mode));
    for (int64_t c = 0; c < y.channels; ++c)
      for (int64_t oy = 0; oy < y.h; ++oy)
        for (int64_t ox = 0; ox < y.w; ++ox) {
          double max = -std::numeric_limits<double>::infinity(), error = 0;
          for (int64_t ky = 0; ky < window.k_h; ++ky)
            for (int64_t kx = 0; kx < window.k_w; ++kx) {
              const int64_t iy = oy * window.stride_h - window.pad_top + ky, ix = ox * window.stride_w - window.pad_left + kx;
              if (iy < 0 || iy >= x.h || ix < 0 || ix >= x.w) continue;
              const double value = x.value[x.at(c, iy, ix)];
              if (value > max || std::isnan(value)) max = value;
              error = std::max(error, x.error[x.at(c, iy, ix)]);
            }
          y.value[y.at(c, oy, ox)] = max, y.error[y.at(c, oy, ox)] = error;
        }
    return y;
  }

  std::string name_;
  InputSpec input_;
  int64_t width_;
  bool has_special_ = false;
  std::vector<int64_t> unflattened_;
  std::vector<Layer> layers_;
  Random random_{7};
};

}  // namespace fastseq::harness
