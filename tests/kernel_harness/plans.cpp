// Whole plans: the kernels one by one, forced, then networks in every layout, batch size and number of threads.
#include <algorithm>
#include <set>
#include <stdexcept>
#include <thread>

#include "harness.h"
#include "network.h"
#include "plan/pack.h"
#include "plan/plan.h"

namespace fastseq::harness {

namespace {

std::vector<Network> networks() {
  std::vector<Network> list;
  auto add = [&](Network network) { list.push_back(std::move(network)); };
  add(Network("convolution", 3, 9, 11).conv(20, 3, 3).relu());
  add(Network("convolution without bias or ReLU", 1, 7, 7).conv(17, 5, 5, 1, 0, false));
  add(Network("padding and stride", 5, 13, 10).conv(30, 3, 5, 2, 2).relu());
  add(Network("1x1 convolution", 33, 6, 5).conv(64, 1, 1));
  add(Network("pool in registers", 3, 12, 14).conv(40, 3, 3, 1, 1).relu().pool(2, 2));
  add(Network("pool in registers, odd rows and columns", 4, 12, 10).conv(7, 4, 4).pool(2, 2));
  add(Network("pool through a ring", 3, 15, 17).conv(20, 3, 3, 1, 1).relu().pool(3, 2, 1));
  add(Network("overlapping pool, ceil_mode", 2, 14, 11).conv(33, 3, 3).relu().pool(3, 2, 0, true));
  add(Network("pool alone", 19, 9, 8).pool(3, 2, 1));
  add(Network("pool of 2x2 alone, then a convolution", 6, 10, 10).pool(2, 2).conv(9, 3, 3, 1, 1));
  add(Network("average pool alone", 19, 9, 8).average(3, 2, 1, true));
  add(Network("average pool that counts no padding, with ReLU", 35, 9, 8).average(3, 1, 1, false, false).relu());
  add(Network("average pool with a divisor, then a convolution", 6, 10, 10).average(2, 2, 0, false, true, -3).conv(9, 3, 3, 1, 1));
  add(Network("average of many pixels", 67, 40, 41).average(40, 1).act(Activation::kSilu));
  add(Network("convolution, adaptive average, linear", 3, 11, 13)
          .conv(20, 3, 3, 1, 1)
          .relu()
          .adaptive(true, 3, 4)
          .linear(10, 20 * 3 * 4));
  add(Network("global average of long sums", 20, 35, 37).adaptive(true, 1, 1).conv(7, 1, 1));
  add(Network("adaptive average to more pixels than there are", 5, 4, 3).adaptive(true, 6, 0).conv(7, 3, 3, 1, 1));
  add(Network("adaptive maximum", 18, 9, 10).adaptive(false, 4, 7).act(Activation::kGelu).conv(7, 3, 3, 1, 1));
  add(Network("scale first, with ReLU, then a convolution", 19, 9, 8).scale(true).relu().conv(7, 3, 3, 1, 1));
  add(Network("convolution, ReLU, scale, SiLU, an activation alone, ReLU alone", 3, 9, 11)
          .conv(20, 3, 3, 1, 1)
          .relu()
          .scale(true)
          .act(Activation::kSilu)
          .scale(false)
          .act(Activation::kTanh)
          .scale(false)
          .relu());
  add(Network("convolution, scale, pool, PReLU of channels, linear", 3, 11, 13)
          .conv(18, 3, 3)
          .relu()
          .scale(true)
          .pool(3, 2)
          .scale(false)
          .prelu(18, -0.5f)
          .linear(10, 18 * 4 * 5));
  add(Network("scale of rows first, linear, scale of rows, GELU, linear", 120)
          .scale(true, true)
          .linear(77)
          .relu()
          .scale(true, true)
          .act(Activation::kGelu)
          .linear(33)
          .scale(false, true)
          .prelu(33, -0.5f));
  add(Network("wide linear for two threads, scale of rows", 512)
          .linear(700)
          .relu()
          .scale(true, true)
          .relu()
          .linear(520)
          .relu()
          .scale(true, true));
  add(Network("convolution, groupnorm, ReLU, pool, groupnorm, SiLU, linear", 3, 11, 13)
          .conv(20, 3, 3, 1, 1)
          .norm(Op::kGroupNorm, 5)
          .relu()
          .pool(2, 2)
          .norm(Op::kGroupNorm, 1, false)
          .act(Activation::kSilu)
          .linear(10, 20 * 5 * 6));
  add(Network("groupnorm first, then a convolution, groups of one channel", 35, 12, 9)
          .norm(Op::kGroupNorm, 7)
          .conv(32, 3, 3, 1, 1)
          .norm(Op::kGroupNorm, 32));
  add(Network("a map for two threads, groupnorm", 3, 24, 25).conv(66, 3, 3, 1, 1).norm(Op::kGroupNorm, 2).conv(7, 1, 1));
  add(Network("layernorm first, linear, GELU, linear, layernorm, softmax", 120)
          .norm(Op::kLayerNorm)
          .linear(77)
          .act(Activation::kGelu)
          .linear(33)
          .norm(Op::kLayerNorm, 1, false)
          .act(Activation::kTanh)
          .softmax(false));
  add(Network("wide linear for two threads, layernorm, logsoftmax", 512)
          .linear(700)
          .norm(Op::kLayerNorm)
          .linear(521)
          .softmax(true));
  add(Network("convolution, softmax of its features", 2, 7, 6).conv(17, 3, 3).relu().softmax(false));
  add(Network("pool, layernorm of its features, linear", 19, 9, 8).pool(3, 2).norm(Op::kLayerNorm, 1, true, 19 * 4 * 3).linear(33));
  add(Network("NaN and infinities in norms", 6, 9, 9).norm(Op::kGroupNorm, 3).pool(2, 1).special());
  add(Network("NaN and infinities in rows", 40).norm(Op::kLayerNorm).softmax(true).special());
  add(Network("NaN and infinities, scaled", 5, 9, 9).scale(true).pool(2, 1).scale(false).relu().special());
  add(Network("zeros around an image, then a convolution", 3, 9, 8).pad(PadMode::kConstant, 1, 0, 2, 1).conv(20, 3, 3, 1, 1));
  add(Network("convolution, reflection, convolution, replication", 5, 9, 8)
          .conv(19, 3, 3)
          .relu()
          .pad(PadMode::kReflect, 2, 1, 0, 3)
          .conv(7, 3, 3)
          .pad(PadMode::kReplicate, 0, 3, 2, 0));
  add(Network("circular, value, linear", 18, 5, 4)
          .pad(PadMode::kCircular, 5, 1, 0, 4)
          .pad(PadMode::kConstant, 0, 1, 1, 0, 2.5f)
          .linear(9, 18 * 12 * 9));
  add(Network("nearest upsampling, convolution, bilinear upsampling, convolution", 19, 5, 4)
          .upsample(false, 10, 8)
          .conv(7, 3, 3, 1, 1)
          .relu()
          .upsample(true, 23, 8)
          .conv(18, 3, 3));
  add(Network("bilinear upsampling of corners, to fewer pixels", 35, 6, 7).upsample(true, 11, 3, true).upsample(false, 5, 9));
  add(Network("shuffles there and back", 20, 6, 5).shuffle(false, 2).conv(9, 3, 3, 1, 1).shuffle(false, 3).shuffle(true, 6));
  add(Network("NaN and infinities upsampled", 5, 4, 5).upsample(true, 8, 10).upsample(false, 8, 20).special());
  add(Network("autoencoder: convolution, linear, maps again, linear again", 3, 8, 8)
          .conv(18, 3, 3)
          .relu()
          .pool(2, 2)
          .scale_features(18 * 3 * 3)
          .relu()
          .linear(21, 18 * 3 * 3)
          .relu()
          .linear(17 * 2 * 3)
          .unflatten(17, 2, 3)
          .upsample(false, 4, 6)
          .conv(5, 3, 3, 1, 1)
          .relu()
          .linear(8, 5 * 4 * 6)
          .unflatten(2, 2, 2)
          .conv(3, 2, 2, 1, 1));
  add(Network("NaN and infinities in averages", 5, 9, 9).average(3, 2, 1).adaptive(true, 2, 3).special());
  add(Network("four steps", 3, 22, 22)
          .conv(16, 3, 3)
          .relu()
          .pool(2, 2)
          .conv(30, 3, 3)
          .relu()
          .pool(2, 2)
          .conv(17, 3, 3, 1, 1)
          .relu());
  add(Network("long sums, weights beyond the cache", 96, 8, 8).conv(97, 3, 3, 1, 1).relu());
  add(Network("long sums, weights beyond the cache, pool through a ring", 96, 8, 8).conv(97, 3, 3, 1, 1).relu().pool(3, 2));
  add(Network("work for two threads", 32, 20, 20).conv(48, 3, 3, 1, 1).relu().pool(2, 2).conv(24, 3, 3).pool(3, 1, 1));
  add(Network("5x5 convolutions", 8, 13, 14).conv(20, 5, 5, 1, 2).relu().pool(2, 2).conv(9, 5, 5, 1, 1));
  add(Network("linear", 37).linear(65));
  add(Network("linear without bias", 700).linear(10, 0, false).relu());
  add(Network("chain of linear", 120).linear(200).relu().linear(33).relu().linear(1));
  add(Network("wide linear for two threads", 512).linear(700).relu().linear(520));
  add(Network("convolution, then linear", 2, 12, 12).conv(17, 5, 5).relu().linear(40, 17 * 8 * 8).relu().linear(10));
  add(Network("pool, then linear above 1 MiB", 3, 18, 18)
          .conv(20, 3, 3)
          .relu()
          .pool(2, 2)
          .linear(210, 20 * 8 * 8)
          .relu()
          .linear(5));
  add(Network("NaN and infinities in a convolution", 3, 9, 9).conv(18, 3, 3, 1, 1).relu().special());
  add(Network("NaN and infinities under pools", 3, 16, 16)
          .conv(18, 3, 3, 1, 1)
          .relu()
          .pool(2, 2)
          .conv(6, 3, 3)
          .pool(3, 2, 1)
          .special());
  add(Network("NaN and infinities in a pool", 5, 9, 9).pool(3, 2, 1).special());
  add(Network("NaN and infinities in linear", 200).linear(33).relu().linear(7).special());
  add(Network("infinite bias under a pool", 3, 8, 8).conv(5, 3, 3).bias_value(kInf).pool(2, 2).special());
  return list;
}

// Groups, a filter for each channel, and dilation.
std::vector<Network> networks_of_groups() {
  using A = Activation;
  std::vector<Network> list;
  auto add = [&](Network network) { list.push_back(std::move(network)); };
  add(Network("depthwise", 20, 9, 11).grouped(20, 3, 20, 1, 1).relu());
  add(Network("depthwise with stride and dilation", 37, 13, 12).grouped(37, 3, 37, 2, 2, 2).grouped(37, 5, 37, 1, 2));
  add(Network("depthwise of few channels, pools", 3, 12, 14)
          .grouped(3, 3, 3, 1, 1)
          .relu()
          .pool(2, 2)
          .grouped(3, 2, 3)
          .pool(3, 2, 1));
  add(Network("depthwise, long sums", 17, 16, 15).grouped(17, 13, 17, 1, 6).act(A::kSilu));
  add(Network("depthwise and 1x1, maps beyond the cache, two threads", 32, 30, 30)
          .grouped(32, 3, 32, 1, 1)
          .relu()
          .conv(64, 1, 1)
          .relu()
          .grouped(64, 3, 64, 2, 1)
          .prelu(64, -0.5f)
          .conv(40, 1, 1)
          .pool(2, 2)
          .grouped(40, 3, 40, 1, 1));
  add(Network("maps beyond the cache, padding of different widths", 16, 34, 34)
          .conv(24, 3, 3, 1, 1)
          .relu()
          .conv(20, 5, 5, 1, 2)
          .conv(33, 3, 3)
          .pool(3, 2, 1)
          .conv(24, 3, 3, 1, 1)
          .conv(9, 1, 1));
  add(Network("several filters for each channel", 6, 8, 9).grouped(24, 3, 6, 1, 1).prelu(24, 0.1f));
  add(Network("groups of four channels", 24, 10, 9).grouped(24, 3, 6, 1, 1).relu().pool(2, 2).grouped(12, 3, 6));
  add(Network("groups of many channels, PReLU", 42, 9, 8).grouped(66, 3, 2, 1, 1).prelu(66, -0.5f).pool(2, 2));
  add(Network("groups of 17 and 20 channels, 3x3 pool", 34, 9, 8).grouped(40, 3, 2, 2, 1).relu().pool(3, 2, 1));
  add(Network("groups of 16 and of 33 channels, dilation, two threads", 66, 17, 16)
          .grouped(96, 3, 2, 1, 2, 2)
          .relu()
          .grouped(96, 3, 6, 1, 1)
          .act(A::kGelu));
  add(Network("groups with weights beyond the cache, SiLU", 128, 7, 7).grouped(134, 5, 2, 1, 2).act(A::kSilu));
  add(Network("more input than output channels in a group", 32, 6, 6).grouped(8, 3, 4, 1, 1));
  add(Network("dilation", 5, 14, 13).grouped(20, 3, 1, 1, 2, 2).relu().grouped(18, 3, 1, 1, 3, 3).pool(2, 2));
  add(Network("dilation, a pool through a ring, rows and columns that are not in all phases", 20, 17, 14)
          .grouped(33, 3, 1, 1, 2, 2)
          .relu()
          .pool(3, 2)
          .grouped(20, 3, 1, 1, 3, 3)
          .act(A::kSilu));
  add(Network("dilation, 5x5 and few channels, two threads", 4, 25, 26)
          .grouped(40, 3, 1, 1, 3, 3)
          .relu()
          .grouped(24, 5, 1, 1, 4, 2));
  add(Network("NaN and infinities, dilation of many channels", 16, 13, 13).grouped(20, 3, 1, 1, 2, 2).relu().special());
  add(Network("dilation of one channel", 1, 14, 13).grouped(6, 5, 1, 1, 0, 2).relu());
  add(Network("NaN and infinities, depthwise", 19, 9, 9).grouped(19, 3, 19, 1, 1).relu().grouped(38, 3, 19, 2, 1).special());
  add(Network("NaN and infinities, groups and dilation", 12, 9, 9).grouped(24, 3, 3, 1, 2, 2).relu().grouped(12, 3, 6).special());
  return list;
}

// Activations that are a pass of their own, behind everything that they may follow.
std::vector<Network> networks_with_activations() {
  using A = Activation;
  std::vector<Network> list;
  auto add = [&](Network network) { list.push_back(std::move(network)); };
  add(Network("convolution, SiLU", 3, 9, 11).conv(20, 3, 3).act(A::kSilu));
  add(Network("convolution, Hardtanh, convolution, ELU", 5, 10, 9)
          .conv(17, 3, 3, 1, 1)
          .act(A::kHardtanh, -0.5f, 0.7f)
          .conv(33, 3, 3, 2, 1)
          .act(A::kElu, 0.8f));
  add(Network("convolution, PReLU of channels, 1x1, PReLU", 6, 8, 8)
          .conv(37, 3, 3, 1, 1)
          .prelu(37, -0.5f)
          .conv(9, 1, 1)
          .prelu(1, 0.1f));
  add(Network("convolution, GELU, 2x2 pool", 3, 12, 14).conv(40, 3, 3, 1, 1).act(A::kGelu).pool(2, 2));
  add(Network("convolution, 2x2 pool, GELU", 3, 12, 14).conv(40, 3, 3, 1, 1).pool(2, 2).act(A::kGelu));
  add(Network("convolution, LeakyReLU, 2x2 pool", 3, 12, 14).conv(18, 3, 3, 1, 1).act(A::kLeakyRelu, 0.1f).pool(2, 2));
  add(Network("convolution, LeakyReLU that falls, 2x2 pool", 3, 12, 14).conv(18, 3, 3).act(A::kLeakyRelu, -0.5f).pool(2, 2));
  add(Network("convolution, PReLU, 2x2 pool", 4, 10, 12).conv(19, 3, 3, 1, 1).prelu(19, 0.1f).pool(2, 2));
  add(Network("convolution, PReLU that falls, 3x3 pool", 4, 11, 12).conv(19, 3, 3, 1, 1).prelu(19, -0.8f).pool(3, 2));
  add(Network("convolution, Mish, 3x3 pool, convolution, Tanh, 3x3 pool", 3, 15, 17)
          .conv(20, 3, 3, 1, 1)
          .act(A::kMish)
          .pool(3, 2, 1)
          .conv(24, 3, 3, 1, 1)
          .act(A::kTanh)
          .pool(3, 1, 1, true));
  add(Network("convolution, 3x3 pool, Hardswish", 3, 15, 17).conv(20, 3, 3, 1, 1).pool(3, 2, 1).act(A::kHardswish));
  add(Network("pool, Sigmoid, convolution, SELU", 19, 9, 8).pool(3, 2, 1).act(A::kSigmoid).conv(7, 3, 3, 1, 1).act(A::kSelu));
  add(Network("pool, PReLU", 19, 9, 8).pool(2, 2).prelu(19, -0.3f));
  add(Network("one plane, SiLU, 2x2 pool", 1, 12, 14).conv(6, 5, 5, 1, 2).act(A::kSilu).pool(2, 2));
  add(Network("one plane, PReLU, 2x2 pool, convolution, CELU", 1, 12, 14)
          .conv(6, 5, 5, 1, 2)
          .prelu(6, 0.1f)
          .pool(2, 2)
          .conv(16, 3, 3)
          .act(A::kCelu, 0.5f));
  add(Network("one plane, PReLU, 3x3 pool", 1, 13, 15).conv(10, 3, 3).prelu(10, -0.5f).pool(3, 2));
  add(Network("5x5 convolutions, Mish, SiLU", 8, 13, 14).conv(20, 5, 5, 1, 2).act(A::kMish).conv(9, 5, 5, 1, 1).act(A::kSilu));
  add(Network("weights beyond the cache, GELU by tanh", 96, 8, 8).conv(97, 3, 3, 1, 1).act(A::kGeluTanh));
  add(Network("weights beyond the cache, SiLU, 3x3 pool", 96, 8, 8).conv(97, 3, 3, 1, 1).act(A::kSilu).pool(3, 2));
  add(Network("channels for two threads, PReLU", 160, 4, 4).conv(161, 3, 3, 1, 1).prelu(161, -0.5f));
  add(Network("few channels to many, Softplus", 4, 4, 5).conv(1410, 3, 3, 1, 1).act(A::kSoftplus, 1, 20));
  add(Network("work for two threads, SiLU, 2x2 pool", 32, 20, 20)
          .conv(48, 3, 3, 1, 1)
          .act(A::kSilu)
          .pool(2, 2)
          .conv(24, 3, 3)
          .act(A::kGelu));
  add(Network("chain of linear, GELU, PReLU, Sigmoid", 120)
          .linear(200)
          .act(A::kGelu)
          .linear(33)
          .prelu(33, -0.5f)
          .linear(5)
          .act(A::kSigmoid));
  add(Network("wide linear for two threads, Softplus, Hardtanh", 512)
          .linear(700)
          .act(A::kSoftplus, 2, 10)
          .linear(521)
          .act(A::kHardtanh, 0, 6));
  add(Network("convolution, SiLU, linear, Hardsigmoid", 2, 12, 12)
          .conv(17, 5, 5)
          .act(A::kSilu)
          .linear(40, 17 * 8 * 8)
          .act(A::kHardsigmoid)
          .linear(10));
  add(Network("pool, Tanh, then linear above 1 MiB, GELU", 3, 18, 18)
          .conv(20, 3, 3)
          .pool(3, 2)
          .act(A::kTanh)
          .linear(280, 20 * 7 * 7)
          .act(A::kGelu)
          .linear(5)
          .act(A::kMish));
  add(Network("NaN and infinities, SiLU", 3, 9, 9).conv(18, 3, 3, 1, 1).act(A::kSilu).special());
  add(Network("NaN and infinities, PReLU of 0 under a pool", 3, 10, 10)
          .conv(18, 3, 3, 1, 1)
          .act(A::kLeakyRelu, 0)
          .pool(2, 2)
          .special());
  add(Network("NaN and infinities, ELU under a pool, GELU under a pool", 3, 16, 16)
          .conv(18, 3, 3, 1, 1)
          .act(A::kElu, 1)
          .pool(2, 2)
          .conv(6, 3, 3)
          .act(A::kGelu)
          .pool(3, 2, 1)
          .special());
  add(Network("NaN and infinities in linear, Softplus, Tanh", 200)
          .linear(33)
          .act(A::kSoftplus, 1, 20)
          .linear(7)
          .act(A::kTanh)
          .special());
  return list;
}

// `images` images of C planes in the order of their pixels.
std::vector<float> to_nhwc(const std::vector<float>& src, int64_t images, int64_t channels, int64_t pixels) {
  std::vector<float> dst(src.size());
  for (int64_t n = 0; n < images; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < pixels; ++p) dst[(n * pixels + p) * channels + c] = src[(n * channels + c) * pixels + p];
  return dst;
}

constexpr int64_t kImages = 5;

std::vector<float> make_input(const Network& network, Storage storage, Random& random) {
  std::vector<float> src = random.values(kImages * network.elements());
  if (storage != Storage::kF32)
    for (float& value : src) value = widened(storage, narrowed(storage, value));
  if (network.has_special())
    for (float v : {kNan, kInf, -kInf, -0.0f, kInf, kNan}) src[random.below(static_cast<int64_t>(src.size()))] = v;
  return src;
}

std::vector<float> run(const Plan& plan, const Network& network, Storage storage, const std::vector<float>& src, int64_t first,
                       int64_t batch, int threads) {
  const OutputSpec& output = plan.output();
  const int64_t elements = output.is_spatial ? output.channels * output.h * output.w : output.features;
  const int64_t stride = static_cast<int64_t>(src.size()) / kImages;
  // A copy of exactly the images that are asked for.
  const std::vector<float> images(src.begin() + first * stride, src.begin() + (first + batch) * stride);
  std::vector<float> dst(static_cast<size_t>(batch * elements), untouched());
  const std::vector<StepSpec> steps = network.steps();
  std::vector<const float*> weights;
  for (size_t step : plan.in_place()) weights.push_back(steps[step].weight);
  if (storage == Storage::kF32) {
    plan.run(images.data(), dst.data(), batch, threads, weights.data());
    return dst;
  }
  std::vector<uint16_t> from(images.size()), to(dst.size(), narrowed(storage, kNan));
  for (size_t i = 0; i < from.size(); ++i) from[i] = narrowed(storage, images[i]);
  plan.run(from.data(), to.data(), batch, threads, weights.data());
  for (size_t i = 0; i < to.size(); ++i) dst[i] = widened(storage, to[i]);
  return dst;
}

void check_values(const Network& network, Storage storage, bool has_bf16, const std::vector<float>& src,
                  const std::vector<float>& got, const std::string& what) {
  const size_t per_image = got.size() / kImages;
  for (int64_t n = 0; n < kImages; ++n) {
    const Tensor wanted = network.reference(src.data() + n * network.elements(), storage, has_bf16);
    if (wanted.value.size() != per_image) return fail(what + ": another number of elements");
    comparisons += static_cast<int64_t>(per_image);
    for (size_t i = 0; i < per_image; ++i)
      if (const float value = got[n * per_image + i]; !is_close(value, wanted.value[i], wanted.error[i]))
        return fail(what + text(": image %d, [%zu] is %.9g, not %.9g +- %.2g", static_cast<int>(n), i, value, wanted.value[i],
                                wanted.error[i]));
  }
}

// A network that each op of the kernel list computes, with `channels` outputs.
Network network_of(const std::string& op, int64_t channels) {
  if (op == "conv2d") return Network(op, 5, 6, 9).conv(channels, 3, 3).relu();
  if (op == "conv2d_depthwise") return Network(op, channels + 1, 6, 9).grouped(channels + 1, 3, channels + 1, 1, 1).relu();
  if (op == "conv2d_grouped") return Network(op, channels + 1, 6, 9).grouped(2 * (channels + 1), 3, channels + 1, 1, 1).relu();
  if (op == "conv2d_plane") return Network(op, 1, 9, 10).conv(channels, 3, 3, 1, 1).relu();
  if (op == "conv2d_winograd") return Network(op, 9, 9, 10).conv(channels, 3, 3, 1, 1).relu();
  if (op == "conv2d_maxpool2d") return Network(op, 5, 8, 9).conv(channels, 3, 3).relu().pool(2, 2);
  if (op == "linear" || op == "linear_in_place") return Network(op, 150).linear(channels);
  if (op == "maxpool2d") return Network(op, channels, 7, 7).pool(3, 2, 1);
  if (op == "scale") return Network(op, channels, 7, 7).scale(true).relu();
  if (op == "groupnorm") return Network(op, channels, 7, 7).norm(Op::kGroupNorm, 1).relu();
  if (op == "layernorm") return Network(op, channels).norm(Op::kLayerNorm).relu();
  if (op == "softmax" || op == "logsoftmax") return Network(op, channels).softmax(op == "logsoftmax");
  if (op == "upsamplebilinear2d") return Network(op, channels, 4, 3).upsample(true, 9, 7);
  if (op == "avgpool2d") return Network(op, channels, 7, 7).average(3, 2, 1);
  throw std::runtime_error("op '" + op +
                           "' of kernel_rows() is not known to " __FILE__ ": give it a network and its kernels a check");
}

}  // namespace

// Every entry of the kernel list, forced: it is what the plan says it uses, and the values are right.
void check_kernel_list(const KernelSet& set, const Bf16Tiles* bf16) {
  Random random(13);
  for (const KernelRow& row : kernel_rows()) {
    if (row.is_bf16 != (bf16 != nullptr) || row.isa != (bf16 ? bf16->isa : set.isa)) continue;
    const int64_t width = row.vectors * set.lanes;
    for (int64_t channels : {width - 1, width, 2 * width + 1}) {
      const Network network = network_of(row.op, std::max<int64_t>(1, channels));
      const std::vector<float> src = make_input(network, Storage::kF32, random);
      PlanOptions options;
      options.kernels = &set, options.bf16 = bf16, options.forced_kernel = row.name;
      PackCache cache;
      const PlanPtr plan = Plan::build(network.input(), network.steps(), options, cache);
      const std::string used = plan->describe().front().kernel;
      if (channels <= width && channels > width - set.lanes)
        expect(used == row.name, row.name + " is forced and " + used + " used");
      check_values(network, Storage::kF32, bf16 != nullptr, src, run(*plan, network, Storage::kF32, src, 0, kImages, 1),
                   row.name + text(", %d channels", static_cast<int>(channels)));
    }
  }
}

// Whole networks: values, and the same bits for every layout, batch size and number of threads. `forced`: an op for all steps that
// it can do, or "" for none but what the direct kernels do. storage: of the input and the results.
void check_plans(const KernelSet& set, const std::string& forced, Storage storage, const Bf16Tiles* bf16) {
  static std::set<std::string> seen;  // networks with the kernels that they ran on: an op that is forced is for few of them
  Random random(11);
  std::vector<Network> all = networks();
  for (Network& network : networks_of_groups()) all.push_back(std::move(network));
  for (Network& network : networks_with_activations()) all.push_back(std::move(network));
  for (const Network& network : all) {
    const std::string what = std::string(set.isa) + ", " + network.name() + (forced.empty() ? "" : ", ") + forced +
                             (storage == Storage::kF32    ? ""
                              : storage == Storage::kBf16 ? ", bfloat16"
                                                          : ", float16") +
                             (bf16 ? ", tiles of pairs" : "");
    const std::vector<float> src = make_input(network, storage, random);
    const std::vector<StepSpec> steps = network.steps();
    PackCache cache;
    std::vector<float> usual;
    PlanOptions options;
    options.kernels = &set, options.bf16 = bf16, options.allows_winograd = !forced.empty(), options.forced_kernel = forced;
    InputSpec input = network.input();
    input.storage = storage;
    std::string key = network.name() + std::to_string(static_cast<int>(storage));
    for (const StepInfo& step : Plan::build(input, steps, options, cache)->describe()) key += ", " + step.kernel;
    if (!seen.insert(key).second) continue;
    for (bool is_nhwc : {false, true})
      for (bool to_nhwc_output : {false, true}) {
        if (is_nhwc && !network.input().is_spatial) continue;
        input.is_nhwc = is_nhwc, options.output_is_nhwc = to_nhwc_output;
        const PlanPtr plan = Plan::build(input, steps, options, cache);
        const OutputSpec& output = plan->output();
        if (to_nhwc_output && !output.is_spatial) continue;
        const std::vector<float> in = is_nhwc ? to_nhwc(src, kImages, input.channels, input.h * input.w) : src;
        const std::string how = what + (is_nhwc ? ", NHWC" : ", NCHW") + (to_nhwc_output ? " to NHWC" : " to NCHW");

        const std::vector<float> whole = run(*plan, network, storage, in, 0, kImages, 1);
        if (usual.empty()) {
          usual = whole;
          check_values(network, storage, bf16 != nullptr, src, usual, how);
        }
        expect_same(whole, to_nhwc_output ? to_nhwc(usual, kImages, output.channels, output.h * output.w) : usual, how);
        const size_t per_image = whole.size() / kImages;
        for (int threads : {1, 2})
          for (int64_t batch = 1; batch <= kImages; ++batch) {
            if ((is_nhwc || to_nhwc_output) && batch != threads + 1) continue;  // all of them for one layout is enough
            const int64_t first = random.below(kImages - batch + 1);
            const std::vector<float> part(whole.begin() + first * per_image, whole.begin() + (first + batch) * per_image);
            expect_same(run(*plan, network, storage, in, first, batch, threads), part,
                        how + text(", batch %d, %d threads", static_cast<int>(batch), threads));
          }
        if (is_nhwc || to_nhwc_output) continue;
        std::vector<float> other;  // of a second caller at the same time
        std::thread caller([&] { other = run(*plan, network, storage, in, 0, kImages, 2); });
        const std::vector<float> own = run(*plan, network, storage, in, 0, kImages, 2);
        caller.join();
        expect_same(own, whole, how + ", beside another caller");
        expect_same(other, whole, how + ", a second caller");
      }
  }
}

}  // namespace fastseq::harness
