// Products of tiles in shared memory, for calls of many tokens; 16-bit types only.
#pragma once
#include "common.cuh"

#if TYPE != 2

// Rows of a tile have 64 elements: eight vectors of 16 bytes, whose places are exchanged so that
// eight rows lie in different banks.
#define DEPTH 64
__device__ __forceinline__ int place(int row, int vec) {
    return row * DEPTH + ((vec ^ row) & 7) * 8;
}

// Products of 128 rows and 128 columns of DEPTH elements, by 8 warps of 16 rows each. Between
// begin and end `c` must not be read.
#ifdef EMULATED
inline void show_copies_to_tensor_cores() {}
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void show_copies_to_tensor_cores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What a warp group's product needs of a tile: its address, eight rows in 1024 bytes, the exchange.
__device__ __forceinline__ unsigned long long describe(const Real* tile) {
    const unsigned long long address = (u32)__cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void begin_products(float (&c)[16][4], const Real* rows,
                                               const Real* columns) {
    float* d = &c[0][0];
    const Real* mine = rows + threadIdx.x / 128 * 64 * DEPTH;
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32."
#if TYPE == 0
            "f16.f16 "
#else
            "bf16.bf16 "
#endif
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
            "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
            "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
            "%64, %65, 1, 1, 1, 0, 0;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
              "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
              "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
              "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
              "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
              "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
              "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
              "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
              "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
            : "l"(describe(mine + k)), "l"(describe(columns + k)));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void end_products(float (&c)[16][4]) {
    float* d = &c[0][0];
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
#else
__device__ __forceinline__ void show_copies_to_tensor_cores() {}
#endif

#if defined(EMULATED) || !defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ void begin_products(float (&c)[16][4], const Real* rows,
                                               const Real* columns) {
    const int lane = threadIdx.x % WARP, top = threadIdx.x / WARP * 16;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        u32 a[4], b[4];
        load_matrices(a, rows + place(top + lane % 16, k / 8 + lane / 16));
#pragma unroll
        for (int n = 0; n < 16; n += 2) {
            const int column = n * 8 + lane % 8 + lane / 16 * 8;
            load_matrices(b, columns + place(column, k / 8 + lane / 8 % 2));
            multiply(c[n], a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(c[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void end_products(float (&c)[16][4]) {}
#endif

#endif
