// Versions of dictionaries and classes: numbers by which a look says that nothing was changed since the last one.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fastseq {

// CPython numbers every state of every dictionary up to 3.12 (PEP 509), and every state of a class; 3.10 could begin anew with the
// numbers of classes. 0 where there is none: then everything has to be looked up again.
inline uint64_t version_of(PyObject* holder) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  if (PyDict_Check(holder)) return reinterpret_cast<PyDictObject*>(holder)->ma_version_tag;
#pragma GCC diagnostic pop
#endif
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030D0000
  if (PyType_Check(holder) && PyType_HasFeature(reinterpret_cast<PyTypeObject*>(holder), Py_TPFLAGS_VALID_VERSION_TAG))
    return reinterpret_cast<PyTypeObject*>(holder)->tp_version_tag;
#endif
  return 0;
}

// The state of a dictionary or class at a moment. Remember it only after everything of interest was looked up.
class Stamp {
 public:
  bool is_of(PyObject* holder) const { return version_ != 0 && version_ == version_of(holder); }
  void remember(PyObject* holder) { version_ = version_of(holder); }
  void forget() { version_ = 0; }

 private:
  uint64_t version_ = 0;
};

// The instance's __dict__, borrowed, or null: it may be no dictionary of the instance any more after the next line of Python.
inline PyObject* dict_of(PyObject* object) {
#if PY_VERSION_HEX < 0x030D0000
  PyObject** const dict = _PyObject_GetDictPtr(object);
  if (dict && *dict) return *dict;
#endif
  PyObject* const made = PyObject_GenericGetDict(object, nullptr);
  if (made) {
    Py_DECREF(made);
  } else {
    PyErr_Clear();
  }
  return made;
}

// The dictionary's value, borrowed, or null. For interned keys, so that no comparison can raise.
inline PyObject* find(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }

// Interned names live as long as the process: no destruction order at interpreter exit to think of.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

}  // namespace fastseq
