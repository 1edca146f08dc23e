// The AVX-512 tiles compiled for the baseline, so that a machine without AVX-512 can still test their logic, tails and tables.
// Slow by design and never chosen unless FASTSEQ_ISA=emulated512 asks for it.
#include <type_traits>

#include "kernels/cpu/kernels.h"

// Values of this type cross no translation unit, so the ABI note about 64-byte vectors does not apply.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC optimize("O1")

namespace fastseq::cpu {
namespace {
namespace emulated512 {

constexpr char kIsa[] = "emulated512", kBf16Isa[] = "emulated512", kAmxIsa[] = "emulated_amx";
constexpr double kBf16Speed = 1.9, kAmxSpeed = 6;  // those of what is emulated

#include "kernels/cpu/limits_512.inl.h"
#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(64)));
// The products of the low halves.
static FASTSEQ_INLINE HalfWords multiply_low(HalfWords a, HalfWords b) { return (a & 0xffffffffull) * (b & 0xffffffffull); }

#include "kernels/cpu/kernel_set.inl.h"

struct PairProduct {
  static constexpr bool kScales = true;
  static FASTSEQ_INLINE Vec spread(const float* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return reinterpret_cast<Vec>(Bits{} + pair);
  }
  static FASTSEQ_INLINE Vec add(Vec sum, Vec x, Vec weight) {
    const Bits a = reinterpret_cast<Bits>(x), b = reinterpret_cast<Bits>(weight);
    sum = sum + reinterpret_cast<Vec>(a & 0xffff0000u) * reinterpret_cast<Vec>(b & 0xffff0000u);
    return sum + reinterpret_cast<Vec>(a << 16) * reinterpret_cast<Vec>(b << 16);
  }
};

#include "kernels/cpu/bf16_tiles.inl.h"

static FASTSEQ_INLINE Vec load_lanes(const float* p, int lanes) {
  Vec v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(lanes) * sizeof *p);
  return v;
}

// One tile or two, in both shapes of the table; each height is compiled anew, which takes long with sanitizers.
constexpr int kAmxRows = 20;

// As isa_amx_bf16.cpp's.
class MatrixUnit {
 public:
  static constexpr bool kScales = true;
  MatrixUnit(int first, int second) : rows_{first, first, second, second, first, second, kLanes, kLanes} {}

  template <int kTile>
  void zero() {
    for (Vec& row : tiles_[kTile]) row = Vec{};
  }
  template <int kTile>
  void load(const float* src, int64_t stride) {
    for (int i = 0; i < rows_[kTile]; ++i) tiles_[kTile][i] = emulated512::load(src + i * stride);
  }
  template <int kTile>
  void store(float* dst, int64_t stride) {
    for (int i = 0; i < rows_[kTile]; ++i) emulated512::store(dst + i * stride, tiles_[kTile][i]);
  }
  template <int kSums, int kSource, int kWeights>
  void add_product() {
    for (int i = 0; i < rows_[kSums]; ++i) {
      Vec odd = {}, even = {};
      for (int k = 0; k < kLanes; ++k) {
        const Bits a = Bits{} + reinterpret_cast<Bits>(tiles_[kSource][i])[k];
        const Bits b = reinterpret_cast<Bits>(tiles_[kWeights][k]);
        odd = odd + reinterpret_cast<Vec>(a & 0xffff0000u) * reinterpret_cast<Vec>(b & 0xffff0000u);
        even = even + reinterpret_cast<Vec>(a << 16) * reinterpret_cast<Vec>(b << 16);
      }
      tiles_[kSums][i] = tiles_[kSums][i] + (even + odd);
    }
  }

 private:
  int rows_[8];
  Vec tiles_[8][kLanes];
};

#include "kernels/cpu/amx_tiles.inl.h"

}  // namespace emulated512
}  // namespace

constexpr KernelSet kEmulated512Kernels = emulated512::make_kernel_set();
const KernelSet& kernels_emulated512() { return kEmulated512Kernels; }
constexpr Bf16Tiles kEmulated512Bf16Tiles = emulated512::make_bf16_tiles();
const Bf16Tiles& bf16_tiles_emulated512() { return kEmulated512Bf16Tiles; }
constexpr Bf16Tiles kEmulatedAmxTiles = emulated512::make_amx_tiles();
const Bf16Tiles& bf16_tiles_emulated_amx() { return kEmulatedAmxTiles; }

}  // namespace fastseq::cpu
