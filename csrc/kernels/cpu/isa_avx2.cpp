// AVX2 and FMA: 16 registers of 8 floats. 6x2, 4x3 and 3x4 vectors leave room for the weights and one broadcast.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/kernels.h"

#pragma GCC target("avx2,fma")

namespace fastseq::cpu {
namespace {
namespace avx2 {

constexpr char kIsa[] = "avx2";
constexpr int kLanes = 8;
constexpr bool kHasManyRegisters = false;
constexpr int kPreferredVectors = 2, kPreferredPoolVectors = 3;
constexpr int kRows1 = 8, kRows2 = 6, kRows3 = 4, kRows4 = 3;
constexpr int kWindows1 = 2, kWindows2 = 1, kWindows3 = 1, kWindows4 = 0;
constexpr int kRowPanels1 = 4, kRowPanels2 = 3, kRowPanels3 = 2;
constexpr int kInPlaceRows = 4;
constexpr int kProductRows1 = 12, kProductRows2 = 6, kProductRows3 = 4, kProductRows4 = 3;
constexpr int kPlaneOuts = 3;

#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(32)));
// The products of the low halves.
static FASTSEQ_INLINE HalfWords multiply_low(HalfWords a, HalfWords b) {
  return reinterpret_cast<HalfWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

#include "kernels/cpu/kernel_set.inl.h"

}  // namespace avx2
}  // namespace

constexpr KernelSet kAvx2Kernels = avx2::make_kernel_set();
const KernelSet& kernels_avx2() { return kAvx2Kernels; }

}  // namespace fastseq::cpu
#endif  // __x86_64__
