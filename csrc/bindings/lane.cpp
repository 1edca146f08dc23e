#include "bindings/lane.h"

#include <structmember.h>

#include "bindings/program.h"
#include "bindings/versions.h"

namespace fastseq {
namespace {

// Set by the first installation, and the same for every other.
struct Lane {
  ternaryfunc generic = nullptr;  // CPython's own, which looks __call__ up
  PyObject* key = nullptr;
  PyTypeObject* match = nullptr;
  Py_ssize_t offset = 0;                          // of the slot in an object of `match`
  PyObject *compiler = nullptr, *flag = nullptr;  // torch.compiler.is_compiling() reads this global name
  Stamp compiler_stamp;                           // of a state in which it was False
};
Lane lane;

bool is_compiling() {
  if (lane.compiler_stamp.is_of(lane.compiler)) return false;
  if (find(lane.compiler, lane.flag) != Py_False) return true;
  lane.compiler_stamp.remember(lane.compiler);
  return false;
}

// The instance's program, borrowed, or null.
PyObject* program_of(PyObject* self) {
  PyObject* const values = dict_of(self);
  PyObject* const match = values ? find(values, lane.key) : nullptr;
  if (!match || Py_TYPE(match) != lane.match) return nullptr;
  PyObject* const program = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(match) + lane.offset);
  return is_program(program) ? program : nullptr;
}

PyObject* call(PyObject* self, PyObject* args, PyObject* kwargs) {
  if (PyTuple_GET_SIZE(args) == 1 && (!kwargs || PyDict_GET_SIZE(kwargs) == 0) && !is_compiling()) {
    if (PyObject* const program = program_of(self)) {
      Py_INCREF(program);  // a layer may do away with it
      PyObject* const result = run_program(program, self, PyTuple_GET_ITEM(args, 0));
      Py_DECREF(program);
      if (result || PyErr_Occurred()) return result;
    }
  }
  return lane.generic(self, args, kwargs);
}

}  // namespace

void install_lane(py::type type, py::str key, py::type match) {
  auto* const target = reinterpret_cast<PyTypeObject*>(type.ptr());
  if (target->tp_call == call) return;
  const py::object own = type.attr("__dict__")["__call__"];
  if (!PyFunction_Check(own.ptr())) throw py::type_error("the lane expects a class whose __call__ is a Python function");
  if (!lane.generic) {
    const py::object slot = match.attr("__dict__")["lane"];
    if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) throw py::type_error("the lane expects a slot of the name 'lane'");
    lane.offset = reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
    lane.key = key.release().ptr();
    PyUnicode_InternInPlace(&lane.key);
    lane.match = reinterpret_cast<PyTypeObject*>(match.release().ptr());
    lane.flag = interned("_is_compiling_flag");
    lane.compiler = py::object(py::module_::import("torch.compiler").attr("__dict__")).release().ptr();
    lane.generic = target->tp_call;
  }
  target->tp_call = call;
}

}  // namespace fastseq
