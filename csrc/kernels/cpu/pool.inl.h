// maxpool2d, avgpool2d: one output row from the rows of its windows, NHWC, vectors over the channels.
// Windows are cut at the image's edge, which is what eager's padding with -inf, or with zeros that are counted, amounts to; a
// window is never empty (the plan checks).
// Averages are divided, as eager's are: a product with the reciprocal would be rounded once more.

// An average of more pixels is a sum of sums of at most as many pixels of a row, and of at most as many of those.
constexpr int kSumPart = 32;

static FASTSEQ_INLINE Vec load_channels(const float* p, int channels, bool can_overread) {
  if (channels >= kLanes || can_overread) return load(p);
  Vec v = Vec{};
  for (int i = 0; i < channels; ++i) v[i] = p[i];
  return v;
}

// Vectors that a window is reduced for at a time, so that one's additions do not wait for each other.
constexpr int kPoolVectors = 4;

// kVec vectors of channels of one pixel; only a single one may be the last, with fewer channels.
template <int kVec>
static FASTSEQ_INLINE void load_pixel(Vec (&to)[kVec], const float* p, int32_t channels, bool can_overread) {
  if constexpr (kVec == 1) {
    to[0] = load_channels(p, channels, can_overread);
  } else {
    for (int v = 0; v < kVec; ++v) to[v] = load(p + v * kLanes);
  }
}

// function(pixels, count, stride) for the window's rows: `count` pixels, `stride` apart.
template <typename Function>
static FASTSEQ_INLINE void for_window_rows(const PoolRowJob& job, const PoolSpan& span, int32_t c, const Function& function) {
  const float* row = job.src;
  for (int32_t r = 0; r < job.row_count; ++r) {
    function(row + span.begin * job.src_pitch + c, span.pixels, job.column_step * job.src_pitch);
    row += job.row_stride;
    if (row >= job.ring_end) row -= job.ring_floats;
  }
}

struct MaxWindow {
  template <int kVec>
  static FASTSEQ_INLINE void reduce(const PoolRowJob& job, const PoolSpan& span, int32_t c, Vec (&result)[kVec]) {
    const int32_t left = job.channels - c;
    load_pixel(result, job.src + span.begin * job.src_pitch + c, left, job.can_overread);
    for_window_rows(job, span, c, [&](const float* pixel, int32_t count, int64_t stride) {
      for (int32_t i = 0; i < count; ++i, pixel += stride) {
        Vec value[kVec];
        load_pixel(value, pixel, left, job.can_overread);
        for (int v = 0; v < kVec; ++v) result[v] = pool_max(result[v], value[v]);
      }
    });
  }
};

template <bool kInParts>
struct AverageWindow {
  template <int kVec>
  static FASTSEQ_INLINE void reduce(const PoolRowJob& job, const PoolSpan& span, int32_t c, Vec (&result)[kVec]) {
    const int32_t left = job.channels - c;
    Vec total[kVec] = {}, group[kVec] = {};
    int32_t parts = 0;
    for_window_rows(job, span, c, [&](const float* pixel, int32_t count, int64_t stride) {
      while (count > 0) {
        const int32_t part = kInParts && count > kSumPart ? kSumPart : count;
        Vec sum[kVec] = {};
        for (int32_t i = 0; i < part; ++i, pixel += stride) {
          Vec value[kVec];
          load_pixel(value, pixel, left, job.can_overread);
          for (int v = 0; v < kVec; ++v) (kInParts ? sum[v] : total[v]) += value[v];
        }
        count -= part;
        if constexpr (kInParts) {
          for (int v = 0; v < kVec; ++v) group[v] += sum[v];
          if (++parts == kSumPart) {
            for (int v = 0; v < kVec; ++v) total[v] += group[v], group[v] = Vec{};
            parts = 0;
          }
        }
      }
    });
    const Vec divisor = splat(job.row_divisor * span.count);
    for (int v = 0; v < kVec; ++v) result[v] = (kInParts ? total[v] + group[v] : total[v]) / divisor;
  }
};

template <typename Window>
static void pool_row_of(const PoolRowJob& job) {
  assert(job.row_count >= 1 && job.w_out >= 1 && "no window is empty");
  const Vec lower = splat(job.lower);
  for (int32_t x = 0; x < job.w_out; ++x) {
    const PoolSpan& span = job.columns[x];
    float* const dst = job.dst + x * job.dst_pitch;
    int32_t c = 0;
    for (; c + kPoolVectors * kLanes <= job.channels; c += kPoolVectors * kLanes) {
      Vec result[kPoolVectors];
      Window::reduce(job, span, c, result);
      for (int v = 0; v < kPoolVectors; ++v) store(dst + c + v * kLanes, clamp_below(result[v], lower));
    }
    for (; c < job.channels; c += kLanes) {
      Vec result[1];
      Window::reduce(job, span, c, result);
      const int32_t left = job.channels - c;
      if (left >= kLanes) {
        store(dst + c, clamp_below(result[0], lower));
      } else {
        store_lanes(dst + c, clamp_below(result[0], lower), left);
      }
    }
  }
}

static constexpr void add_pools(KernelSet& set) {
  set.pool_row = pool_row_of<MaxWindow>;
  set.average_row[0] = pool_row_of<AverageWindow<false>>, set.average_row[1] = pool_row_of<AverageWindow<true>>;
}
