// The kernels that make rows of an image: pools behind a ring, convolutions of a single plane and of few channels each.
#include <algorithm>
#include <cmath>

#include "harness.h"

namespace fastseq::harness {

void check_pool_row(const KernelSet& set, PoolRow pool_row, const PoolRow (&average_row)[2], Random& random) {
  for (int channels : {1, set.lanes - 1, set.lanes, set.lanes + 1, 3 * set.lanes + 2, 5 * set.lanes + 1})
    for (int n = 0; n < 60; ++n) {
      const bool is_long = n % 15 == 14, averages = n % 3 != 0;
      const int64_t w_in = 1 + random.below(is_long ? 90 : 12), dilation = 1 + random.below(2);
      PoolRowJob job = {};
      job.w_out = static_cast<int32_t>(1 + random.below(5)), job.column_step = dilation;
      std::vector<PoolSpan> columns;
      for (int32_t x = 0; x < job.w_out; ++x) {
        const int64_t begin = random.below(w_in), most = (w_in - begin - 1) / dilation + 1;
        columns.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(is_long ? most : 1 + random.below(most)),
                           static_cast<float>(1 + random.below(9))});
      }
      job.columns = columns.data(), job.row_divisor = static_cast<float>(1 + random.below(9));
      job.channels = channels;
      job.can_overread = random.coin();
      const int64_t room = (channels + set.lanes - 1) / set.lanes * set.lanes;
      job.src_pitch = (job.can_overread ? room : channels) + random.below(3), job.dst_pitch = channels + random.below(3);
      const int64_t row = w_in * job.src_pitch + random.below(5), row_step = 1 + random.below(2);
      const int64_t rows_kept = (is_long ? 60 : 1) + random.below(4), first = random.below(rows_kept);
      job.row_stride = row_step * row;
      job.row_count = static_cast<int32_t>(is_long ? rows_kept : 1 + random.below(rows_kept));
      job.lower = random.coin() ? 0.0f : -kInf;

      std::vector<float> src = random.values(rows_kept * row + (job.can_overread ? set.lanes : 0));
      if (!is_long)
        for (float& v : src)
          if (random.below(20) == 0) v = random.coin() ? kNan : random.coin() ? -kInf : -0.0f;
      job.ring_end = src.data() + rows_kept * row, job.ring_floats = rows_kept * row;
      job.src = src.data() + first * row;
      std::vector<float> dst(static_cast<size_t>((job.w_out - 1) * job.dst_pitch + channels), untouched()), wanted = dst;
      job.dst = dst.data();
      (averages ? average_row[is_long || n % 2] : pool_row)(job);
      for (int32_t x = 0; x < job.w_out; ++x)
        for (int c = 0; c < channels; ++c) {
          float max = -kInf;
          double sum = 0, scale = 0;
          for (int64_t r = 0; r < job.row_count; ++r)
            for (int32_t i = 0; i < columns[x].pixels; ++i) {
              const float value =
                  src[(first + r * row_step) % rows_kept * row + (columns[x].begin + i * dilation) * job.src_pitch + c];
              if (value > max || std::isnan(value)) max = value;
              sum += value, scale += std::abs(value);
            }
          float& to = wanted[x * job.dst_pitch + c];
          const float found = dst[x * job.dst_pitch + c];
          if (averages) {
            const double divisor = static_cast<double>(job.row_divisor) * columns[x].count;
            const double average = sum / divisor < job.lower ? job.lower : sum / divisor;
            // Of up to 32 terms, 32 of those, and the rest of 5460 / 1024.
            to = is_close(found, average, 70 * kRounding * scale / divisor) ? found : static_cast<float>(average);
            continue;
          }
          // Which zero of a window wins is the order's, so only their value counts.
          const float result = max < job.lower ? job.lower : max;
          to = result == 0 && found == 0 ? found : result;
        }
      expect_same(dst, wanted, text("%s %s, %d channels", set.isa, averages ? "average_row" : "pool_row", channels));
    }
}

void check_blend_row(const KernelSet& set, BlendRow blend_row, Random& random) {
  for (int channels : {1, set.lanes - 1, set.lanes, set.lanes + 1, 5 * set.lanes + 2})
    for (int n = 0; n < 20; ++n) {
      const int64_t w_in = 1 + random.below(5);
      BlendRowJob job = {};
      job.w_out = static_cast<int32_t>(1 + random.below(9)), job.channels = channels;
      job.can_overread = random.coin();
      const int64_t room = (channels + set.lanes - 1) / set.lanes * set.lanes, read = job.can_overread ? room : channels;
      job.src_pitch = read + random.below(3), job.dst_pitch = channels + random.below(3);
      const auto weight = [&] { return random.below(4) ? (random.value() + 1) / 2 : random.coin() ? 1.0f : 0.0f; };
      std::vector<Blend> columns;
      for (int32_t x = 0; x < job.w_out; ++x) {
        const float first = weight();
        columns.push_back({static_cast<int32_t>(random.below(w_in)), static_cast<int32_t>(random.below(w_in)), first, 1 - first});
      }
      job.columns = columns.data(), job.top_weight = weight(), job.bottom_weight = 1 - job.top_weight;
      std::vector<float> rows[2];
      for (std::vector<float>& row : rows) {
        row = random.values((w_in - 1) * job.src_pitch + read);
        for (float& v : row)
          if (random.below(20) == 0) v = random.coin() ? kNan : random.coin() ? -kInf : kInf;
      }
      job.top = rows[0].data(), job.bottom = rows[1].data();
      std::vector<float> dst(static_cast<size_t>((job.w_out - 1) * job.dst_pitch + channels), untouched()), wanted = dst;
      job.dst = dst.data();
      blend_row(job);
      for (int64_t x = 0; x < job.w_out; ++x)
        for (int64_t c = 0; c < channels; ++c) {
          const Blend& column = columns[static_cast<size_t>(x)];
          double sum = 0, magnitude = 0;
          for (int row = 0; row < 2; ++row) {
            const double across = row ? job.bottom_weight : job.top_weight;
            const double a = rows[row][column.first * job.src_pitch + c], b = rows[row][column.second * job.src_pitch + c];
            sum += across * (column.first_weight * a + column.second_weight * b);
            magnitude += across * (column.first_weight * std::abs(a) + column.second_weight * std::abs(b));
          }
          const float found = dst[static_cast<size_t>(x * job.dst_pitch + c)];
          wanted[static_cast<size_t>(x * job.dst_pitch + c)] =
              is_close(found, sum, 4 * kRounding * magnitude) ? found : static_cast<float>(sum);
        }
      expect_same(dst, wanted, text("%s blend_row, %d channels", set.isa, channels));
    }
}

void check_scale_rows(const KernelSet& set, ScaleRows scale_rows, Random& random) {
  for (int lanes : {1, set.lanes - 1, set.lanes, set.lanes + 1, 3 * set.lanes + 2})
    for (int n = 0; n < 20; ++n) {
      const bool copies = n % 4 == 0;
      ScaleJob job = {};
      job.rows = 1 + random.below(4), job.lanes = lanes;
      job.can_overread = random.coin();
      const int64_t room = (lanes + set.lanes - 1) / set.lanes * set.lanes;
      job.src_stride = (job.can_overread ? room : lanes) + random.below(3), job.dst_stride = lanes + random.below(3);
      job.lower = random.coin() ? 0.0f : -kInf;
      std::vector<float> src = random.values((job.rows - 1) * job.src_stride + (job.can_overread ? room : lanes));
      for (float& v : src)
        if (random.below(20) == 0) v = random.coin() ? kNan : random.coin() ? -kInf : -0.0f;
      std::vector<float> scale = random.values(room), shift = random.values(room);
      if (copies) std::fill(scale.begin(), scale.end(), 1.0f), std::fill(shift.begin(), shift.end(), -0.0f);
      std::vector<float> dst(static_cast<size_t>((job.rows - 1) * job.dst_stride + lanes), untouched()), wanted = dst;
      job.src = src.data(), job.dst = dst.data(), job.scale = scale.data(), job.shift = shift.data();
      scale_rows(job);
      for (int64_t row = 0; row < job.rows; ++row)
        for (int lane = 0; lane < lanes; ++lane) {
          const float from = src[row * job.src_stride + lane];
          const double product = static_cast<double>(from) * scale[lane], sum = product + shift[lane];
          const double result = sum < job.lower ? job.lower : sum;
          float& to = wanted[row * job.dst_stride + lane];
          const float found = dst[row * job.dst_stride + lane];
          const double allowed = 2 * kRounding * (std::abs(product) + std::abs(shift[lane]));
          to = copies                             ? (from < job.lower ? job.lower : from)
               : is_close(found, result, allowed) ? found
                                                  : static_cast<float>(result);
        }
      expect_same(dst, wanted, text("%s scale_rows, %d lanes", set.isa, lanes));
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

// Rows of filters of every size, stride and dilation, one term or several, against double precision; what is around the written
// pixels stays.
void check_depthwise_rows(const KernelSet& set, DepthwiseRows depthwise_rows, Random& random) {
  for (int n = 0; n < 150; ++n) {
    DepthwiseJob job = {};
    const bool is_3x3 = random.coin();
    job.k_h = is_3x3 ? 3 : static_cast<int32_t>(1 + random.below(n % 10 ? 5 : 15));
    job.k_w = is_3x3 ? 3 : static_cast<int32_t>(1 + random.below(n % 10 ? 5 : 15));
    const int64_t stride = 1 + random.below(2), dilation = 1 + random.below(2) * random.below(2);
    job.rows = static_cast<int32_t>(1 + random.below(4)), job.width = static_cast<int32_t>(1 + random.below(25));
    job.channels = static_cast<int32_t>(1 + random.below(3 * set.lanes));
    job.terms = random.coin() ? 1 : static_cast<int32_t>(1 + random.below(3));
    job.lower = random.coin() ? 0.0f : -kInf;
    const int64_t vectors = (job.channels + set.lanes - 1) / set.lanes, lanes = vectors * set.lanes, taps = job.k_h * job.k_w;
    const int64_t pitch = lanes + random.below(3);
    const int64_t columns = (job.width - 1) * stride + (job.k_w - 1) * dilation + 1;
    const int64_t row_stride = columns * pitch + random.below(5);
    job.src_row_stride = stride * row_stride, job.src_pitch = stride * pitch;
    job.tap_row_stride = dilation * row_stride, job.tap_pitch = dilation * pitch;
    std::vector<float> src = random.values(((job.rows - 1) * stride + (job.k_h - 1) * dilation + 1) * row_stride + lanes);
    if (random.below(3) == 0)
      src[static_cast<size_t>(random.below(static_cast<int64_t>(src.size())))] = random.coin() ? kNan : kInf;
    const std::vector<float> weight = random.values(vectors * taps * job.terms * set.lanes), bias = random.values(lanes);
    // Any lane of the source's vector may be a term; vectors are aligned.
    std::vector<int32_t> first_channel(static_cast<size_t>(vectors));
    std::vector<int32_t> room(static_cast<size_t>((vectors * job.terms + 1) * set.lanes));
    const auto address = reinterpret_cast<uintptr_t>(room.data());
    const uintptr_t alignment = static_cast<uintptr_t>(set.lanes) * sizeof(int32_t);
    int32_t* const index = room.data() + (alignment - address % alignment) % alignment / sizeof(int32_t);
    for (int64_t v = 0; v < vectors; ++v)
      first_channel[static_cast<size_t>(v)] = static_cast<int32_t>(random.below(v * set.lanes + 1));
    for (int64_t i = 0; i < vectors * job.terms * set.lanes; ++i) index[i] = static_cast<int32_t>(random.below(set.lanes));
    const bool shuffles = job.terms > 1 || random.coin();
    if (shuffles) job.index = index, job.first_channel = first_channel.data();
    job.src = src.data(), job.weight = weight.data(), job.bias = bias.data();
    job.dst_pitch = job.channels + random.below(3), job.dst_row_stride = job.width * job.dst_pitch + random.below(3);
    std::vector<float> dst(static_cast<size_t>(job.rows * job.dst_row_stride), untouched());
    job.dst = dst.data();
    depthwise_rows(job);
    const std::string what = text("%s depthwise_rows, %dx%d", set.isa, job.k_h, job.k_w);
    for (int64_t y = 0; y < job.rows; ++y)
      for (int64_t i = 0; i < job.dst_row_stride; ++i) {
        const float found = dst[static_cast<size_t>(y * job.dst_row_stride + i)];
        const int64_t x = i / job.dst_pitch, c = i % job.dst_pitch;
        if (x >= job.width || c >= job.channels) {
          expect(bits(found) == bits(untouched()), what + " writes beside its pixels");
          continue;
        }
        const int64_t v = c / set.lanes, lane = c % set.lanes;
        double sum = bias[static_cast<size_t>(c)], scale = std::abs(sum);
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t term = 0; term < job.terms; ++term) {
            const int64_t channel =
                shuffles ? first_channel[static_cast<size_t>(v)] + index[(v * job.terms + term) * set.lanes + lane] : c;
            const int64_t at = y * job.src_row_stride + x * job.src_pitch + t / job.k_w * job.tap_row_stride +
                               t % job.k_w * job.tap_pitch + channel;
            const double product = static_cast<double>(src[static_cast<size_t>(at)]) *
                                   weight[static_cast<size_t>(((v * taps + t) * job.terms + term) * set.lanes + lane)];
            sum += product, scale += std::abs(product);
          }
        const double wanted = sum < job.lower ? job.lower : sum;
        if (std::isnan(wanted)) {
          expect(std::isnan(found), what + " loses NaN");
        } else if (std::isinf(wanted)) {
          expect(found == wanted, what + " loses an infinity");
        } else {
          expect(std::abs(found - wanted) <= (taps * job.terms + 2) * kRounding * scale, what + " is off");
        }
      }
  }
}

}  // namespace fastseq::harness
