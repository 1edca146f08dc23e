// Watches: is a module still what the matcher saw? Compares the objects in its __dict__ by identity, which is exact because only
// immutable attributes are matched, and cheap enough for every call.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/gate.h"
#include "bindings/versions.h"

namespace fastseq {

namespace py = pybind11;

// kHooked: calling the module does more than its forward: it has hooks, or torch.nn.Module.compile was called on it.
enum class WatchResult { kSame, kHooked, kChanged };

class ModuleWatch {
 public:
  // attributes: names in module.__dict__ whose values (or absence) were matched; parameters, buffers: names in module._parameters
  // and module._buffers that forward reads. children: the values of module._modules in order, for a container; names: its keys,
  // where they count. is_owner: the module owns the program that this watch belongs to, and is not kept alive by it.
  ModuleWatch(py::object module, const std::vector<std::string>& attributes, const std::vector<std::string>& parameters,
              const std::vector<std::string>& buffers, std::optional<py::tuple> children, std::optional<py::tuple> names,
              bool is_owner);
  ~ModuleWatch();
  ModuleWatch(const ModuleWatch&) = delete;
  ModuleWatch& operator=(const ModuleWatch&) = delete;

  WatchResult check(bool check_hooks = true) const;

  // The objects in the order of `parameters` and then of `buffers`, borrowed; null for one that the module no longer has (None is
  // given as such).
  PyObject* const* current_parameters() const;
  // For the garbage collector: the references held here.
  int traverse(visitproc visit, void* arg) const;

 private:
  bool has_changed(PyObject* values) const;
  bool has_other_children() const;

  PyObject* module_;
  bool is_owner_;
  PyTypeObject* type_;
  py::object forward_;      // of the type, in case somebody patches the class
  py::object own_forward_;  // of the instance, normally none
  std::vector<std::pair<py::object, py::object>> attributes_;
  std::vector<py::object> parameters_, buffers_;  // names
  std::optional<py::tuple> children_, names_;

  // What the last look found, for the next one to start from: valid while the stamps are those of the class, of the module's
  // __dict__, and of the dictionaries in it. Borrowed: the stamped __dict__ refers to them.
  mutable Stamp type_stamp_, dict_stamp_, children_stamp_, parameters_stamp_, buffers_stamp_;
  mutable std::array<PyObject*, 4> hooks_ = {};  // null: not a dictionary
  mutable PyObject *modules_ = nullptr, *parameters_dict_ = nullptr, *buffers_dict_ = nullptr;
  mutable bool is_compiled_ = false;
  mutable std::vector<PyObject*> found_parameters_;
};

// Names in dictionaries of modules and in classes, and what was found there.
class Lookups {
 public:
  // value: of a class, null stands for nothing by that name.
  struct Lookup {
    py::object holder, key, value;
  };

  void add(py::object holder, py::object key, py::object value);
  // The index of a name that stands for something else now, or nothing.
  std::optional<size_t> changed() const;
  const std::vector<Lookup>& all() const { return lookups_; }

 private:
  std::vector<Lookup> lookups_;
  std::vector<PyObject*> holders_;  // each once
  mutable std::vector<Stamp> stamps_;
};

// What a forward of Python code was traced from: the function's code, and what its global names, torch's functions and the
// attributes of its class were.
class ForwardWatch {
 public:
  // names: (dictionary or class, key, value); of a class, None stands for nothing by that name.
  ForwardWatch(py::object function, const std::vector<std::tuple<py::object, py::str, py::object>>& names);

  bool is_same() const;
  // For the garbage collector: the references held here.
  int traverse(visitproc visit, void* arg) const;

 private:
  py::object function_, code_;
  Lookups names_;
};

// Null, or what concerns all modules and so leaves every run to eager: hooks registered for all of them, or another function in
// the place of one that eager looks up by name (fastseq.matcher.LOOKED_UP); in classes only of layers that are watched.
Reason refuse_globally();

}  // namespace fastseq
