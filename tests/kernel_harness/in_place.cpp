// Linear layers whose weights are not packed: the kernels of few rows, and the tiles of many.
#include <algorithm>

#include "harness.h"

namespace fastseq::harness {

// Weights that are read where they lie: the bits of packed ones, which the smallest tile computes, for every tile of both kinds.
void check_in_place(const KernelSet& set, TileLoop smallest, const InPlaceLoop (&few)[kMaxInPlaceRows + 1], int few_rows,
                    const InPlaceTileLoop (&tiles)[kMaxVectors + 1], const Limits& max_rows, Random& random) {
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

}  // namespace fastseq::harness
