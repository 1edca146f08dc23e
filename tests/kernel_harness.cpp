// The CPU kernels and plans by themselves, without Python and torch, on whatever machine this was compiled for: each kernel of
// each instruction set against double precision, then whole plans. Returns 0, or says what is wrong.
// A kernel that this file does not know is an error: a new member of KernelSet does not compile in check_isa, and a new op in
// kernel_rows() is named at run time.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "plan/pack.h"
#include "plan/plan.h"

namespace {

using namespace fastseq;
using namespace fastseq::cpu;

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kRounding = 0x1p-24;  // of one float operation, relative
// The plan's promise: no chain of additions is longer than a partial sum, and then come the partial sums.
constexpr int64_t kLongestPartialSum = 191, kShortestPartialSum = 64;

int64_t comparisons = 0, failures = 0;

void fail(const std::string& what) {
  constexpr int kShown = 20;
  if (++failures <= kShown) std::fprintf(stderr, "wrong: %s\n", what.c_str());
  if (failures == kShown) std::fprintf(stderr, "(no more are shown)\n");
}

void expect(bool is_so, const std::string& what) {
  ++comparisons;
  if (!is_so) fail(what);
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// What lies in memory that a kernel has not written: a NaN that no arithmetic makes.
float untouched() {
  const uint32_t pattern = 0x7fc0dead;
  float result;
  std::memcpy(&result, &pattern, sizeof result);
  return result;
}

bool is_same(float a, float b) {
  return bits(a) == bits(b) || (std::isnan(a) && std::isnan(b) && bits(a) != bits(untouched()) && bits(b) != bits(untouched()));
}

bool is_close(float value, double wanted, double error) {
  if (std::isnan(wanted)) return std::isnan(value) && bits(value) != bits(untouched());
  if (std::isinf(wanted)) return value == wanted;
  return std::fabs(value - wanted) <= error;
}

void expect_same(const std::vector<float>& got, const std::vector<float>& wanted, const std::string& what) {
  comparisons += static_cast<int64_t>(wanted.size());
  if (got.size() != wanted.size()) return fail(what + ": another size");
  for (size_t i = 0; i < got.size(); ++i)
    if (!is_same(got[i], wanted[i])) return fail(what + text(": [%zu] is %.9g, not %.9g", i, got[i], wanted[i]));
}

// How far a float sum of `terms` products may be off, relative to the sum of their magnitudes.
double sum_error(int64_t terms) {
  return kRounding * static_cast<double>(std::min(terms, kLongestPartialSum) + terms / kShortestPartialSum + 2);
}

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

// --- register tiles ---------------------------------------------------------------------------------------------------

// Rows of a source, read through offsets and runs, times a matrix of weights: what every tile computes a piece of.
struct Problem {
  static constexpr int64_t kRows = 3 * kMaxRows;
  int64_t lanes, width, depth = 0;
  std::vector<Run> runs;
  std::vector<float> src, weight, bias;  // weight[k][width]
  std::vector<int32_t> src_offset;
  std::vector<double> sum, error;  // in double precision, bias included
  std::vector<float> result;       // as the smallest tile computes it

  Problem(const KernelSet& set, const std::vector<int>& lengths, bool has_special, Random& random)
      : lanes(set.lanes), width(kMaxVectors * kMaxPanels * set.lanes) {
    int64_t offset = random.below(3), end = 0;
    for (size_t r = 0; r < lengths.size(); ++r) {
      const int length = std::abs(lengths[r]);  // a negative one ends a partial sum
      runs.push_back({static_cast<int32_t>(offset), length, lengths[r] < 0});
      depth += length, end = offset + length;
      offset = end + random.below(4);
    }
    for (int64_t i = 0; i < kRows; ++i) src_offset.push_back(static_cast<int32_t>(random.below(40)));
    src = random.values(*std::max_element(src_offset.begin(), src_offset.end()) + end);
    if (has_special)
      for (float v : {kNan, kInf, -kInf, -0.0f}) src[static_cast<size_t>(random.below(static_cast<int64_t>(src.size())))] = v;
    weight = random.values(depth * width), bias = random.values(width);
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t lane = 0; lane < width; ++lane) {
        double value = bias[lane], magnitude = std::fabs(value);
        int64_t k = 0;
        for (const Run& run : runs)
          for (int32_t n = 0; n < run.length; ++n, ++k) {
            const double product = static_cast<double>(src[src_offset[i] + run.offset + n]) * weight[k * width + lane];
            value += product, magnitude += std::fabs(product);
          }
        sum.push_back(value), error.push_back(magnitude * sum_error(depth));
      }
  }

  // Panels of `vectors` vectors, one behind the other.
  Panels pack(int64_t vectors, int64_t panels) const {
    const int64_t wide = vectors * lanes;
    Panels packed(panels * depth * wide);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t k = 0; k < depth; ++k) std::copy_n(&weight[k * width + p * wide], wide, packed.data() + (p * depth + k) * wide);
    return packed;
  }

  float row_max(int64_t row, int64_t lane) const {
    float max = result[row * width + lane];
    for (int64_t i = row + 1; i < row + 4; ++i) {
      const float value = result[i * width + lane];
      if (value > max || std::isnan(value)) max = value;
    }
    return max;
  }
};

// One call of a tile loop: `tiles` tiles of `rows` results over `panels` panels, compared with the smallest tile's bits.
void check_tile(const Problem& problem, TileLoop loop, bool pools, int64_t rows, int64_t vectors, int64_t panels, int64_t tiles,
                int64_t last_lanes, float lower, Random& random, const std::string& what) {
  const int64_t wide = vectors * problem.lanes, stored = (panels - 1) * wide + last_lanes, count = rows * tiles;
  const Panels weight = problem.pack(vectors, panels);
  std::vector<int32_t> dst_offset;
  for (int64_t i = 0, at = random.below(5); i < count; ++i, at += stored + random.below(3))
    dst_offset.push_back(static_cast<int32_t>(at));
  std::vector<float> dst(static_cast<size_t>(dst_offset.back() + stored), untouched()), wanted = dst;
  for (int64_t i = count - 1; i > 0; --i) std::swap(dst_offset[i], dst_offset[random.below(i + 1)]);

  TileJob job = {};
  job.src = problem.src.data(), job.src_offset = problem.src_offset.data();
  job.runs = problem.runs.data(), job.run_count = static_cast<int32_t>(problem.runs.size());
  job.weight = weight.data(), job.panel_stride = problem.depth * wide;
  const std::vector<float> bias(problem.bias.begin(), problem.bias.begin() + panels * wide);
  job.bias = bias.data(), job.lower = lower;
  job.dst = dst.data(), job.dst_offset = dst_offset.data(), job.lanes = static_cast<int32_t>(last_lanes);
  loop(job, tiles);

  for (int64_t i = 0; i < count; ++i)
    for (int64_t lane = 0; lane < stored; ++lane) {
      const float value = pools ? problem.row_max(4 * i, lane) : problem.result[i * problem.width + lane];
      wanted[dst_offset[i] + lane] = value < lower ? lower : value;
    }
  expect_same(dst, wanted,
              what + text(", depth %d in %zu runs, %d tiles, %d lanes, lower %g", static_cast<int>(problem.depth),
                          problem.runs.size(), static_cast<int>(tiles), static_cast<int>(stored), static_cast<double>(lower)));
}

// The smallest tile, which the others are compared with, against double precision.
void check_smallest_tile(Problem& problem, TileLoop loop, const std::string& what) {
  problem.result.assign(static_cast<size_t>(Problem::kRows * problem.width), untouched());
  const Panels weight = problem.pack(1, kMaxVectors * kMaxPanels);
  std::vector<int32_t> dst_offset;
  for (int64_t i = 0; i < Problem::kRows; ++i) dst_offset.push_back(static_cast<int32_t>(i * problem.width));
  for (int64_t p = 0; p < kMaxVectors * kMaxPanels; ++p) {
    TileJob job = {};
    job.src = problem.src.data(), job.src_offset = problem.src_offset.data();
    job.runs = problem.runs.data(), job.run_count = static_cast<int32_t>(problem.runs.size());
    job.weight = weight.data() + p * problem.depth * problem.lanes;
    job.bias = &problem.bias[p * problem.lanes], job.lower = -kInf;
    job.dst = problem.result.data() + p * problem.lanes, job.dst_offset = dst_offset.data();
    job.lanes = static_cast<int32_t>(problem.lanes);
    loop(job, Problem::kRows);
  }
  comparisons += static_cast<int64_t>(problem.result.size());
  for (size_t i = 0; i < problem.result.size(); ++i)
    if (!is_close(problem.result[i], problem.sum[i], problem.error[i]))
      return fail(what + text(": row %zu, lane %zu of depth %d is %.9g, not %.9g +- %.2g", i / problem.width, i % problem.width,
                              static_cast<int>(problem.depth), problem.result[i], problem.sum[i], problem.error[i]));
}

// --- Winograd ---------------------------------------------------------------------------------------------------------

// In double precision, from the points alone: rows of B^T are the polynomials that vanish at the other points, those of A^T powers.
struct Transforms {
  double input[kWinogradPatch][kWinogradPatch] = {}, output[4][kWinogradPatch] = {};

  explicit Transforms(int out) {
    const double points[] = {0, std::sqrt(0.5), -std::sqrt(0.5), std::sqrt(2.0), -std::sqrt(2.0)};
    for (int p = 0; p < kWinogradPatch; ++p) {
      input[p][0] = 1;
      for (int other = 0, degree = 0; other < 5; ++other) {
        if (other == p) continue;
        ++degree;
        for (int i = degree; i >= 0; --i) input[p][i] = (i ? input[p][i - 1] : 0) - points[other] * input[p][i];
      }
      for (int k = 0; k < out; ++k) output[k][p] = p < 5 ? std::pow(points[p], k) : k == out - 1;
    }
  }
};

// Roundings on the way through a transform of both sides, and of its constants.
constexpr double kTransformError = 24 * kRounding;

// V = B^T d B of one patch of one channel, or how much its terms add up to.
void transform_input(const Transforms& t, const double (&d)[6][6], double (&v)[6][6], double (&magnitude)[6][6]) {
  for (int p = 0; p < 6; ++p)
    for (int q = 0; q < 6; ++q) {
      v[p][q] = magnitude[p][q] = 0;
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j) {
          const double term = t.input[p][i] * d[i][j] * t.input[q][j];
          v[p][q] += term, magnitude[p][q] += std::fabs(term);
        }
    }
}

void check_winograd_input(const KernelSet& set, WinogradInput kernel, bool has_few_channels, Random& random) {
  const Transforms transforms(4);
  for (int channels : {1, set.lanes, 2 * set.lanes + 1}) {
    const int wide = has_few_channels ? 4 : (channels + set.lanes - 1) / set.lanes * set.lanes, tiles = 3;
    WinogradInputJob job = {};
    job.src_pitch = wide + random.below(3), job.src_row_stride = 9 * job.src_pitch + random.below(3);
    job.channels = has_few_channels ? 4 : channels, job.tiles = tiles;
    job.dst_tile_stride = has_few_channels ? kWinogradPoints * 4 + 4 : wide + 5,
    job.dst_point_stride = tiles * job.dst_tile_stride + 3;
    const std::vector<float> src = random.values(5 * job.src_row_stride + (tiles + 5) * job.src_pitch + wide);
    const float* patches[tiles];
    for (int t = 0; t < tiles; ++t) patches[t] = src.data() + t * job.src_pitch;
    job.src = patches;
    const int64_t size = has_few_channels ? (tiles - 1) * job.dst_tile_stride + kWinogradPoints * 4
                                          : (kWinogradPoints - 1) * job.dst_point_stride + (tiles - 1) * job.dst_tile_stride + wide;
    std::vector<float> dst(static_cast<size_t>(size), untouched());
    job.dst = dst.data();
    kernel(job);
    for (int t = 0; t < tiles; ++t)
      for (int c = 0; c < wide; ++c) {
        double d[6][6], v[6][6], magnitude[6][6];
        for (int i = 0; i < 6; ++i)
          for (int j = 0; j < 6; ++j) d[i][j] = patches[t][i * job.src_row_stride + j * job.src_pitch + c];
        transform_input(transforms, d, v, magnitude);
        for (int p = 0; p < kWinogradPoints; ++p) {
          float& got = dst[t * job.dst_tile_stride + c + p * (has_few_channels ? 4 : job.dst_point_stride)];
          expect(is_close(got, v[p / 6][p % 6], kTransformError * magnitude[p / 6][p % 6]),
                 text("%s winograd input, few channels %d: point %d is %.9g, not %.9g", set.isa, has_few_channels, p, got,
                      v[p / 6][p % 6]));
          got = untouched();
        }
      }
    expect_same(dst, std::vector<float>(dst.size(), untouched()), text("%s winograd input writes elsewhere", set.isa));
  }
}

// m[point][tile][lane], values at the points, to pixels. few: the channels of the variant that makes m itself, 0 for the other.
void check_winograd_output(const KernelSet& set, WinogradOutput kernel, int out, bool pools, int few, bool has_special,
                           Random& random) {
  const Transforms transforms(out);
  const int side = pools ? out / 2 : out, tiles = 3, lanes = set.lanes, wide = 2 * lanes, first_lane = 3;
  const int stored = static_cast<int>(1 + random.below(wide)), computed = (stored + lanes - 1) / lanes * lanes;
  WinogradOutputJob job = {};
  job.tiles = tiles, job.lanes = stored, job.first_lane = first_lane, job.lower = random.coin() ? 0.0f : -kInf;
  job.src_tile_stride = few ? kWinogradPoints * 4 + 4 : wide + 1, job.src_point_stride = tiles * job.src_tile_stride + 2;
  std::vector<float> src = random.values(few ? tiles * job.src_tile_stride : kWinogradPoints * job.src_point_stride);
  if (has_special) src[static_cast<size_t>(random.below(40))] = random.coin() ? kNan : kInf;
  const std::vector<float> bias = random.values(wide), weights = random.values(kWinogradPoints * wide * std::max(1, few));
  Panels weight(static_cast<int64_t>(weights.size()));
  std::copy(weights.begin(), weights.end(), weight.data());
  job.src = src.data(), job.weight = weight.data(), job.bias = bias.data();
  job.dst_pitch = first_lane + stored + 2, job.dst_row_stride = tiles * side * job.dst_pitch + 1;
  std::vector<float> dst(static_cast<size_t>(side * job.dst_row_stride), untouched());
  std::vector<float> poison(static_cast<size_t>(tiles * lanes)), wanted_poison = poison;
  WinogradTile places[tiles];
  for (int t = 0; t < tiles; ++t)
    places[t] = {dst.data() + t * side * job.dst_pitch, static_cast<int32_t>(t == 1 ? random.below(side) : 0),
                 static_cast<int32_t>(t == 2 ? random.below(side) : 0)};
  job.tile = places, job.poison = poison.data();
  kernel(job);

  const std::string what = text("%s winograd output of %d, pools %d, few channels %d", set.isa, out, pools, few);
  for (int t = 0; t < tiles; ++t)
    for (int lane = 0; lane < computed; ++lane) {
      double m[6][6], size[6][6], y[4][4] = {}, magnitude[4][4] = {};
      for (int p = 0; p < kWinogradPoints; ++p) {
        double& value = m[p / 6][p % 6];
        value = few ? 0 : src[p * job.src_point_stride + t * job.src_tile_stride + lane];
        size[p / 6][p % 6] = std::fabs(value);
        for (int c = 0; c < few; ++c) {
          const double term = static_cast<double>(src[t * job.src_tile_stride + p * 4 + c]) *
                              weights[((lane / lanes * kWinogradPoints + p) * few + c) * lanes + lane % lanes];
          value += term, size[p / 6][p % 6] += std::fabs(term);
        }
      }
      bool is_finite = true;
      for (int i = 0; i < out; ++i)
        for (int j = 0; j < out; ++j) {
          for (int p = 0; p < 6; ++p)
            for (int q = 0; q < 6; ++q) {
              const double factor = transforms.output[i][p] * transforms.output[j][q];
              if (factor == 0) continue;
              y[i][j] += factor * m[p][q], magnitude[i][j] += std::fabs(factor) * size[p][q];
            }
          is_finite = is_finite && std::isfinite(y[i][j]);
        }
      if (!is_finite) wanted_poison[t * lanes + lane % lanes] = kNan;
      if (lane >= stored) continue;
      for (int i = places[t].skip_rows; i < side; ++i)
        for (int j = places[t].skip_columns; j < side; ++j) {
          double value = y[i][j], error = magnitude[i][j];
          if (pools) {
            value = std::max({y[2 * i][2 * j], y[2 * i][2 * j + 1], y[2 * i + 1][2 * j], y[2 * i + 1][2 * j + 1]});
            error = std::max({magnitude[2 * i][2 * j], magnitude[2 * i][2 * j + 1], magnitude[2 * i + 1][2 * j],
                              magnitude[2 * i + 1][2 * j + 1]});
          }
          value += bias[lane], error += std::fabs(bias[lane]);
          if (value < job.lower) value = job.lower;
          float& got = places[t].dst[i * job.dst_row_stride + j * job.dst_pitch + first_lane + lane];
          // Where a sum is not finite the tile is computed again, so only the poison counts.
          if (is_finite) expect(is_close(got, value, kTransformError * error), what + text(": %.9g, not %.9g", got, value));
          expect(bits(got) != bits(untouched()), what + " leaves out a pixel");
          got = untouched();
        }
    }
  expect_same(dst, std::vector<float>(dst.size(), untouched()), what + " writes elsewhere");
  expect_same(poison, wanted_poison, what + ": poison");
}

// dst = src * weight in chains; other heights and widths have the bits of the smallest.
void check_product(const KernelSet& set, ProductLoop smallest, ProductLoop loop, int rows, int vectors, Random& random) {
  for (int depth : {1, 7, 40, 97})
    for (int chain : {depth, 32, 8}) {
      const int blocks = static_cast<int>(1 + random.below(3)), count = blocks * rows, wide = vectors * set.lanes;
      ProductJob job = {};
      job.src_stride = depth + random.below(5), job.depth = depth, job.chain = chain, job.group = 3 * chain;
      const std::vector<float> src = random.values((count - 1) * job.src_stride + depth), values = random.values(depth * wide);
      Panels weight(depth * wide);
      std::copy(values.begin(), values.end(), weight.data());
      std::vector<float> dst(static_cast<size_t>(count * wide), untouched()), wanted = dst,
                                                                              column(static_cast<size_t>(count * set.lanes));
      job.src = src.data(), job.weight = weight.data(), job.dst = dst.data();
      loop(job, blocks);
      const std::string what = text("%s product[%d rows][%d vectors], depth %d, chain %d", set.isa, rows, vectors, depth, chain);
      for (int v = 0; v < vectors; ++v) {
        Panels part(depth * set.lanes);
        for (int k = 0; k < depth; ++k) std::copy_n(&values[k * wide + v * set.lanes], set.lanes, part.data() + k * set.lanes);
        job.weight = part.data(), job.dst = column.data();
        smallest(job, count);
        for (int i = 0; i < count; ++i) std::copy_n(&column[i * set.lanes], set.lanes, &wanted[i * wide + v * set.lanes]);
      }
      expect_same(dst, wanted, what);
      for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < wide; ++lane) {
          double sum = 0, magnitude = 0;
          for (int k = 0; k < depth; ++k) {
            const double term = static_cast<double>(src[i * job.src_stride + k]) * values[k * wide + lane];
            sum += term, magnitude += std::fabs(term);
          }
          expect(is_close(dst[i * wide + lane], sum, magnitude * kRounding * (std::min(depth, chain) + depth / chain + 2)), what);
        }
    }
}

// Weights that are read where they lie: the bits of packed ones, which the smallest tile computes, for every tile of both kinds.
void check_in_place(const KernelSet& set, TileLoop smallest, const InPlaceLoop (&few)[kMaxInPlaceRows + 1], int few_rows,
                    const InPlaceTileLoop (&tiles)[kMaxVectors + 1], const int (&max_rows)[kMaxVectors + 1], Random& random) {
  for (const std::vector<int>& lengths : {std::vector<int>{1}, {37}, {kLongestRun, 64}, {128, 130, 3}, {65, 64, 64, 66}}) {
    const std::string what = text("%s in place, %zu runs", set.isa, lengths.size());
    const int64_t rows = std::max<int64_t>(kMaxInPlaceRows, 2 * kMaxVectors * set.lanes - 1), lanes = set.lanes;
    const int64_t outs = 2 * kMaxRows + 1 + random.below(2 * lanes), groups = (outs + lanes - 1) / lanes;
    std::vector<Run> runs;
    int64_t depth = 0;
    for (size_t r = 0; r < lengths.size(); depth += lengths[r++])
      runs.push_back({static_cast<int32_t>(depth), lengths[r], r + 1 < lengths.size()});
    const int64_t src_stride = depth + random.below(3), weight_stride = depth + random.below(3);
    std::vector<float> src = random.values((rows - 1) * src_stride + depth);
    const std::vector<float> weight = random.values((outs - 1) * weight_stride + depth);
    std::vector<float> bias = random.values(outs);
    if (random.coin()) src[static_cast<size_t>(random.below(static_cast<int64_t>(src.size())))] = random.coin() ? kNan : kInf;
    bias.resize(static_cast<size_t>(groups * lanes + kMaxRows));
    const float lower = random.coin() ? 0.0f : -kInf;

    std::vector<float> wanted(static_cast<size_t>(rows * outs));
    std::vector<int32_t> src_offset, dst_offset;
    for (int64_t i = 0; i < rows; ++i) {
      src_offset.push_back(static_cast<int32_t>(i * src_stride));
      dst_offset.push_back(static_cast<int32_t>(i * outs));
    }
    for (int64_t first = 0; first < outs; first += lanes) {
      Panels packed(depth * lanes);
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t n = first; n < std::min(outs, first + lanes); ++n)
          packed.data()[k * lanes + n - first] = weight[n * weight_stride + k];
      TileJob job = {};
      job.src = src.data(), job.src_offset = src_offset.data();
      job.runs = runs.data(), job.run_count = static_cast<int32_t>(runs.size());
      job.weight = packed.data(), job.bias = bias.data() + first, job.lower = lower;
      job.dst = wanted.data() + first, job.dst_offset = dst_offset.data();
      job.lanes = static_cast<int32_t>(std::min(lanes, outs - first));
      smallest(job, rows);
    }

    expect(few_rows >= 1 && few_rows <= kMaxInPlaceRows, what + ": its rows fit their table");
    for (int n = 0; n <= kMaxInPlaceRows; ++n) {
      expect((few[n] != nullptr) == (n >= 1 && n <= few_rows), what + text(": kernel of %d rows", n));
      if (!few[n]) continue;
      InPlaceJob job = {};
      job.weight = weight.data(), job.weight_stride = weight_stride, job.weight_rows = outs;
      job.src = src.data(), job.src_stride = src_stride;
      job.runs = runs.data(), job.run_count = static_cast<int32_t>(runs.size());
      job.bias = bias.data(), job.lower = lower;
      job.dst_stride = outs + random.below(3);
      std::vector<float> dst(static_cast<size_t>((n - 1) * job.dst_stride + outs), untouched()), expected = dst;
      for (int i = 0; i < n; ++i) std::copy_n(&wanted[static_cast<size_t>(i * outs)], outs, &expected[i * job.dst_stride]);
      job.dst = dst.data();
      few[n](job);
      expect_same(dst, expected, what + text(", %d rows", n));
    }

    for (int vectors = 0; vectors <= kMaxVectors; ++vectors) {
      expect((tiles[vectors] != nullptr) == (vectors > 0 && max_rows[vectors] > 0), what + text(": tile of %d vectors", vectors));
      if (!tiles[vectors]) continue;
      const int64_t width = vectors * lanes, panels = std::min<int64_t>(2, (rows + width - 1) / width);
      Panels packed(panels * depth * width), sums(panels * (outs + max_rows[vectors]) * width);
      for (int64_t i = 0; i < std::min(rows, panels * width); ++i)
        for (int64_t k = 0; k < depth; ++k) packed.data()[(i / width * depth + k) * width + i % width] = src[i * src_stride + k];
      InPlaceTileJob job = {};
      job.weight = weight.data(), job.weight_stride = weight_stride, job.weight_rows = outs;
      job.panels = static_cast<int32_t>(panels), job.panel_stride = depth * width;
      job.sums = sums.data(), job.sums_stride = (outs + max_rows[vectors]) * width;
      job.bias = bias.data(), job.lower = lower;
      // In two stretches where there are two runs.
      for (size_t first = 0, end = (runs.size() + 1) / 2; first < runs.size(); first = end, end = runs.size()) {
        job.runs = &runs[first], job.run_count = static_cast<int32_t>(end - first);
        job.panel = packed.data() + runs[first].offset * width;
        job.has_sums = first > 0, job.is_last = end == runs.size();
        tiles[vectors](job);
      }
      std::vector<float> got(wanted);
      for (int64_t i = 0; i < std::min(rows, panels * width); ++i)
        for (int64_t n = 0; n < outs; ++n)
          got[static_cast<size_t>(i * outs + n)] = sums.data()[i / width * job.sums_stride + n * width + i % width];
      expect_same(got, wanted, what + text(", tile of %d vectors", vectors));
    }
  }
}

// --- the other kernels ------------------------------------------------------------------------------------------------

void check_pool_row(const KernelSet& set, PoolRow pool_row, Random& random) {
  for (int channels : {1, set.lanes - 1, set.lanes, set.lanes + 1, 3 * set.lanes + 2})
    for (int n = 0; n < 40; ++n) {
      PoolRowJob job = {};
      job.k_w = static_cast<int32_t>(1 + random.below(4)), job.stride_w = static_cast<int32_t>(1 + random.below(3));
      job.pad_w = static_cast<int32_t>(random.below(job.k_w / 2 + 1));
      job.w_in = static_cast<int32_t>(std::max<int64_t>(1, job.k_w - job.pad_w) + random.below(9));
      job.w_out = (job.w_in + 2 * job.pad_w - job.k_w) / job.stride_w + 1;
      job.channels = channels;
      job.can_overread = random.coin();
      const int64_t room = (channels + set.lanes - 1) / set.lanes * set.lanes;
      job.src_pitch = (job.can_overread ? room : channels) + random.below(3), job.dst_pitch = channels + random.below(3);
      job.row_stride = job.w_in * job.src_pitch + random.below(5);
      const int64_t rows_kept = 1 + random.below(4), first = random.below(rows_kept);
      job.row_count = static_cast<int32_t>(1 + random.below(rows_kept));
      job.lower = random.coin() ? 0.0f : -kInf;

      std::vector<float> src = random.values(rows_kept * job.row_stride);
      for (float& v : src)
        if (random.below(20) == 0) v = random.coin() ? kNan : random.coin() ? -kInf : -0.0f;
      job.ring_begin = src.data(), job.ring_end = src.data() + rows_kept * job.row_stride;
      job.src = src.data() + first * job.row_stride;
      std::vector<float> dst(static_cast<size_t>((job.w_out - 1) * job.dst_pitch + channels), untouched()), wanted = dst;
      job.dst = dst.data();
      pool_row(job);
      for (int32_t x = 0; x < job.w_out; ++x)
        for (int c = 0; c < channels; ++c) {
          float max = -kInf;
          for (int64_t r = first; r < first + job.row_count; ++r)
            for (int32_t i = 0; i < job.k_w; ++i) {
              const int32_t at = x * job.stride_w - job.pad_w + i;
              if (at < 0 || at >= job.w_in) continue;
              const float value = src[r % rows_kept * job.row_stride + at * job.src_pitch + c];
              if (value > max || std::isnan(value)) max = value;
            }
          // Which zero of a window wins is the order's, so only their value counts.
          const float result = max < job.lower ? job.lower : max;
          wanted[x * job.dst_pitch + c] = result == 0 && dst[x * job.dst_pitch + c] == 0 ? dst[x * job.dst_pitch + c] : result;
        }
      expect_same(dst, wanted, text("%s pool_row, %d channels, window %d", set.isa, channels, job.k_w));
    }
}

// Row by row against double precision; the values around the written rows stay.
void check_plane_row(const KernelSet& set, const PlaneRow (&plane_row)[2], Random& random) {
  for (int pools = 0; pools < 2; ++pools)
    for (int n = 0; n < 60; ++n) {
      PlaneJob job = {};
      job.k_h = static_cast<int32_t>(1 + random.below(5)), job.k_w = static_cast<int32_t>(1 + random.below(5));
      job.width = static_cast<int32_t>(1 + random.below(3 * set.lanes));
      if (pools) job.width += job.width % 2;
      job.outs = static_cast<int32_t>(1 + random.below(20));
      job.lower = random.coin() ? 0.0f : -kInf;
      const int64_t written = (job.width + 2 * set.lanes - 1) / (2 * set.lanes) * 2 * set.lanes;  // before pooling
      job.src_row_stride = written + job.k_w - 1 + random.below(3);
      std::vector<float> src = random.values((job.k_h + pools) * job.src_row_stride);
      if (random.below(3) == 0)
        src[static_cast<size_t>(random.below(static_cast<int64_t>(src.size())))] = random.coin() ? kNan : kInf;
      const std::vector<float> weight = random.values(job.k_h * job.k_w * job.outs), bias = random.values(job.outs);
      job.src = src.data(), job.weight = weight.data(), job.bias = bias.data();
      job.dst_stride = written / (1 + pools) + random.below(3);
      std::vector<float> dst(static_cast<size_t>(job.outs * job.dst_stride), untouched());
      job.dst = dst.data();
      plane_row[pools](job);
      const std::string what = text("%s plane row, pool %d", set.isa, pools);
      auto sum_at = [&](int64_t row, int64_t x, int64_t out, double& scale) {
        double sum = 0;
        for (int64_t ky = 0; ky < job.k_h; ++ky)
          for (int64_t kx = 0; kx < job.k_w; ++kx) {
            const double term = static_cast<double>(src[static_cast<size_t>((row + ky) * job.src_row_stride + x + kx)]) *
                                weight[static_cast<size_t>((ky * job.k_w + kx) * job.outs + out)];
            sum += term, scale += std::abs(term);
          }
        return sum;
      };
      for (int64_t out = 0; out < job.outs; ++out)
        for (int64_t x = 0; x < job.dst_stride; ++x) {
          const float found = dst[static_cast<size_t>(out * job.dst_stride + x)];
          if (x >= written / (1 + pools)) expect(bits(found) == bits(untouched()), what + " writes too far");
          if (x >= job.width / (1 + pools)) continue;
          double scale = std::abs(bias[static_cast<size_t>(out)]), wanted = -kInf;
          bool has_nan = false;
          for (int64_t i = 0; i < 1 + pools; ++i)
            for (int64_t j = 0; j < 1 + pools; ++j) {
              const double sum = sum_at(i, x * (1 + pools) + j, out, scale);
              has_nan = has_nan || std::isnan(sum);
              wanted = std::max(wanted, sum);
            }
          wanted = has_nan ? kNan : wanted + bias[static_cast<size_t>(out)];
          if (!std::isnan(wanted) && wanted < job.lower) wanted = job.lower;
          if (std::isnan(wanted)) {
            expect(std::isnan(found), what + " loses NaN");
          } else if (std::isinf(wanted)) {
            expect(found == wanted, what + " loses an infinity");
          } else {
            expect(std::abs(found - wanted) <= (job.k_h * job.k_w + 2) * kRounding * scale, what + " is off");
          }
        }
    }
}

void check_transpose(const KernelSet& set, Transpose transpose, Random& random) {
  for (int64_t rows = 1; rows <= 20; ++rows)
    for (int64_t cols = 1; cols <= 20; ++cols)
      for (bool can_overread : {false, true}) {
        const int64_t room = can_overread ? (rows + 7) / 8 * 8 : rows;
        const int64_t src_stride = rows == 1 && random.coin() && !can_overread ? 1 : room + random.below(3);
        const int64_t dst_stride = cols + random.below(3);
        const std::vector<float> src = random.values((cols - 1) * src_stride + room);
        std::vector<float> dst(static_cast<size_t>((rows - 1) * dst_stride + cols), untouched()), wanted = dst;
        transpose(src.data(), src_stride, dst.data(), dst_stride, rows, cols, can_overread);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < cols; ++j) wanted[i * dst_stride + j] = src[j * src_stride + i];
        expect_same(dst, wanted, text("%s transpose to %dx%d", set.isa, static_cast<int>(rows), static_cast<int>(cols)));
      }
}

void check_fingerprint(const KernelSet& set, Fingerprint fingerprint, Random& random) {
  for (int64_t count : {0, 1, 7, 8, 63, 64, 65, 128, 131, 300}) {
    const std::string what = text("%s fingerprint of %d floats", set.isa, static_cast<int>(count));
    std::vector<float> src = random.values(count);
    const uint64_t usual = fingerprint(src.data(), count);
    expect(fingerprint(src.data(), count) == usual, what + " is not the same again");
    for (int64_t shift = 1; shift < 4; ++shift) {
      std::vector<float> moved(static_cast<size_t>(count + shift));
      std::copy(src.begin(), src.end(), moved.begin() + shift);
      expect(fingerprint(moved.data() + shift, count) == usual, what + " depends on the alignment");
    }
    if (count > 0) expect(fingerprint(src.data(), count - 1) != usual, what + " does not depend on their number");
    for (int64_t i = 0; i < count; ++i) {
      const float kept = src[i];
      uint32_t changed = bits(kept) ^ (1u << random.below(32));
      std::memcpy(&src[i], &changed, sizeof changed);
      expect(fingerprint(src.data(), count) != usual, what + " misses a bit");
      src[i] = -kept;
      expect(fingerprint(src.data(), count) != usual, what + " misses a sign");
      src[i] = kept;
      const int64_t other = random.below(count);
      if (bits(src[other]) == bits(kept)) continue;
      std::swap(src[i], src[other]);
      expect(fingerprint(src.data(), count) != usual, what + " misses an exchange");
      std::swap(src[i], src[other]);
    }
  }
}

// Every float of every line it says to read counts, and no other.
void check_fingerprint_sample(const KernelSet& set, Fingerprint fingerprint, Random& random) {
  const int64_t count = 20011;
  std::vector<float> src = random.values(count);
  std::vector<bool> is_read(static_cast<size_t>(count));
  for (int64_t line = 0; line < kSampleLines; ++line)
    for (int64_t i = 0; i < kLineFloats; ++i)
      is_read[static_cast<size_t>((count - kLineFloats) * line / (kSampleLines - 1) + i)] = true;
  const std::string what = text("%s sampled fingerprint", set.isa);
  const uint64_t usual = fingerprint(src.data(), count);
  expect(is_read.front() && is_read.back(), what + " covers both ends");
  for (int64_t i = 0; i < count; i += i + 40 < count ? 1 + random.below(3) : 1) {
    const float kept = src[static_cast<size_t>(i)];
    src[static_cast<size_t>(i)] = -kept;
    expect((fingerprint(src.data(), count) != usual) == is_read[static_cast<size_t>(i)],
           what + text(" at %d", static_cast<int>(i)));
    src[static_cast<size_t>(i)] = kept;
  }
  expect(fingerprint(src.data(), count) == usual, what + " is not the same again");
}

void check_fma_probe(const KernelSet& set, FmaProbe fma_probe) {
  float sink = 1;
  const double flops = fma_probe(10, &sink);
  expect(flops > 0 && fma_probe(20, &sink) == 2 * flops, text("%s fma_probe counts its operations", set.isa));
  expect(std::isfinite(sink), text("%s fma_probe stays finite", set.isa));
}

// --- plans ------------------------------------------------------------------------------------------------------------

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
  std::vector<float> weight, bias;
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
  Network& relu() {
    layers_.back().spec.has_relu = true;
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
      if (spec.has_relu)
        for (double& v : x.value) v = v < 0 ? 0 : v;
      if (spec.has_pool || spec.op == Op::kMaxPool2d) x = max_pool(x, spec.pool);
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

// `images` images of C planes in the order of their pixels.
std::vector<float> to_nhwc(const std::vector<float>& src, int64_t images, int64_t channels, int64_t pixels) {
  std::vector<float> dst(src.size());
  for (int64_t n = 0; n < images; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < pixels; ++p) dst[(n * pixels + p) * channels + c] = src[(n * channels + c) * pixels + p];
  return dst;
}

constexpr int64_t kImages = 5;

std::vector<float> make_input(const Network& network, Random& random) {
  std::vector<float> src = random.values(kImages * network.elements());
  if (network.has_special())
    for (float v : {kNan, kInf, -kInf, -0.0f, kInf, kNan}) src[random.below(static_cast<int64_t>(src.size()))] = v;
  return src;
}

std::vector<float> run(const Plan& plan, const Network& network, const std::vector<float>& src, int64_t first, int64_t batch,
                       int threads) {
  const OutputSpec& output = plan.output();
  const int64_t elements = output.is_spatial ? output.channels * output.h * output.w : output.features;
  const int64_t stride = static_cast<int64_t>(src.size()) / kImages;
  // A copy of exactly the images that are asked for.
  const std::vector<float> images(src.begin() + first * stride, src.begin() + (first + batch) * stride);
  std::vector<float> dst(static_cast<size_t>(batch * elements), untouched());
  const std::vector<StepSpec> steps = network.steps();
  std::vector<const float*> weights;
  for (size_t step : plan.in_place()) weights.push_back(steps[step].weight);
  plan.run(images.data(), dst.data(), batch, threads, weights.data());
  return dst;
}

void check_values(const Network& network, const std::vector<float>& src, const std::vector<float>& got, const std::string& what) {
  const size_t per_image = got.size() / kImages;
  for (int64_t n = 0; n < kImages; ++n) {
    const Tensor wanted = network.reference(src.data() + n * network.elements());
    if (wanted.value.size() != per_image) return fail(what + ": another number of elements");
    comparisons += static_cast<int64_t>(per_image);
    for (size_t i = 0; i < per_image; ++i)
      if (const float value = got[n * per_image + i]; !is_close(value, wanted.value[i], wanted.error[i]))
        return fail(what + text(": image %d, [%zu] is %.9g, not %.9g +- %.2g", static_cast<int>(n), i, value, wanted.value[i],
                                wanted.error[i]));
  }
}

// Whole networks: values, and the same bits for every layout, batch size and number of threads. `forced`: an op for all steps that
// it can do, or "" for none but what the direct kernels do.
void check_plans(const KernelSet& set, const std::string& forced) {
  Random random(11);
  for (const Network& network : networks()) {
    const std::string what = std::string(set.isa) + ", " + network.name() + (forced.empty() ? "" : ", ") + forced;
    const std::vector<float> src = make_input(network, random);
    const std::vector<StepSpec> steps = network.steps();
    PackCache cache;
    std::vector<float> usual;
    for (bool is_nhwc : {false, true})
      for (bool to_nhwc_output : {false, true}) {
        if (is_nhwc && !network.input().is_spatial) continue;
        InputSpec input = network.input();
        input.is_nhwc = is_nhwc;
        PlanOptions options;
        options.kernels = &set, options.output_is_nhwc = to_nhwc_output, options.allows_winograd = !forced.empty();
        options.forced_kernel = forced;
        const PlanPtr plan = Plan::build(input, steps, options, cache);
        const OutputSpec& output = plan->output();
        if (to_nhwc_output && !output.is_spatial) continue;
        const std::vector<float> in = is_nhwc ? to_nhwc(src, kImages, input.channels, input.h * input.w) : src;
        const std::string how = what + (is_nhwc ? ", NHWC" : ", NCHW") + (to_nhwc_output ? " to NHWC" : " to NCHW");

        const std::vector<float> whole = run(*plan, network, in, 0, kImages, 1);
        if (usual.empty()) {
          usual = whole;
          check_values(network, src, usual, how);
        }
        expect_same(whole, to_nhwc_output ? to_nhwc(usual, kImages, output.channels, output.h * output.w) : usual, how);
        const size_t per_image = whole.size() / kImages;
        for (int threads : {1, 2})
          for (int64_t batch = 1; batch <= kImages; ++batch) {
            if ((is_nhwc || to_nhwc_output) && batch != threads + 1) continue;  // all of them for one layout is enough
            const int64_t first = random.below(kImages - batch + 1);
            const std::vector<float> part(whole.begin() + first * per_image, whole.begin() + (first + batch) * per_image);
            expect_same(run(*plan, network, in, first, batch, threads), part,
                        how + text(", batch %d, %d threads", static_cast<int>(batch), threads));
          }
        if (is_nhwc || to_nhwc_output) continue;
        std::vector<float> other;  // of a second caller at the same time
        std::thread caller([&] { other = run(*plan, network, in, 0, kImages, 2); });
        const std::vector<float> own = run(*plan, network, in, 0, kImages, 2);
        caller.join();
        expect_same(own, whole, how + ", beside another caller");
        expect_same(other, whole, how + ", a second caller");
      }
  }
}

// A network that each op of the kernel list computes, with `channels` outputs.
Network network_of(const std::string& op, int64_t channels) {
  if (op == "conv2d") return Network(op, 5, 6, 9).conv(channels, 3, 3).relu();
  if (op == "conv2d_plane") return Network(op, 1, 9, 10).conv(channels, 3, 3, 1, 1).relu();
  if (op == "conv2d_winograd") return Network(op, 9, 9, 10).conv(channels, 3, 3, 1, 1).relu();
  if (op == "conv2d_maxpool2d") return Network(op, 5, 8, 9).conv(channels, 3, 3).relu().pool(2, 2);
  if (op == "linear" || op == "linear_in_place") return Network(op, 150).linear(channels);
  if (op == "maxpool2d") return Network(op, channels, 7, 7).pool(3, 2, 1);
  throw std::runtime_error("op '" + op +
                           "' of kernel_rows() is not known to " __FILE__ ": give it a network and its kernels a check");
}

// Every entry of the kernel list, forced: it is what the plan says it uses, and the values are right.
void check_kernel_list(const KernelSet& set) {
  Random random(13);
  for (const KernelRow& row : kernel_rows()) {
    if (row.isa != set.isa) continue;
    const int64_t width = row.vectors * set.lanes;
    for (int64_t channels : {width - 1, width, 2 * width + 1}) {
      const Network network = network_of(row.op, std::max<int64_t>(1, channels));
      const std::vector<float> src = make_input(network, random);
      PlanOptions options;
      options.kernels = &set, options.forced_kernel = row.name;
      PackCache cache;
      const PlanPtr plan = Plan::build(network.input(), network.steps(), options, cache);
      const std::string used = plan->describe().front().kernel;
      if (channels <= width && channels > width - set.lanes)
        expect(used == row.name, row.name + " is forced and " + used + " used");
      check_values(network, src, run(*plan, network, src, 0, kImages, 1),
                   row.name + text(", %d channels", static_cast<int>(channels)));
    }
  }
}

// --- instruction sets -------------------------------------------------------------------------------------------------

void check_isa(const KernelSet& set) {
  // All members by name: with one more this does not compile before the new one has its check here.
  const auto& [isa, lanes, max_rows, pool_rows, preferred_vectors, preferred_pool_vectors, tile, pool_tile, row_tile, row_panels,
               in_place, in_place_tile, in_place_rows, product_rows, product, winograd_input, winograd_small_input, winograd_output,
               winograd_small_output, plane_row, pool_row, transpose, fingerprint, fingerprint_sample, fma_probe] = set;
  const std::string name = isa;
  Random random(3);

  expect(max_rows[preferred_vectors] > 0 && pool_rows[preferred_pool_vectors] > 0, name + ": preferred tiles exist");
  for (int vectors = 1; vectors <= 40; ++vectors)
    for (int panel : split_vectors(vectors, preferred_vectors, max_rows))
      expect(panel >= 1 && panel <= kMaxVectors && max_rows[panel] > 0, name + ": every panel has a tile");

  // Lengths of the runs; a negative one ends a partial sum.
  std::vector<Problem> problems;
  for (bool has_special : {false, true})
    for (const std::vector<int>& lengths :
         {std::vector<int>{1}, {2, 1}, {27}, {3, 3, 3}, {-64, -64, 5}, {100, -28, -128, 44}, {1, 1, -62, 64}})
      problems.emplace_back(set, lengths, has_special, random);
  for (Problem& problem : problems) check_smallest_tile(problem, tile[1][1], name + " tile 1x1");

  // Every cell of a table up to its limit is a kernel, and no other is.
  auto each_cell = [&](const char* table, TileLoop loop, bool should_exist, bool pools, int rows, int vectors, int panels) {
    const std::string what = name + text(" %s[%d rows][%d vectors x %d panels]", table, rows, vectors, panels);
    expect((loop != nullptr) == should_exist, what + (loop ? " exists beyond its limit" : " is missing"));
    if (!loop) return;
    const int64_t wide = static_cast<int64_t>(vectors) * set.lanes;
    for (size_t p = 0; p < problems.size(); ++p) {
      const int64_t widths[2][2] = {{1, wide}, {std::max<int64_t>(1, wide - 1), 1 + random.below(wide)}};
      for (int64_t last_lanes : widths[p % 2])
        check_tile(problems[p], loop, pools, rows, vectors, panels, 1 + random.below(3), last_lanes, random.coin() ? 0.0f : -kInf,
                   random, what);
    }
  };
  for (int vectors = 0; vectors <= kMaxVectors; ++vectors) {
    expect(max_rows[vectors] >= 0 && max_rows[vectors] <= kMaxRows, name + ": max_rows fits its table");
    expect(pool_rows[vectors] >= 0 && pool_rows[vectors] <= kMaxRows && pool_rows[vectors] % 4 == 0, name + ": so does pool_rows");
    for (int rows = 0; rows <= kMaxRows; ++rows)
      each_cell("tile", tile[vectors][rows], vectors && rows && rows <= max_rows[vectors], false, rows, vectors, 1);
    for (int windows = 0; windows <= kMaxRows / 4; ++windows)
      each_cell("pool_tile", pool_tile[vectors][windows], vectors && windows && windows <= pool_rows[vectors] / 4, true, windows,
                vectors, 1);
  }
  for (int rows = 0; rows < 4; ++rows)
    for (int panels = 0; panels <= kMaxPanels; ++panels)
      each_cell("row_tile", row_tile[rows][panels], rows && panels && panels <= row_panels[rows], false, rows, preferred_vectors,
                panels);

  check_in_place(set, tile[1][1], in_place, in_place_rows, in_place_tile, max_rows, random);
  for (int vectors = 0; vectors <= kMaxVectors; ++vectors)
    for (int rows = 0; rows <= kMaxRows; ++rows) {
      const ProductLoop loop = product[vectors][rows];
      expect((loop != nullptr) == (vectors && rows && rows <= product_rows[vectors]),
             name + text(": product[%d][%d]", vectors, rows));
      if (loop) check_product(set, product[1][1], loop, rows, vectors, random);
    }
  check_winograd_input(set, winograd_input, false, random);
  check_winograd_input(set, winograd_small_input, true, random);
  for (bool pools : {false, true})
    for (bool has_special : {false, true})
      for (int repeat = 0; repeat < 4; ++repeat) {
        check_winograd_output(set, winograd_output[0][pools], 4, pools, 0, has_special, random);
        check_winograd_output(set, winograd_output[1][pools], 2, pools, 0, has_special, random);
        expect(!winograd_small_output[pools][0], name + ": no Winograd without channels");
        for (int channels = 1; channels <= kMostSmallChannels; ++channels)
          check_winograd_output(set, winograd_small_output[pools][channels], 4, pools, channels, has_special, random);
      }

  check_plane_row(set, plane_row, random);
  check_pool_row(set, pool_row, random);
  check_transpose(set, transpose, random);
  check_fingerprint(set, fingerprint, random);
  check_fingerprint_sample(set, fingerprint_sample, random);
  check_fma_probe(set, fma_probe);
  check_kernel_list(set);
  for (const char* forced : {"", "conv2d_winograd", "conv2d_plane", "linear_in_place"}) check_plans(set, forced);
}

// Instruction sets with equally many lanes must agree on what a fingerprint is: an emulated one stands for the real one.
void check_agreement(const std::vector<const KernelSet*>& sets) {
  Random random(5);
  const std::vector<float> src = random.values(1000);
  for (const KernelSet* a : sets)
    for (const KernelSet* b : sets)
      if (a->lanes == b->lanes)
        expect(a->fingerprint(src.data(), 1000) == b->fingerprint(src.data(), 1000),
               std::string(a->isa) + " and " + b->isa + " make different fingerprints");
}

int run_all() {
  std::vector<const KernelSet*> run;
  for (const Isa& isa : isas()) {
    const KernelSet& set = *isa.kernels;
    if (!isa.is_supported) {
      std::printf("%s: not supported here\n", set.isa);
      continue;
    }
    expect(select_isa(set.isa) == &set, std::string(set.isa) + " is chosen when it is named");
    const int64_t before = comparisons;
    check_isa(set);
    std::printf("%s: %lld comparisons\n", set.isa, static_cast<long long>(comparisons - before));
    run.push_back(&set);
  }
  expect(select_isa("") == run.front(), "the best instruction set is chosen");
  expect(!select_isa("no such instruction set"), "no instruction set has that name");
  check_agreement(run);
  if (failures)
    std::fprintf(stderr, "%lld of %lld comparisons failed\n", static_cast<long long>(failures),
                 static_cast<long long>(comparisons));
  return failures ? 1 : 0;
}

}  // namespace

int main() {
  try {
    return run_all();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "wrong: %s\n", error.what());
    return 1;
  }
}
