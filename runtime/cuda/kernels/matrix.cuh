// Products of tiles in shared memory, for calls of many tokens; 16-bit types only.
#pragma once
#include "common.cuh"

#if TYPE != 2

// Rows of a tile have 32 elements: four vectors of 16 bytes, whose places are exchanged so that
// eight rows lie in different banks.
#define DEPTH 32
__device__ __forceinline__ int place(int row, int vec) {
    return row * DEPTH + ((vec ^ (row >> 1)) & 3) * 8;
}

// The fragment of 16 rows and 16 elements from `k` on, k being a multiple of 16.
__device__ __forceinline__ void load_rows(u32 (&a)[4], const Real* tile, int row, int k) {
    const int lane = threadIdx.x % WARP;
    load_matrices(a, tile + place(row + lane % 16, k / 8 + lane / 16));
}

// The fragments of 16 columns, stored as rows, and 16 elements: those of columns 0-7, then 8-15.
__device__ __forceinline__ void load_columns(u32 (&b)[4], const Real* tile, int column, int k) {
    const int lane = threadIdx.x % WARP;
    load_matrices(b, tile + place(column + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}

#endif
