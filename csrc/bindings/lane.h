// The fast lane: what `model(x)` runs before any line of Python.
#pragma once

#include <pybind11/pybind11.h>

namespace fastseq {

namespace py = pybind11;

// Puts the lane into a class's slot for calls, in front of what it holds. `type`: a class with a `__call__` of its own, written in
// Python: it runs whatever the lane leaves, and stays what everybody else finds there. An assignment to `type.__call__` takes the
// lane out, and subclasses are without: CPython then looks `__call__` up, as for any class.
// `key`: of an instance's __dict__, where an object of the class `match` may be, whose slot `lane` may hold a Program.
void install_lane(py::type type, py::str key, py::type match);

}  // namespace fastseq
