// AVX-512: 32 registers of 16 floats. 7x4, 9x3 and 12x2 vectors; a taller 2-vector tile would run out of address registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels/cpu/kernels.h"

// gcc 12's own _mm512_mul_epu32 passes an undefined vector on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")

namespace fastseq::cpu {
namespace {
namespace avx512 {

constexpr char kIsa[] = "avx512";

#include "kernels/cpu/limits_512.inl.h"
#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(64)));
// The products of the low halves.
static FASTSEQ_INLINE HalfWords multiply_low(HalfWords a, HalfWords b) {
  return reinterpret_cast<HalfWords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

#include "kernels/cpu/kernel_set.inl.h"

}  // namespace avx512
}  // namespace

constexpr KernelSet kAvx512Kernels = avx512::make_kernel_set();
const KernelSet& kernels_avx512() { return kAvx512Kernels; }

}  // namespace fastseq::cpu
#endif  // __x86_64__
