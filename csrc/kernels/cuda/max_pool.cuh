// max_pool: torch.max_pool2d of maps of any strides, with an optional bias and ReLU, or with kFinishes a BatchNorm and any
// activation, before it: see MaxPoolArgs in kernels.h. The latter is computed element by element, without vectors.
// A thread makes kVector neighbouring channels of one output; with vectors they are one 16-byte load and store per window element.
// As torch.max_pool2d on CUDA: a NaN wins and stays, of equals the first stays. Memory-bound: each input is read once per window.
#pragma once

#include "kernels/cuda/finish.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

template <typename Element>
union Piece {  // 16 bytes of channels
  static constexpr int kCount = 16 / static_cast<int>(sizeof(Element));
  uint4 bits;
  Element elements[kCount];
};

template <typename Element, bool kIsVector, bool kFinishes>
FS_KERNEL(256, 1)
max_pool(FS_ARGS MaxPoolArgs args) {
  static_assert(!(kIsVector && kFinishes), "the functions would be there once for each channel");
  constexpr int kVector = kIsVector ? Piece<Element>::kCount : 1;
  const int groups = args.channels / kVector;
  const int64_t total = static_cast<int64_t>(args.batch) * args.h_out * args.w_out * groups;
  const Element* const src = static_cast<const Element*>(args.src);
  Element* const dst = static_cast<Element*>(args.dst);
  const Element* const bias = static_cast<const Element*>(args.bias);
  const bool is_channel_fastest = args.src_c_stride == 1;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    // Neighbouring threads read neighbouring elements.
    int64_t rest = i;
    int c = 0;
    if (is_channel_fastest) c = static_cast<int>(rest % groups) * kVector, rest /= groups;
    const int x = static_cast<int>(rest % args.w_out);
    rest /= args.w_out;
    const int y = static_cast<int>(rest % args.h_out);
    rest /= args.h_out;
    if (!is_channel_fastest) c = static_cast<int>(rest % groups) * kVector, rest /= groups;
    const int64_t image = rest;

    float largest[kVector], shift[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) largest[v] = -INFINITY, shift[v] = bias ? to_float(bias[c + v]) : 0.0f;
    const ChannelFinish<Element> channel(args.finish, shift[0], c < args.finished_channels ? c : 0);  // of use with kFinishes alone
    const int first_y = y * args.pool_stride_h - args.pool_top, first_x = x * args.pool_stride_w - args.pool_left;
    const Element* const base = src + image * args.src_image_stride + c * args.src_c_stride;
    for (int dy = 0; dy < args.pool_h; ++dy) {
      if (static_cast<unsigned>(first_y + dy) >= static_cast<unsigned>(args.h_in)) continue;
      for (int dx = 0; dx < args.pool_w; ++dx) {
        if (static_cast<unsigned>(first_x + dx) >= static_cast<unsigned>(args.w_in)) continue;
        const Element* const at = base + (first_y + dy) * args.src_h_stride + (first_x + dx) * args.src_w_stride;
        Piece<Element> piece;
        if constexpr (kIsVector) {
          piece.bits = *reinterpret_cast<const uint4*>(at);
        } else {
          piece.elements[0] = *at;
        }
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          float value = to_float(piece.elements[v]);
          if constexpr (kFinishes) {
            value = channel.norm(value);
            if (!args.finish.is_after_pool) value = channel.activate(args.finish, value);
          } else {
            if (bias) value += shift[v];
            if (args.has_relu) value = relu(value);
          }
          if (value > largest[v] || value != value) largest[v] = value;
        }
      }
    }
    if constexpr (kFinishes) {
      if (args.finish.is_after_pool) largest[0] = channel.activate(args.finish, largest[0]);
      if (c >= args.finished_channels) largest[0] = 0.0f;
    }
    Element* const target =
        dst + image * args.dst_image_stride + y * args.dst_h_stride + x * args.dst_w_stride + c * args.dst_c_stride;
    Piece<Element> piece;
#pragma unroll
    for (int v = 0; v < kVector; ++v) piece.elements[v] = from_float<Element>(largest[v]);
    if constexpr (kIsVector) {
      *reinterpret_cast<uint4*>(target) = piece.bits;
    } else {
      *target = piece.elements[0];
    }
  }
}

}  // namespace fastseq::cuda
