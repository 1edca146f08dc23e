// Program: what a FusedSequential runs per call. Native runs and eager layers in order, and the counters.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <vector>

#include "bindings/native_run.h"

namespace fastseq {

// Adds the types fastseq._C.Program and fastseq._C.Refused. Plain CPython types: a pybind11 call costs as much as a small MLP.
void add_program_types(py::module_& module);

bool is_program(PyObject* object);  // object: may be null

// What `owner(input)` gives, a new reference; or null: with an exception set, or without if Module.__call__ must take over.
PyObject* run_program(PyObject* program, PyObject* owner, PyObject* input);

}  // namespace fastseq
