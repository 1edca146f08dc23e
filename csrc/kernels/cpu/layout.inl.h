// transpose: between NCHW (planes) and NHWC (pixels), in 8x8 blocks held in registers.

typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec8U __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Index8 __attribute__((vector_size(32)));

static FASTSEQ_INLINE void transpose_8x8(Vec8 (&r)[8]) {
  Vec8 a[8];
  constexpr Index8 low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = __builtin_shuffle(r[2 * i], r[2 * i + 1], low);
    a[2 * i + 1] = __builtin_shuffle(r[2 * i], r[2 * i + 1], high);
  }
  constexpr Index8 even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
  Vec8 b[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = __builtin_shuffle(a[4 * i], a[4 * i + 2], even);
    b[4 * i + 1] = __builtin_shuffle(a[4 * i], a[4 * i + 2], odd);
    b[4 * i + 2] = __builtin_shuffle(a[4 * i + 1], a[4 * i + 3], even);
    b[4 * i + 3] = __builtin_shuffle(a[4 * i + 1], a[4 * i + 3], odd);
  }
  constexpr Index8 first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shuffle(b[i], b[i + 4], first);
    r[i + 4] = __builtin_shuffle(b[i], b[i + 4], second);
  }
}

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec4U __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Index4 __attribute__((vector_size(16)));

// Two to four planes to dense pixels, four at a time: each store reaches into the next pixel, which then overwrites it.
static FASTSEQ_INLINE void interleave_planes(const float* src, int64_t src_stride, float* dst, int64_t pixels, int64_t planes) {
  const float* plane[4];
  for (int c = 0; c < 4; ++c) plane[c] = src + (c < planes ? c : 0) * src_stride;
  int64_t i = 0;
  for (; i + 5 <= pixels; i += 4) {
    Vec4 p[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) p[c] = *reinterpret_cast<const Vec4U*>(plane[c] + i);
    constexpr Index4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Vec4 a = __builtin_shuffle(p[0], p[1], low), b = __builtin_shuffle(p[2], p[3], low);
    const Vec4 c = __builtin_shuffle(p[0], p[1], high), d = __builtin_shuffle(p[2], p[3], high);
    float* const out = dst + i * planes;
    *reinterpret_cast<Vec4U*>(out) = __builtin_shuffle(a, b, first);
    *reinterpret_cast<Vec4U*>(out + planes) = __builtin_shuffle(a, b, second);
    *reinterpret_cast<Vec4U*>(out + 2 * planes) = __builtin_shuffle(c, d, first);
    *reinterpret_cast<Vec4U*>(out + 3 * planes) = __builtin_shuffle(c, d, second);
  }
  for (; i < pixels; ++i)
    for (int64_t c = 0; c < planes; ++c) dst[i * planes + c] = plane[c][i];
}

static FASTSEQ_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Eight columns of dst from row i to row `end`, in blocks, none beyond last_row: that one overlaps the one before instead of
// leaving a scalar tail; it writes the same values again.
static FASTSEQ_INLINE void transpose_columns(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t i,
                                             int64_t end, int64_t rows, int64_t last_row) {
  for (; i < end; i += 8) {
    const int64_t row = smaller(i, last_row);
    Vec8 block[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) block[n] = *reinterpret_cast<const Vec8U*>(src + n * src_stride + row);
    transpose_8x8(block);
    float* const out = dst + row * dst_stride;
    if (rows - row >= 8) {
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) *reinterpret_cast<Vec8U*>(out + n * dst_stride) = block[n];
    } else {
      for (int n = 0; n < rows - row; ++n) *reinterpret_cast<Vec8U*>(out + n * dst_stride) = block[n];
    }
  }
}

static void transpose_one(const TransposeJob& job, const float* src, float* dst) {
  if (job.rows == 1 && job.src_stride == 1) {
    for (int64_t j = 0; j < job.columns; ++j) dst[j] = src[j];
  } else if (job.columns >= 2 && job.columns <= 4 && job.dst_stride == job.columns) {
    interleave_planes(src, job.src_stride, dst, job.rows, job.columns);
  } else {
    for (int64_t i = 0; i < job.rows; ++i)
      for (int64_t j = 0; j < job.columns; ++j) dst[i * job.dst_stride + j] = src[j * job.src_stride + i];
  }
}

// The side whose rows are further apart are planes. They take turns line by line, as many of them as fill a line of a pixel, fewer
// where their rows share the sets of a cache: more at a time than hardware follows as streams would each be waited for. What each
// needs next is asked for early. Small planes are written all together, since caches hold a line of each.
static void transpose(const TransposeJob& job) {
  if (job.columns < 8 || (job.rows < 8 && !job.can_overread)) {
    for (int64_t m = 0; m < job.count; ++m) transpose_one(job, job.src + m * job.src_step, job.dst + m * job.dst_step);
    return;
  }
  constexpr int64_t kLine = 16, kSmallPlane = 1024;
  const int64_t src_stride = job.src_stride, dst_stride = job.dst_stride, rows = job.rows, columns = job.columns;
  const int64_t last_row = job.can_overread ? rows : rows - 8;
  const bool writes_planes = dst_stride > src_stride;
  const int64_t stride = writes_planes ? dst_stride : src_stride;
  const bool shares_sets = stride % 512 == 0;
  const bool is_small = writes_planes && stride < kSmallPlane && !shares_sets;
  const int64_t planes = is_small ? rows : shares_sets ? 8 : kLine;
  for (int64_t first = 0; first < (writes_planes ? rows : columns); first += planes)
    for (int64_t m = 0; m < job.count; ++m) {
      const float* const src = job.src + m * job.src_step;
      float* const dst = job.dst + m * job.dst_step;
      if (writes_planes) {
        const int64_t end = smaller(first + planes, rows);
        for (int64_t j = 0; j < columns; j += 8) {
          if (!is_small && j % kLine == 0)
            for (int64_t i = first; i < end; ++i) __builtin_prefetch(dst + i * dst_stride + j + kLine, 1);
          const int64_t column = smaller(j, columns - 8);
          transpose_columns(src + column * src_stride, src_stride, dst + column, dst_stride, first, end, rows, last_row);
        }
      } else {
        const int64_t end = smaller(first + planes, columns);
        for (int64_t i = 0; i < rows; i += kLine) {
          for (int64_t j = first; j < end; ++j) __builtin_prefetch(src + j * src_stride + i + kLine);
          for (int64_t j = first; j < end; j += 8) {
            const int64_t column = smaller(j, columns - 8);
            transpose_columns(src + column * src_stride, src_stride, dst + column, dst_stride, i, smaller(i + kLine, rows), rows,
                              last_row);
          }
        }
      }
    }
}
