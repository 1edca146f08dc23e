// The baseline of the target architecture (SSE2 on x86-64, NEON on aarch64): runs everywhere.
#include "kernels/cpu/kernels.h"

namespace fastseq::cpu {
namespace {
namespace portable {

constexpr char kIsa[] = "portable";

#include "kernels/cpu/limits_128.inl.h"
#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(16)));
// The products of the low halves.
static FASTSEQ_INLINE HalfWords multiply_low(HalfWords a, HalfWords b) { return (a & 0xffffffffull) * (b & 0xffffffffull); }

#include "kernels/cpu/kernel_set.inl.h"

}  // namespace portable
}  // namespace

constexpr KernelSet kPortableKernels = portable::make_kernel_set();
const KernelSet& kernels_portable() { return kPortableKernels; }

}  // namespace fastseq::cpu
