// Program: what a FusedSequential runs per call. Native runs and eager layers in order, and the counters.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <vector>

#include "bindings/native_run.h"

namespace fastseq {

// Adds the type fastseq._C.Program to the module. A plain CPython type: a pybind11 call costs as much as a small MLP.
void add_program_type(py::module_& module);

}  // namespace fastseq
