// Where large results live. The kernel hands out fresh pages at a few microseconds each, which for a result of some megabytes is
// more than a small network computes: blocks that nobody uses any more serve the next results, as many as fit a bound.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <optional>

namespace fastseq {

// A CPU tensor with undefined contents, as at::empty gives it: it may be resized, shared and kept for ever.
at::Tensor empty_output(at::IntArrayRef sizes, at::ScalarType dtype, std::optional<at::MemoryFormat> format);

}  // namespace fastseq
