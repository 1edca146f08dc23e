// finish: a BatchNorm in eval mode and an activation, in float32, of what a layer has summed: see Finish in kernels.h.
// The BatchNorm is computed as torch does, ((x - mean) / sqrt(variance + eps)) * gain + shift, but for the bias, from which the
// mean is taken first, and for the last product and sum, which are rounded once. So statistics of any size do what they do there.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

template <typename Element>
FS_DEVICE float channel_of(const void* values, int n, float missing) {
  return values ? to_float(static_cast<const Element*>(values)[n]) : missing;
}

// What one channel is given. n must be a channel that there is.
template <typename Element>
struct ChannelFinish {
  float center, scale = 1.0f, gain = 1.0f, shift = -0.0f;  // of no BatchNorm: what changes no bit
  float a;

  FS_DEVICE ChannelFinish(const Finish& finish, float bias, int n) : center(bias), a(finish.a) {
    if (finish.has_norm) {
      center = bias - channel_of<Element>(finish.mean, n, 0.0f);
      scale = reciprocal_root(channel_of<Element>(finish.variance, n, 0.0f) + finish.eps);
      gain = channel_of<Element>(finish.gain, n, 1.0f);
      shift = channel_of<Element>(finish.shift, n, 0.0f);
    }
    if (finish.kind == Activation::kPrelu) a = channel_of<Element>(finish.slopes, n * finish.slope_step, 0.0f);
  }

  // Bias and BatchNorm.
  FS_DEVICE float norm(float sum) const { return fused_multiply_add((sum + center) * scale, gain, shift); }
  FS_DEVICE float activate(const Finish& finish, float value) const { return cuda::activate(finish.kind, value, a, finish.b); }
};

// Bias, BatchNorm and activation of a single sum.
template <typename Element>
FS_DEVICE float finished(const Finish& finish, float sum, float bias, int n) {
  const ChannelFinish<Element> channel(finish, bias, n);
  return channel.activate(finish, channel.norm(sum));
}

}  // namespace fastseq::cuda
