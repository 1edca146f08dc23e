// The kernels that make one row of an image: pools behind a ring, and convolutions of a single plane.
#include <algorithm>
#include <cmath>

#include "harness.h"

namespace fastseq::harness {

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

}  // namespace fastseq::harness
