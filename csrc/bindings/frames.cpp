#include "bindings/frames.h"

#include <vector>

namespace fastseq {
namespace {

class GcPause {
 public:
  GcPause() : was_enabled_(PyGC_Disable()) {}
  ~GcPause() {
    if (was_enabled_) PyGC_Enable();
  }
  GcPause(const GcPause&) = delete;
  GcPause& operator=(const GcPause&) = delete;

 private:
  const int was_enabled_;
};

}  // namespace

bool is_calling(unsigned long ident, const py::object& code, const py::str& name, const py::object& value) {
  PyThreadState* const self = PyThreadState_Get();
  PyThreadState* thread = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(self));
  while (thread && thread->thread_id != ident) thread = PyThreadState_Next(thread);
  if (!thread) return false;
  // The collector, which the objects made here may set off, could let other threads run, and so may the end of an object.
  const GcPause pause;
  std::vector<py::object> frames;
  for (PyFrameObject* frame = PyThreadState_GetFrame(thread); frame; frame = PyFrame_GetBack(frame)) {
    frames.push_back(py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(frame)));
    frames.push_back(py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame))));
    if (!frames.back().is(code)) continue;
    const py::object locals =
        py::reinterpret_steal<py::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(frame), "f_locals"));
    const py::object found = locals ? py::reinterpret_steal<py::object>(PyObject_GetItem(locals.ptr(), name.ptr())) : py::object();
    if (!found) PyErr_Clear();
    frames.push_back(locals);
    if (found.is(value)) return true;
  }
  return false;
}

}  // namespace fastseq
