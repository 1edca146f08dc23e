#include "kernels/cuda/kernels.h"

namespace fastseq::cuda {

const char* name_of(Math math) {
  switch (math) {
    case Math::kIeee:
      return "f32";
    case Math::kTf32:
      return "tf32";
    case Math::kF16:
      return "f16";
    case Math::kBF16:
      return "bf16";
  }
  return "";
}

}  // namespace fastseq::cuda
