#include "bindings/watch.h"

#include <algorithm>
#include <array>
#include <iterator>

namespace fastseq {
namespace {

const std::array<PyObject*, 4>& hook_names() {
  static const std::array<PyObject*, 4> names = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                                 interned("_backward_hooks"), interned("_backward_pre_hooks")};
  return names;
}

PyObject* forward_name() {
  static PyObject* const name = interned("forward");
  return name;
}

// Looks along the bases; borrowed.
PyObject* type_forward(PyTypeObject* type) { return _PyType_Lookup(type, forward_name()); }

// What eager looks up in the class by name at each call has to be torch's from now on, see refuse_globally.
void expect_originals_of(PyTypeObject* type);

}  // namespace

ModuleWatch::ModuleWatch(py::object module, const std::vector<std::string>& attributes, const std::vector<std::string>& parameters,
                         const std::vector<std::string>& buffers, std::optional<py::tuple> children, std::optional<py::tuple> names,
                         bool is_owner)
    : module_(module.ptr()),
      is_owner_(is_owner),
      type_(Py_TYPE(module_)),
      children_(std::move(children)),
      names_(std::move(names)) {
  forward_ = py::reinterpret_borrow<py::object>(type_forward(type_));
  PyObject* const values = dict_of(module_);
  if (!values) throw py::type_error("ModuleWatch expects an object with a __dict__");
  const auto value_of = [&](PyObject* key) { return py::reinterpret_borrow<py::object>(find(values, key)); };
  own_forward_ = value_of(forward_name());
  for (const std::string& name : attributes) {
    PyObject* key = PyUnicode_InternFromString(name.c_str());
    attributes_.emplace_back(py::reinterpret_steal<py::object>(key), value_of(key));
  }
  const auto intern = [](const std::string& name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name.c_str()));
  };
  std::transform(parameters.begin(), parameters.end(), std::back_inserter(parameters_), intern);
  std::transform(buffers.begin(), buffers.end(), std::back_inserter(buffers_), intern);
  found_parameters_.resize(parameters_.size() + buffers_.size());
  if (!is_owner_) Py_INCREF(module_);
  expect_originals_of(type_);
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

// Compares what `values`, the module's __dict__, holds by itself; and remembers the dictionaries in it.
bool ModuleWatch::has_changed(PyObject* values) const {
  static PyObject* const modules_name = interned("_modules");
  static PyObject* const parameters_name = interned("_parameters");
  static PyObject* const buffers_name = interned("_buffers");
  static PyObject* const compiled_name = interned("_compiled_call_impl");
  for (const auto& [name, expected] : attributes_)
    if (find(values, name.ptr()) != expected.ptr()) return true;
  // A value of the same name in __dict__ would hide the registered one.
  for (const auto* names : {&parameters_, &buffers_})
    for (const py::object& name : *names)
      if (find(values, name.ptr())) return true;
  if (find(values, forward_name()) != own_forward_.ptr()) return true;
  const auto dict_named = [&](PyObject* name) {
    PyObject* const found = find(values, name);
    return found && PyDict_Check(found) ? found : nullptr;
  };
  modules_ = dict_named(modules_name);
  parameters_dict_ = dict_named(parameters_name);
  buffers_dict_ = dict_named(buffers_name);
  std::transform(hook_names().begin(), hook_names().end(), hooks_.begin(), dict_named);
  PyObject* const compiled = find(values, compiled_name);
  is_compiled_ = compiled && compiled != Py_None;
  dict_stamp_.remember(values);
  return false;
}

bool ModuleWatch::has_other_children() const {
  const Py_ssize_t count = static_cast<Py_ssize_t>(children_->size());
  if (!modules_ || PyDict_GET_SIZE(modules_) != count) return true;
  PyObject *key, *child;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(modules_, &position, &key, &child); ++i) {
    if (child != PyTuple_GET_ITEM(children_->ptr(), i)) return true;
    if (!names_) continue;
    PyObject* const name = PyTuple_GET_ITEM(names_->ptr(), i);
    if (key != name && PyUnicode_Compare(key, name) != 0) return true;
  }
  children_stamp_.remember(modules_);
  return false;
}

WatchResult ModuleWatch::check(bool check_hooks) const {
  if (Py_TYPE(module_) != type_) return WatchResult::kChanged;
  if (!type_stamp_.is_of(reinterpret_cast<PyObject*>(type_))) {
    if (type_forward(type_) != forward_.ptr()) return WatchResult::kChanged;
    type_stamp_.remember(reinterpret_cast<PyObject*>(type_));
  }
  PyObject* const values = dict_of(module_);
  if (!values) return WatchResult::kChanged;
  if (!dict_stamp_.is_of(values) && has_changed(values)) return WatchResult::kChanged;
  if (children_ && !(modules_ && children_stamp_.is_of(modules_)) && has_other_children()) return WatchResult::kChanged;
  if (check_hooks) {
    if (is_compiled_) return WatchResult::kHooked;
    for (PyObject* hooks : hooks_) {
      if (!hooks) return WatchResult::kChanged;
      if (PyDict_GET_SIZE(hooks) != 0) return WatchResult::kHooked;
    }
  }
  return WatchResult::kSame;
}

PyObject* const* ModuleWatch::current_parameters() const {
  static PyObject* const parameters_name = interned("_parameters");
  static PyObject* const buffers_name = interned("_buffers");
  PyObject* const values = dict_of(module_);
  const bool is_known = values && dict_stamp_.is_of(values);
  const auto is_same = [](PyObject* dict, const Stamp& stamp) { return dict && stamp.is_of(dict); };
  if (is_known && is_same(parameters_dict_, parameters_stamp_) && (buffers_.empty() || is_same(buffers_dict_, buffers_stamp_)))
    return found_parameters_.data();
  auto to = found_parameters_.begin();
  const auto look_up = [&](PyObject* known, PyObject* name, const std::vector<py::object>& keys, Stamp& stamp) {
    PyObject* dict = is_known ? known : values ? find(values, name) : nullptr;
    if (dict && !PyDict_Check(dict)) dict = nullptr;
    to =
        std::transform(keys.begin(), keys.end(), to, [&](const py::object& key) { return dict ? find(dict, key.ptr()) : nullptr; });
    if (dict) {
      stamp.remember(dict);
    } else {
      stamp.forget();
    }
  };
  look_up(parameters_dict_, parameters_name, parameters_, parameters_stamp_);
  look_up(buffers_dict_, buffers_name, buffers_, buffers_stamp_);
  return found_parameters_.data();
}

void Lookups::add(py::object holder, py::object key, py::object value) {
  if (!PyType_Check(holder.ptr()) && !PyDict_Check(holder.ptr())) throw py::type_error("expected dictionaries and classes");
  if (std::find(holders_.begin(), holders_.end(), holder.ptr()) == holders_.end()) {
    holders_.push_back(holder.ptr());
    stamps_.emplace_back();
  }
  PyObject* interned_key = key.release().ptr();
  PyUnicode_InternInPlace(&interned_key);
  lookups_.push_back({std::move(holder), py::reinterpret_steal<py::object>(interned_key), std::move(value)});
}

std::optional<size_t> Lookups::changed() const {
  bool is_known = true;
  for (size_t i = 0; i < holders_.size() && is_known; ++i) is_known = stamps_[i].is_of(holders_[i]);
  if (is_known) return std::nullopt;
  for (size_t i = 0; i < lookups_.size(); ++i) {
    const Lookup& l = lookups_[i];
    PyObject* const found = PyType_Check(l.holder.ptr())
                                ? _PyType_Lookup(reinterpret_cast<PyTypeObject*>(l.holder.ptr()), l.key.ptr())
                                : find(l.holder.ptr(), l.key.ptr());
    if (found != l.value.ptr()) return i;
  }
  for (size_t i = 0; i < holders_.size(); ++i) stamps_[i].remember(holders_[i]);
  return std::nullopt;
}

ForwardWatch::ForwardWatch(py::object function, const std::vector<std::tuple<py::object, py::str, py::object>>& names)
    : function_(std::move(function)) {
  if (!PyFunction_Check(function_.ptr())) throw py::type_error("ForwardWatch expects a Python function");
  code_ = py::reinterpret_borrow<py::object>(PyFunction_GET_CODE(function_.ptr()));
  for (const auto& [holder, key, value] : names) {
    const bool is_absent = PyType_Check(holder.ptr()) && value.is_none();
    names_.add(holder, key, is_absent ? py::object() : value);
  }
}

bool ForwardWatch::is_same() const { return PyFunction_GET_CODE(function_.ptr()) == code_.ptr() && !names_.changed(); }

int ForwardWatch::traverse(visitproc visit, void* arg) const {
  Py_VISIT(function_.ptr());
  Py_VISIT(code_.ptr());
  for (const Lookups::Lookup& name : names_.all()) {
    Py_VISIT(name.holder.ptr());
    Py_VISIT(name.key.ptr());
    Py_VISIT(name.value.ptr());
  }
  return 0;
}

namespace {

// What concerns all modules, as it was when fastseq was imported: before anybody could replace it behind fastseq's back.
struct Globals {
  Globals() {
    const py::module_ module = py::module_::import("torch.nn.modules.module");
    for (const char* name :
         {"_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"})
      hooks.push_back(py::object(module.attr(name)).release().ptr());
    for (const py::handle entry : py::list(py::module_::import("fastseq.matcher").attr("LOOKED_UP")))
      waiting.push_back(entry.cast<Original>());
    // Functions at once, and the base of all classes: what is called before a layer's own class.
    expect([](const py::object& owner) { return !is_layer_type(owner); });
  }

  // Begins to compare the originals of some owners.
  template <typename Predicate>
  void expect(const Predicate& is_wanted) {
    const auto rest = std::stable_partition(waiting.begin(), waiting.end(),
                                            [&](const Original& original) { return !is_wanted(std::get<0>(original)); });
    for (auto found = rest; found != waiting.end(); ++found) {
      const auto& [owner, name, value] = *found;
      const std::string path = py::str(owner.attr("__name__")).cast<std::string>() + "." + name;
      py::object holder = PyType_Check(owner.ptr()) ? owner : py::object(owner.attr("__dict__"));
      originals.add(std::move(holder), py::str(name), value);
      reasons.push_back(lasting(path + " was replaced"));
    }
    waiting.erase(rest, waiting.end());
  }

  static bool is_layer_type(const py::object& owner) {
    const py::module_ nn = py::module_::import("torch.nn");
    return PyType_Check(owner.ptr()) && !owner.is(nn.attr("Module")) && !owner.is(nn.attr("Sequential"));
  }

  using Original = std::tuple<py::object, std::string, py::object>;
  std::vector<PyObject*> hooks;
  std::vector<Original> waiting;  // of classes of which no layer is watched: there are many, and each costs every call
  Lookups originals;
  std::vector<Reason> reasons;  // of each lookup
};

Globals& globals() {
  static Globals* const g = new Globals;
  return *g;
}

void expect_originals_of(PyTypeObject* type) {
  if (globals().waiting.empty()) return;
  globals().expect([type](const py::object& owner) { return owner.ptr() == reinterpret_cast<PyObject*>(type); });
}

}  // namespace

Reason refuse_globally() {
  if (is_disabled()) return "fastseq.disabled() is active in this thread";
  const Globals& g = globals();
  for (PyObject* hooks : g.hooks)
    if (PyDict_GET_SIZE(hooks) != 0) return "hooks for all modules are registered";
  const std::optional<size_t> replaced = g.originals.changed();
  return replaced ? g.reasons[*replaced] : nullptr;
}

}  // namespace fastseq
