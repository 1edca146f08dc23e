// AVX-512 with vdpbf16ps: register tiles on pairs of bfloat16 numbers, beside the kernels of isa_avx512.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/kernels.h"

#pragma GCC target("avx512bf16,avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")

namespace fastseq::cpu {
namespace {
namespace avx512_bf16 {

constexpr char kBf16Isa[] = "avx512_bf16";
constexpr double kBf16Speed = 1.9;

#include "kernels/cpu/limits_512.inl.h"
#include "kernels/cpu/vector.inl.h"

#include "kernels/cpu/gemm_tile.inl.h"

// Each of the two additions is rounded, the odd number's first. Subnormal numbers count as zero, whatever the CPU's modes.
struct PairProduct {
  static constexpr bool kScales = true;
  static FASTSEQ_INLINE Vec spread(const float* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return reinterpret_cast<Vec>(_mm512_set1_epi32(pair));
  }
  static FASTSEQ_INLINE Vec add(Vec sum, Vec x, Vec weight) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weight));
  }
};

#include "kernels/cpu/bf16_tiles.inl.h"

}  // namespace avx512_bf16
}  // namespace

constexpr Bf16Tiles kAvx512Bf16Tiles = avx512_bf16::make_bf16_tiles();
const Bf16Tiles& bf16_tiles_avx512() { return kAvx512Bf16Tiles; }

}  // namespace fastseq::cpu
#endif  // __x86_64__
