// The CUDA kernels as a Python module that runs them on the CPU, with the names and arguments of the real one.
#include "bindings.h"

extern "C" int cuda_on_cpu_set_schedule(const char* name, unsigned long long seed);
extern "C" const char* cuda_on_cpu_schedule();
extern "C" void cuda_on_cpu_set_max_shared(int bytes);
extern "C" size_t cuda_on_cpu_launch_shared_bytes();

PYBIND11_MODULE(emulated, m) {
    m.doc() = "csrc/cuda under the emulation of tests/cuda_on_cpu.";
    sedd::bind_cuda(m);
    m.def("set_schedule", [](const char* name, unsigned long long seed) {
        if (cuda_on_cpu_set_schedule(name, seed) != 0) throw pybind11::value_error(std::string("schedule: ") + name);
    });
    m.def("schedule", [] { return cuda_on_cpu_schedule(); });
    m.def("set_max_shared", cuda_on_cpu_set_max_shared);
    m.def("launch_shared_bytes", cuda_on_cpu_launch_shared_bytes);
}
