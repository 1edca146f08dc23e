#include "bindings/watch.h"

#include <array>

namespace fastseq {
namespace {

// Interned names live as long as the process: no destruction order at interpreter exit to think of.
PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

const std::array<PyObject*, 4>& hook_names() {
  static const std::array<PyObject*, 4> names = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                                 interned("_backward_hooks"), interned("_backward_pre_hooks")};
  return names;
}

// The dictionary's value, borrowed, or null. The keys are interned strings, so no comparison can raise.
PyObject* find(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }

PyObject* forward_name() {
  static PyObject* const name = interned("forward");
  return name;
}

// Looks along the bases; borrowed.
PyObject* type_forward(PyTypeObject* type) { return _PyType_Lookup(type, forward_name()); }

}  // namespace

ModuleWatch::ModuleWatch(py::object module, const std::vector<std::string>& attributes, const std::vector<std::string>& parameters,
                         std::optional<py::tuple> children, std::optional<py::tuple> names, bool is_owner)
    : module_(module.ptr()),
      is_owner_(is_owner),
      type_(Py_TYPE(module_)),
      children_(std::move(children)),
      names_(std::move(names)) {
  if (!is_owner_) Py_INCREF(module_);
  forward_ = py::reinterpret_borrow<py::object>(type_forward(type_));
  const py::dict values = dict();
  const auto value_of = [&](PyObject* key) { return py::reinterpret_borrow<py::object>(find(values.ptr(), key)); };
  own_forward_ = value_of(forward_name());
  for (const std::string& name : attributes) {
    PyObject* key = PyUnicode_InternFromString(name.c_str());
    attributes_.emplace_back(py::reinterpret_steal<py::object>(key), value_of(key));
  }
  for (const std::string& name : parameters)
    parameters_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str())));
}

ModuleWatch::~ModuleWatch() {
  if (!is_owner_) Py_DECREF(module_);
}

int ModuleWatch::traverse(visitproc visit, void* arg) const {
  if (!is_owner_) Py_VISIT(module_);
  Py_VISIT(forward_.ptr());
  Py_VISIT(own_forward_.ptr());
  for (const auto& [name, expected] : attributes_) Py_VISIT(expected.ptr());
  if (children_) Py_VISIT(children_->ptr());
  if (names_) Py_VISIT(names_->ptr());
  return 0;
}

py::object ModuleWatch::dict() const { return py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module_, nullptr)); }

WatchResult ModuleWatch::check(bool check_hooks) const {
  static PyObject* const modules_name = interned("_modules");
  static PyObject* const compiled_name = interned("_compiled_call_impl");
  if (Py_TYPE(module_) != type_ || type_forward(type_) != forward_.ptr()) return WatchResult::kChanged;
  const py::object holder = dict();
  PyObject* const values = holder.ptr();
  if (!values) {
    PyErr_Clear();
    return WatchResult::kChanged;
  }
  for (const auto& [name, expected] : attributes_)
    if (find(values, name.ptr()) != expected.ptr()) return WatchResult::kChanged;
  // A parameter of the same name in __dict__ would hide the registered one.
  for (const py::object& name : parameters_)
    if (find(values, name.ptr())) return WatchResult::kChanged;
  if (find(values, forward_name()) != own_forward_.ptr()) return WatchResult::kChanged;
  if (children_) {
    PyObject* const modules = find(values, modules_name);
    const Py_ssize_t count = static_cast<Py_ssize_t>(children_->size());
    if (!modules || !PyDict_Check(modules) || PyDict_GET_SIZE(modules) != count) return WatchResult::kChanged;
    PyObject *key, *child;
    Py_ssize_t position = 0;
    for (Py_ssize_t i = 0; PyDict_Next(modules, &position, &key, &child); ++i) {
      if (child != PyTuple_GET_ITEM(children_->ptr(), i)) return WatchResult::kChanged;
      if (!names_) continue;
      PyObject* const name = PyTuple_GET_ITEM(names_->ptr(), i);
      if (key != name && PyUnicode_Compare(key, name) != 0) return WatchResult::kChanged;
    }
  }
  if (check_hooks) {
    PyObject* const compiled = find(values, compiled_name);
    if (compiled && compiled != Py_None) return WatchResult::kHooked;
    for (PyObject* name : hook_names()) {
      PyObject* const hooks = find(values, name);
      if (!hooks || !PyDict_Check(hooks)) return WatchResult::kChanged;
      if (PyDict_GET_SIZE(hooks) != 0) return WatchResult::kHooked;
    }
  }
  return WatchResult::kSame;
}

PyObject* ModuleWatch::parameter(size_t index) const {
  static PyObject* const parameters_name = interned("_parameters");
  const py::object holder = dict();
  PyObject* const parameters = holder.ptr() ? find(holder.ptr(), parameters_name) : nullptr;
  return parameters && PyDict_Check(parameters) ? find(parameters, parameters_[index].ptr()) : nullptr;
}

ForwardWatch::ForwardWatch(py::object function, const std::vector<std::tuple<py::object, py::str, py::object>>& names)
    : function_(std::move(function)) {
  if (!PyFunction_Check(function_.ptr())) throw py::type_error("ForwardWatch expects a Python function");
  code_ = py::reinterpret_borrow<py::object>(PyFunction_GET_CODE(function_.ptr()));
  for (const auto& [holder, key, value] : names) {
    if (!PyType_Check(holder.ptr()) && !PyDict_Check(holder.ptr())) throw py::type_error("ForwardWatch expects dicts and classes");
    PyObject* interned_key = py::object(key).release().ptr();
    PyUnicode_InternInPlace(&interned_key);
    names_.push_back({holder, py::reinterpret_steal<py::object>(interned_key), value});
  }
}

bool ForwardWatch::is_same() const {
  if (PyFunction_GET_CODE(function_.ptr()) != code_.ptr()) return false;
  for (const Name& name : names_) {
    if (PyType_Check(name.holder.ptr())) {
      PyObject* const found = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(name.holder.ptr()), name.key.ptr());
      if (found != (name.value.is_none() ? nullptr : name.value.ptr())) return false;
    } else if (find(name.holder.ptr(), name.key.ptr()) != name.value.ptr()) {
      return false;
    }
  }
  return true;
}

int ForwardWatch::traverse(visitproc visit, void* arg) const {
  Py_VISIT(function_.ptr());
  Py_VISIT(code_.ptr());
  for (const Name& name : names_) {
    Py_VISIT(name.holder.ptr());
    Py_VISIT(name.key.ptr());
    Py_VISIT(name.value.ptr());
  }
  return 0;
}

Reason refuse_globally() {
  if (is_disabled()) return "fastseq.disabled() is active in this thread";
  struct Original {
    PyObject *holder, *name, *value;  // holder: a class, or the dictionary of a module
    Reason reason;
    PyObject* found() const {
      return PyType_Check(holder) ? _PyType_Lookup(reinterpret_cast<PyTypeObject*>(holder), name) : find(holder, name);
    }
  };
  struct Globals {
    std::vector<PyObject*> hooks;
    std::vector<Original> originals;
  };
  static const Globals* const globals = [] {
    auto* g = new Globals;
    const py::module_ module = py::module_::import("torch.nn.modules.module");
    for (const char* name :
         {"_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"})
      g->hooks.push_back(py::object(module.attr(name)).release().ptr());
    // What fastseq found when it was imported, which is before anybody could replace it behind fastseq's back.
    for (const py::handle entry : py::list(py::module_::import("fastseq.matcher").attr("LOOKED_UP"))) {
      const auto [owner, name, value] = entry.cast<std::tuple<py::object, std::string, py::object>>();
      const std::string path = py::str(owner.attr("__name__")).cast<std::string>() + "." + name;
      py::object holder = PyType_Check(owner.ptr()) ? owner : py::object(owner.attr("__dict__"));
      g->originals.push_back(
          {holder.release().ptr(), interned(name.c_str()), py::object(value).release().ptr(), lasting(path + " was replaced")});
    }
    return g;
  }();
  for (PyObject* hooks : globals->hooks)
    if (PyDict_GET_SIZE(hooks) != 0) return "hooks for all modules are registered";
  for (const Original& original : globals->originals)
    if (original.found() != original.value) return original.reason;
  return nullptr;
}

}  // namespace fastseq
