// What the self-tests of the emulation share: cases with a name, checks that say what was wrong, launches. All of them
// are CUDA: nvcc compiles them as well.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace selftest {

struct Case {
    const char* name;
    void (*run)();
    Case* next;
};
inline Case* cases = nullptr;

struct Register {
    Case self;
    Register(const char* name, void (*run)()) : self{name, run, cases} { cases = &self; }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class To, class From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace selftest

#define CASE(name)                                          \
    static void name();                                     \
    static selftest::Register register_##name{#name, name}; \
    static void name()

#define CHECK(...) \
    if (!(__VA_ARGS__)) selftest::fail(__FILE__, __LINE__, #__VA_ARGS__)

// A launch that must succeed.
#define RUN(...)                                                                                 \
    do {                                                                                         \
        SEDD_LAUNCH(__VA_ARGS__);                                                                \
        const cudaError_t error = cudaGetLastError();                                            \
        if (error != cudaSuccess) selftest::fail(__FILE__, __LINE__, cudaGetErrorString(error)); \
    } while (false)
