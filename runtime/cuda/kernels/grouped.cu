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
#define STAGES 4    // of which loads are under way
#define TILE_BYTES (2 * TILE * DEPTH * 2)

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

// c[64, 32] of each warp += rows[128, K] . columns[128, K], 8 warps as 2 x 4.
// `row(i)` and `column(i)` give where a row begins, or nothing.
template <int K, class Row, class Column>
__device__ __forceinline__ void multiply_tile(float (&c)[4][4][4], Real* shared, const Row& row,
                                              const Column& column) {
    constexpr int STEPS = (K + DEPTH - 1) / DEPTH;
    const int thread = threadIdx.x, warp = thread / WARP;
    const int line = thread / 2, half = thread % 2;  // a thread copies half a row of both tiles
    const Real *from_row = row(line), *from_column = column(line);
    auto fetch = [&](int step) {
        if (step < STEPS) {
            Real* rows = shared + step % STAGES * 2 * TILE * DEPTH;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int vec = half * 2 + i, k = step * DEPTH + vec * 8;
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
    const int top = warp / 4 * 64, left = warp % 4 * 32;
    for (int step = 0; step < STEPS; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const Real* rows = shared + step % STAGES * 2 * TILE * DEPTH;
        const Real* columns = rows + TILE * DEPTH;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) load_rows(a[i], rows, top + i * 16, k);
#pragma unroll
            for (int j = 0; j < 2; ++j) load_columns(b[j], columns, left + j * 16, k);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    multiply(c[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2],
                             b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// hidden[pair, i] = weight[pair] silu(gate) up, gate and up being rows 2 i and 2 i + 1.
// Grid: [2 inner / 128, most tiles]. Dynamic shared memory: STAGES * TILE_BYTES.
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
    float c[4][4][4] = {};
    multiply_tile<K>(
        c, (Real*)dynamic,
        [&](int i) { return i < count ? x + (long)rows[first + i] * K : (const Real*)nullptr; },
        [&](int i) {
            return left + i < columns ? matrix + (long)(left + i) * K : (const Real*)nullptr;
        });
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = warp / 4 * 64 + i * 16 + half * 8 + lane / 4;
                const int column = left + warp % 4 * 32 + j * 8 + lane % 4 * 2;
                if (at >= count || column >= columns) continue;
                float gate = c[i][j][half * 2], up = c[i][j][half * 2 + 1];
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
                 const Real* weight, const Real* bias, int experts, int n) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int left = blockIdx.x * TILE;
    const Real* matrix = weight + (long)expert * n * INNER;
    float c[4][4][4] = {};
    multiply_tile<INNER>(
        c, (Real*)dynamic,
        [&](int i) {
            return i < count ? hidden + (long)(first + i) * INNER : (const Real*)nullptr;
        },
        [&](int i) { return left + i < n ? matrix + (long)(left + i) * INNER : (const Real*)nullptr; });
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = warp / 4 * 64 + i * 16 + half * 8 + lane / 4;
                const int column = left + warp % 4 * 32 + j * 8 + lane % 4 * 2;
                if (at >= count || column >= n) continue;
                float x[2] = {c[i][j][half * 2], c[i][j][half * 2 + 1]};
                const long pair = first + at;
                if (bias)
                    for (int o = 0; o < 2; ++o)
                        x[o] += pair_weights[pair] * to_float(bias[(long)expert * n + column + o]);
                *(u32*)(out + pair * n + column) =
                    (u32)to_real(x[0]) | (u32)to_real(x[1]) << 16;
            }
}

#endif
