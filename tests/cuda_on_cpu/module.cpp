// The CUDA kernels as a Python module that runs them on the CPU, with the names and arguments of the real one.
#include "bindings.h"

extern "C" int cuda_on_cpu_set_schedule(const char* name, unsigned long long seed);
extern "C" const char* cuda_on_cpu_schedule();

PYBIND11_MODULE(emulated, m) {
    m.doc() = "csrc/cuda under the emulation of tests/cuda_on_cpu.";
    sedd::bind_cuda(m);
    m.def("set_schedule", [](const char* name, unsigned long long seed) {
        if (cuda_on_cpu_set_schedule(name, seed) != 0) throw pybind11::value_error(std::string("schedule: ") + name);
    });
    m.def("schedule", [] { return cuda_on_cpu_schedule(); });
}
