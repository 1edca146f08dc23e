// scale: a BatchNorm that is a step of its own, or nothing but a copy: rows of pixels or features times one number per channel,
// plus another; what groupnorm takes away from them first is its center. With 1 and -0.0 every value stays what it is.

template <bool kIsCentered>
static FASTSEQ_INLINE void scale_rows_around(const ScaleJob& job, const float* center) {
  assert(job.lanes > 0 && (job.rows == 1 || job.dst_stride >= job.lanes) && "rows do not overlap");
  const Vec lower = splat(job.lower);
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* const src = job.src + row * job.src_stride;
    float* const dst = job.dst + row * job.dst_stride;
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int left = static_cast<int>(job.lanes - lane < kLanes ? job.lanes - lane : kLanes);
      Vec value = load_channels(src + lane, left, job.can_overread);
      if constexpr (kIsCentered) value -= load(center + lane);
      store_row(dst + lane, clamp_below(value * load(job.scale + lane) + load(job.shift + lane), lower), left);
    }
  }
}

static void scale_rows(const ScaleJob& job) { scale_rows_around<false>(job, nullptr); }

static void centered_rows(const ScaleJob& job, const float* center) { scale_rows_around<true>(job, center); }
