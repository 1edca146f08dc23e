// Winograd's transforms and the products between them.
#include <algorithm>
#include <cmath>

#include "harness.h"

namespace fastseq::harness {

namespace {

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

}  // namespace

void check_products(const KernelSet& set, const Products& product, const Limits& product_rows, Random& random) {
  for (int vectors = 0; vectors <= kMaxVectors; ++vectors)
    for (int rows = 0; rows <= kMaxRows; ++rows) {
      const ProductLoop loop = product[vectors][rows];
      expect((loop != nullptr) == (vectors && rows && rows <= product_rows[vectors]),
             text("%s: product[%d][%d]", set.isa, vectors, rows));
      if (loop) check_product(set, product[1][1], loop, rows, vectors, random);
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

void check_winograd_outputs(const KernelSet& set, const WinogradOutput (&output)[2][2],
                            const WinogradOutput (&small_output)[2][kMostSmallChannels + 1], Random& random) {
  for (bool pools : {false, true})
    for (bool has_special : {false, true})
      for (int repeat = 0; repeat < 4; ++repeat) {
        check_winograd_output(set, output[0][pools], 4, pools, 0, has_special, random);
        check_winograd_output(set, output[1][pools], 2, pools, 0, has_special, random);
        expect(!small_output[pools][0], std::string(set.isa) + ": no Winograd without channels");
        for (int channels = 1; channels <= kMostSmallChannels; ++channels)
          check_winograd_output(set, small_output[pools][channels], 4, pools, channels, has_special, random);
      }
}

}  // namespace fastseq::harness
