// A stack of execution that can be left and resumed: what a CUDA thread runs on.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// The emulation's own code is not watched by ThreadSanitizer: all threads pass through it, which is no race of theirs.
// What is inlined is so for speed: between a switch and the kernel is then no return, which the processor would predict
// to go where the fiber that it left came from.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
#define CUDA_ON_CPU_INLINED CUDA_ON_CPU_UNWATCHED
#else
#define CUDA_ON_CPU_UNWATCHED
#define CUDA_ON_CPU_INLINED __attribute__((always_inline))
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !(defined(__x86_64__) && defined(__ELF__)) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif
#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#else
// Saves what a function must keep, leaves the stack pointer at *from, and goes on where `to` was left.
asm(R"(
.pushsection .text.cuda_on_cpu_switch, "axG", @progbits, cuda_on_cpu_switch, comdat
.weak cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
.popsection
)");
extern "C" void cuda_on_cpu_switch(void** from, void* to);
#endif

#pragma GCC visibility push(hidden)  // each library has a device of its own
namespace cuda_on_cpu {

struct Fiber {
    void* stack_pointer;
    const void* stack;  // its lowest address, and its size
    size_t stack_bytes;
#if defined(CUDA_ON_CPU_UCONTEXT)
    ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
    inline static Fiber* left;  // by the last switch
#elif defined(__SANITIZE_THREAD__)
    void* tsan;
#endif

    // Leaves this fiber, which is the running one, for another; returns when another switches to this one.
    CUDA_ON_CPU_INLINED void switch_to(Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
        left = this;
        __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
#endif
        to.impersonate();
#if defined(CUDA_ON_CPU_UCONTEXT)
        swapcontext(&context, &to.context);
#else
        cuda_on_cpu_switch(&stack_pointer, to.stack_pointer);
#endif
        arrived();
    }

    // After a switch, which on a new fiber leads to the function that it was started with.
    void arrived() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, &left->stack, &left->stack_bytes);
#endif
    }

    // Lets ThreadSanitizer take the running fiber for this one, without ordering the two.
    CUDA_ON_CPU_UNWATCHED void impersonate() {
#if defined(__SANITIZE_THREAD__)
        __tsan_switch_to_fiber(tsan, __tsan_switch_to_fiber_no_sync);
#endif
    }

    // The host's code has a stack already.
    void adopt_host() {
#if defined(__SANITIZE_THREAD__)
        tsan = __tsan_get_current_fiber();
#endif
    }

    // The next switch to this fiber calls `entry`, which must not return, on an empty stack. The number tells fibers
    // apart: in ThreadSanitizer's reports, and in a cache, of which their stacks shall not all share a few sets.
    void start(void (*entry)(), unsigned number) {
        if (stack == nullptr) allocate_stack();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack, kStackBytes);
        fake_stack = nullptr;
#elif defined(__SANITIZE_THREAD__)
        char name[32];
        std::snprintf(name, sizeof name, "CUDA thread %u", number);
        if (tsan != nullptr) __tsan_destroy_fiber(tsan);
        tsan = __tsan_create_fiber(0);
        __tsan_set_fiber_name(tsan, name);
#endif
        const size_t bytes = kStackBytes - number % 32 * 128;
#if defined(CUDA_ON_CPU_UCONTEXT)
        getcontext(&context);
        context.uc_stack.ss_sp = const_cast<void*>(stack);
        context.uc_stack.ss_size = bytes;
        makecontext(&context, entry, 0);
#else
        auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack) + bytes);
        *--top = nullptr;  // where a caller's return address would be
        *--top = reinterpret_cast<void*>(entry);
        stack_pointer = top - 6;  // what is there goes into registers that `entry` does not read
#endif
    }

  private:
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    static constexpr size_t kStackBytes = size_t{256} << 10;
#else
    static constexpr size_t kStackBytes = size_t{64} << 10;
#endif

    // The system gives memory to what is touched, but none to the page below. Fibers live as long as the process.
    void allocate_stack() {
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
            std::perror("cuda_on_cpu: the stack of a CUDA thread");
            std::abort();
        }
        stack = static_cast<char*>(memory) + page;
        stack_bytes = kStackBytes;
    }
};

#if defined(__SANITIZE_THREAD__)
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
#else
inline void release(void*) {}
inline void acquire(void*) {}
#endif

}  // namespace cuda_on_cpu
#pragma GCC visibility pop
