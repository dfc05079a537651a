// The experts of a layer: only the kept ones are read, each once for all its tokens.
#pragma once
#include "route.cu"

// Blocks of `gate_up` on a multiprocessor: enough for all of a token to run at once.
#define GATE_UP_BLOCKS 8
#define GATE_UP_LOADS 2

// hidden[slot, t, i] = weight[slot, t] silu(gate) up. Grid: one block per 8 elements of the shared
// expert, then of each kept one: [shared / 8 + most * inner / 8]. Blocks beyond the kept end.
template <int K, int BITS, int SHARED_BITS, int GROUPS, int WARPS>
__global__ void __launch_bounds__(WARPS * WARP, GATE_UP_BLOCKS)
    gate_up(Real* hidden, Real* shared_hidden, const Real* x, const Routing* routing,
            const char* values, const Real* scales, const Real* bias, int block, int inner,
            const char* shared_gate, const char* shared_up, const Real* shared_gate_scales,
            const Real* shared_up_scales, int shared_block, int shared_inner, int shared_gated,
            int tokens) {
    __shared__ float parts[WARPS * GROUPS * 128];
    const int warp = threadIdx.x / WARP, g = (threadIdx.x % WARP) / 4;
    const int shared_tiles = shared_inner / 8, tiles = inner / 8;
    let_next_begin();
    float c[GROUPS][4] = {};
    auto token = [&](int group, int k) {
        const int t = group * 8 + g;
        return t < tokens ? load(x + (long)t * K + k) : zeros();
    };
    int slot = -1, expert = 0, tile = blockIdx.x;
    if (tile < shared_tiles) {
        const long i = tile * 8 + g;
        const Weight<SHARED_BITS> weight = {shared_gate, shared_up, shared_gate_scales,
                                            shared_up_scales, shared_block};
        Pieces<K, SHARED_BITS, WARPS, GATE_UP_LOADS> first;
        first.load(weight, i, i, 0, warp);
        wait_for_previous();
        multiply_rows(c, first, weight, i, i, warp, token);
    } else {
        slot = (tile - shared_tiles) / tiles;
        tile = (tile - shared_tiles) % tiles;
        wait_for_previous();
        if (slot >= routing->count) return;
        expert = routing->expert[slot];
        const long row = ((long)expert * inner + tile * 8 + g) * 2;
        const Weight<BITS> weight = one_weight<BITS>(values, scales, block);
        Pieces<K, BITS, WARPS, GATE_UP_LOADS> first;
        first.load(weight, row, row + 1, 0, warp);
        multiply_rows(c, first, weight, row, row + 1, warp, token);
    }
    store_products<GROUPS>(parts + warp * GROUPS * 128, c);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * 8; i += WARPS * WARP) {
        const int t = i / 8, at = tile * 8 + i % 8;
        float gate = sum_of_parts<GROUPS, WARPS>(parts, t * 16 + i % 8);
        float up = sum_of_parts<GROUPS, WARPS>(parts, t * 16 + i % 8 + 8);
        if (slot < 0) {
            const float weight = shared_gated ? routing->shared[t] : 1.0f;
            shared_hidden[(long)t * shared_inner + at] = to_real(silu(gate) * up * weight);
        } else if (routing->tokens[slot] >> t & 1) {
            if (bias) {
                gate += to_float(bias[((long)expert * inner + at) * 2]);
                up += to_float(bias[((long)expert * inner + at) * 2 + 1]);
            }
            hidden[((long)slot * tokens + t) * inner + at] =
                to_real(silu(gate) * up * routing->weight[slot][t]);
        }
    }
}

// out[t, n] = sum over the kept experts of hidden[slot, t] . down[expert, n], plus the shared
// expert's, the bias and the residual. Grid: n / 16.
template <int INNER, int SHARED_INNER, int BITS, int SHARED_BITS, int GROUPS, int WARPS>
__global__ void __launch_bounds__(WARPS * WARP)
    down(Real* out, const Real* hidden, const Real* shared_hidden, const Routing* routing,
         const char* values, const Real* scales, const Real* bias, int block,
         const char* shared_values, const Real* shared_scales, int shared_block,
         const Real* residual, int n, int tokens) {
    typedef Layout<INNER, BITS> L;
    constexpr int UNROLL = BITS ? 2 : 4;
    constexpr int CHUNKS = (L::LOADS + UNROLL - 1) / UNROLL;  // of an expert
    __shared__ float parts[WARPS * GROUPS * 128];
    __shared__ int expert[MOST_TOKENS * MOST_CANDIDATES], users[MOST_TOKENS * MOST_CANDIDATES];
    const int warp = threadIdx.x / WARP, g = (threadIdx.x % WARP) / 4, tile = blockIdx.x;
    const long row = tile * 16 + g, row8 = row + 8;
    float c[GROUPS][4] = {};
    let_next_begin();
    if constexpr (SHARED_INNER > 0) {
        const Weight<SHARED_BITS> weight =
            one_weight<SHARED_BITS>(shared_values, shared_scales, shared_block);
        Pieces<SHARED_INNER, SHARED_BITS, WARPS> first;
        first.load(weight, row, row8, 0, warp);
        wait_for_previous();
        multiply_rows(
            c, first, weight, row, row8, warp, [&](int group, int k) {
                const int t = group * 8 + g;
                return t < tokens ? load(shared_hidden + (long)t * SHARED_INNER + k) : zeros();
            });
    } else {
        wait_for_previous();
    }
    const Weight<BITS> weight = one_weight<BITS>(values, scales, block);
    const int count = routing->count, chunks = count * CHUNKS;
    for (int i = threadIdx.x; i < count; i += WARPS * WARP) {
        expert[i] = routing->expert[i];
        users[i] = routing->tokens[i];
    }
    __syncthreads();
    Piece<BITS> current[UNROLL], next[UNROLL];
    auto fetch = [&](int chunk, Piece<BITS>(&pieces)[UNROLL]) {
        const long base = (long)expert[chunk / CHUNKS] * n;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i)
            pieces[i] = load_piece<INNER, BITS>(weight, base + row, base + row8,
                                                chunk % CHUNKS * UNROLL + i);
    };
    if (warp < chunks) fetch(warp, current);
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        if (chunk + WARPS < chunks) fetch(chunk + WARPS, next);
        const int slot = chunk / CHUNKS, mask = users[slot];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int k = ((chunk % CHUNKS * UNROLL + i) * 4 + threadIdx.x % 4) * L::LANE;
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
                add_products<BITS>(c[group], current[i], [&](int vec) {
                    const int t = group * 8 + g;
                    if (t >= tokens || !(mask >> t & 1) || k >= INNER) return zeros();
                    return load(hidden + ((long)slot * tokens + t) * INNER + k + vec * PER_VEC);
                });
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) current[i] = next[i];
    }
    store_products<GROUPS>(parts + warp * GROUPS * 128, c);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * 16; i += WARPS * WARP) {
        const int t = i / 16, column = tile * 16 + i % 16;
        float sum = sum_of_parts<GROUPS, WARPS>(parts, i);
        if (bias)
            for (int slot = 0; slot < count; ++slot)
                if (users[slot] >> t & 1)
                    sum += routing->weight[slot][t] *
                           to_float(bias[(long)expert[slot] * n + column]);
        if (residual) sum = to_float(to_real(sum)) + to_float(residual[(long)t * n + column]);
        out[(long)t * n + column] = to_real(sum);
    }
}
