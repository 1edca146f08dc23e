// What the kernels for chains of Linear layers share: elements, copies in pieces of 16 bytes, sums over lanes, fragments.
//
// Alignment. A row is read in the widest units that its base, its stride and its length allow, which is known before the launch is:
// load_bytes() of 16, 4 or the size of an element, the same for all threads. What is read never depends on it, nor does the order
// in which it is added up.
#pragma once

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/finish.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/ptx.h"

namespace fastseq::cuda {

FS_HOST_DEVICE constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

union FloatBits {
  float value;
  uint32_t bits;
};
FS_DEVICE uint32_t bits_of_float(float value) {
  FloatBits both;
  both.value = value;
  return both.bits;
}
FS_DEVICE float float_of_bits(uint32_t bits) {
  FloatBits both;
  both.bits = bits;
  return both.value;
}

FS_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FS_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
FS_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// Pieces -----------------------------------------------------------------------------------------------------------------------

constexpr int kPieceBytes = 16;
template <typename Element>
constexpr int kPieceElements = kPieceBytes / static_cast<int>(sizeof(Element));

struct Words {
  uint32_t words[4];
};

// Bytes that loads from rows of `k` elements may take at once.
template <typename Element>
FS_DEVICE int load_bytes(const void* base, int64_t row_stride, int k) {
  const uint64_t all = reinterpret_cast<uintptr_t>(base) |
                       static_cast<uint64_t>(row_stride * static_cast<int64_t>(sizeof(Element))) |
                       static_cast<uint64_t>(k) * sizeof(Element);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : static_cast<int>(sizeof(Element));
}

// The first `valid` elements at `from`, and zeros.
template <typename Element, int kLoadBytes>
FS_DEVICE Words load_piece(const Element* from, int valid) {
  Words piece{{0, 0, 0, 0}};
  if constexpr (kLoadBytes == 16) {
    if (valid > 0) {
      const uint4 all = *reinterpret_cast<const uint4*>(from);
      piece = {{all.x, all.y, all.z, all.w}};
    }
  } else if constexpr (kLoadBytes == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * (4 / static_cast<int>(sizeof(Element))) < valid) piece.words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
  } else {
    const uint16_t* const halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * i < valid) piece.words[i] = halves[2 * i];
      if (2 * i + 1 < valid) piece.words[i] |= static_cast<uint32_t>(halves[2 * i + 1]) << 16;
    }
  }
  return piece;
}

template <typename Element>
FS_DEVICE float element_of(const Words& piece, int i) {
  if constexpr (sizeof(Element) == 4) {
    return float_of_bits(piece.words[i]);
  } else {
    return i % 2 == 0 ? unpack_low<Element>(piece.words[i / 2]) : unpack_high<Element>(piece.words[i / 2]);
  }
}

// Copies the first `k` elements of rows to shared memory, `pieces` pieces a row, filled up with zeros; rows from `valid_rows` on
// are zeros. kAcross threads share a row. Asynchronous where elements come in units of 4 bytes: in the caller's next group.
template <typename Element, int kAcross>
FS_DEVICE void copy_rows(unsigned char* to, int to_stride_bytes, const Element* from, int64_t from_stride, int rows, int valid_rows,
                         int k, int pieces, int unit, int thread, int threads) {
#pragma unroll 1
  for (int row = thread / kAcross; row < rows; row += threads / kAcross) {
#pragma unroll 1
    for (int piece = thread % kAcross; piece < pieces; piece += kAcross) {
      unsigned char* const target = to + row * to_stride_bytes + piece * kPieceBytes;
      const int valid = row < valid_rows ? k - piece * kPieceElements<Element> : 0;
      const Element* const source = valid > 0 ? from + row * from_stride + piece * kPieceElements<Element> : from;
      if (unit == 16) {
        cp_async_16(target, source, valid > 0);
      } else if (unit == 4) {
        constexpr int kWord = 4 / static_cast<int>(sizeof(Element));
#pragma unroll
        for (int i = 0; i < 4; ++i) cp_async_4(target + 4 * i, i * kWord < valid ? source + i * kWord : source, i * kWord < valid);
      } else {
        const Words words = load_piece<Element, static_cast<int>(sizeof(Element))>(source, valid);
        *reinterpret_cast<uint4*>(target) = make_uint4(words.words[0], words.words[1], words.words[2], words.words[3]);
      }
    }
  }
}

// Sums over lanes --------------------------------------------------------------------------------------------------------------

// Adds kCount items over groups of kLanes lanes, both powers of two, in a tree that is the same for every item and every kCount.
// Afterwards items[0], ... of a lane are the sums of the kKept items from first_item() on; lanes that are not is_keeper() hold
// copies.
template <int kLanes, int kCount>
struct LaneSums {
  static constexpr int kKept = kCount > kLanes ? kCount / kLanes : 1;
  static constexpr int kCopies = kCount < kLanes ? kLanes / kCount : 1;

  FS_DEVICE static int first_item(int lane) { return lane % kLanes / kCopies * kKept; }
  FS_DEVICE static bool is_keeper(int lane) { return lane % kCopies == 0; }

  FS_DEVICE static void add(float (&items)[kCount], int lane) { add_half<kLanes / 2, kCount>(items, lane); }

 private:
  template <int kMask, int kLeft>
  FS_DEVICE static void add_half(float (&items)[kCount], int lane) {
    if constexpr (kMask > 0) {
      if constexpr (kLeft > 1) {
        const bool is_upper = (lane & kMask) != 0;
#pragma unroll
        for (int i = 0; i < kLeft / 2; ++i) {
          const float given = is_upper ? items[i] : items[i + kLeft / 2];
          const float kept = is_upper ? items[i + kLeft / 2] : items[i];
          items[i] = kept + shfl_xor(given, kMask);
        }
      } else {
        items[0] += shfl_xor(items[0], kMask);
      }
      add_half<kMask / 2, (kLeft > 1 ? kLeft / 2 : 1)>(items, lane);
    }
  }
};

// Fragments --------------------------------------------------------------------------------------------------------------------

template <Math kMath>
FS_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMath == Math::kF16) mma_f16(d, a, b);
  if constexpr (kMath == Math::kBF16) mma_bf16(d, a, b);
  if constexpr (kMath == Math::kTf32) mma_tf32(d, a, b);
}

template <typename Element>
FS_DEVICE float bias_at(const ChainArgs::Layer& layer, int n) {
  return layer.bias && n < layer.n ? to_float(static_cast<const Element*>(layer.bias)[n]) : 0.0f;
}

// Whether rows of dst may be written in units of `bytes`.
template <typename Element>
FS_DEVICE bool can_write(const ChainArgs& args, int bytes) {
  return (reinterpret_cast<uintptr_t>(args.dst) |
          static_cast<uint64_t>(args.dst_row_stride * static_cast<int64_t>(sizeof(Element)))) %
             bytes ==
         0;
}

// Writes columns first_n + 8 i + 2 t and the next of a row, for i below 4: words[i] of 16-bit pairs. The four lanes t of a row
// exchange words until each has a piece. All lanes of the warp come here, those without a row too.
template <typename Element>
FS_DEVICE void write_pairs(Element* row, bool has_row, int first_n, int n_count, bool can_vector, uint32_t (&words)[4]) {
  const int t = lane_index() % 4;
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool is_upper = (t & mask) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & mask) continue;
      const uint32_t got = shfl_xor(is_upper ? words[i] : words[i + mask], mask);
      if (is_upper) {
        words[i] = got;
      } else {
        words[i + mask] = got;
      }
    }
  }
  const int n = first_n + 8 * t;
  if (!has_row) return;
  if (can_vector && n + 8 <= n_count) {
    *reinterpret_cast<uint4*>(row + n) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (n + 2 * i < n_count) row[n + 2 * i] = Element{static_cast<uint16_t>(words[i])};
    if (n + 2 * i + 1 < n_count) row[n + 2 * i + 1] = Element{static_cast<uint16_t>(words[i] >> 16)};
  }
}

// Columns n and n + 1 of a row.
FS_DEVICE void write_floats(float* row, int n, int n_count, bool can_vector, float first, float second) {
  if (can_vector && n + 1 < n_count) {
    *reinterpret_cast<float2*>(row + n) = make_float2(first, second);
    return;
  }
  if (n < n_count) row[n] = first;
  if (n + 1 < n_count) row[n + 1] = second;
}

// Launches ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kNotForThisKernel = int64_t{1} << 40;  // bytes of shared memory that no device has

FS_HOST_DEVICE inline int widest(const ChainArgs& args) {
  int width = 0;
  for (int i = 0; i < args.count; ++i) {
    if (args.layers[i].k > width) width = args.layers[i].k;
    if (args.layers[i].n > width) width = args.layers[i].n;
  }
  return width;
}

inline int64_t tiles_of(const ChainArgs& args, int tile_rows) { return (args.rows + tile_rows - 1) / tile_rows; }

// One block a tile; more tiles than a grid is wide go on in y.
inline Grid grid_of_tiles(int64_t tiles) {
  constexpr int64_t kMostX = 1 << 30;
  if (tiles <= kMostX) return {static_cast<unsigned>(tiles)};
  return {static_cast<unsigned>(kMostX), static_cast<unsigned>((tiles + kMostX - 1) / kMostX)};
}
FS_DEVICE int64_t tile_of_block() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

}  // namespace fastseq::cuda
