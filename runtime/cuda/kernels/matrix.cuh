// Products of tiles in shared memory, for calls of many tokens; 16-bit types only.
#pragma once
#include "common.cuh"
#include "groups.cuh"

#if TYPE != 2

// Rows of a tile have 64 elements: eight vectors of 16 bytes, whose places are exchanged so that
// eight rows lie in different banks.
#define DEPTH 64
__device__ __forceinline__ int place(int row, int vec) {
    return row * DEPTH + ((vec ^ row) & 7) * 8;
}

// Where eight rows of a tile fill 1024 bytes that begin at a multiple of that.
__device__ __forceinline__ Real* tiles(Vec* dynamic) {
    return (Real*)(((unsigned long long)dynamic + 1023) & ~1023ull);
}

// Products of 128 rows and 8 N columns of DEPTH elements, by 8 warps of 16 rows each. `c` must not
// be read before `end_products<0>`; `end_products<1>` leaves the last product under way.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void show_copies_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void keep_in_registers(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

template <int N>
__device__ __forceinline__ void keep_in_registers(u32 (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

__device__ __forceinline__ void order_registers() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int N>
__device__ __forceinline__ void begin_products(float (&c)[N][4], const Real* rows,
                                               const Real* columns) {
    const Real* mine = rows + threadIdx.x / 128 * 64 * DEPTH;
    keep_in_registers(c);
    order_registers();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16)
        multiply_group(c, describe(mine + k), describe(columns + k));
    commit_products();
}

template <int PENDING, int N>
__device__ __forceinline__ void end_products(float (&c)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    keep_in_registers(c);
}
#else
__device__ __forceinline__ void show_copies_to_tensor_cores() {}

template <int N>
__device__ __forceinline__ void begin_products(float (&c)[N][4], const Real* rows,
                                               const Real* columns) {
    const int lane = threadIdx.x % WARP, top = threadIdx.x / WARP * 16;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        u32 a[4], b[4];
        load_matrices(a, rows + place(top + lane % 16, k / 8 + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            const int column = n * 8 + lane % 8 + lane / 16 * 8;
            load_matrices(b, columns + place(column, k / 8 + lane / 8 % 2));
            multiply(c[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(c[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

template <int PENDING, int N>
__device__ __forceinline__ void end_products(float (&c)[N][4]) {}
#endif

#endif
