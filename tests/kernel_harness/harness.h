// What all checks of the harness share: comparisons, random values, memory, and the checks themselves, by the file they are in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace fastseq::harness {

using namespace fastseq::cpu;

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kRounding = 0x1p-24;  // of one float operation, relative

// --- comparisons: harness.cpp -----------------------------------------------------------------------------------------

extern int64_t comparisons, failures;

void fail(const std::string& what);
void expect(bool is_so, const std::string& what);
void expect_same(const std::vector<float>& got, const std::vector<float>& wanted, const std::string& what);
bool is_close(float value, double wanted, double error);

// How far a float sum of `terms` products may be off, relative to the sum of their magnitudes.
double sum_error(int64_t terms);

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// What lies in memory that a kernel has not written: a NaN that no arithmetic makes.
inline float untouched() {
  const uint32_t pattern = 0x7fc0dead;
  float result;
  std::memcpy(&result, &pattern, sizeof result);
  return result;
}

// --- values and memory ------------------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  bool coin() { return below(2) == 1; }
  float value() { return static_cast<float>(static_cast<double>(engine_()) / 0x1p31 - 1); }  // in [-1, 1)
  std::vector<float> values(int64_t count) {
    std::vector<float> result(static_cast<size_t>(count));
    for (float& v : result) v = value();
    return result;
  }

 private:
  std::mt19937 engine_;
};

// Exactly `count` floats at a multiple of 64 bytes, so that a sanitizer sees the first access behind them.
class Panels {
 public:
  explicit Panels(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(count) * sizeof(float))) throw std::bad_alloc();
    data_.reset(static_cast<float*>(memory));
    std::fill(data_.get(), data_.get() + count, 0.0f);
  }
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> data_;
};

// --- the checks of one instruction set --------------------------------------------------------------------------------

// A table of a KernelSet, and limits.
using Limits = int[kMaxVectors + 1];
using Products = ProductLoop[kMaxVectors + 1][kMaxRows + 1];

// tiles.cpp
void check_tiles(const KernelSet& set, const TileTable& table, Random& random);
void check_bf16_tiles(const KernelSet& set, const Bf16Tiles& tiles, Random& random);
// in_place.cpp
void check_in_place(const KernelSet& set, TileLoop smallest, const InPlaceLoop (&few)[kMaxInPlaceRows + 1], int few_rows,
                    const InPlaceTileLoop (&tiles)[kMaxVectors + 1], const Limits& max_rows, Random& random);
// winograd.cpp
void check_products(const KernelSet& set, const Products& product, const Limits& product_rows, Random& random);
void check_winograd_input(const KernelSet& set, WinogradInput kernel, bool has_few_channels, Random& random);
void check_winograd_outputs(const KernelSet& set, const WinogradOutput (&output)[2][2],
                            const WinogradOutput (&small_output)[2][kMostSmallChannels + 1], Random& random);
// rows.cpp
void check_plane_row(const KernelSet& set, const PlaneRow (&plane_row)[2], Random& random);
void check_blend_row(const KernelSet& set, BlendRow blend_row, Random& random);
void check_scale_rows(const KernelSet& set, ScaleRows scale_rows, Random& random);
void check_pool_row(const KernelSet& set, PoolRow pool_row, const PoolRow (&average_row)[2], Random& random);
void check_depthwise_rows(const KernelSet& set, DepthwiseRows depthwise_rows, Random& random);
// statistics.cpp
void check_softmax_rows(const KernelSet& set, const SoftmaxRows (&softmax_rows)[2], Random& random);
void check_layer_norm_rows(const KernelSet& set, LayerNormRows layer_norm_rows, Random& random);
void check_centered_rows(const KernelSet& set, CenteredRows centered_rows, Random& random);
void check_channel_moments(const KernelSet& set, ChannelMoments channel_moments, Random& random);
// activations.cpp
double activation_value(Activation kind, double a, double b, double x);  // a PReLU's a is its slope
void check_activations(const KernelSet& set, const ActivationLoop (&activation)[kActivations], Random& random);
// conversions.cpp
using Conversions = ConvertLoop[kStorages];
uint16_t narrowed(Storage storage, float value);  // by definition, bit for bit but for NaN, of which there is one
float widened(Storage storage, uint16_t value);
double rounding_error(Storage storage, double value);  // how far the nearest number of the type may be
void check_conversions(const KernelSet& set, const Conversions& widen, const Conversions& narrow,
                       const ActivationLoop (&round)[kStorages], Random& random);
// utilities.cpp
void check_transpose(const KernelSet& set, Transpose transpose, Random& random);
void check_fingerprint(const KernelSet& set, Fingerprint fingerprint, Random& random);
void check_fingerprint_sample(const KernelSet& set, Fingerprint fingerprint, Random& random);
void check_fma_probe(const KernelSet& set, FmaProbe fma_probe);
// plans.cpp
void check_kernel_list(const KernelSet& set, const Bf16Tiles* bf16 = nullptr);
void check_plans(const KernelSet& set, const std::string& forced, Storage storage = Storage::kF32, const Bf16Tiles* bf16 = nullptr);

}  // namespace fastseq::harness
