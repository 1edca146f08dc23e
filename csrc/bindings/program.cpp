#include "bindings/program.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastseq {
namespace {

struct Segment {
  std::shared_ptr<NativeRun> run;      // null for an eager layer
  std::vector<py::object> layers;      // those that run, in order
  std::shared_ptr<ModuleWatch> watch;  // of an eager layer that may become one to fuse, or null
};

struct Counters {
  int64_t fused = 0, eager = 0;
  std::map<Reason, int64_t> fallbacks;
  void count_fallback(Reason reason) {
    ++eager;
    ++fallbacks[reason];
  }
};

struct State {
  PyObject* owner = nullptr;  // borrowed: the owner holds the program. A copy of the owner's __dict__ is not the owner.
  std::vector<std::shared_ptr<ModuleWatch>> containers;  // the owner first
  std::vector<Segment> segments;
  std::vector<std::shared_ptr<ForwardWatch>> forwards;  // whose trace the segments are; none for those of a Sequential
  bool has_native = false;
  bool shares = false;  // another program of the same owner has the same watches and runs, and tells the garbage collector of them
  Counters counters;
  std::map<Reason, int64_t> declined;  // by attempt()
};

struct Program {
  PyObject_HEAD State* state;
};

constexpr Reason kHooked = "a layer has hooks or a compiled call";
constexpr Reason kChanged = "changed";  // the Python side builds a new program and tries again

py::dict counts_by_text(const std::map<Reason, int64_t>& counts) {
  py::dict result;
  for (const auto& [reason, number] : counts) {
    const py::str key(reason);
    result[key] = number + (result.contains(key) ? result[key].cast<int64_t>() : 0);
  }
  return result;
}

// Null, or why no native run may be tried at all. `is_called`: through __call__, so the owner's own hooks count.
Reason refuse_all(const State& state, PyObject* owner, bool is_called) {
  if (owner != state.owner || state.containers.empty()) return kChanged;
  if (const Reason reason = refuse_globally()) return reason;
  for (const auto& forward : state.forwards)
    if (!forward->is_same()) return kChanged;
  for (size_t i = 0; i < state.containers.size(); ++i) {
    const WatchResult result = state.containers[i]->check(/*check_hooks=*/is_called || i > 0);
    if (result == WatchResult::kChanged) return kChanged;
    if (result == WatchResult::kHooked) return kHooked;
  }
  return nullptr;
}

bool has_changed_segment(const State& state) {
  for (const Segment& segment : state.segments) {
    if (segment.run && segment.run->check() == WatchResult::kChanged) return true;
    if (segment.watch && segment.watch->check(/*check_hooks=*/false) == WatchResult::kChanged) return true;
  }
  return false;
}

// All segments in order; a new reference, or null with an exception set or `reason` given.
PyObject* run_segments(State& state, PyObject* input, Reason& reason) {
  if (state.segments.size() == 1 && state.segments.front().run) {
    NativeRun& run = *state.segments.front().run;
    const WatchResult watched = run.check();
    if (watched != WatchResult::kSame) {
      reason = watched == WatchResult::kHooked ? kHooked : kChanged;
      return nullptr;
    }
    Outcome outcome = run.call(input);
    reason = outcome.reason;
    if (reason) return nullptr;
    ++state.counters.fused;
    return THPVariable_Wrap(std::move(outcome.value));
  }
  if (has_changed_segment(state)) {
    reason = kChanged;
    return nullptr;
  }
  py::object value = py::reinterpret_borrow<py::object>(input);
  for (const Segment& segment : state.segments) {
    Reason refused = "an eager layer";
    if (segment.run) {
      // Checked again here: the layers before may have hooked or changed this run's. Then its layers run by themselves.
      refused = segment.run->check() == WatchResult::kSame ? nullptr : kHooked;
      if (!refused) {
        Outcome outcome = segment.run->call(value.ptr());
        refused = outcome.reason;
        if (!refused) {
          value = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(outcome.value)));
          ++state.counters.fused;
        }
      }
      if (refused) state.counters.count_fallback(refused);
    }
    if (!refused) continue;
    for (const py::object& layer : segment.layers) {
      value = py::reinterpret_steal<py::object>(PyObject_CallOneArg(layer.ptr(), value.ptr()));
      if (!value) return nullptr;
    }
  }
  return value.release().ptr();
}

// The str subclass whose instances are reasons for eager: no layer can return one, as it could return any other object.
PyObject* refused_type = nullptr;

State* state_of(PyObject* self) { return reinterpret_cast<Program*>(self)->state; }

bool check_arguments(const char* method, Py_ssize_t count) {
  if (count == 2) return true;
  PyErr_Format(PyExc_TypeError, "Program.%s expects (module, input), got %zd arguments", method, count);
  return false;
}

// forward(module, input) -> result, or the reason (Refused) why eager must compute it; 'changed' asks for a new program.
PyObject* program_forward(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!check_arguments("forward", count)) return nullptr;
  State& state = *state_of(self);
  Reason reason = refuse_all(state, args[0], false);
  if (!reason) {
    PyObject* const result = run_segments(state, args[1], reason);
    if (result || PyErr_Occurred()) return result;
  }
  if (reason != kChanged) state.counters.count_fallback(reason);
  return PyObject_CallFunction(refused_type, "s", reason);
  END_HANDLE_TH_ERRORS
}

// Null, or why the segments of a forward must not take its place although some could: in between, layers run by themselves,
// and where a whole call is eager the forward itself is as good.
Reason refuse_segments(PyObject* object) {
  const at::Tensor* const input = exact_tensor(object);
  if (!input) return "the input is not a plain torch.Tensor";
  if (at::GradMode::is_enabled()) return "gradients may be recorded; use torch.no_grad() or inference_mode()";
  if (const Reason reason = active_mode(input->device().type())) return reason;
  return refuse_input(*input, backend_of(*input));
}

// Null, or why a module's own forward must run, before any of the segments was tried.
Reason refuse_whole(const State& state, PyObject* owner, PyObject* input) {
  if (const Reason reason = refuse_all(state, owner, true)) return reason;
  if (!state.has_native) return has_changed_segment(state) ? kChanged : "nothing to fuse";
  return state.segments.size() > 1 ? refuse_segments(input) : nullptr;
}

// The result of a call of the owner, or null: with an exception set, or because Module.__call__ must take over, which counts why.
PyObject* run_or_refuse(State& state, PyObject* owner, PyObject* input) {
  Reason reason = state.forwards.empty() ? refuse_all(state, owner, true) : refuse_whole(state, owner, input);
  return reason ? nullptr : run_segments(state, input, reason);
}

// call(module, input) -> result, or the type Refused itself if Module.__call__ must take over.
PyObject* program_call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!check_arguments("call", count)) return nullptr;
  PyObject* const result = run_or_refuse(*state_of(self), args[0], args[1]);
  return result || PyErr_Occurred() ? result : Py_NewRef(refused_type);
  END_HANDLE_TH_ERRORS
}

// refuses(module, input) -> None, or the reason (Refused) for which attempt would not begin.
PyObject* program_refuses(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!check_arguments("refuses", count)) return nullptr;
  const Reason reason = refuse_whole(*state_of(self), args[0], args[1]);
  if (!reason) Py_RETURN_NONE;
  return PyObject_CallFunction(refused_type, "s", reason);
  END_HANDLE_TH_ERRORS
}

// attempt(module, input) -> the result of a whole forward, or the reason (Refused) why the forward itself must run.
PyObject* program_attempt(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!check_arguments("attempt", count)) return nullptr;
  State& state = *state_of(self);
  Reason reason = refuse_whole(state, args[0], args[1]);
  if (!reason) {
    PyObject* const result = run_segments(state, args[1], reason);
    if (result || PyErr_Occurred()) return result;
  }
  if (reason != kChanged) ++state.declined[reason];
  return PyObject_CallFunction(refused_type, "s", reason);
  END_HANDLE_TH_ERRORS
}

// is_current(module) -> whether the layers are still those that were matched.
PyObject* program_is_current(PyObject* self, PyObject* module) {
  HANDLE_TH_ERRORS
  const State& state = *state_of(self);
  return PyBool_FromLong(refuse_all(state, module, false) != kChanged && !has_changed_segment(state));
  END_HANDLE_TH_ERRORS
}

PyObject* program_stats(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  const State& state = *state_of(self);
  py::dict result;
  result["fused_calls"] = state.counters.fused;
  result["eager_calls"] = state.counters.eager;
  result["fallbacks"] = counts_by_text(state.counters.fallbacks);
  result["declined"] = counts_by_text(state.declined);
  return result.release().ptr();
  END_HANDLE_TH_ERRORS
}

PyObject* program_reset_stats(PyObject* self, PyObject*) {
  state_of(self)->counters = Counters();
  state_of(self)->declined.clear();
  Py_RETURN_NONE;
}

// Program(owner, containers, segments, forwards): containers are ModuleWatch objects, the owner's first; segments are
// (run or None, layers, watch or None); forwards are ForwardWatch objects. shares: see State.
PyObject* program_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  PyObject *owner, *containers, *segments, *forwards;
  int shares = 0;
  static const char* names[] = {"owner", "containers", "segments", "forwards", "shares", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|p", const_cast<char**>(names), &owner, &containers, &segments, &forwards,
                                   &shares))
    return nullptr;
  auto state = std::make_unique<State>();
  state->shares = shares;
  state->owner = owner;
  for (const py::handle watch : py::reinterpret_borrow<py::list>(containers))
    state->containers.push_back(watch.cast<std::shared_ptr<ModuleWatch>>());
  if (state->containers.empty()) throw py::value_error("Program expects the owner's watch first");
  for (const py::handle item : py::reinterpret_borrow<py::list>(segments)) {
    const auto [run, layers, watch] = item.cast<std::tuple<py::object, std::vector<py::object>, py::object>>();
    Segment segment;
    if (!run.is_none()) segment.run = run.cast<std::shared_ptr<NativeRun>>();
    if (!watch.is_none()) segment.watch = watch.cast<std::shared_ptr<ModuleWatch>>();
    segment.layers = layers;
    state->has_native = state->has_native || segment.run;
    state->segments.push_back(std::move(segment));
  }
  for (const py::handle forward : py::reinterpret_borrow<py::list>(forwards))
    state->forwards.push_back(forward.cast<std::shared_ptr<ForwardWatch>>());
  PyObject* const self = type->tp_alloc(type, 0);
  if (self) reinterpret_cast<Program*>(self)->state = state.release();
  return self;
  END_HANDLE_TH_ERRORS
}

int program_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const State* const state = state_of(self);
  if (!state) return 0;
  for (const Segment& segment : state->segments)
    for (const py::object& layer : segment.layers) Py_VISIT(layer.ptr());
  // Each reference must be told of once only.
  if (state->shares) return 0;
  for (const auto& watch : state->containers)
    if (const int stop = watch->traverse(visit, arg)) return stop;
  for (const auto& forward : state->forwards)
    if (const int stop = forward->traverse(visit, arg)) return stop;
  for (const Segment& segment : state->segments) {
    if (segment.run)
      if (const int stop = segment.run->traverse(visit, arg)) return stop;
    if (segment.watch)
      if (const int stop = segment.watch->traverse(visit, arg)) return stop;
  }
  return 0;
}

int program_clear(PyObject* self) {
  // Moved out first: what is destroyed may run Python code that looks at this object.
  State* const state = state_of(self);
  if (!state) return 0;
  const std::vector<Segment> segments = std::move(state->segments);
  const auto containers = std::move(state->containers);
  const auto forwards = std::move(state->forwards);
  state->segments.clear(), state->containers.clear(), state->forwards.clear();
  return 0;
}

void program_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  PyTypeObject* const type = Py_TYPE(self);
  delete state_of(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef program_methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(program_call)), METH_FASTCALL,
     "call(module, input) -> result, or the type Refused if nn.Module.__call__ must take over"},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(program_forward)), METH_FASTCALL,
     "forward(module, input) -> result, or the reason for eager as a Refused"},
    {"attempt", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(program_attempt)), METH_FASTCALL,
     "attempt(module, input) -> the result of a whole forward, or the reason for running the forward itself as a Refused"},
    {"refuses", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(program_refuses)), METH_FASTCALL,
     "refuses(module, input) -> None, or the reason for which attempt would not begin as a Refused"},
    {"is_current", program_is_current, METH_O, "is_current(module) -> whether the layers are still those that were matched"},
    {"stats", program_stats, METH_NOARGS, "Counters since the last reset."},
    {"reset_stats", program_reset_stats, METH_NOARGS, "Set the counters to zero."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot program_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(program_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(program_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(program_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(program_clear)},
    {Py_tp_methods, program_methods},
    {Py_tp_doc, const_cast<char*>("Native runs and eager layers of a Sequential or a forward, in order.")},
    {0, nullptr},
};

PyType_Slot refused_slots[] = {
    {Py_tp_doc, const_cast<char*>("Why eager must compute a call.")},
    {0, nullptr},
};

PyType_Spec refused_spec = {"fastseq._C.Refused", 0, 0, Py_TPFLAGS_DEFAULT, refused_slots};

PyType_Spec program_spec = {"fastseq._C.Program", sizeof(Program), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, program_slots};

}  // namespace

bool is_program(PyObject* object) { return object && Py_TYPE(object)->tp_dealloc == program_dealloc; }

PyObject* run_program(PyObject* program, PyObject* owner, PyObject* input) {
  HANDLE_TH_ERRORS
  return run_or_refuse(*state_of(program), owner, input);
  END_HANDLE_TH_ERRORS
}

void add_program_types(py::module_& module) {
  PyObject* const type = PyType_FromSpec(&program_spec);
  if (!type) throw py::error_already_set();
  module.add_object("Program", type);
  refused_type = PyType_FromSpecWithBases(&refused_spec, reinterpret_cast<PyObject*>(&PyUnicode_Type));
  if (!refused_type) throw py::error_already_set();
  module.add_object("Refused", Py_NewRef(refused_type));
}

}  // namespace fastseq
