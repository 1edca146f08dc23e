// Watches: is a module still what the matcher saw? Compares the objects in its __dict__ by identity, which is exact because only
// immutable attributes are matched, and cheap enough for every call.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/gate.h"

namespace fastseq {

namespace py = pybind11;

enum class WatchResult { kSame, kHooked, kChanged };

class ModuleWatch {
 public:
  // attributes: names in module.__dict__ whose values were matched; parameters: names in module._parameters that forward reads.
  // children: the values of module._modules in order, for a container.
  ModuleWatch(py::object module, const std::vector<std::string>& attributes, const std::vector<std::string>& parameters,
              std::optional<py::tuple> children);

  WatchResult check(bool check_hooks = true) const;

  // The parameter object, borrowed; null if the module no longer has it (None is returned as such).
  PyObject* parameter(size_t index) const;
  PyObject* module() const { return module_.ptr(); }
  // torch.nn.Module.compile() was called on the module.
  bool is_compiled() const;

 private:
  py::object dict() const;

  py::object module_;
  PyTypeObject* type_;
  py::object forward_;  // of the type, in case somebody patches the class
  std::vector<std::pair<py::object, py::object>> attributes_;
  std::vector<py::object> parameters_;
  std::optional<py::tuple> children_;
};

// Hooks registered for all modules fire for every layer, so a run with any of them is eager.
bool has_global_hooks();

}  // namespace fastseq
