// What all kernels share: elements of vectors, sums of warps, products of fragments.
//
// Under EMULATED the same source runs on a CPU: tests/runtime/cuda/emulation.hpp has what a GPU
// has.
#pragma once
#include "types.cuh"
#ifndef EMULATED
#include "device.cuh"
#endif

__device__ __forceinline__ Vec load(const void* address) { return *(const Vec*)address; }

__device__ __forceinline__ Vec zeros() {
    Vec v;
    v.w[0] = v.w[1] = v.w[2] = v.w[3] = 0;
    return v;
}

__device__ __forceinline__ void unpack(const Vec& v, float (&x)[PER_VEC]) {
#if TYPE == 2
    for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(v.w[i]);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = to_float((Real)(v.w[i] & 0xffff));
        x[2 * i + 1] = to_float((Real)(v.w[i] >> 16));
    }
#endif
}

__device__ __forceinline__ Vec pack(const float (&x)[PER_VEC]) {
    Vec v;
#if TYPE == 2
    for (int i = 0; i < 4; ++i) v.w[i] = __float_as_uint(x[i]);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i)
        v.w[i] = (u32)to_real(x[2 * i]) | (u32)to_real(x[2 * i + 1]) << 16;
#endif
    return v;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

// Integers in the order of numbers.
__device__ __forceinline__ u32 in_order(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

__device__ __forceinline__ u32 largest_of_warp(u32 x) { return __reduce_max_sync(~0u, x); }

__device__ __forceinline__ u32 smallest_of_warp(u32 x) { return __reduce_min_sync(~0u, x); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Products of 16 rows of a weight with up to 8 tokens. A lane holds, of rows g and g + 8, as many
// consecutive elements as one 16-byte load gives, and the same elements of token g. What the tensor
// core calls k is permuted so, alike in both factors.
__device__ __forceinline__ void multiply_vecs(float (&c)[4], const Vec& row, const Vec& row8,
                                              const Vec& token) {
#if TYPE == 2
    // Three products of TF32 parts give nearly the precision of float32.
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 high[6], low[6];
        const u32 parts[6] = {row.w[i],     row8.w[i],  row.w[i + 1],
                              row8.w[i + 1], token.w[i], token.w[i + 1]};
#pragma unroll
        for (int j = 0; j < 6; ++j) {
            float x = __uint_as_float(parts[j]);
            high[j] = to_tf32(x);
            low[j] = to_tf32(x - __uint_as_float(high[j]));
        }
        multiply(c, low[0], low[1], low[2], low[3], high[4], high[5]);
        multiply(c, high[0], high[1], high[2], high[3], low[4], low[5]);
        multiply(c, high[0], high[1], high[2], high[3], high[4], high[5]);
    }
#else
    multiply(c, row.w[0], row8.w[0], row.w[1], row8.w[1], token.w[0], token.w[1]);
    multiply(c, row.w[2], row8.w[2], row.w[3], row8.w[3], token.w[2], token.w[3]);
#endif
}
