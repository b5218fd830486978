// The emulated device: it runs one block at a time, whose threads are fibers that take turns where CUDA threads wait.
#pragma once

#include <cstdarg>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "cuda_on_cpu/fiber.h"
#include "cuda_on_cpu/types.h"

// Of the emulation's functions, those that only a mistake calls.
#define CUDA_ON_CPU_FAILS [[noreturn]] CUDA_ON_CPU_UNWATCHED __attribute__((cold, noinline))

#pragma GCC visibility push(hidden)

// Between these lie all static __shared__ variables, if the linker was given shared.ld.
extern char cuda_on_cpu_shared_begin[] __attribute__((weak));
extern char cuda_on_cpu_shared_end[] __attribute__((weak));

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;

inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

enum class Schedule { forward, reverse, greedy, random };

// What a thread waits at: shuffles, votes and what else has a mask, then what has none.
enum class At : uint8_t { shfl, up, down, xor_, ballot, any, all, warp, block, block_or, block_and, block_count, exit };
constexpr const char* kNames[] = {"__shfl_sync",     "__shfl_up_sync",   "__shfl_down_sync",  "__shfl_xor_sync",
                                  "__ballot_sync",   "__any_sync",       "__all_sync",        "__syncwarp",
                                  "__syncthreads",   "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
                                  "the kernel's end"};

// A place in the source: the caller's, where it is the default of a function's last parameter.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(Site other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Launch {
    const char* kernel;
    void (*call)(const void* arguments);
    const void* arguments;
    dim3 grid, block;
    size_t shared_bytes, shared_limit;
};

// A copy to shared memory, 4, 8 or 16 bytes from one multiple of them to another.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

// The copies of a thread on their way: groups, the oldest first, and those of no group yet.
class Copies {
  public:
    void begin(const Copy& copy) { begun_.push_back(copy); }
    void commit() { groups_.emplace_back().swap(begun_); }
    void clear() { groups_.clear(), begun_.clear(); }

    // Those of all groups but the last `prior`.
    std::vector<Copy> take(size_t prior) {
        std::vector<Copy> taken;
        while (groups_.size() > prior) {
            taken.insert(taken.end(), groups_.front().begin(), groups_.front().end());
            groups_.erase(groups_.begin());
        }
        return taken;
    }

  private:
    std::vector<std::vector<Copy>> groups_;
    std::vector<Copy> begun_;
};

inline unsigned lowest(uint32_t bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }
inline unsigned highest(uint32_t bits) { return 31u - static_cast<unsigned>(__builtin_clz(bits)); }

class Device {
  public:
    // Runs all blocks, one after the other. Returns what went wrong, which report() explains.
    CUDA_ON_CPU_UNWATCHED static cudaError_t run(const Launch& launch) {
        const dim3 &g = launch.grid, &b = launch.block;
        const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{g.x} * g.y * g.z;
        report_length_ = 0;
        const int brackets = launch.kernel[0] == '(' ? 1 : 0;  // around a template's name
        say("kernel %.*s", static_cast<int>(std::strlen(launch.kernel)) - 2 * brackets, launch.kernel + brackets);
        if (threads < 1 || threads > kMaxThreads || b.z > 64 || blocks < 1 || g.x >> 31 || g.y >> 16 || g.z >> 16) {
            say(": no grid of (%u, %u, %u) blocks of (%u, %u, %u) threads is possible", g.x, g.y, g.z, b.x, b.y, b.z);
            return cudaErrorInvalidConfiguration;
        }
        if (launch.shared_bytes > launch.shared_limit) {
            say(": %zu bytes of dynamic shared memory are more than its %zu", launch.shared_bytes, launch.shared_limit);
            return cudaErrorInvalidValue;
        }
        if (shared_ == nullptr || shared_bytes_ != launch.shared_bytes) {
            shared_.reset(new unsigned char[launch.shared_bytes]);  // no larger, so that AddressSanitizer sees its end
            shared_bytes_ = launch.shared_bytes;
        }
        total_ = static_cast<unsigned>(threads);
        for (unsigned i = 0; i < total_; ++i) prepare(i, b);
        host_.adopt_host();
        launch_ = &launch;
        error_ = cudaSuccess;
        random_ = seed_;
        block_size = b;
        grid_size = g;
        const uint64_t skip = schedule_ == Schedule::random ? random() % blocks : 0;
        for (uint64_t i = 0; i < blocks && error_ == cudaSuccess; ++i) {
            const uint64_t n = schedule_ == Schedule::reverse ? blocks - 1 - i : (i + skip) % blocks;
            block_index.x = static_cast<unsigned>(n % g.x);
            block_index.y = static_cast<unsigned>(n / g.x % g.y);
            block_index.z = static_cast<unsigned>(n / g.x / g.y);
            run_block();
        }
        return error_;
    }

    static const char* report() { return report_; }
    static void set_schedule(Schedule schedule, uint64_t seed) { schedule_ = schedule, seed_ = seed; }
    static Schedule schedule() { return schedule_; }

    // The rest is for the thread that runs.

    CUDA_ON_CPU_UNWATCHED static unsigned lane() { return running_->lane; }
    CUDA_ON_CPU_UNWATCHED static void* shared() { return shared_.get(); }

    CUDA_ON_CPU_UNWATCHED static Copies& copies() { return running_->copies; }

    CUDA_ON_CPU_UNWATCHED static void begin_copy(const Copy& copy, Site site) {
        const auto to = reinterpret_cast<uintptr_t>(copy.to), from = reinterpret_cast<uintptr_t>(copy.from);
        const auto first = reinterpret_cast<uintptr_t>(shared_.get());
        const bool has_size = copy.bytes == 4 || copy.bytes == 8 || copy.bytes == 16;
        const bool is_aligned = has_size && (to | from) % copy.bytes == 0;
        if (is_aligned && first <= to && to + copy.bytes <= first + shared_bytes_) return copies().begin(copy);
        char what[256];
        std::snprintf(what, sizeof what, "%s copy of %zu bytes from %#zx to %#zx, %s:%d",
                      is_aligned ? "beyond shared memory:" : "misaligned", copy.bytes, size_t{from}, size_t{to},
                      site.file, site.line);
        fail(is_aligned ? cudaErrorLaunchFailure : cudaErrorMisalignedAddress, what);
    }

    // Waits for the lanes of the mask; returns the value of the lane `source`, or which lanes' values are not 0.
    CUDA_ON_CPU_INLINED static uint64_t meet(At at, uint32_t mask, uint64_t value, unsigned source, Site site) {
        const Turn turn = arrive(at, mask, value, source, site);
        turn.pass();
        return turn.from->home->result[turn.from->lane];
    }

    // Waits for the block; returns for how many threads the predicate holds.
    CUDA_ON_CPU_INLINED static int meet_block(At at, bool predicate, Site site) {
        arrive_block(at, predicate, site).pass();
        return result_;
    }

    // Ends the launch: the thread did what it must not do.
    CUDA_ON_CPU_FAILS static void fail(cudaError_t error, const char* what) {
        if (running_ == nullptr) {
            std::fprintf(stderr, "cuda_on_cpu: in the host's code: %s\n", what);
            std::abort();
        }
        say_block();
        say_thread(*running_);
        say(": %s", what);
        stop(error);
    }

  private:
    struct Warp;
    struct Thread {
        Fiber fiber;
        uint3 index;
        uint8_t warp, lane;
        At at;  // what it waits at, unless it is ready
        uint32_t mask;
        Warp* home;
        Site site;
        Copies copies;
    };

    struct Warp {
        uint32_t ready;    // lanes that can go on
        uint32_t here;     // lanes to count on: neither at the kernel's end nor at a barrier of the block
        uint32_t arrived;  // lanes that wait for others of the warp
        uint32_t mask;     // for whom they wait, and where, if that is the same for all
        At at;
        bool mixed;  // it is not
        uint8_t source[kWarpSize];
        uint64_t value[kWarpSize], result[kWarpSize];
    };

    // Whose turn ends and whose begins. Choosing and passing are two functions because a call that returns on the fiber
    // that made it is predicted right.
    struct Turn {
        Thread *from, *to;
        CUDA_ON_CPU_INLINED void pass() const {
            if (from != to) from->fiber.switch_to(to->fiber);
        }
    };

    // ---- Waiting ----

    CUDA_ON_CPU_UNWATCHED __attribute__((noinline)) static Turn arrive(At at, uint32_t mask, uint64_t value,
                                                                       unsigned source, Site site) {
        Thread& self = *running_;
        Warp& warp = *self.home;
        const uint32_t bit = 1u << self.lane;
        self.at = at;
        self.mask = mask;
        self.site = site;
        if ((mask & bit) == 0) fail_absent(self, self.lane);
        if ((mask & ~warp.here) != 0) fail_absent(self, lowest(mask & ~warp.here));
        if ((mask >> source & 1) == 0) fail_absent(self, source);
        warp.value[self.lane] = value;
        warp.source[self.lane] = static_cast<uint8_t>(source);
        if (warp.arrived == 0) {
            warp.at = at;
            warp.mask = mask;
            warp.mixed = false;
        } else if (warp.at != at || warp.mask != mask) {
            warp.mixed = true;
        }
        warp.arrived |= bit;
        if (warp.mixed ? complete(self) : warp.arrived == mask) {
            finish(self);
        } else {
            pause(self);
        }
        return turn();
    }

    // Whether all for whom `self` waits have arrived and wait for the same.
    CUDA_ON_CPU_UNWATCHED __attribute__((noinline)) static bool complete(const Thread& self) {
        bool all = true;
        for (uint32_t lanes = self.mask; lanes != 0; lanes &= lanes - 1) {
            const Thread& other = thread(self.warp, lowest(lanes));
            const bool arrived = self.home->arrived >> other.lane & 1;
            const bool same = other.at == self.at && other.mask == self.mask;
            // each waits for the other: neither will come to where the other is
            if (arrived && !same && (other.mask >> self.lane & 1)) fail_pair("mismatch", self, "meets", other);
            all = all && arrived && same;
        }
        return all;
    }

    // The last lane to arrive does the work of all.
    CUDA_ON_CPU_UNWATCHED __attribute__((noinline)) static void finish(const Thread& self) {
        Warp& warp = *self.home;
        uint64_t votes = 0;
        for (uint32_t lanes = self.mask; lanes != 0; lanes &= lanes - 1) {
            if (warp.value[lowest(lanes)] != 0) votes |= 1u << lowest(lanes);
        }
        for (uint32_t lanes = self.mask; lanes != 0; lanes &= lanes - 1) {
            const unsigned lane = lowest(lanes);
            warp.result[lane] = self.at < At::ballot ? warp.value[warp.source[lane]] : votes;
        }
        warp.arrived &= ~self.mask;
        warp.ready |= self.mask;
        ready_warps_ |= 1u << self.warp;
        if (self.at == At::warp) order(self.warp, self.warp + 1u, self.mask);
    }

    CUDA_ON_CPU_UNWATCHED __attribute__((noinline)) static Turn arrive_block(At at, bool predicate, Site site) {
        Thread& self = *running_;
        self.at = at;
        self.site = site;
        if (exited_ > 0) fail_pair("divergent barrier", self, "waits for", *first_exited_);
        if (waiting_ == 0) first_waiting_ = &self;
        const Thread& first = *first_waiting_;
        if (first.at != at || !(first.site == site)) fail_pair("divergent barrier", self, "meets", first);
        leave_warp(self);
        votes_ += predicate;
        if (++waiting_ == total_) {
            result_ = votes_;
            make_ready();
            order(0, warps(), ~0u);
        }
        return turn();
    }

    CUDA_ON_CPU_UNWATCHED static void pause(const Thread& self) {
        self.home->ready &= ~(1u << self.lane);
        if (self.home->ready == 0) ready_warps_ &= ~(1u << self.warp);
    }

    // The thread comes to no collective of its warp any more, or not before the whole block has been at a barrier.
    CUDA_ON_CPU_UNWATCHED static void leave_warp(const Thread& self) {
        for (uint32_t lanes = self.home->arrived; lanes != 0; lanes &= lanes - 1) {
            const Thread& other = thread(self.warp, lowest(lanes));
            if (other.mask >> self.lane & 1) fail_absent(other, self.lane);
        }
        self.home->here &= ~(1u << self.lane);
        pause(self);
    }

    CUDA_ON_CPU_UNWATCHED static void make_ready() {
        for (unsigned w = 0; w < warps(); ++w) {
            const unsigned lanes = total_ - w * kWarpSize;
            warps_[w].ready = warps_[w].here = lanes < kWarpSize ? (1u << lanes) - 1 : ~0u;
        }
        ready_warps_ = ~0u >> (kMaxWarps - warps());
        waiting_ = 0;
        votes_ = 0;
    }

    // Tells ThreadSanitizer that what lanes of the mask did comes before what they will do; shuffles and votes order
    // nothing. The group meets at the address of its first thread: what that has from earlier groups, the first thread
    // has been told itself.
    CUDA_ON_CPU_UNWATCHED static void order(unsigned first_warp, unsigned end_warp, uint32_t mask) {
#if defined(__SANITIZE_THREAD__)
        Thread& first = thread(first_warp, lowest(mask));
        for (const auto step : {release, acquire}) {
            for (unsigned w = first_warp; w < end_warp; ++w) {
                for (uint32_t lanes = warps_[w].ready & mask; lanes != 0; lanes &= lanes - 1) {
                    thread(w, lowest(lanes)).fiber.impersonate();
                    step(&first);
                }
            }
        }
        running_->fiber.impersonate();
#else
        (void)first_warp, (void)end_warp, (void)mask;
#endif
    }

    // ---- Turns ----

    CUDA_ON_CPU_UNWATCHED static Turn turn() {
        Thread* from = running_;
        running_ = &next(*from);
        thread_index = running_->index;
        return {from, running_};
    }

    CUDA_ON_CPU_UNWATCHED static Thread& next(Thread& self) {
        if (ready_warps_ == 0) fail_deadlock();
        const uint32_t ready = self.home->ready;
        const unsigned w = self.warp;
        switch (schedule_) {
            case Schedule::forward:
                if (const uint32_t after = ready & (~1u << self.lane)) return thread(w, lowest(after));
                if (const uint32_t after = ready_warps_ & (~1u << w)) return first_of(lowest(after));
                return first_of(lowest(ready_warps_));
            case Schedule::reverse:
                if (const uint32_t before = ready & ((1u << self.lane) - 1)) return thread(w, highest(before));
                if (const uint32_t before = ready_warps_ & ((1u << w) - 1)) return last_of(highest(before));
                return last_of(highest(ready_warps_));
            case Schedule::greedy:
                if (ready >> self.lane & 1) return self;
                return first_of(ready != 0 ? w : lowest(ready_warps_));
            default:
                const unsigned any = pick(ready_warps_);
                return thread(any, pick(warps_[any].ready));
        }
    }
    CUDA_ON_CPU_UNWATCHED static Thread& first_of(unsigned w) { return thread(w, lowest(warps_[w].ready)); }
    CUDA_ON_CPU_UNWATCHED static Thread& last_of(unsigned w) { return thread(w, highest(warps_[w].ready)); }

    // The place of one of the ones, each with the same probability.
    CUDA_ON_CPU_UNWATCHED static unsigned pick(uint32_t bits) {
        for (auto skip = random() % static_cast<unsigned>(__builtin_popcount(bits)); skip > 0; --skip) bits &= bits - 1;
        return lowest(bits);
    }

    // SplitMix64 (Steele, Lea and Flood, 2014).
    CUDA_ON_CPU_UNWATCHED static uint64_t random() {
        uint64_t z = random_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }

    // ---- Blocks ----

    CUDA_ON_CPU_UNWATCHED static void prepare(unsigned i, dim3 block) {
        Thread& thread = threads_[i];
        thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        if (thread.home != nullptr) return;
        thread.warp = static_cast<uint8_t>(i / kWarpSize);
        thread.lane = static_cast<uint8_t>(i % kWarpSize);
        thread.home = &warps_[thread.warp];
        thread.fiber.start(thread_main, i);
    }

    // What each fiber does: the kernel for the same thread of one block after the other.
    CUDA_ON_CPU_UNWATCHED static void thread_main() {
        running_->fiber.arrived();
        for (;;) {
            acquire(&begun_);
            running_->copies.clear();
            launch_->call(launch_->arguments);
            Thread& self = *running_;
            self.at = At::exit;
            if (waiting_ > 0) fail_pair("divergent barrier", *first_waiting_, "waits for", self);
            leave_warp(self);
            if (exited_ == 0) first_exited_ = &self;
            release(&ended_);
            if (++exited_ == total_) {
                self.fiber.switch_to(host_);
            } else {
                turn().pass();
            }
        }
    }

    CUDA_ON_CPU_UNWATCHED static void run_block() {
        undefine_shared();
        exited_ = 0;
        make_ready();
        for (unsigned w = 0; w < warps(); ++w) warps_[w].arrived = 0;
        running_ = &threads_[schedule_ == Schedule::forward ? total_ - 1 : 0];  // whom the first one to go follows
        release(&begun_);
        host_.switch_to(turn().to->fiber);
        acquire(&ended_);
        running_ = nullptr;
        if (error_ == cudaSuccess) return;
        for (unsigned i = 0; i < total_; ++i) threads_[i].fiber.start(thread_main, i);  // what they did is abandoned
    }

    // Shared memory is undefined when a block starts: here it is NaN, or -1, and not by chance 0.
    CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("address"))) static void undefine_shared() {
        using Word = volatile uint64_t __attribute__((may_alias));
        std::memset(shared_.get(), 0xFF, shared_bytes_);
        auto* word = reinterpret_cast<Word*>(cuda_on_cpu_shared_begin);
        while (word != reinterpret_cast<Word*>(cuda_on_cpu_shared_end)) *word++ = ~uint64_t{0};
    }

    // ---- Reports ----

    CUDA_ON_CPU_UNWATCHED __attribute__((format(printf, 1, 2))) static void say(const char* format, ...) {
        const size_t room = sizeof report_ - report_length_;
        va_list arguments;
        va_start(arguments, format);
        const auto length = static_cast<size_t>(std::vsnprintf(report_ + report_length_, room, format, arguments));
        va_end(arguments);
        report_length_ += length < room ? length : room - 1;
    }

    CUDA_ON_CPU_UNWATCHED static void say_block() {
        say(", block (%u, %u, %u): ", block_index.x, block_index.y, block_index.z);
    }

    CUDA_ON_CPU_UNWATCHED static void say_thread(const Thread& thread) {
        const uint3& i = thread.index;
        say("thread (%u, %u, %u) [warp %u, lane %u]", i.x, i.y, i.z, thread.warp, thread.lane);
    }

    CUDA_ON_CPU_UNWATCHED static void say_thread_waits(const Thread& thread) {
        say_thread(thread);
        say(" at %s", kNames[static_cast<int>(thread.at)]);
        if (thread.at <= At::warp) say("(0x%08x)", thread.mask);
        if (thread.at != At::exit) say(", %s:%d", thread.site.file, thread.site.line);
    }

    CUDA_ON_CPU_FAILS static void fail_pair(const char* what, const Thread& thread, const char* link,
                                            const Thread& other) {
        say_block();
        say("%s: ", what);
        say_thread_waits(thread);
        say(", %s ", link);
        say_thread_waits(other);
        stop(cudaErrorLaunchFailure);
    }

    CUDA_ON_CPU_FAILS static void fail_absent(const Thread& self, unsigned lane) {
        const bool named = self.mask >> lane & 1, exists = self.warp * kWarpSize + lane < total_;
        if (named && exists) fail_pair("absent lane", self, "waits for", thread(self.warp, lane));
        say_block();
        say("absent lane: ");
        say_thread_waits(self);
        if (named) {
            say(", waits for lane %u, which the block does not have", lane);
        } else {
            say(lane == self.lane ? ", is not in its own mask" : ", reads lane %u, which is not in its mask", lane);
        }
        stop(cudaErrorLaunchFailure);
    }

    CUDA_ON_CPU_FAILS static void fail_deadlock() {
        const auto alike = [](const Thread& a, const Thread& b) {
            return a.at == b.at && (a.at > At::warp || a.mask == b.mask) && (a.at == At::exit || a.site == b.site);
        };
        say_block();
        say("deadlock");
        for (unsigned i = 0; i < total_; ++i) {
            unsigned count = 0, first = total_;
            for (unsigned j = total_; j-- > 0;) {
                if (!alike(threads_[i], threads_[j])) continue;
                first = j;
                ++count;
            }
            if (first != i) continue;
            say("; %u like ", count);
            say_thread_waits(threads_[i]);
        }
        stop(cudaErrorLaunchFailure);
    }

    // Leaves the block for good.
    CUDA_ON_CPU_FAILS static void stop(cudaError_t error) {
        error_ = error;
        release(&ended_);
        running_->fiber.switch_to(host_);
        __builtin_unreachable();
    }

    CUDA_ON_CPU_UNWATCHED static Thread& thread(unsigned w, unsigned lane) { return threads_[w * kWarpSize + lane]; }
    CUDA_ON_CPU_UNWATCHED static unsigned warps() { return (total_ + kWarpSize - 1) / kWarpSize; }

    inline static Thread threads_[kMaxThreads];
    inline static Warp warps_[kMaxWarps];
    inline static uint32_t ready_warps_;  // those with a lane that can go on
    inline static Thread *running_, *first_waiting_, *first_exited_;
    inline static unsigned total_, waiting_, exited_;  // threads of the block; at a barrier of the block; at the end
    inline static int votes_, result_;                 // at the barrier to come, and of the last one
    inline static Fiber host_;
    inline static const Launch* launch_;
    inline static Schedule schedule_;
    inline static uint64_t seed_, random_;
    inline static cudaError_t error_;
    inline static char report_[4096];
    inline static size_t report_length_;
    inline static std::unique_ptr<unsigned char[]> shared_;
    inline static size_t shared_bytes_;
    inline static char begun_, ended_;  // addresses by which ThreadSanitizer is told of a block's begin and end
};

}  // namespace cuda_on_cpu
#pragma GCC visibility pop
