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
    spec.pools_before_activation = spec.has_pool || spec.op == Op::kMaxPool2d;
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
      layers_.emplace_back();
      layers_.back().spec.op = Op::kMaxPool2d, layers_.back().spec.name = "maxpool2d";
    }
    layers_.back().spec.has_pool = joins, layers_.back().spec.pool = window;
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
      result.back().weight = layer.weight.data();
      result.back().bias = layer.bias.empty() ? nullptr : layer.bias.data();
      result.back().activation.slopes = layer.slopes.data();
      result.back().activation.slope_count = static_cast<int64_t>(layer.slopes.size());
    }
    return result;
  }

  // One image in NCHW order, or one row.
  Tensor reference(const float* src) const {
    Tensor x = input_.is_spatial ? Tensor(input_.channels, input_.h, input_.w) : Tensor(input_.features, 1, 1);
    std::copy_n(src, x.value.size(), x.value.begin());
    for (const Layer& layer : layers_) {
      const StepSpec& spec = layer.spec;
      if (spec.op == Op::kLinear) {
        // As a convolution over the whole image: the features of an image are its elements in NCHW order.
        Window all;
        all.k_h = x.h, all.k_w = x.w;
        x = convolve(x, layer, all);
      } else if (spec.op == Op::kConv2d) {
        x = convolve(x, layer, spec.conv);
      }
      if (!spec.pools_before_activation) activate(x, layer);
      if (spec.has_pool || spec.op == Op::kMaxPool2d) x = max_pool(x, spec.pool);
      if (spec.pools_before_activation) activate(x, layer);
    }
    return x;
  }

 private:
  StepSpec& add(Op op, const char* name, int64_t out, int64_t terms, bool has_bias) {
    layers_.emplace_back();
    Layer& layer = layers_.back();
    layer.weight = random_.values(out * terms);
    for (float& w : layer.weight) w /= std::sqrt(static_cast<float>(terms));
    if (has_bias) layer.bias = random_.values(out);
    layer.spec.op = op, layer.spec.name = name, layer.spec.out = out;
    return layer.spec;
  }

  static Tensor convolve(const Tensor& x, const Layer& layer, const Window& window) {
    const int64_t h = (x.h + window.pad_top + window.pad_bottom - window.k_h) / window.stride_h + 1;
    const int64_t w = (x.w + window.pad_left + window.pad_right - window.k_w) / window.stride_w + 1;
    Tensor y(layer.spec.out, h, w);
    const double own_error = sum_error(x.channels * window.k_h * window.k_w);
    for (int64_t o = 0; o < y.channels; ++o)
      for (int64_t oy = 0; oy < h; ++oy)
        for (int64_t ox = 0; ox < w; ++ox) {
          double value = layer.bias.empty() ? 0 : layer.bias[o], magnitude = std::fabs(value), inherited = 0;
          for (int64_t c = 0; c < x.channels; ++c)
            for (int64_t ky = 0; ky < window.k_h; ++ky)
              for (int64_t kx = 0; kx < window.k_w; ++kx) {
                const int64_t iy = oy * window.stride_h - window.pad_top + ky, ix = ox * window.stride_w - window.pad_left + kx;
                if (iy < 0 || iy >= x.h || ix < 0 || ix >= x.w) continue;
                const double weight = layer.weight[((o * x.channels + c) * window.k_h + ky) * window.k_w + kx];
                const double product = weight * x.value[x.at(c, iy, ix)];
                value += product, magnitude += std::fabs(product);
                inherited += std::fabs(weight) * x.error[x.at(c, iy, ix)];
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
  std::vector<Layer> layers_;
  Random random_{7};
};

}  // namespace fastseq::harness
