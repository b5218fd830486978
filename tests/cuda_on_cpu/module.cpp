// The CUDA kernels as a Python module that runs them on the CPU, with the names and arguments of the real one.
#include "bindings.h"

extern "C" int cuda_on_cpu_set_schedule(const char* name, unsigned long long seed);
extern "C" const char* cuda_on_cpu_schedule();
extern "C" void cuda_on_cpu_set_max_shared(int bytes);
extern "C" size_t cuda_on_cpu_launch_shared_bytes();

namespace {

PyObject* set_schedule(PyObject*, PyObject* arguments) {
    const char* name;
    unsigned long long seed;
    if (!PyArg_ParseTuple(arguments, "sK", &name, &seed)) return nullptr;
    if (cuda_on_cpu_set_schedule(name, seed) != 0) return PyErr_Format(PyExc_ValueError, "schedule: %s", name);
    Py_RETURN_NONE;
}

PyObject* schedule(PyObject*, PyObject*) { return PyUnicode_FromString(cuda_on_cpu_schedule()); }

PyObject* set_max_shared(PyObject*, PyObject* arguments) {
    int bytes;
    if (!PyArg_ParseTuple(arguments, "i", &bytes)) return nullptr;
    cuda_on_cpu_set_max_shared(bytes);
    Py_RETURN_NONE;
}

PyObject* launch_shared_bytes(PyObject*, PyObject*) { return PyLong_FromSize_t(cuda_on_cpu_launch_shared_bytes()); }

PyMethodDef functions[] = {
    {"set_schedule", set_schedule, METH_VARARGS, nullptr},
    {"schedule", schedule, METH_NOARGS, nullptr},
    {"set_max_shared", set_max_shared, METH_VARARGS, nullptr},
    {"launch_shared_bytes", launch_shared_bytes, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "emulated",
    "csrc/cuda under the emulation of tests/cuda_on_cpu.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit_emulated() {
    PyObject* const module = PyModule_Create(&definition);
    if (module == nullptr || sedd::add_cuda(module)) return module;
    Py_DECREF(module);
    return nullptr;
}
