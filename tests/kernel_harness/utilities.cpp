// The kernels that compute no layer: transposition, fingerprints of weights, the probe of the CPU's speed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "harness.h"

namespace fastseq::harness {

void check_transpose(const KernelSet& set, Transpose transpose, Random& random) {
  for (int64_t rows = 1; rows <= 20; ++rows)
    for (int64_t cols = 1; cols <= 20; ++cols)
      for (bool can_overread : {false, true}) {
        const int64_t room = can_overread ? (rows + 7) / 8 * 8 : rows;
        // Either side may be the one whose rows are further apart, and the matrices may lie within each other's rows.
        const int64_t count = 1 + random.below(3), far = random.coin() ? count : 1, near = count / far;
        const int64_t src_stride = rows == 1 && random.coin() && !can_overread ? 1 : far * room + random.below(3);
        const int64_t src_step = src_stride == 1 || far == 1 ? cols * std::max(src_stride, room) : room;
        const int64_t dst_stride = near * cols + random.below(3), dst_step = near == 1 ? rows * dst_stride : cols;
        const std::vector<float> src = random.values((count - 1) * src_step + (cols - 1) * src_stride + room);
        std::vector<float> dst(static_cast<size_t>((count - 1) * dst_step + (rows - 1) * dst_stride + cols), untouched());
        std::vector<float> wanted = dst;
        transpose({src.data(), src_stride, dst.data(), dst_stride, rows, cols, can_overread, count, src_step, dst_step});
        for (int64_t m = 0; m < count; ++m)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) wanted[m * dst_step + i * dst_stride + j] = src[m * src_step + j * src_stride + i];
        expect_same(dst, wanted, text("%s transpose to %dx%d", set.isa, static_cast<int>(rows), static_cast<int>(cols)));
      }
}

void check_fingerprint(const KernelSet& set, Fingerprint fingerprint, Random& random) {
  for (int64_t count : {0, 1, 7, 8, 63, 64, 65, 128, 131, 300}) {
    const std::string what = text("%s fingerprint of %d floats", set.isa, static_cast<int>(count));
    std::vector<float> src = random.values(count);
    const uint64_t usual = fingerprint(src.data(), count);
    expect(fingerprint(src.data(), count) == usual, what + " is not the same again");
    for (int64_t shift = 1; shift < 4; ++shift) {
      std::vector<float> moved(static_cast<size_t>(count + shift));
      std::copy(src.begin(), src.end(), moved.begin() + shift);
      expect(fingerprint(moved.data() + shift, count) == usual, what + " depends on the alignment");
    }
    if (count > 0) expect(fingerprint(src.data(), count - 1) != usual, what + " does not depend on their number");
    for (int64_t i = 0; i < count; ++i) {
      const float kept = src[i];
      uint32_t changed = bits(kept) ^ (1u << random.below(32));
      std::memcpy(&src[i], &changed, sizeof changed);
      expect(fingerprint(src.data(), count) != usual, what + " misses a bit");
      src[i] = -kept;
      expect(fingerprint(src.data(), count) != usual, what + " misses a sign");
      src[i] = kept;
      const int64_t other = random.below(count);
      if (bits(src[other]) == bits(kept)) continue;
      std::swap(src[i], src[other]);
      expect(fingerprint(src.data(), count) != usual, what + " misses an exchange");
      std::swap(src[i], src[other]);
    }
  }
}

// Every float of every line it says to read counts, and no other.
void check_fingerprint_sample(const KernelSet& set, Fingerprint fingerprint, Random& random) {
  const int64_t count = 20011;
  std::vector<float> src = random.values(count);
  std::vector<bool> is_read(static_cast<size_t>(count));
  for (int64_t line = 0; line < kSampleLines; ++line)
    for (int64_t i = 0; i < kLineFloats; ++i)
      is_read[static_cast<size_t>((count - kLineFloats) * line / (kSampleLines - 1) + i)] = true;
  const std::string what = text("%s sampled fingerprint", set.isa);
  const uint64_t usual = fingerprint(src.data(), count);
  expect(is_read.front() && is_read.back(), what + " covers both ends");
  for (int64_t i = 0; i < count; i += i + 40 < count ? 1 + random.below(3) : 1) {
    const float kept = src[static_cast<size_t>(i)];
    src[static_cast<size_t>(i)] = -kept;
    expect((fingerprint(src.data(), count) != usual) == is_read[static_cast<size_t>(i)],
           what + text(" at %d", static_cast<int>(i)));
    src[static_cast<size_t>(i)] = kept;
  }
  expect(fingerprint(src.data(), count) == usual, what + " is not the same again");
}

void check_fma_probe(const KernelSet& set, FmaProbe fma_probe) {
  float sink = 1;
  const double flops = fma_probe(10, &sink);
  expect(flops > 0 && fma_probe(20, &sink) == 2 * flops, text("%s fma_probe counts its operations", set.isa));
  expect(std::isfinite(sink), text("%s fma_probe stays finite", set.isa));
}

}  // namespace fastseq::harness
