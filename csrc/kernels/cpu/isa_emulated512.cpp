// The AVX-512 tiles compiled for the baseline, so that a machine without AVX-512 can still test their logic, tails and tables.
// Slow by design and never chosen unless FASTSEQ_ISA=emulated512 asks for it.
#include "kernels/cpu/kernels.h"

// Values of this type cross no translation unit, so the ABI note about 64-byte vectors does not apply.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC optimize("O1")

namespace fastseq::cpu {
namespace {
namespace emulated512 {

constexpr char kIsa[] = "emulated512";

#include "kernels/cpu/limits_512.inl.h"
#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(64)));
// The products of the low halves.
static FASTSEQ_INLINE HalfWords multiply_low(HalfWords a, HalfWords b) { return (a & 0xffffffffull) * (b & 0xffffffffull); }

#include "kernels/cpu/kernel_set.inl.h"

}  // namespace emulated512
}  // namespace

constexpr KernelSet kEmulated512Kernels = emulated512::make_kernel_set();
const KernelSet& kernels_emulated512() { return kEmulated512Kernels; }

}  // namespace fastseq::cpu
