// Runs CUDA kernels on a CPU, one block after the other: every thread is a fiber that gives way
// where threads wait for each other. It checks arithmetic and indices, not races or speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) Vec* name = (Vec*)emulated::shared.data()
#define threadIdx (emulated::current->thread)
#define blockIdx emulated::block
#define gridDim emulated::grid
#define blockDim emulated::size
using std::max;
using std::min;

namespace emulated {

struct Dim {
    unsigned x, y, z;
};

struct Fiber {  // lives on from block to block, since it is made by slow calls of the system
    jmp_buf place;
    std::vector<char> stack;
    Dim thread;
    bool alive = false;
};

struct Group {  // threads that wait for each other
    int alive = 0, arrived = 0;
    long generation = 0;
};

inline Fiber* current;
inline jmp_buf scheduler;
inline std::deque<Fiber> fibers;  // which stay where they are
inline std::vector<Group> warps;
inline Group whole;
inline Dim block, grid, size;
inline std::vector<char> shared;
inline std::function<void()> kernel;
struct Slot {
    uint32_t words[8];
};
inline std::vector<Slot> slots;

inline void give_way() {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void go_on(Fiber& fiber) {
    current = &fiber;
    if (!_setjmp(scheduler)) _longjmp(fiber.place, 1);
}

inline void arrive(Group& group) {
    if (group.arrived >= group.alive) {
        group.arrived = 0;
        ++group.generation;
    }
}

inline void wait(Group& group) {
    const long generation = group.generation;
    ++group.arrived;
    arrive(group);
    while (generation == group.generation) give_way();
}

inline Group& warp() { return warps[current->thread.x / 32]; }

inline void run_fiber() {
    for (;;) {
        give_way();
        kernel();
        current->alive = false;
        --whole.alive;
        --warp().alive;
        if (whole.arrived) arrive(whole);
        if (warp().arrived) arrive(warp());
    }
}

inline void begin(Fiber& fiber) {
    fiber.stack.resize(1 << 16);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = fiber.stack.size();
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    current = &fiber;
    if (!_setjmp(scheduler)) setcontext(&context);
}

inline void launch(Dim blocks, unsigned threads, size_t bytes, std::function<void()> body) {
    kernel = body;
    grid = blocks;
    size = {threads, 1, 1};
    shared.assign(bytes + 16, (char)0xa5);
    while (fibers.size() < threads) begin(fibers.emplace_back());
    slots.resize(threads);
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x; ++block.x) {
                whole = Group();
                whole.alive = (int)threads;
                warps.assign((threads + 31) / 32, Group());
                for (unsigned t = 0; t < threads; ++t) {
                    fibers[t].thread = {t, 0, 0};
                    fibers[t].alive = true;
                    ++warps[t / 32].alive;
                }
                while (whole.alive)
                    for (Fiber& fiber : fibers)
                        if (fiber.alive) go_on(fiber);
            }
}

template <class T>
T exchange(T value, int from) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    slots[current->thread.x].words[0] = word;
    wait(warp());
    const unsigned base = current->thread.x / 32 * 32;
    word = slots[base + (unsigned)from % 32].words[0];
    wait(warp());
    T result;
    std::memcpy(&result, &word, 4);
    return result;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::whole); }
inline void sync_block() { emulated::wait(emulated::whole); }
inline void __syncwarp() { emulated::wait(emulated::warp()); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated::exchange(value, (int)(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emulated::exchange(value, from);
}
inline unsigned __ballot_sync(unsigned, bool given) {
    emulated::slots[threadIdx.x].words[0] = given;
    emulated::wait(emulated::warp());
    unsigned mask = 0;
    for (unsigned i = 0; i < 32; ++i)
        mask |= emulated::slots[threadIdx.x / 32 * 32 + i].words[0] << i;
    emulated::wait(emulated::warp());
    return mask;
}
inline unsigned of_warp(unsigned x, bool largest) {
    emulated::slots[threadIdx.x].words[0] = x;
    emulated::wait(emulated::warp());
    for (unsigned i = 0; i < 32; ++i) {
        const unsigned other = emulated::slots[threadIdx.x / 32 * 32 + i].words[0];
        x = largest ? max(x, other) : min(x, other);
    }
    emulated::wait(emulated::warp());
    return x;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return of_warp(x, true); }
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return of_warp(x, false); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (uint32_t)(bytes >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
inline float __uint_as_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float power_of_two(float x) { return std::exp2(x); }
template <class T>
T __ldcg(const T* address) {
    return *address;
}
inline int atomicAdd(int* to, int value) {
    const int old = *to;
    *to += value;
    return old;
}
inline int atomicOr(int* to, int value) {
    const int old = *to;
    *to |= value;
    return old;
}

#include "types.cuh"

#if TYPE == 0
inline float to_float(Real x) {
    _Float16 y;
    std::memcpy(&y, &x, 2);
    return (float)y;
}
inline Real to_real(float x) {
    const _Float16 y = (_Float16)x;
    Real z;
    std::memcpy(&z, &y, 2);
    return z;
}
#elif TYPE == 1
inline float to_float(Real x) { return __uint_as_float((uint32_t)x << 16); }
inline Real to_real(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (Real)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
inline float to_float(Real x) { return x; }
inline Real to_real(float x) { return x; }
inline uint32_t to_tf32(float x) { return __float_as_uint(x) & 0xffffe000; }
#endif

inline Vec load_once(const void* address) { return *(const Vec*)address; }
inline void copy_later(void* to, const void* from, bool used) {
    if (used)
        std::memcpy(to, from, 16);
    else
        std::memset(to, 0, 16);
}
inline void end_copies() {}
template <int PENDING>
void wait_for_copies() {}

#if TYPE != 2
// The rows of four 8x8 matrices, by the addresses that the lanes give.
inline void matrices(uint32_t (&m)[4], const Real* row, bool transposed) {
    std::memcpy(emulated::slots[threadIdx.x].words, &row, sizeof row);
    emulated::wait(emulated::warp());
    const unsigned base = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto element = [&](int matrix, unsigned i, unsigned j) {
        const Real* from;
        std::memcpy(&from, emulated::slots[base + matrix * 8 + i].words, sizeof from);
        return (uint32_t)from[j];
    };
    for (int i = 0; i < 4; ++i)
        m[i] = transposed ? element(i, 2 * t, g) | element(i, 2 * t + 1, g) << 16
                          : element(i, g, 2 * t) | element(i, g, 2 * t + 1) << 16;
    emulated::wait(emulated::warp());
}
inline void load_matrices(uint32_t (&m)[4], const Real* row) { matrices(m, row, false); }
inline void load_transposed(uint32_t (&m)[4], const Real* row) { matrices(m, row, true); }
#endif
inline void let_next_begin() {}
inline void wait_for_previous() {}

inline uint32_t of_halves(uint32_t a, uint32_t b, float (*f)(float, float)) {
#if TYPE == 0
    return (uint32_t)to_real(f(to_float((Real)a), to_float((Real)b))) |
           (uint32_t)to_real(f(to_float((Real)(a >> 16)), to_float((Real)(b >> 16)))) << 16;
#else
    return 0;
#endif
}
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return of_halves(a, b, [](float x, float y) { return x - y; });
}
inline uint32_t multiply_halves(uint32_t a, uint32_t b) {
    return of_halves(a, b, [](float x, float y) { return x * y; });
}

// The fragments are those of mma.sync.m16n8k16 (m16n8k8 for float32) in the PTX manual.
inline void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(emulated::slots[threadIdx.x].words, mine, sizeof mine);
    emulated::wait(emulated::warp());
    const unsigned base = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto word = [&](unsigned lane, int i) { return emulated::slots[base + lane].words[i]; };
    auto dot = [&](uint32_t a, uint32_t b) {
#if TYPE == 2
        return __uint_as_float(a) * __uint_as_float(b);
#else
        return to_float((Real)a) * to_float((Real)b) +
               to_float((Real)(a >> 16)) * to_float((Real)(b >> 16));
#endif
    };
    for (int i = 0; i < 4; ++i) {
        const unsigned column = t * 2 + i % 2;
        for (unsigned j = 0; j < 4; ++j)
            c[i] += dot(word(g * 4 + j, i / 2), word(column * 4 + j, 4)) +
                    dot(word(g * 4 + j, i / 2 + 2), word(column * 4 + j, 5));
    }
    emulated::wait(emulated::warp());
}
