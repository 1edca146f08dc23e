// fused_mlp: a chain of Linear layers for many rows in one launch: see ChainArgs in kernels.h. Widths up to 512, equal or not.
// 16-bit activations are rounded between layers, as eager rounds them. Intermediate activations never leave the multiprocessor.
//
// In registers (fused_mlp_registers), on tensor cores, for layers up to kWidth wide. A warp has 16 or 32 rows and takes them
// through all layers by itself: the accumulators of two neighbouring n8 tiles are, once packed, what the next mma wants as k. For
// tf32, where an accumulator pair is columns 2t and 2t+1 and the next fragment wants k t and t+4, every k is taken in that permuted
// order, of activations, weights and the input alike. Weights come in panels of 32 outputs through shared memory, in a ring of
// kSlots, ahead of use, over the ends of layers and of tiles; if all panels fit, they are loaded once. Blocks take tile after tile,
// and a warp's next rows are on their way while it works on these.
//
// In shared memory (fused_mlp_shared), for wider layers and for IEEE fp32. A block keeps the activations of its rows in shared
// memory and all outputs of a layer in registers, so that they can overwrite their input; weights stream through two stages of
// kStepBytes of k. IEEE fp32 has its accumulators where mma has them and reads four k at a time, 64 rows by 32 columns a warp.
//
// Zeros. What pads k is zero on both sides: in the input and weights as loaded, and in outputs that do not exist, which are set to
// zero after every layer, since the sums there may be NaN (an infinity times the zeros of a weight that does not exist).
// Order of summation: k ascending, in steps of an mma, or one by one for IEEE fp32; it depends on nothing else.
//
// Sources: fused MLP of tiny-cuda-nn (Mueller et al., Real-time Neural Radiance Caching, 2021) for the idea; accumulators as next
// fragments: FlashAttention-2; fragment layouts: PTX ISA, "Matrix Fragments for mma".
#pragma once

#include "kernels/cuda/chain.cuh"

namespace fastseq::cuda {

// Rows of fragments are read 8 at a time in 16-byte units: an odd multiple of 16 bytes keeps them in different banks.
FS_HOST_DEVICE constexpr int odd_stride(int bytes) { return round_up(bytes, 32) + 16; }
// Rows of tf32 fragments in registers are read 4 at a time in units of 32 bytes.
FS_HOST_DEVICE constexpr int odd_stride_of_32(int bytes) { return round_up(bytes, 64) + 32; }

// In registers --------------------------------------------------------------------------------------------------------------------

constexpr int kPanel = 32;  // outputs
constexpr int kSlots = 3;
constexpr int kResidentBytes = 96 << 10;  // so much shared memory is worth taking to load weights once

template <Math math, int width, int tiles_m, int most_threads>
struct RegisterTile {
  static constexpr Math kMath = math;
  using Element = ElementOf<math>;
  static constexpr int kSize = static_cast<int>(sizeof(Element));
  static constexpr int kWidth = width;
  static constexpr int kMT = tiles_m;  // m16 tiles of a warp
  static constexpr int kThreads = most_threads;
  static constexpr int kWarpRows = 16 * kMT;
  static constexpr int kRows = kWarpRows * kThreads / 32;
  static constexpr int kStep = 32 / kSize;  // k of an mma
  static constexpr int kSteps = kWidth / kStep;
  static constexpr int kPanelSteps = kPanel / kStep;  // that a panel's outputs make
  static constexpr int kPanels = kWidth / kPanel;

  FS_HOST_DEVICE static constexpr int stride(int k) {
    return math == Math::kTf32 ? odd_stride_of_32(k * kSize) : odd_stride(k * kSize);
  }
};

// What of shared memory is what.
struct RegisterLayout {
  int panels = 0, slots = 0;  // of a tile; that there is room for
  int panel_bytes = 0, rows_bytes = 0;

  FS_HOST_DEVICE bool is_resident() const { return slots == panels; }
  FS_HOST_DEVICE int bytes() const { return slots * panel_bytes + rows_bytes; }
};
template <typename Tile>
FS_HOST_DEVICE inline RegisterLayout register_layout(const ChainArgs& args) {
  RegisterLayout layout;
  for (int i = 0; i < args.count; ++i) {
    layout.panels += (args.layers[i].n + kPanel - 1) / kPanel;
    const int bytes = kPanel * (Tile::stride(args.layers[i].k) + 4);
    if (bytes > layout.panel_bytes) layout.panel_bytes = bytes;
  }
  layout.rows_bytes = Tile::kRows * Tile::stride(args.layers[0].k);
  const bool fits = layout.panels <= kSlots || layout.panels * layout.panel_bytes + layout.rows_bytes <= kResidentBytes;
  layout.slots = fits ? layout.panels : kSlots;
  return layout;
}

// Weights on their way to shared memory, panel by panel.
template <typename Tile>
struct PanelRing {
  using Element = typename Tile::Element;

  const ChainArgs& args;
  const RegisterLayout layout;
  unsigned char* const slots;
  int layer = 0, n = 0;  // of the next panel to ask for
  int slot = 0;          // where it goes
  int reading = 0;       // the slot of the next panel to use

  FS_DEVICE PanelRing(const ChainArgs& a, const RegisterLayout& l, unsigned char* memory) : args(a), layout(l), slots(memory) {}

  // Those of a panel, behind its weights.
  FS_DEVICE float* biases(int index) const { return reinterpret_cast<float*>(slots + (index + 1) * layout.panel_bytes) - kPanel; }

  FS_DEVICE void next_slot(int& index) const {
    if (++index == layout.slots) index = 0;
  }

  // Asks for the next panel, the first one of the next tile after the last. A group of its own.
  FS_DEVICE void ask() {
    const ChainArgs::Layer& from = args.layers[layer];
    const Element* const rows = static_cast<const Element*>(from.weight) + static_cast<int64_t>(n) * from.k;
    copy_rows<Element, 8>(slots + slot * layout.panel_bytes, Tile::stride(from.k), rows, from.k, kPanel, from.n - n, from.k,
                          round_up(from.k, Tile::kStep) * Tile::kSize / kPieceBytes,
                          load_bytes<Element>(from.weight, from.k, from.k), thread_index(), static_cast<int>(blockDim.x));
    cp_async_commit();
    if (thread_index() < kPanel) biases(slot)[thread_index()] = bias_at<Element>(from, n + thread_index());
    next_slot(slot);
    n += kPanel;
    if (n < from.n) return;
    n = 0;
    if (++layer == args.count) layer = 0;
  }

  FS_DEVICE void start() {
    const int first = layout.is_resident() ? layout.panels : kSlots - 1;
    for (int i = 0; i < first; ++i) ask();
    if (layout.is_resident()) {
      cp_async_wait<0>();
      block_barrier();
    }
  }

  // The slot of the next panel, once it is there for all threads.
  FS_DEVICE int panel() {
    if (!layout.is_resident()) {
      cp_async_wait<kSlots - 2>();
      block_barrier();
      ask();  // into the slot of the panel before, which nobody reads any more
    }
    const int result = reading;
    next_slot(reading);
    return result;
  }
};

// The fragments of a warp's rows of activations.
template <typename Tile>
using Activations = uint32_t[Tile::kMT][Tile::kSteps][4];
template <typename Tile>
using PanelSums = float[Tile::kMT][4][4];  // [m16 tile][n8 tile]

template <typename Tile>
struct RegisterChain {
  using Element = typename Tile::Element;

  const ChainArgs& args;
  const RegisterLayout layout;
  PanelRing<Tile> ring;
  unsigned char* const rows;  // of this warp, as they are in memory
  const int rows_stride, lane, g, t;

  FS_DEVICE RegisterChain(const ChainArgs& a, const RegisterLayout& l)
      : args(a),
        layout(l),
        ring(a, l, shared_memory()),
        rows(shared_memory() + l.slots * l.panel_bytes + warp_index() * Tile::kWarpRows * Tile::stride(a.layers[0].k)),
        rows_stride(Tile::stride(a.layers[0].k)),
        lane(lane_index()),
        g(lane_index() / 4),
        t(lane_index() % 4) {}

  FS_DEVICE int64_t first_row(int64_t tile) const { return tile * Tile::kRows + warp_index() * Tile::kWarpRows; }

  // Asks for this warp's rows of a tile, in the next group.
  FS_DEVICE void ask_for_rows(int64_t tile) {
    const int64_t first = first_row(tile), left = args.rows - first;
    const int k = args.layers[0].k;
    copy_rows<Element, 8>(rows, rows_stride, static_cast<const Element*>(args.src) + (left > 0 ? first * args.src_row_stride : 0),
                          args.src_row_stride, Tile::kWarpRows, left < Tile::kWarpRows ? static_cast<int>(left) : Tile::kWarpRows,
                          k, round_up(k, Tile::kStep) * Tile::kSize / kPieceBytes,
                          load_bytes<Element>(args.src, args.src_row_stride, k), lane, 32);
  }

  FS_DEVICE void read_rows(Activations<Tile>& x) const {
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if (step * Tile::kStep >= args.layers[0].k) break;
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m) {
        const unsigned char* const from = rows + m * 16 * rows_stride + step * 32;
        if constexpr (Tile::kMath == Math::kTf32) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 pair = *reinterpret_cast<const float2*>(from + (g + 8 * i) * rows_stride + 8 * t);
            x[m][step][i] = to_tf32(pair.x);
            x[m][step][i + 2] = to_tf32(pair.y);
          }
        } else {
          ldmatrix_x4(x[m][step], from + lane % 16 * rows_stride + lane / 16 * 16);
        }
      }
    }
  }

  // The weights of a step for the four n8 tiles of a panel.
  FS_DEVICE void read_weights(uint32_t (&b)[4][2], const unsigned char* panel, int stride, int step) const {
    if constexpr (Tile::kMath == Math::kTf32) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(panel + (8 * j + g) * stride + step * 32 + 8 * t);
        b[j][0] = to_tf32(pair.x), b[j][1] = to_tf32(pair.y);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t two[4];
        ldmatrix_x4(two, panel + (8 * j + lane / 16 * 8 + lane % 8) * stride + step * 32 + lane / 8 % 2 * 16);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
    }
  }

  // Bias, ReLU, and zero where there is no output.
  FS_DEVICE void finish(PanelSums<Tile>& sums, const float* biases, bool has_relu, int outputs) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 8 * j + 2 * t;
      const float2 bias = *reinterpret_cast<const float2*>(biases + n);
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = sums[m][j][i] + (i % 2 == 0 ? bias.x : bias.y);
          sums[m][j][i] = n + i % 2 >= outputs ? 0.0f : has_relu ? relu(value) : value;
        }
    }
  }

  // Sums as fragments of activations, from step `first` on.
  FS_DEVICE static void pack(Activations<Tile>& y, const PanelSums<Tile>& sums, int first, bool is_last) {
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&four)[4] = sums[m][j];
        if constexpr (Tile::kMath == Math::kTf32) {
          constexpr int kOrder[4] = {0, 2, 1, 3};
#pragma unroll
          for (int i = 0; i < 4; ++i) y[m][first + j][i] = is_last ? bits_of_float(four[kOrder[i]]) : to_tf32(four[kOrder[i]]);
        } else {
          y[m][first + j / 2][j % 2 * 2] = pack2<Element>(four[0], four[1]);
          y[m][first + j / 2][j % 2 * 2 + 1] = pack2<Element>(four[2], four[3]);
        }
      }
  }

  FS_DEVICE void write(const Activations<Tile>& y, int64_t tile) const {
    const int n_count = args.layers[args.count - 1].n;
    const bool can_vector = can_write<Element>(args, Tile::kSize == 4 ? 8 : 16);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      if (panel * kPanel >= n_count) break;
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_row(tile) + 16 * m + 8 * half + g;
          const bool has_row = row < args.rows;
          Element* const to = static_cast<Element*>(args.dst) + (has_row ? row * args.dst_row_stride : 0);
          const auto& steps = y[m];
          if constexpr (Tile::kMath == Math::kTf32) {
            if (!has_row) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint32_t (&four)[4] = steps[panel * Tile::kPanelSteps + j];
              write_floats(to, panel * kPanel + 8 * j + 2 * t, n_count, can_vector, float_of_bits(four[half]),
                           float_of_bits(four[half + 2]));
            }
          } else {
            const uint32_t (&first)[4] = steps[panel * 2];
            const uint32_t (&second)[4] = steps[panel * 2 + 1];
            uint32_t words[4] = {first[half], first[half + 2], second[half], second[half + 2]};
            write_pairs<Element>(to, has_row, panel * kPanel, n_count, can_vector, words);
          }
        }
    }
  }

  FS_DEVICE void multiply(const ChainArgs::Layer& layer, bool is_last, const Activations<Tile>& x, Activations<Tile>& y) {
    const int stride = Tile::stride(layer.k);
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      if (panel * kPanel >= layer.n) break;
      const int slot = ring.panel();
      const unsigned char* const weights = ring.slots + slot * layout.panel_bytes;
      PanelSums<Tile> sums;
#pragma unroll
      for (int i = 0; i < Tile::kMT * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        if (step * Tile::kStep >= layer.k) break;
        uint32_t b[4][2];
        read_weights(b, weights, stride, step);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int m = 0; m < Tile::kMT; ++m) multiply_add<Tile::kMath>(sums[m][j], x[m][step], b[j]);
      }
      finish(sums, ring.biases(slot), layer.has_relu != 0, layer.n - panel * kPanel);
      pack(y, sums, panel * Tile::kPanelSteps, is_last);
    }
  }

  FS_DEVICE void run(int64_t tiles) {
    int64_t tile = blockIdx.x;
    ask_for_rows(tile);
    ring.start();
    for (; tile < tiles; tile += gridDim.x) {
      // In a ring the rows came with the first panel that was asked for since, four or more panels ago.
      if (layout.is_resident() || tile == blockIdx.x) {
        cp_async_wait<0>();
      } else {
        cp_async_wait<kSlots - 2>();
      }
      warp_barrier();
      Activations<Tile> x, y;
      read_rows(x);
      warp_barrier();
      if (tile + gridDim.x < tiles) ask_for_rows(tile + gridDim.x);
      if (layout.is_resident()) cp_async_commit();
      for (int i = 0; i < args.count; ++i) {
        const bool is_last = i + 1 == args.count;
        multiply(args.layers[i], is_last, x, y);
        if (is_last) break;
#pragma unroll
        for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
          for (int step = 0; step < Tile::kSteps; ++step)
#pragma unroll
            for (int j = 0; j < 4; ++j) x[m][step][j] = y[m][step][j];
      }
      write(y, tile);
    }
    cp_async_wait<0>();
  }
};

template <typename Tile>
FS_KERNEL(Tile::kThreads, 1)
fused_mlp_registers(FS_ARGS ChainArgs args) {
  RegisterChain<Tile>(args, register_layout<Tile>(args)).run((args.rows + Tile::kRows - 1) / Tile::kRows);
}

// In shared memory ----------------------------------------------------------------------------------------------------------------

template <Math math, int warps_m, int warps_n, int tiles_m, int tiles_n, int step_bytes>
struct SharedTile {
  static constexpr Math kMath = math;
  using Element = ElementOf<math>;
  static constexpr int kSize = static_cast<int>(sizeof(Element));
  static constexpr int kWarpsM = warps_m, kWarpsN = warps_n;
  static constexpr int kMT = tiles_m, kNT = tiles_n;  // m16 and n8 tiles of a warp
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kMT * kWarpsM;
  static constexpr int kWidth = 8 * kNT * kWarpsN;
  static constexpr int kStepBytes = step_bytes;
  static constexpr int kStep = kStepBytes / kSize;  // k of a stage
  static constexpr int kStageStride = odd_stride(kStepBytes);
  static_assert(8 * kNT % kStep == 0, "a warp pads its outputs to a whole step");
  static_assert(kNT % 4 == 0, "outputs are written four n8 tiles at a time");
};

struct SharedLayout {
  int stride = 0, stage_bytes = 0, rows_bytes = 0, biases = 0;  // the last: floats of a layer
  FS_HOST_DEVICE int bytes() const { return rows_bytes + 2 * (stage_bytes + biases * 4); }
};
template <typename Tile>
FS_HOST_DEVICE inline SharedLayout shared_layout(const ChainArgs& args) {
  int k = 0, n = 0;
  for (int i = 0; i < args.count; ++i) {
    if (args.layers[i].k > k) k = args.layers[i].k;
    if (args.layers[i].n > n) n = args.layers[i].n;
  }
  SharedLayout layout;
  layout.stride = odd_stride(round_up(k, Tile::kStep) * Tile::kSize);
  layout.rows_bytes = Tile::kRows * layout.stride;
  layout.biases = round_up(n, 8 * Tile::kNT);
  layout.stage_bytes = layout.biases * Tile::kStageStride;
  return layout;
}

template <typename Tile>
struct SharedChain {
  using Element = typename Tile::Element;
  using Sums = float[Tile::kMT][Tile::kNT][4];

  const ChainArgs& args;
  const SharedLayout layout;
  unsigned char* const rows;
  unsigned char* const stages;
  const int lane, g, t, warp_m, warp_n;
  int layer = 0, k = 0, stage = 0;  // of the next step to ask for

  FS_DEVICE SharedChain(const ChainArgs& a, const SharedLayout& l)
      : args(a),
        layout(l),
        rows(shared_memory()),
        stages(shared_memory() + l.rows_bytes),
        lane(lane_index()),
        g(lane_index() / 4),
        t(lane_index() % 4),
        warp_m(warp_index() / Tile::kWarpsN),
        warp_n(warp_index() % Tile::kWarpsN) {}

  FS_DEVICE int first_n() const { return warp_n * 8 * Tile::kNT; }

  FS_DEVICE void ask_for_rows(int64_t first) {
    const int k_count = args.layers[0].k;
    const int64_t left = args.rows - first;
    copy_rows<Element, 8>(rows, layout.stride, static_cast<const Element*>(args.src) + first * args.src_row_stride,
                          args.src_row_stride, Tile::kRows, left < Tile::kRows ? static_cast<int>(left) : Tile::kRows, k_count,
                          round_up(k_count, Tile::kStep) * Tile::kSize / kPieceBytes,
                          load_bytes<Element>(args.src, args.src_row_stride, k_count), thread_index(), Tile::kThreads);
  }

  // Of two layers, this one's and the next one's.
  FS_DEVICE float* biases(int index) const {
    return reinterpret_cast<float*>(stages + 2 * layout.stage_bytes) + index % 2 * layout.biases;
  }

  // Asks for the next step of weights, if there is one. A group of its own.
  FS_DEVICE void ask() {
    if (layer < args.count) {
      const ChainArgs::Layer& from = args.layers[layer];
      if (k == 0) {
        for (int n = thread_index(); n < layout.biases; n += Tile::kThreads) biases(layer)[n] = bias_at<Element>(from, n);
      }
      copy_rows<Element, Tile::kStepBytes / kPieceBytes>(
          stages + stage * layout.stage_bytes, Tile::kStageStride, static_cast<const Element*>(from.weight) + k, from.k, from.n,
          from.n, from.k - k, Tile::kStepBytes / kPieceBytes, load_bytes<Element>(from.weight, from.k, from.k), thread_index(),
          Tile::kThreads);
      stage = 1 - stage;
      k += Tile::kStep;
      if (k >= from.k) k = 0, ++layer;
    }
    cp_async_commit();
  }

  // 32 bytes of k, on tensor cores. `a`, `b`: the warp's first row of either.
  FS_DEVICE void multiply_on_tensor_cores(Sums& sums, const unsigned char* a, const unsigned char* b) const {
    uint32_t x[Tile::kMT][4];
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m) {
      ldmatrix_x4(x[m], a + (m * 16 + lane % 16) * layout.stride + lane / 16 * 16);
      if constexpr (Tile::kMath == Math::kTf32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][i] = round_bits_to_tf32(x[m][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::kNT; n += 2) {
      uint32_t two[4];
      ldmatrix_x4(two, b + (n * 8 + lane / 16 * 8 + lane % 8) * Tile::kStageStride + lane / 8 % 2 * 16);
      if constexpr (Tile::kMath == Math::kTf32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) two[i] = round_bits_to_tf32(two[i]);
      }
      const uint32_t first[2] = {two[0], two[1]}, second[2] = {two[2], two[3]};
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m) {
        multiply_add<Tile::kMath>(sums[m][n], x[m], first);
        multiply_add<Tile::kMath>(sums[m][n + 1], x[m], second);
      }
    }
  }

  // The same in IEEE fp32, four k at a time.
  FS_DEVICE void multiply_in_fp32(Sums& sums, const unsigned char* a, const unsigned char* b) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 x[Tile::kMT][2];
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          x[m][i] = *reinterpret_cast<const float4*>(a + (m * 16 + i * 8 + g) * layout.stride + half * 16);
#pragma unroll
      for (int n = 0; n < Tile::kNT; ++n)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float4 w = *reinterpret_cast<const float4*>(b + (n * 8 + 2 * t + q) * Tile::kStageStride + half * 16);
#pragma unroll
          for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& sum = sums[m][n][2 * i + q];
              sum = fused_multiply_add(x[m][i].x, w.x, sum);
              sum = fused_multiply_add(x[m][i].y, w.y, sum);
              sum = fused_multiply_add(x[m][i].z, w.z, sum);
              sum = fused_multiply_add(x[m][i].w, w.w, sum);
            }
        }
    }
  }

  FS_DEVICE void multiply(Sums& sums, int first_k, int reading) const {
    const unsigned char* const a = rows + warp_m * 16 * Tile::kMT * layout.stride + first_k * Tile::kSize;
    const unsigned char* const b = stages + reading * layout.stage_bytes + first_n() * Tile::kStageStride;
#pragma unroll 1
    for (int part = 0; part < Tile::kStepBytes; part += 32) {
      if constexpr (Tile::kMath == Math::kIeee) {
        multiply_in_fp32(sums, a + part, b + part);
      } else {
        multiply_on_tensor_cores(sums, a + part, b + part);
      }
    }
  }

  // Bias and ReLU.
  FS_DEVICE void finish(Sums& sums, const float* bias_row, bool has_relu) const {
#pragma unroll
    for (int j = 0; j < Tile::kNT; ++j) {
      const int n = 8 * j + 2 * t;
      const float2 bias = *reinterpret_cast<const float2*>(bias_row + n);
#pragma unroll
      for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = sums[m][j][i] + (i % 2 == 0 ? bias.x : bias.y);
          sums[m][j][i] = has_relu ? relu(value) : value;
        }
    }
  }

  // The outputs of a layer as the input of the next, with zeros up to a whole step.
  FS_DEVICE void keep(const Sums& sums, int n_count) const {
    const int padded = round_up(n_count, Tile::kStep);
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned char* const row = rows + ((warp_m * Tile::kMT + m) * 16 + half * 8 + g) * layout.stride;
#pragma unroll
        for (int j = 0; j < Tile::kNT; ++j) {
          const int n = first_n() + 8 * j + 2 * t;
          if (n >= padded) continue;
          const float first = n < n_count ? sums[m][j][2 * half] : 0.0f;
          const float second = n + 1 < n_count ? sums[m][j][2 * half + 1] : 0.0f;
          if constexpr (Tile::kSize == 4) {
            *reinterpret_cast<float2*>(row + n * 4) = make_float2(first, second);
          } else {
            *reinterpret_cast<uint32_t*>(row + n * 2) = pack2<Element>(first, second);
          }
        }
      }
  }

  FS_DEVICE void write(const Sums& sums, int n_count, int64_t first_row) const {
    const bool can_vector = can_write<Element>(args, Tile::kSize == 4 ? 8 : 16);
#pragma unroll
    for (int m = 0; m < Tile::kMT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + (warp_m * Tile::kMT + m) * 16 + half * 8 + g;
        const bool has_row = row < args.rows;
        Element* const to = static_cast<Element*>(args.dst) + (has_row ? row * args.dst_row_stride : 0);
#pragma unroll
        for (int j = 0; j < Tile::kNT; j += 4) {
          const int n = first_n() + 8 * j;
          if constexpr (Tile::kSize == 4) {
            if (!has_row) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i)
              write_floats(to, n + 8 * i + 2 * t, n_count, can_vector, sums[m][j + i][2 * half], sums[m][j + i][2 * half + 1]);
          } else {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = pack2<Element>(sums[m][j + i][2 * half], sums[m][j + i][2 * half + 1]);
            write_pairs<Element>(to, has_row, n, n_count, can_vector, words);
          }
        }
      }
  }

  FS_DEVICE void run(int64_t first_row) {
    ask_for_rows(first_row);
    ask();
    int reading = 0;
    for (int i = 0; i < args.count; ++i) {
      const ChainArgs::Layer& from = args.layers[i];
      const bool has_outputs = first_n() < from.n;  // of this warp
      Sums sums;
#pragma unroll
      for (int j = 0; j < Tile::kMT * Tile::kNT * 4; ++j) sums[j / (4 * Tile::kNT)][j / 4 % Tile::kNT][j % 4] = 0.0f;
      for (int first_k = 0; first_k < from.k; first_k += Tile::kStep) {
        cp_async_wait<0>();
        block_barrier();  // this step is there, and the one before is done
        ask();
        if (has_outputs) multiply(sums, first_k, reading);
        reading = 1 - reading;
      }
      if (has_outputs) finish(sums, biases(i) + first_n(), from.has_relu != 0);
      if (i + 1 == args.count) {
        if (has_outputs) write(sums, from.n, first_row);
        return;
      }
      block_barrier();  // all have read the rows
      if (has_outputs) keep(sums, from.n);
    }
  }
};

template <typename Tile>
FS_KERNEL(Tile::kThreads, (Tile::kThreads <= 128 ? 2 : 1))
fused_mlp_shared(FS_ARGS ChainArgs args) {
  const int64_t first_row = tile_of_block() * Tile::kRows;
  if (first_row >= args.rows) return;
  SharedChain<Tile>(args, shared_layout<Tile>(args)).run(first_row);
}

}  // namespace fastseq::cuda
