// The baseline of the target architecture (SSE2 on x86-64, NEON on aarch64), 16 registers of 4 floats: runs everywhere.
#include "kernels/cpu/kernels.h"

namespace fastseq::cpu {
namespace {
namespace portable {

constexpr char kIsa[] = "portable";
constexpr int kLanes = 4;
constexpr int kPreferredVectors = 2, kPreferredPoolVectors = 2;
constexpr int kRows1 = 8, kRows2 = 6, kRows3 = 4, kRows4 = 3;
constexpr int kWindows1 = 2, kWindows2 = 1, kWindows3 = 1, kWindows4 = 0;
constexpr int kRowPanels1 = 4, kRowPanels2 = 3, kRowPanels3 = 2;
constexpr int kProductRows1 = 12, kProductRows2 = 6, kProductRows3 = 4, kProductRows4 = 3;

#include "kernels/cpu/vector.inl.h"

typedef uint64_t HalfWords __attribute__((vector_size(16)));
static FASTSEQ_INLINE HalfWords multiply_halves(HalfWords v) { return (v & 0xffffffffull) * (v >> 32); }

#include "kernels/cpu/kernel_set.inl.h"

}  // namespace portable
}  // namespace

constexpr KernelSet kPortableKernels = portable::make_kernel_set();
const KernelSet& kernels_portable() { return kPortableKernels; }

}  // namespace fastseq::cpu
