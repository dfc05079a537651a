// The experts of a call of many tokens: each expert's rows in one product, by tiles, no host asked.
#pragma once
#include "matrix.cuh"

// Which tokens every expert has: `offsets` [E + 1] into `rows`, the tokens in the experts' order.
struct Groups {
    const int* offsets;
    const int* rows;
};

#if TYPE != 2

#define TILE 128  // rows of a block's tile

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

// Goes through a tile's steps; with MULTIPLY, it also multiplies.
template <bool MULTIPLY, int STEPS, int STAGES, int STAGE, int N, class Fetch>
__device__ __forceinline__ void run_steps(float (&c)[N][4], Real* shared, const Fetch& fetch) {
    for (int step = 0; step < STEPS; ++step) {
        wait_for_copies<STAGES - 3>();
        show_copies_to_tensor_cores();
        sync_block();
        const Real* rows = shared + step % STAGES * STAGE;
        if (MULTIPLY) begin_products(c, rows, rows + TILE * DEPTH);
        fetch(step + STAGES - 2);
        if (MULTIPLY) end_products<1>(c);
    }
    if (MULTIPLY) end_products<0>(c);
}

// c[16, COLUMNS] of each of 8 warps += rows[128, K] . columns[COLUMNS, K], `count` rows being
// used; c[n] has columns 8 n to 8 n + 7. `row(i)` and `column(i)` give where a row begins, or
// nothing. Loads of STAGES - 2 steps are under way while a step multiplies, and the step before it
// may still.
template <int K, int COLUMNS, int STAGES, class Row, class Column>
__device__ __forceinline__ void multiply_tile(float (&c)[COLUMNS / 8][4], Real* shared, int count,
                                              const Row& row, const Column& column) {
    constexpr int STEPS = (K + DEPTH - 1) / DEPTH, STAGE = (TILE + COLUMNS) * DEPTH;
    // Eight threads copy a row's 128 bytes, 32 rows at a time.
    const int line = threadIdx.x / 8, vec = threadIdx.x % 8;
    const Real *from_rows[TILE / 32], *from_columns[COLUMNS / 32];
#pragma unroll
    for (int i = 0; i < TILE / 32; ++i) from_rows[i] = row(line + i * 32);
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; ++i) from_columns[i] = column(line + i * 32);
    auto fetch = [&](int step) {
        const int k = step * DEPTH + vec * 8;
        Real* stage = shared + step % STAGES * STAGE;
        if (step < STEPS) {
#pragma unroll
            for (int i = 0; i < TILE / 32; ++i) {
                const bool used = from_rows[i] && k < K;
                copy_later(stage + place(line + i * 32, vec), used ? from_rows[i] + k : shared,
                           used);
            }
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; ++i) {
                const bool used = from_columns[i] && k < K;
                copy_later(stage + TILE * DEPTH + place(line + i * 32, vec),
                           used ? from_columns[i] + k : shared, used);
            }
        }
        end_copies();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 2; ++step) fetch(step);
    // Of a tile that is half empty, four warps have nothing to do but to copy.
    if ((int)threadIdx.x / 128 * 64 < count)
        run_steps<true, STEPS, STAGES, STAGE>(c, shared, fetch);
    else
        run_steps<false, STEPS, STAGES, STAGE>(c, shared, fetch);
}

// Gives `use` each pair of neighbouring columns of a warp's part of a tile: row, column, values.
template <int N, class Use>
__device__ __forceinline__ void for_each_result(const float (&c)[N][4], int count, int left,
                                                int columns, const Use& use) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int row = warp * 16 + half * 8 + lane / 4;
            const int column = left + n * 8 + lane % 4 * 2;
            if (row < count && column < columns)
                use(row, column, c[n][half * 2], c[n][half * 2 + 1]);
        }
}

// Results of an expert's rows from `first` on: what `grouped_gate_up` gives.
template <int N>
__device__ __forceinline__ void store_gated(Real* hidden, const float (&c)[N][4],
                                            const float* pair_weights, const Real* bias, int expert,
                                            int first, int count, int left, int columns) {
    for_each_result(c, count, left, columns, [&](int row, int column, float gate, float up) {
        const long pair = first + row;
        if (bias) {
            gate += to_float(bias[(long)expert * columns + column]);
            up += to_float(bias[(long)expert * columns + column + 1]);
        }
        hidden[pair * (columns / 2) + column / 2] = to_real(silu(gate) * up * pair_weights[pair]);
    });
}

// The same of `grouped_down`.
template <int N>
__device__ __forceinline__ void store_pairs(Real* out, const float (&c)[N][4],
                                            const float* pair_weights, const Real* bias, int expert,
                                            int first, int count, int left, int columns) {
    for_each_result(c, count, left, columns, [&](int row, int column, float x, float y) {
        const long pair = first + row;
        if (bias) {
            x += pair_weights[pair] * to_float(bias[(long)expert * columns + column]);
            y += pair_weights[pair] * to_float(bias[(long)expert * columns + column + 1]);
        }
        *(u32*)(out + pair * columns + column) = (u32)to_real(x) | (u32)to_real(y) << 16;
    });
}

// Products of an expert's matrix [columns, K] with its rows in a block's tile; `row(i)` gives where
// the i-th begins.
template <int K, int COLUMNS, int STAGES, class Row>
__device__ __forceinline__ void multiply_expert(float (&c)[COLUMNS / 8][4], Vec* dynamic,
                                                const Real* matrix, int columns, int left,
                                                int count, const Row& row) {
    const Real* none = nullptr;
    multiply_tile<K, COLUMNS, STAGES>(
        c, tiles(dynamic), count, [&](int i) { return i < count ? row(i) : none; },
        [&](int i) { return left + i < columns ? matrix + (long)(left + i) * K : none; });
}

// hidden[pair, i] = weight[pair] silu(gate) up, gate and up being rows 2 i and 2 i + 1.
// Grid: [2 inner / COLUMNS, most tiles]. Dynamic shared memory: STAGES tiles of rows and columns,
// and 1024 bytes.
template <int K, int COLUMNS, int STAGES>
__global__ void __launch_bounds__(256, COLUMNS == 128 ? 2 : 1)
    grouped_gate_up(Real* hidden, const Real* x, const int* offsets, const int* rows,
                    const float* pair_weights, const Real* weight, const Real* bias, int experts,
                    int inner) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int columns = 2 * inner, left = blockIdx.x * COLUMNS;
    float c[COLUMNS / 8][4] = {};
    multiply_expert<K, COLUMNS, STAGES>(
        c, dynamic, weight + (long)expert * columns * K, columns, left, count,
        [&](int i) { return x + (long)rows[first + i] * K; });
    store_gated(hidden, c, pair_weights, bias, expert, first, count, left, columns);
}

// out[pair, n] = hidden[pair] . weight[expert, n] + pair_weight bias.
// Grid: [N / COLUMNS, most tiles].
template <int INNER, int COLUMNS, int STAGES>
__global__ void __launch_bounds__(256, COLUMNS == 128 ? 2 : 1)
    grouped_down(Real* out, const Real* hidden, const int* offsets, const float* pair_weights,
                 const Real* weight, const Real* bias, int experts, int columns) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int left = blockIdx.x * COLUMNS;
    float c[COLUMNS / 8][4] = {};
    multiply_expert<INNER, COLUMNS, STAGES>(
        c, dynamic, weight + (long)expert * columns * INNER, columns, left, count,
        [&](int i) { return hidden + (long)(first + i) * INNER; });
    store_pairs(out, c, pair_weights, bias, expert, first, count, left, columns);
}

#endif
