// tiny_mlp: a whole chain of Linear layers in one launch, for few rows: see ChainArgs in kernels.h. Any widths, any batch.
// One block makes kRows rows. IEEE fp32 arithmetic; 16-bit activations are rounded between layers, as eager rounds them.
//
// Idea. With a few rows the time is that of launches and of waiting for L2, not of arithmetic. So weights come straight from the
// layer's own memory into registers, 16 bytes a load, and are asked for two steps ahead, over the ends of layers and before the
// input has arrived: of a network with up to 64 KB of weights nothing waits but the first step. A group of 8 lanes (32 where rows
// are long) makes kOutputs outputs at a time; its lanes split k piece by piece and add up in a tree. Activations are fp32 in shared
// memory, in two buffers, filled with zeros up to where the lanes of a group end.
//
// A layer with a BatchNorm or another activation than ReLU (Finish) leaves its sums in the next layer's input, and a loop over them
// finishes them there: that code is there once, and not once for each of the sums that a thread holds.
//
// Order of summation of an output: lane j of g takes pieces j, j + g, ... ascending, then the tree. It depends on k alone.
// Source: matrix-vector kernels of llama.cpp (ggml/src/ggml-cuda/mmvf.cu) for lanes along k; the look-ahead is ours.
#pragma once

#include "kernels/cuda/chain.cuh"

namespace fastseq::cuda {

constexpr int kTinyThreads = 256;
constexpr int kTinyOutputs = 2;  // of a group at a time
constexpr int kTinyPieces = 4;   // of a lane, output and step: 8 loads of 16 bytes a step, of which two are on their way

// Lanes that split a row of k elements: 8 do up to four pieces in one step.
FS_HOST_DEVICE constexpr int tiny_lanes(int k, int element_size) {
  return k * element_size <= 8 * kTinyPieces * kPieceBytes * 2 ? 8 : 32;
}
FS_HOST_DEVICE constexpr int tiny_padded(int k, int element_size) {
  return round_up(k, tiny_lanes(k, element_size) * (kPieceBytes / element_size));
}
// Floats of a row of the activations that layers 0, 2, ... (parity 0) or 1, 3, ... read; and of the last layer's sums, where they
// are finished in shared memory.
FS_HOST_DEVICE inline int tiny_row_stride(const ChainArgs& args, int parity, int element_size) {
  int stride = 0;
  for (int i = parity; i <= args.count; i += 2) {
    if (i == args.count && !args.layers[i - 1].finish.is_used) break;
    const int padded = tiny_padded(i < args.count ? args.layers[i].k : args.layers[i - 1].n, element_size);
    if (padded > stride) stride = padded;
  }
  return stride;
}

// A piece of 8 elements is two float4 in shared memory. They lie 32 floats apart, so that 8 lanes read 128 bytes in a row.
template <typename Element>
FS_DEVICE int tiny_place(int k) {
  if constexpr (sizeof(Element) == 4) {
    return k;
  } else {
    return k / 64 * 64 + k / 4 % 2 * 32 + k / 8 % 8 * 4 + k % 4;
  }
}

// Finishes the sums of a layer, which all threads have left in `sums`, where the next layer reads; of the last one, the output.
template <typename Element, int kRows>
FS_DEVICE void finish_layer(const ChainArgs& args, int index, float* sums, int stride, int64_t first_row) {
  const ChainArgs::Layer& layer = args.layers[index];
  block_barrier();
#pragma unroll 1
  for (int i = thread_index(); i < kRows * layer.n; i += kTinyThreads) {
    const int row = i / layer.n, n = i % layer.n;
    float& place = sums[row * stride + tiny_place<Element>(n)];
    const Element rounded = from_float<Element>(finished<Element>(layer.finish, place, bias_at<Element>(layer, n), n));
    if (index + 1 < args.count) {
      place = to_float(rounded);
    } else if (args.rows > first_row + row) {
      static_cast<Element*>(args.dst)[(first_row + row) * args.dst_row_stride + n] = rounded;
    }
  }
}

template <typename Element, int kRows>
struct TinyMlp {
  static constexpr int kElements = kPieceElements<Element>;
  static constexpr int kItems = kTinyOutputs * kRows;
  static constexpr int kSize = static_cast<int>(sizeof(Element));

  // A step: kTinyOutputs outputs of each group, and kTinyPieces pieces of k for each lane. Outputs of a group are `groups` apart.
  struct Step {
    int layer = 0, n = 0, k = 0;

    FS_DEVICE void advance(const ChainArgs& args) {
      const int lanes = tiny_lanes(args.layers[layer].k, kSize);
      k += lanes * kTinyPieces * kElements;
      if (k < args.layers[layer].k) return;
      k = 0;
      n += kTinyThreads / lanes * kTinyOutputs;
      if (n < args.layers[layer].n) return;
      n = 0;
      ++layer;
    }
  };

  using Weights = Words[kTinyOutputs][kTinyPieces];

  const ChainArgs& args;
  const int64_t first_row;
  float* src;  // activations of this layer
  float* dst;
  int src_stride, dst_stride;
  Step now, ahead;
  float sums[kItems];  // [output][row]

  FS_DEVICE explicit TinyMlp(const ChainArgs& a)
      : args(a),
        first_row(tile_of_block() * kRows),
        src_stride(tiny_row_stride(a, 0, kSize)),
        dst_stride(tiny_row_stride(a, 1, kSize)) {
    src = reinterpret_cast<float*>(shared_memory());
    dst = src + kRows * src_stride;
    clear();
  }

  FS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums[i] = 0.0f;
  }

  template <int kLoadBytes>
  FS_DEVICE void load_in_units(Weights& weights) const {
    const ChainArgs::Layer& layer = args.layers[ahead.layer];
    const int lanes = tiny_lanes(layer.k, kSize), groups = kTinyThreads / lanes;
    const int group = thread_index() / lanes, lane = thread_index() % lanes;
#pragma unroll
    for (int p = 0; p < kTinyOutputs; ++p) {
      const int n = ahead.n + p * groups + group;
      const Element* const row = static_cast<const Element*>(layer.weight) + static_cast<int64_t>(n) * layer.k;
#pragma unroll
      for (int u = 0; u < kTinyPieces; ++u) {
        const int k = ahead.k + (u * lanes + lane) * kElements;
        weights[p][u] = load_piece<Element, kLoadBytes>(row + k, n < layer.n ? layer.k - k : 0);
      }
    }
  }

  // Loads the weights of step `ahead`, and makes `ahead` the next one.
  FS_DEVICE void load(Weights& weights) {
    if (ahead.layer >= args.count) return;
    const ChainArgs::Layer& layer = args.layers[ahead.layer];
    const int unit = load_bytes<Element>(layer.weight, layer.k, layer.k);
    if (unit == 16) {
      load_in_units<16>(weights);
    } else if (unit == 4) {
      load_in_units<4>(weights);
    } else {
      load_in_units<kSize>(weights);
    }
    ahead.advance(args);
  }

  template <int kLoadBytes>
  FS_DEVICE void read_rows_in_units() {
    constexpr int kAcross = kTinyThreads / kRows;  // threads of a row
    const int row = thread_index() / kAcross, k_count = args.layers[0].k;
    const bool has_row = first_row + row < args.rows;
    const Element* const from = static_cast<const Element*>(args.src) + (has_row ? (first_row + row) * args.src_row_stride : 0);
    const int padded = tiny_padded(k_count, kSize);
    for (int k = thread_index() % kAcross * kElements; k < padded; k += kAcross * kElements) {
      const Words piece = load_piece<Element, kLoadBytes>(from + k, has_row ? k_count - k : 0);
#pragma unroll
      for (int i = 0; i < kElements; i += 4) {
        float4 four;
        four.x = element_of<Element>(piece, i);
        four.y = element_of<Element>(piece, i + 1);
        four.z = element_of<Element>(piece, i + 2);
        four.w = element_of<Element>(piece, i + 3);
        *reinterpret_cast<float4*>(src + row * src_stride + tiny_place<Element>(k + i)) = four;
      }
    }
  }

  FS_DEVICE void read_rows() {
    const int unit = load_bytes<Element>(args.src, args.src_row_stride, args.layers[0].k);
    if (unit == 16) {
      read_rows_in_units<16>();
    } else if (unit == 4) {
      read_rows_in_units<4>();
    } else {
      read_rows_in_units<kSize>();
    }
  }

  // Zeros behind the outputs of this layer, which the next one reads.
  FS_DEVICE void pad_outputs() {
    if (now.layer + 1 >= args.count) return;
    const int n = args.layers[now.layer].n, padded = tiny_padded(n, kSize);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      for (int k = n + thread_index(); k < padded; k += kTinyThreads) dst[row * dst_stride + tiny_place<Element>(k)] = 0.0f;
    }
  }

  FS_DEVICE void multiply(const Weights& weights) {
    const ChainArgs::Layer& layer = args.layers[now.layer];
    const int lanes = tiny_lanes(layer.k, kSize), lane = thread_index() % lanes;
#pragma unroll
    for (int u = 0; u < kTinyPieces; ++u) {
      if (now.k + u * lanes * kElements >= layer.k) break;
      float w[kTinyOutputs][kElements];
#pragma unroll
      for (int p = 0; p < kTinyOutputs; ++p)
#pragma unroll
        for (int i = 0; i < kElements; ++i) w[p][i] = element_of<Element>(weights[p][u], i);
      const float* const x = src + tiny_place<Element>(now.k + (u * lanes + lane) * kElements);
#pragma unroll
      for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int i = 0; i < kElements; i += 4) {
          const float4 four = *reinterpret_cast<const float4*>(x + row * src_stride + i * 8);
#pragma unroll
          for (int p = 0; p < kTinyOutputs; ++p) {
            float& sum = sums[p * kRows + row];
            sum = fused_multiply_add(w[p][i], four.x, sum);
            sum = fused_multiply_add(w[p][i + 1], four.y, sum);
            sum = fused_multiply_add(w[p][i + 2], four.z, sum);
            sum = fused_multiply_add(w[p][i + 3], four.w, sum);
          }
        }
    }
  }

  // The step `done` was the last of its outputs.
  template <int kLanes>
  FS_DEVICE void finish(const Step& done) {
    using Sums = LaneSums<kLanes, kItems>;
    const ChainArgs::Layer& layer = args.layers[done.layer];
    const int lane = lane_index();
    const int item = Sums::first_item(lane);  // all items of a lane are of one output
    const int n = done.n + item / kRows * (kTinyThreads / kLanes) + thread_index() / kLanes;
    const float bias = bias_at<Element>(layer, n);
    Sums::add(sums, lane);
    if (n < layer.n && Sums::is_keeper(lane)) {
#pragma unroll
      for (int i = 0; i < Sums::kKept; ++i) {
        const int row = item % kRows + i;
        if (layer.finish.is_used) {
          dst[row * dst_stride + tiny_place<Element>(n)] = sums[i];
          continue;
        }
        float value = sums[i] + bias;
        if (layer.has_relu) value = relu(value);
        const Element rounded = from_float<Element>(value);
        if (done.layer + 1 < args.count) {
          dst[row * dst_stride + tiny_place<Element>(n)] = to_float(rounded);
        } else if (first_row + row < args.rows) {
          static_cast<Element*>(args.dst)[(first_row + row) * args.dst_row_stride + n] = rounded;
        }
      }
    }
    clear();
  }

  // Does step `now` with its weights, and loads those of `ahead` in their place. False after the last.
  FS_DEVICE bool step(Weights& weights) {
    multiply(weights);
    load(weights);
    const Step done = now;
    now.advance(args);
    if (now.k == 0) {
      if (tiny_lanes(args.layers[done.layer].k, kSize) == 8) {
        finish<8>(done);
      } else {
        finish<32>(done);
      }
    }
    if (now.layer != done.layer) {
      if (args.layers[done.layer].finish.is_used) finish_layer<Element, kRows>(args, done.layer, dst, dst_stride, first_row);
      if (now.layer == args.count) return false;
      float* const read = src;
      src = dst, dst = read;
      const int stride = src_stride;
      src_stride = dst_stride, dst_stride = stride;
      block_barrier();
      pad_outputs();
    }
    return true;
  }

  FS_DEVICE void run() {
    Weights even, odd;
    load(even);
    load(odd);
    read_rows();
    pad_outputs();
    block_barrier();
    while (step(even) && step(odd)) {
    }
  }
};

template <typename Element, int kRows>
FS_KERNEL(kTinyThreads, 1)
tiny_mlp(FS_ARGS ChainArgs args) {
  if (tile_of_block() * kRows >= args.rows) return;
  TinyMlp<Element, kRows>(args).run();
}

}  // namespace fastseq::cuda
