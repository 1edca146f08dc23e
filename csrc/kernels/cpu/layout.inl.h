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

static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows_out, int64_t cols_out,
                      bool can_overread) {
  if (rows_out == 1 && src_stride == 1) {
    for (int64_t j = 0; j < cols_out; ++j) dst[j] = src[j];
    return;
  }
  if (cols_out >= 2 && cols_out <= 4 && dst_stride == cols_out) {
    interleave_planes(src, src_stride, dst, rows_out, cols_out);
    return;
  }
  if (cols_out < 8 || (rows_out < 8 && !can_overread)) {
    for (int64_t i = 0; i < rows_out; ++i)
      for (int64_t j = 0; j < cols_out; ++j) dst[i * dst_stride + j] = src[j * src_stride + i];
    return;
  }
  // The last block overlaps the one before instead of leaving a scalar tail; it writes the same values again.
  for (int64_t jj = 0; jj < cols_out; jj += 8) {
    const int64_t j = jj + 8 <= cols_out ? jj : cols_out - 8;
    for (int64_t ii = 0; ii < rows_out; ii += 8) {
      const int64_t i = can_overread || ii + 8 <= rows_out ? ii : rows_out - 8;
      Vec8 block[8];
#pragma GCC unroll 8
      for (int n = 0; n < 8; ++n) block[n] = *reinterpret_cast<const Vec8U*>(src + (j + n) * src_stride + i);
      transpose_8x8(block);
      float* out = dst + i * dst_stride + j;
      const int64_t valid = rows_out - i;
      if (valid >= 8) {
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) *reinterpret_cast<Vec8U*>(out + n * dst_stride) = block[n];
      } else {
        for (int n = 0; n < valid; ++n) *reinterpret_cast<Vec8U*>(out + n * dst_stride) = block[n];
      }
    }
  }
}
