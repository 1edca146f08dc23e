// layernorm of rows; of groupnorm the moments of each channel.
// A mean is rounded, and squares of what is far from it lose digits: it is taken twice, of the numbers and of their differences
// from the first, so that a row far from 0 has an exact mean and variance. Shares are added rather than numbers, so that no sum is
// larger than what it stands for.

static void layer_norm_rows(const ScaleJob& job, double eps) {
  assert(job.lanes > 0 && (job.rows == 1 || job.dst_stride >= job.lanes) && "rows do not overlap");
  const Vec lower = splat(job.lower), share = splat(1.0f / static_cast<float>(job.lanes));
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* const src = job.src + row * job.src_stride;
    float* const dst = job.dst + row * job.dst_stride;
    Vec mean[1], moments[2];
    sum_row(job.lanes, mean, [&](int64_t lane, int64_t left, Vec(&part)[1]) {
      part[0] += load_row(src + lane, left, job.can_overread, Vec{}) * share;
    });
    const Vec center = mean[0];
    sum_row(job.lanes, moments, [&](int64_t lane, int64_t left, Vec(&part)[2]) {
      const Vec difference = load_row(src + lane, left, job.can_overread, center) - center;
      const Vec part_of_mean = difference * share;
      part[0] += part_of_mean, part[1] += part_of_mean * difference;
    });
    const Vec rest = moments[0];
    const double variance = static_cast<double>(clamp_below(moments[1] - rest * rest, Vec{})[0]);
    const Vec inverse = splat(static_cast<float>(1 / __builtin_sqrt(variance + eps)));
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int64_t left = job.lanes - lane;
      const Vec normal = ((load_row(src + lane, left, job.can_overread, center) - center) - rest) * inverse;
      store_row(dst + lane, clamp_below(normal * load(job.scale + lane) + load(job.shift + lane), lower), left);
    }
  }
}

// kVec vectors of channels of all pixels: sums of up to kSumPart pixels, of those in a row, and of the rows.
template <int kVec>
static FASTSEQ_INLINE void moments_of(const MomentsJob& job, int64_t c) {
  const auto left = static_cast<int32_t>(job.channels - c);
  const Vec share = splat(job.share);
  Vec center[kVec], mean[kVec] = {}, square[kVec] = {};
  for (int v = 0; v < kVec; ++v) center[v] = load(job.center + c + v * kLanes);
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* pixel = job.src + row * job.row_stride + c;
    Vec row_mean[kVec] = {}, row_square[kVec] = {};
    for (int64_t x = 0; x < job.width;) {
      const int64_t end = job.width - x < kSumPart ? job.width : x + kSumPart;
      Vec part_mean[kVec] = {}, part_square[kVec] = {};
      for (; x < end; ++x, pixel += job.pitch) {
        Vec value[kVec];
        load_pixel(value, pixel, left, job.can_overread);
        for (int v = 0; v < kVec; ++v) {
          const Vec difference = value[v] - center[v], part = difference * share;
          part_mean[v] += part, part_square[v] += part * difference;
        }
      }
      for (int v = 0; v < kVec; ++v) row_mean[v] += part_mean[v], row_square[v] += part_square[v];
    }
    for (int v = 0; v < kVec; ++v) mean[v] += row_mean[v], square[v] += row_square[v];
  }
  for (int v = 0; v < kVec; ++v) store(job.mean + c + v * kLanes, mean[v]), store(job.square + c + v * kLanes, square[v]);
}

static void channel_moments(const MomentsJob& job) {
  assert(job.rows > 0 && job.width > 0 && job.channels > 0 && "no sum is empty");
  int64_t c = 0;
  for (; job.channels - c >= kPoolVectors * kLanes; c += kPoolVectors * kLanes) moments_of<kPoolVectors>(job, c);
  for (; c < job.channels; c += kLanes) moments_of<1>(job, c);
}
