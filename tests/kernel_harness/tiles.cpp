// Register tiles, packed weights: the smallest against double precision, all others against its bits.
#include <algorithm>
#include <cmath>

#include "harness.h"
#include "plan/pack.h"

namespace fastseq::harness {

namespace {

// Two bfloat16 numbers in the place of a float.
struct Pair {
  uint16_t first, second;
  static float of(float a, float b) {
    const uint32_t pattern = narrowed(Storage::kBf16, a) | static_cast<uint32_t>(narrowed(Storage::kBf16, b)) << 16;
    float result;
    std::memcpy(&result, &pattern, sizeof result);
    return result;
  }
  static double product(float x, float y, double* magnitude) {
    double sum = 0;
    for (int shift : {0, 16}) {
      const double term = static_cast<double>(widened(Storage::kBf16, static_cast<uint16_t>(bits(x) >> shift))) *
                          widened(Storage::kBf16, static_cast<uint16_t>(bits(y) >> shift));
      sum += term, *magnitude += std::fabs(term);
    }
    return sum;
  }
};

// Rows of a source, read through offsets and runs, times a matrix of weights: what every tile computes a piece of.
struct Problem {
  int64_t rows, lanes, width, depth = 0;
  std::vector<Run> runs;
  std::vector<float> src, weight, bias;  // weight[k][width]
  std::vector<float> scale;              // empty for none
  std::vector<int32_t> src_offset;
  std::vector<double> sum, error;  // in double precision, bias included
  std::vector<float> result;       // as the smallest tile computes it

  Problem(const KernelSet& set, int64_t rows, const std::vector<int>& lengths, bool has_special, bool is_of_pairs, bool has_scale,
          Random& random)
      : rows(rows), lanes(set.lanes), width(kMaxVectors * kMaxPanels * set.lanes) {
    int64_t offset = random.below(3), end = 0;
    for (size_t r = 0; r < lengths.size(); ++r) {
      const int length = std::abs(lengths[r]);  // a negative one ends a partial sum
      runs.push_back({static_cast<int32_t>(offset), length, lengths[r] < 0});
      depth += length, end = offset + length;
      offset = end + random.below(4);
    }
    for (int64_t i = 0; i < rows; ++i) src_offset.push_back(static_cast<int32_t>(random.below(40)));
    src = random.values(*std::max_element(src_offset.begin(), src_offset.end()) + end);
    if (has_special)
      for (float v : {kNan, kInf, -kInf, -0.0f}) src[static_cast<size_t>(random.below(static_cast<int64_t>(src.size())))] = v;
    weight = random.values(depth * width), bias = random.values(width);
    if (has_scale) scale = random.values(width);
    if (is_of_pairs) {
      for (float& x : src) x = random.coin() ? Pair::of(x, random.value()) : Pair::of(random.value(), x);
      for (float& w : weight) w = Pair::of(w, random.value());
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t lane = 0; lane < width; ++lane) {
        double value = 0, magnitude = 0;
        int64_t k = 0;
        for (const Run& run : runs)
          for (int32_t n = 0; n < run.length; ++n, ++k) {
            const float x = src[src_offset[i] + run.offset + n], w = weight[k * width + lane];
            if (is_of_pairs) {
              value += Pair::product(x, w, &magnitude);
              continue;
            }
            const double product = static_cast<double>(x) * w;
            value += product, magnitude += std::fabs(product);
          }
        if (has_scale) value *= scale[lane], magnitude *= std::fabs(scale[lane]);
        value += bias[lane], magnitude += std::fabs(bias[lane]);
        sum.push_back(value), error.push_back(magnitude * sum_error(is_of_pairs ? 2 * depth : depth));
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

// What a tile loop computes of a problem, and how it may be called.
enum class Kind { kTile, kPool, kRow };

// The same call of a loop in stretches of the reduction, one partial sum each.
void run_in_stretches(TileLoop loop, TileJob job, const Problem& problem, int64_t wide, int64_t count, int64_t tiles) {
  std::vector<float> sums(static_cast<size_t>(count * wide), untouched());
  job.sums = sums.data(), job.sums_stride = static_cast<int32_t>(wide);
  std::vector<Run> stretch;
  for (size_t r = 0; r < problem.runs.size(); ++r) {
    stretch.push_back(problem.runs[r]);
    job.is_last = r + 1 == problem.runs.size();
    if (!stretch.back().ends_partial_sum && !job.is_last) continue;
    if (!job.is_last) stretch.back().ends_partial_sum = 0;
    job.runs = stretch.data(), job.run_count = static_cast<int32_t>(stretch.size());
    loop(job, tiles);
    for (const Run& run : stretch) job.weight += run.length * wide;
    job.has_sums = true;
    stretch.clear();
  }
}

// One call of a tile loop: `tiles` tiles of `rows` results over `panels` panels, compared with the smallest tile's bits.
void check_tile(const Problem& problem, TileLoop loop, Kind kind, int64_t rows, int64_t vectors, int64_t panels, int64_t tiles,
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
  std::vector<float> scale = problem.scale;
  scale.resize(scale.empty() ? 0 : static_cast<size_t>(panels * wide));
  job.scale = scale.empty() ? nullptr : scale.data();
  job.dst = dst.data(), job.dst_offset = dst_offset.data(), job.lanes = static_cast<int32_t>(last_lanes);
  loop(job, tiles);

  for (int64_t i = 0; i < count; ++i)
    for (int64_t lane = 0; lane < stored; ++lane) {
      const float value = kind == Kind::kPool ? problem.row_max(4 * i, lane) : problem.result[i * problem.width + lane];
      wanted[dst_offset[i] + lane] = value < lower ? lower : value;
    }
  const std::string how =
      what + text(", depth %d in %zu runs, %d tiles, %d lanes, lower %g", static_cast<int>(problem.depth), problem.runs.size(),
                  static_cast<int>(tiles), static_cast<int>(stored), static_cast<double>(lower));
  expect_same(dst, wanted, how);
  if (kind != Kind::kTile) return;
  dst.assign(dst.size(), untouched());
  run_in_stretches(loop, job, problem, wide, count, tiles);
  expect_same(dst, wanted, how + ", in stretches");
}

// The smallest tile, which the others are compared with, against double precision.
void check_smallest_tile(Problem& problem, TileLoop loop, const std::string& what) {
  problem.result.assign(static_cast<size_t>(problem.rows * problem.width), untouched());
  const Panels weight = problem.pack(1, kMaxVectors * kMaxPanels);
  std::vector<int32_t> dst_offset;
  for (int64_t i = 0; i < problem.rows; ++i) dst_offset.push_back(static_cast<int32_t>(i * problem.width));
  for (int64_t p = 0; p < kMaxVectors * kMaxPanels; ++p) {
    TileJob job = {};
    job.src = problem.src.data(), job.src_offset = problem.src_offset.data();
    job.runs = problem.runs.data(), job.run_count = static_cast<int32_t>(problem.runs.size());
    job.weight = weight.data() + p * problem.depth * problem.lanes;
    job.bias = &problem.bias[p * problem.lanes], job.lower = -kInf;
    job.scale = problem.scale.empty() ? nullptr : &problem.scale[p * problem.lanes];
    job.dst = problem.result.data() + p * problem.lanes, job.dst_offset = dst_offset.data();
    job.lanes = static_cast<int32_t>(problem.lanes);
    loop(job, problem.rows);
  }
  comparisons += static_cast<int64_t>(problem.result.size());
  for (size_t i = 0; i < problem.result.size(); ++i)
    if (!is_close(problem.result[i], problem.sum[i], problem.error[i]))
      return fail(what + text(": row %zu, lane %zu of depth %d is %.9g, not %.9g +- %.2g", i / problem.width, i % problem.width,
                              static_cast<int>(problem.depth), problem.result[i], problem.sum[i], problem.error[i]));
}

void check_all_tiles(const KernelSet& set, const std::string& name, bool is_of_pairs, const TileTable& table, Random& random) {
  const auto& [max_rows, pool_rows, preferred_vectors, preferred_pool_vectors, tile, pool_tile, row_tile, row_panels] = table;
  expect(max_rows[preferred_vectors] > 0 && pool_rows[preferred_pool_vectors] > 0, name + ": preferred tiles exist");
  for (int vectors = 1; vectors <= 40; ++vectors)
    for (int panel : split_vectors(vectors, preferred_vectors, max_rows))
      expect(panel >= 1 && panel <= kMaxVectors && max_rows[panel] > 0, name + ": every panel has a tile");
  // Lengths of the runs; a negative one ends a partial sum.
  std::vector<Problem> problems;
  const int most_rows =
      std::max(*std::max_element(max_rows, max_rows + kMaxVectors + 1), *std::max_element(pool_rows, pool_rows + kMaxVectors + 1));
  for (bool has_special : {false, true})
    for (const std::vector<int>& lengths :
         {std::vector<int>{1}, {2, 1}, {27}, {3, 3, 3}, {-64, -64, 5}, {100, -28, -128, 44}, {1, 1, -62, 64}})
      problems.emplace_back(set, 3 * most_rows, lengths, has_special, is_of_pairs, is_of_pairs && problems.size() % 2, random);
  for (Problem& problem : problems) check_smallest_tile(problem, tile[1][1], name + " tile 1x1");

  // Every cell of a table up to its limit is a kernel, and no other is.
  auto each_cell = [&](const char* table, TileLoop loop, bool should_exist, Kind kind, int rows, int vectors, int panels) {
    const std::string what = name + text(" %s[%d rows][%d vectors x %d panels]", table, rows, vectors, panels);
    expect((loop != nullptr) == should_exist, what + (loop ? " exists beyond its limit" : " is missing"));
    if (!loop) return;
    const int64_t wide = static_cast<int64_t>(vectors) * set.lanes;
    for (size_t p = 0; p < problems.size(); ++p) {
      const int64_t widths[2][2] = {{1, wide}, {std::max<int64_t>(1, wide - 1), 1 + random.below(wide)}};
      for (int64_t last_lanes : widths[p % 2])
        check_tile(problems[p], loop, kind, rows, vectors, panels, 1 + random.below(3), last_lanes, random.coin() ? 0.0f : -kInf,
                   random, what);
    }
  };
  for (int vectors = 0; vectors <= kMaxVectors; ++vectors) {
    expect(max_rows[vectors] >= 0 && max_rows[vectors] <= kMaxRows, name + ": max_rows fits its table");
    expect(pool_rows[vectors] >= 0 && pool_rows[vectors] <= kMaxRows && pool_rows[vectors] % 4 == 0, name + ": so does pool_rows");
    for (int rows = 0; rows <= kMaxRows; ++rows)
      each_cell("tile", tile[vectors][rows], vectors && rows && rows <= max_rows[vectors], Kind::kTile, rows, vectors, 1);
    for (int windows = 0; windows <= kMaxRows / 4; ++windows)
      each_cell("pool_tile", pool_tile[vectors][windows], vectors && windows && windows <= pool_rows[vectors] / 4, Kind::kPool,
                windows, vectors, 1);
  }
  for (int rows = 0; rows < 4; ++rows)
    for (int panels = 0; panels <= kMaxPanels; ++panels)
      each_cell("row_tile", row_tile[rows][panels], rows && panels && panels <= row_panels[rows], Kind::kRow, rows,
                preferred_vectors, panels);
}

}  // namespace

void check_tiles(const KernelSet& set, const TileTable& table, Random& random) {
  check_all_tiles(set, set.isa, false, table, random);
}

void check_bf16_tiles(const KernelSet& set, const Bf16Tiles& bf16, Random& random) {
  const auto& [isa, speed, table] = bf16;
  expect(speed > 1, std::string(isa) + " is worth it");
  check_all_tiles(set, std::string(isa) + " of pairs", true, table, random);
}

}  // namespace fastseq::harness
