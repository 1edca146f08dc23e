// maxpool2d: one output row from up to k_h NHWC input rows, vectors over the channels.
// Windows are cut at the image's edge, which is what eager's padding with -inf amounts to; a window is never empty (the plan
// checks).

static FASTSEQ_INLINE Vec load_channels(const float* p, int channels, bool can_overread) {
  if (channels >= kLanes || can_overread) return load(p);
  Vec v = Vec{};
  for (int i = 0; i < channels; ++i) v[i] = p[i];
  return v;
}

static void pool_row(const PoolRowJob& job) {
  assert(job.row_count >= 1 && job.w_out >= 1 && "no window is empty");
  const Vec lower = splat(job.lower);
  for (int32_t x = 0; x < job.w_out; ++x) {
    const int32_t first = x * job.stride_w - job.pad_w;
    const int32_t begin = first < 0 ? 0 : first;
    const int32_t end = first + job.k_w > job.w_in ? job.w_in : first + job.k_w;
    float* dst = job.dst + x * job.dst_pitch;
    for (int32_t c = 0; c < job.channels; c += kLanes) {
      const int32_t left = job.channels - c;
      Vec max = load_channels(job.src + begin * job.src_pitch + c, left, job.can_overread);
      const float* row = job.src;
      for (int32_t r = 0; r < job.row_count; ++r) {
        for (int32_t i = begin; i < end; ++i) {
          max = pool_max(max, load_channels(row + i * job.src_pitch + c, left, job.can_overread));
        }
        row += job.row_stride;
        if (row == job.ring_end) row = job.ring_begin;
      }
      max = clamp_below(max, lower);
      if (left >= kLanes) {
        store(dst + c, max);
      } else {
        store_lanes(dst + c, max, left);
      }
    }
  }
}
