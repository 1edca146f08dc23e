// scale: a BatchNorm that is a step of its own, or nothing but a copy: rows of pixels or features times one number per channel,
// plus another. With 1 and -0.0 every value stays what it is.

static void scale_rows(const ScaleJob& job) {
  assert(job.lanes > 0 && (job.rows == 1 || job.dst_stride >= job.lanes) && "rows do not overlap");
  const Vec lower = splat(job.lower);
  for (int64_t row = 0; row < job.rows; ++row) {
    const float* const src = job.src + row * job.src_stride;
    float* const dst = job.dst + row * job.dst_stride;
    for (int64_t lane = 0; lane < job.lanes; lane += kLanes) {
      const int left = static_cast<int>(job.lanes - lane < kLanes ? job.lanes - lane : kLanes);
      const Vec value = load_channels(src + lane, left, job.can_overread);
      const Vec result = clamp_below(value * load(job.scale + lane) + load(job.shift + lane), lower);
      if (left == kLanes) {
        store(dst + lane, result);
      } else {
        store_lanes(dst + lane, result, left);
      }
    }
  }
}
