// Steps of rows of features that are no Linear: each makes rows of rows. A new one is an Op, an entry in the table of rows.cpp, a
// kernel, and the reading of its numbers in bindings/from_python.cpp.
#pragma once

#include "kernels/cpu/kernels.h"
#include "plan/plan.h"
#include "plan/spec.h"

namespace fastseq {

struct RowOp {
  Op op;
  const char* kernel;  // the name before the instruction set
  // Fills in what `rows` reads of a step, for rows of step.n features. Refusal where eager would raise.
  void (*prepare)(const StepSpec& spec, const cpu::KernelSet& set, LinearStep& step);
  MakeRows rows;
};

// Null for all but those.
const RowOp* row_op(Op op);

}  // namespace fastseq
