// upsamplebilinear2d: one output row of a bilinear upsampling from two rows of the source, NHWC, vectors over the channels.
// All four pixels count, those with weight 0 too, as eager's do: zero times infinity is NaN.
// Each product has one sum that it can be fused with, so that the bits do not depend on how the compiler does it.

static FASTSEQ_INLINE Vec weighted_sum(Vec a, Vec a_weight, Vec b, Vec b_weight) {
  const Vec sum = a * a_weight + Vec{};
  return b * b_weight + sum;
}

template <int kVec>
static FASTSEQ_INLINE void blend_pixel(const BlendRowJob& job, const Blend& column, int32_t c, Vec (&result)[kVec]) {
  const int32_t left = job.channels - c;
  const int64_t first = column.first * job.src_pitch + c, second = column.second * job.src_pitch + c;
  const Vec first_weight = splat(column.first_weight), second_weight = splat(column.second_weight);
  const Vec top_weight = splat(job.top_weight), bottom_weight = splat(job.bottom_weight);
  Vec a[kVec], b[kVec], top[kVec];  // pixels, and their sums in the upper row
  load_pixel(a, job.top + first, left, job.can_overread), load_pixel(b, job.top + second, left, job.can_overread);
  for (int v = 0; v < kVec; ++v) top[v] = weighted_sum(a[v], first_weight, b[v], second_weight);
  load_pixel(a, job.bottom + first, left, job.can_overread), load_pixel(b, job.bottom + second, left, job.can_overread);
  for (int v = 0; v < kVec; ++v) {
    const Vec bottom = weighted_sum(a[v], first_weight, b[v], second_weight);
    result[v] = weighted_sum(top[v], top_weight, bottom, bottom_weight);
  }
}

static void blend_row(const BlendRowJob& job) {
  for (int32_t x = 0; x < job.w_out; ++x) {
    const Blend& column = job.columns[x];
    float* const dst = job.dst + x * job.dst_pitch;
    int32_t c = 0;
    for (; c + kPoolVectors * kLanes <= job.channels; c += kPoolVectors * kLanes) {
      Vec result[kPoolVectors];
      blend_pixel(job, column, c, result);
      for (int v = 0; v < kPoolVectors; ++v) store(dst + c + v * kLanes, result[v]);
    }
    for (; c < job.channels; c += kLanes) {
      Vec result[1];
      blend_pixel(job, column, c, result);
      const int32_t left = job.channels - c;
      if (left >= kLanes) {
        store(dst + c, result[0]);
      } else {
        store_lanes(dst + c, result[0], left);
      }
    }
  }
}
