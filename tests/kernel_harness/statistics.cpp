// The kernels that reduce rows or maps to a few numbers first: softmax, layernorm, what groupnorm takes.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "harness.h"

namespace fastseq::harness {

namespace {

// Rows of numbers that lie as a job has them, and what it writes to: as much as it may touch, and nothing else.
struct Rows {
  int64_t rows, lanes, src_stride, dst_stride;
  bool can_overread, is_in_place;
  std::vector<float> src, dst;

  Rows(int64_t lanes_, const KernelSet& set, Random& random) : rows(1 + random.below(3)), lanes(lanes_) {
    can_overread = random.coin(), is_in_place = random.below(3) == 0;
    const int64_t room = (lanes + set.lanes - 1) / set.lanes * set.lanes;
    src_stride = (can_overread ? room : lanes) + random.below(3);
    dst_stride = is_in_place ? src_stride : lanes + random.below(3);
    // What is overread is nothing that a result may depend on.
    src.assign(static_cast<size_t>((rows - 1) * src_stride + (can_overread ? room : lanes)), kNan);
    dst.assign(static_cast<size_t>((rows - 1) * dst_stride + lanes), untouched());
  }
  float* row(int64_t i) { return src.data() + i * src_stride; }

  template <typename Job>
  Job job() {
    Job result = {};
    result.rows = rows, result.lanes = lanes, result.src_stride = src_stride, result.dst_stride = dst_stride;
    result.can_overread = can_overread, result.src = src.data(), result.dst = is_in_place ? src.data() : dst.data();
    return result;
  }
  // error(row, lane): how far a result may be off what wanted(row, lane) is.
  template <typename Wanted, typename Error>
  void expect_results(const Wanted& wanted, const Error& error, const std::string& what) const {
    const std::vector<float>& got = is_in_place ? src : dst;
    for (size_t i = 0; i < got.size(); ++i) {
      const int64_t at = static_cast<int64_t>(i) / dst_stride, lane = static_cast<int64_t>(i) % dst_stride;
      if (lane >= lanes) {
        expect(is_in_place ? std::isnan(got[i]) : bits(got[i]) == bits(untouched()), what + " writes beside its rows");
        continue;
      }
      const double value = wanted(at, lane);
      expect(is_close(got[i], value, error(at, lane)),
             what + text(": [%d][%d] is %.9g, not %.9g", static_cast<int>(at), static_cast<int>(lane), got[i], value));
    }
  }
};

double ulp(double value) {
  int exponent;
  std::frexp(value, &exponent);
  return std::ldexp(1, std::max(exponent - 24, -149));
}

// Of a row in double precision, NaN where float32 has it.
std::vector<double> softmax(const float* row, int64_t lanes, bool is_log) {
  const double max = *std::max_element(row, row + lanes);
  double sum = 0;
  std::vector<double> result(static_cast<size_t>(lanes));
  for (int64_t i = 0; i < lanes; ++i) sum += std::exp(row[i] - max);
  for (int64_t i = 0; i < lanes; ++i)
    result[static_cast<size_t>(i)] = is_log ? row[i] - max - std::log(sum) : std::exp(row[i] - max) / sum;
  return result;
}

// The mean and variance of numbers, and the root of the latter and eps.
struct Moments {
  double mean = 0, variance = 0, deviation = 0;
  template <typename Values>
  Moments(const Values& values, double eps) {
    const double count = static_cast<double>(values.size());
    for (const double v : values) mean += v / count;
    for (const double v : values) variance += (v - mean) * (v - mean) / count;
    deviation = std::sqrt(variance + eps);
  }
};

std::vector<int64_t> row_lengths(const KernelSet& set) {
  return {1, 2, set.lanes - 1, set.lanes, set.lanes + 1, 3 * set.lanes + 2, 4 * set.lanes, 9 * set.lanes + 5, 300 * set.lanes + 7};
}

}  // namespace

void check_softmax_rows(const KernelSet& set, const SoftmaxRows (&softmax_rows)[2], Random& random) {
  for (int64_t lanes : row_lengths(set))
    for (int n = 0; n < (lanes > 1000 ? 4 : 40); ++n) {
      const bool is_log = n % 2;
      Rows rows(lanes, set, random);
      const float spread = n % 5 == 0 ? 200.0f : n % 5 == 1 ? 1e-3f : 8.0f, offset = n % 7 == 0 ? 1000.0f : 0.0f;
      std::vector<std::vector<double>> wanted;
      for (int64_t r = 0; r < rows.rows; ++r) {
        float* const row = rows.row(r);
        for (int64_t i = 0; i < lanes; ++i) row[i] = spread * random.value() + offset;
        if (random.below(3) == 0) row[random.below(lanes)] = -kInf;
        if (random.below(6) == 0) row[random.below(lanes)] = random.coin() ? kNan : kInf;
        if (random.below(8) == 0) std::fill(row, row + lanes, random.coin() ? -kInf : -3e38f);
        wanted.push_back(softmax(row, lanes, is_log));
        if (std::any_of(row, row + lanes, [](float v) { return std::isnan(v); }))
          std::fill(wanted.back().begin(), wanted.back().end(), kNan);
      }
      softmax_rows[is_log](rows.job<SoftmaxJob>());
      const auto value = [&](int64_t r, int64_t lane) { return wanted[static_cast<size_t>(r)][static_cast<size_t>(lane)]; };
      const auto error = [&](int64_t r, int64_t lane) {
        // Sums are of partial sums: long ones are off by a few units more.
        const double more = 1 + static_cast<double>(lanes) / (300 * set.lanes), result = value(r, lane);
        return std::isfinite(result) ? more * (is_log ? 3 * ulp(std::max(1.0, std::fabs(result))) : 4 * ulp(result)) : 0;
      };
      rows.expect_results(value, error,
                          text("%s %s, %d lanes", set.isa, is_log ? "logsoftmax" : "softmax", static_cast<int>(lanes)));
    }
}

void check_layer_norm_rows(const KernelSet& set, LayerNormRows layer_norm_rows, Random& random) {
  for (int64_t lanes : row_lengths(set))
    for (int n = 0; n < (lanes > 1000 ? 4 : 40); ++n) {
      Rows rows(lanes, set, random);
      const double eps = n % 3 == 0 ? 1e-12 : 1e-5;
      const float offset = n % 4 == 1 ? 1e5f : 0.0f, size = n % 4 == 2 ? 1e18f : n % 4 == 3 ? 1e-4f : 1.0f;
      const int64_t room = (lanes + set.lanes - 1) / set.lanes * set.lanes;
      const std::vector<float> scale = random.values(room), shift = random.values(room);
      std::vector<std::vector<double>> values;
      std::vector<Moments> moments;
      for (int64_t r = 0; r < rows.rows; ++r) {
        float* const row = rows.row(r);
        for (int64_t i = 0; i < lanes; ++i) row[i] = offset + size * random.value();
        if (random.below(6) == 0) row[random.below(lanes)] = random.coin() ? kNan : random.coin() ? kInf : -kInf;
        values.emplace_back(row, row + lanes);
        moments.emplace_back(values.back(), eps);
      }
      ScaleJob job = rows.job<ScaleJob>();
      job.scale = scale.data(), job.shift = shift.data(), job.lower = random.coin() ? 0.0f : -kInf;
      layer_norm_rows(job, eps);
      const auto normal = [&](int64_t r, int64_t lane) {
        const Moments& of = moments[static_cast<size_t>(r)];
        return (values[static_cast<size_t>(r)][static_cast<size_t>(lane)] - of.mean) / of.deviation;
      };
      const auto value = [&](int64_t r, int64_t lane) {
        const double result = normal(r, lane) * scale[static_cast<size_t>(lane)] + shift[static_cast<size_t>(lane)];
        return result < job.lower ? job.lower : result;
      };
      const auto error = [&](int64_t r, int64_t lane) {
        return kRounding * (16 * (std::fabs(normal(r, lane)) + 1) * std::fabs(scale[static_cast<size_t>(lane)]) +
                            2 * std::fabs(shift[static_cast<size_t>(lane)]));
      };
      rows.expect_results(value, error, text("%s layernorm, %d lanes, from %g", set.isa, static_cast<int>(lanes), offset));
    }
}

void check_centered_rows(const KernelSet& set, CenteredRows centered_rows, Random& random) {
  for (int64_t lanes : {1, set.lanes - 1, set.lanes, 3 * set.lanes + 2})
    for (int n = 0; n < 20; ++n) {
      Rows rows(lanes, set, random);
      const int64_t room = (lanes + set.lanes - 1) / set.lanes * set.lanes;
      const std::vector<float> scale = random.values(room), shift = random.values(room), center = random.values(room);
      for (int64_t r = 0; r < rows.rows; ++r)
        for (int64_t i = 0; i < lanes; ++i) rows.row(r)[i] = random.below(20) ? random.value() : random.coin() ? kNan : kInf;
      const std::vector<float> src = rows.src;
      ScaleJob job = rows.job<ScaleJob>();
      job.scale = scale.data(), job.shift = shift.data(), job.lower = random.coin() ? 0.0f : -kInf;
      centered_rows(job, center.data());
      const auto product = [&](int64_t r, int64_t lane) {
        const double difference =
            static_cast<double>(src[static_cast<size_t>(r * rows.src_stride + lane)]) - center[static_cast<size_t>(lane)];
        return difference * scale[static_cast<size_t>(lane)];
      };
      const auto value = [&](int64_t r, int64_t lane) {
        const double result = product(r, lane) + shift[static_cast<size_t>(lane)];
        return result < job.lower ? job.lower : result;
      };
      const auto error = [&](int64_t r, int64_t lane) {
        return 3 * kRounding * (std::fabs(product(r, lane)) + std::fabs(shift[static_cast<size_t>(lane)]));
      };
      rows.expect_results(value, error, text("%s centered_rows, %d lanes", set.isa, static_cast<int>(lanes)));
    }
}

void check_channel_moments(const KernelSet& set, ChannelMoments channel_moments, Random& random) {
  for (int64_t channels : {1, set.lanes - 1, set.lanes, set.lanes + 1, 3 * set.lanes + 2, 5 * set.lanes + 1})
    for (int n = 0; n < 12; ++n) {
      MomentsJob job = {};
      job.rows = 1 + random.below(5), job.width = 1 + random.below(n % 4 ? 9 : 150), job.channels = channels;
      job.can_overread = random.coin();
      const int64_t room = (channels + set.lanes - 1) / set.lanes * set.lanes;
      job.pitch = (job.can_overread ? room : channels) + random.below(3), job.row_stride = job.width * job.pitch + random.below(5);
      const std::vector<float> src =
          random.values((job.rows - 1) * job.row_stride + (job.width - 1) * job.pitch + (job.can_overread ? room : channels));
      const std::vector<float> center = random.values(room);
      std::vector<float> mean(static_cast<size_t>(room)), square(mean.size());
      job.src = src.data(), job.center = center.data(), job.share = random.value();
      job.mean = mean.data(), job.square = square.data();
      channel_moments(job);
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, squares = 0, magnitude = 0;
        for (int64_t y = 0; y < job.rows; ++y)
          for (int64_t x = 0; x < job.width; ++x) {
            const double difference = static_cast<double>(src[static_cast<size_t>(y * job.row_stride + x * job.pitch + c)]) -
                                      center[static_cast<size_t>(c)];
            sum += difference * job.share, squares += difference * difference * job.share,
                magnitude += std::fabs(difference * job.share);
          }
        const std::string what = text("%s channel_moments, %d channels", set.isa, static_cast<int>(channels));
        // Up to 32 pixels, as many of those, and the rows; differences are below 2.
        const double error = 45 * kRounding * magnitude;
        expect(is_close(mean[static_cast<size_t>(c)], sum, error), what + ": the mean is off");
        expect(is_close(square[static_cast<size_t>(c)], squares, 2 * error), what + ": the square is off");
      }
    }
}

}  // namespace fastseq::harness
