// What other threads of this process are doing.
#pragma once

#include <pybind11/pybind11.h>

namespace fastseq {

namespace py = pybind11;

// Whether the Python thread `ident` is inside a call of `code` whose local variable `name` is `value`. Looks at the whole stack
// without letting the thread go on: a walk along frame.f_back in Python loses its way where a generator is left meanwhile.
bool is_calling(unsigned long ident, const py::object& code, const py::str& name, const py::object& value);

}  // namespace fastseq
