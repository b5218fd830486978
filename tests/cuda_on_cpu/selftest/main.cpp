// Runs the emulation's self-tests: by name from Python, or from the command line under a sanitizer.
#include "selftest.h"

#include <cstdio>

// null, or what was wrong; valid until the calling thread's next call.
extern "C" __attribute__((visibility("default"))) const char* selftest_run(const char* name) {
    static thread_local std::string wrong;
    wrong = "there is no such case";
    for (const auto* test = selftest::cases; test != nullptr; test = test->next) {
        if (std::string(test->name) != name) continue;
        try {
            test->run();
            return nullptr;
        } catch (const std::exception& error) {
            wrong = error.what();
        }
    }
    return wrong.c_str();
}

// selftest <schedule> <seed> <case>...
int main(int count, char** words) {
    if (count < 4 || cuda_on_cpu_set_schedule(words[1], std::stoull(words[2])) != 0) return 2;
    int failed = 0;
    for (int i = 3; i < count; ++i) {
        const char* wrong = selftest_run(words[i]);
        std::printf("%s: %s\n", words[i], wrong == nullptr ? "passed" : wrong);
        failed += wrong != nullptr;
    }
    return failed == 0 ? 0 : 1;
}
