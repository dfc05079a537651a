// The experts of a call of many tokens: each expert's rows in one product, by tiles, no host asked.
#pragma once
#include "matrix.cuh"

// Which tokens every expert has: `offsets` [E + 1] into `rows`, the tokens in the experts' order.
struct Groups {
    const int* offsets;
    const int* rows;
};

#if TYPE != 2

#define TILE 128    // rows and columns of a block's tile
#define STAGES 3    // of which loads are under way

// Where eight rows of a tile fill 1024 bytes that begin at a multiple of that.
__device__ __forceinline__ Real* tiles(Vec* dynamic) {
    return (Real*)(((unsigned long long)dynamic + 1023) & ~1023ull);
}

// Finds a block's expert and the first of its rows. Returns false beyond the last tile.
__device__ __forceinline__ bool find_tile(const int* offsets, int experts, int tile, int& expert,
                                          int& first, int& count) {
    __shared__ int found[3];
    if (threadIdx.x < WARP) {
        int before = 0;
        for (int from = 0; from < experts; from += WARP) {
            const int e = from + threadIdx.x;
            const int begin = e < experts ? offsets[e] : 0, end = e < experts ? offsets[e + 1] : 0;
            const int tiles = (end - begin + TILE - 1) / TILE;
            int sum = tiles;
            for (int offset = 1; offset < WARP; offset *= 2) {
                const int other = __shfl_sync(~0u, sum, (int)threadIdx.x - offset);
                if ((int)threadIdx.x >= offset) sum += other;
            }
            const int mine = tile - before - (sum - tiles);
            if (mine >= 0 && mine < tiles) {
                found[0] = e;
                found[1] = begin + mine * TILE;
                found[2] = min(TILE, end - begin - mine * TILE);
            }
            before += __shfl_sync(~0u, sum, WARP - 1);
        }
        if (threadIdx.x == 0 && tile >= before) found[0] = -1;
    }
    __syncthreads();
    expert = found[0];
    first = found[1];
    count = found[2];
    return expert >= 0;
}

// c[16, 128] of each of 8 warps += rows[128, K] . columns[128, K]; c[n] has columns 8 n to 8 n + 7.
// `row(i)` and `column(i)` give where a row begins, or nothing.
template <int K, class Row, class Column>
__device__ __forceinline__ void multiply_tile(float (&c)[16][4], Real* shared, const Row& row,
                                              const Column& column) {
    constexpr int STEPS = (K + DEPTH - 1) / DEPTH;
    const int thread = threadIdx.x;
    const int line = thread / 2, half = thread % 2;  // a thread copies half a row of both tiles
    const Real *from_row = row(line), *from_column = column(line);
    auto fetch = [&](int step) {
        if (step < STEPS) {
            Real* rows = shared + step % STAGES * 2 * TILE * DEPTH;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int vec = half * 4 + i, k = step * DEPTH + vec * 8;
                const bool used = k < K;
                const bool row_used = from_row && used, column_used = from_column && used;
                copy_later(rows + place(line, vec), row_used ? from_row + k : shared, row_used);
                copy_later(rows + TILE * DEPTH + place(line, vec),
                           column_used ? from_column + k : shared, column_used);
            }
        }
        end_copies();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) fetch(step);
    for (int step = 0; step < STEPS; ++step) {
        wait_for_copies<STAGES - 2>();
        show_copies_to_tensor_cores();
        __syncthreads();
        const Real* rows = shared + step % STAGES * 2 * TILE * DEPTH;
        begin_products(c, rows, rows + TILE * DEPTH);
        fetch(step + STAGES - 1);
        end_products(c);
    }
}

// hidden[pair, i] = weight[pair] silu(gate) up, gate and up being rows 2 i and 2 i + 1.
// Grid: [2 inner / 128, most tiles]. Dynamic shared memory: STAGES tiles of both, and 1024 bytes.
template <int K>
__global__ void __launch_bounds__(256, 2)
    grouped_gate_up(Real* hidden, const Real* x, const int* offsets, const int* rows,
                    const float* pair_weights, const Real* weight, const Real* bias, int experts,
                    int inner) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int columns = 2 * inner, left = blockIdx.x * TILE;
    const Real* matrix = weight + (long)expert * columns * K;
    float c[16][4] = {};
    multiply_tile<K>(
        c, tiles(dynamic),
        [&](int i) { return i < count ? x + (long)rows[first + i] * K : (const Real*)nullptr; },
        [&](int i) {
            return left + i < columns ? matrix + (long)(left + i) * K : (const Real*)nullptr;
        });
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const int at = warp * 16 + half * 8 + lane / 4;
            const int column = left + n * 8 + lane % 4 * 2;
                if (at >= count || column >= columns) continue;
                float gate = c[n][half * 2], up = c[n][half * 2 + 1];
                if (bias) {
                    gate += to_float(bias[(long)expert * columns + column]);
                    up += to_float(bias[(long)expert * columns + column + 1]);
                }
                const long pair = first + at;
                hidden[pair * inner + column / 2] = to_real(silu(gate) * up * pair_weights[pair]);
            }
}

// out[pair, n] = hidden[pair] . weight[expert, n] + pair_weight bias. Grid: [N / 128, most tiles].
template <int INNER>
__global__ void __launch_bounds__(256, 2)
    grouped_down(Real* out, const Real* hidden, const int* offsets, const float* pair_weights,
                 const Real* weight, const Real* bias, int experts, int columns) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int left = blockIdx.x * TILE;
    const Real* matrix = weight + (long)expert * columns * INNER;
    float c[16][4] = {};
    multiply_tile<INNER>(
        c, tiles(dynamic),
        [&](int i) {
            return i < count ? hidden + (long)(first + i) * INNER : (const Real*)nullptr;
        },
        [&](int i) { return left + i < columns ? matrix + (long)(left + i) * INNER : (const Real*)nullptr; });
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const int at = warp * 16 + half * 8 + lane / 4;
            const int column = left + n * 8 + lane % 4 * 2;
                if (at >= count || column >= columns) continue;
                float x[2] = {c[n][half * 2], c[n][half * 2 + 1]};
                const long pair = first + at;
                if (bias)
                    for (int o = 0; o < 2; ++o)
                        x[o] += pair_weights[pair] * to_float(bias[(long)expert * columns + column + o]);
                *(u32*)(out + pair * columns + column) =
                    (u32)to_real(x[0]) | (u32)to_real(x[1]) << 16;
            }
}

#endif
