// Attention of many new tokens, which are in the cache already: tiles of 64 queries and 64 keys.
#pragma once
#include "matrix.cuh"

#if TYPE != 2

#define QUERIES 64
#define POSITIONS 64
#define LOG2_E 1.4426950408889634f

// Where a tile of POSITIONS keys or values, in pieces of DEPTH elements, has eight of them.
__device__ __forceinline__ int place_in_tile(int position, int vec) {
    return vec / 8 * POSITIONS * DEPTH + place(position, vec % 8);
}

// Warp groups have computed this on no card yet, so that they do it only where that is asked for.
#if defined(GROUPS_IN_ATTENTION) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BY_GROUPS
#endif

// score[QUERIES, POSITIONS] = q . keys, and sum[QUERIES, SIZE] += p . values, by 4 warps of 16
// queries. Lanes hold all but the tiles.
template <int SIZE>
__device__ __forceinline__ void multiply_keys(float (&score)[POSITIONS / 8][4],
                                              u32 (&q)[SIZE / 16][4], const Real* keys) {
#ifdef BY_GROUPS
    if constexpr (SIZE % DEPTH == 0) {
        keep_in_registers(score);
        keep_in_registers(q);
        order_registers();
#pragma unroll
        for (int s = 0; s < SIZE / 16; ++s)
            multiply_group<false>(
                score, q[s], describe(keys + s * 16 / DEPTH * POSITIONS * DEPTH + s * 16 % DEPTH));
        commit_products();
        end_products<0>(score);
        return;
    }
#endif
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int s = 0; s < SIZE / 16; ++s)
#pragma unroll
        for (int n = 0; n < POSITIONS; n += 16) {
            u32 b[4];
            load_matrices(b, keys + place_in_tile(n + lane % 8 + lane / 16 * 8,
                                                  s * 2 + lane / 8 % 2));
            multiply(score[n / 8], q[s][0], q[s][1], q[s][2], q[s][3], b[0], b[1]);
            multiply(score[n / 8 + 1], q[s][0], q[s][1], q[s][2], q[s][3], b[2], b[3]);
        }
}

template <int SIZE, int PIECES>
__device__ __forceinline__ void multiply_values(float (&sum)[PIECES][8][4],
                                                u32 (&p)[POSITIONS / 16][4],
                                                const Real* values) {
#ifdef BY_GROUPS
    if constexpr (SIZE % DEPTH == 0) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) keep_in_registers(sum[piece]);
        keep_in_registers(p);
        order_registers();
#pragma unroll
        for (int s = 0; s < POSITIONS / 16; ++s)
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece)
                multiply_group<true>(
                    sum[piece], p[s],
                    describe(values + piece * POSITIONS * DEPTH + s * 16 * DEPTH));
        commit_products();
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) end_products<0>(sum[piece]);
        return;
    }
#endif
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int s = 0; s < POSITIONS / 16; ++s)
#pragma unroll
        for (int n = 0; n < SIZE / 8; n += 2) {
            u32 b[4];
            load_transposed(b, values + place_in_tile(s * 16 + lane % 16, n + lane / 16));
            float(&left)[4] = sum[n / 8][n % 8], (&right)[4] = sum[n / 8][n % 8 + 1];
            multiply(left, p[s][0], p[s][1], p[s][2], p[s][3], b[0], b[1]);
            multiply(right, p[s][0], p[s][1], p[s][2], p[s][3], b[2], b[3]);
        }
}

// Grid: [width / 64, heads, sequences]; 4 warps of 16 queries. Dynamic shared memory: twice a tile
// of keys and one of values, and 1024 bytes. Query `i` of a sequence is at `past + i`.
template <int SIZE>
__global__ void __launch_bounds__(128, SIZE <= 128 ? 3 : 1)
    flash(Real* out, const Real* query, int query_pitch, const Real* keys, const Real* values,
          const int* lengths, const int* counts, int width, int heads, int kv_heads, int capacity,
          float scale, float softcap) {
    constexpr int STEPS = SIZE / 16, VECS = SIZE / 8, PIECES = (SIZE + DEPTH - 1) / DEPTH;
    constexpr int TILE_SIZE = PIECES * POSITIONS * DEPTH;
    DYNAMIC_SHARED(dynamic);
    Real* shared = tiles(dynamic);
    const int sequence = blockIdx.z, head = blockIdx.y, thread = threadIdx.x;
    const int lane = thread % WARP, g = lane / 4, t = lane % 4;
    // The last queries have most to see, so they come first.
    const int begin = ((int)gridDim.x - 1 - (int)blockIdx.x) * QUERIES;
    const int past = lengths[sequence], count = counts[sequence];
    if (begin >= count) return;
    const long row = (long)sequence * kv_heads + head / (heads / kv_heads);
    const Real* key_rows = keys + row * capacity * SIZE;
    const Real* value_rows = values + row * capacity * SIZE;
    const int mine = begin + thread / WARP * 16 + g;
    u32 q[STEPS][4];
    const Real* of_mine = query + ((long)sequence * width + mine) * query_pitch + head * SIZE;
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int offset = i % 2 * 8, k = s * 16 + i / 2 * 8 + t * 2;
            q[s][i] = mine + offset < count
                          ? *(const u32*)(of_mine + (long)offset * query_pitch + k)
                          : 0;
        }
    float sum[PIECES][8][4] = {}, largest[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
    // Powers of two are cheaper than those of e.
    const float unit = softcap > 0.0f ? LOG2_E : scale * LOG2_E;
    const int end = past + min(begin + QUERIES, count);
    auto tile = [&](int from) { return shared + from / POSITIONS % 2 * 2 * TILE_SIZE; };
    auto fetch = [&](int from) {
        Real* to = tile(from);
        for (int i = thread; from < end && i < POSITIONS * VECS; i += 128) {
            const int at = i / VECS, vec = i % VECS;
            const bool used = from + at < end;
            const long source = (long)(used ? from + at : 0) * SIZE + vec * 8;
            copy_later(to + place_in_tile(at, vec), key_rows + source, used);
            copy_later(to + TILE_SIZE + place_in_tile(at, vec), value_rows + source, used);
        }
        end_copies();
    };
    fetch(0);
    for (int from = 0; from < end; from += POSITIONS) {
        fetch(from + POSITIONS);
        wait_for_copies<1>();
        show_copies_to_tensor_cores();
        __syncthreads();
        float score[POSITIONS / 8][4] = {};
        multiply_keys<SIZE>(score, q, tile(from));
        if (softcap > 0.0f)
#pragma unroll
            for (int n = 0; n < POSITIONS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    score[n][i] = softcap * tanhf(score[n][i] * scale / softcap);
        if (from + POSITIONS > past + begin + 1)  // some query doesn't see all of the tile
#pragma unroll
            for (int n = 0; n < POSITIONS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (from + n * 8 + t * 2 + i % 2 > past + mine + i / 2 * 8)
                        score[n][i] = -1e30f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = largest[i];
#pragma unroll
            for (int n = 0; n < POSITIONS / 8; ++n)
                most = fmaxf(most, fmaxf(score[n][i * 2], score[n][i * 2 + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const float factor = power_of_two((largest[i] - most) * unit), offset = most * unit;
            largest[i] = most;
            total[i] *= factor;
#pragma unroll
            for (int n = 0; n < PIECES * 8; ++n) {
                sum[n / 8][n % 8][i * 2] *= factor;
                sum[n / 8][n % 8][i * 2 + 1] *= factor;
            }
#pragma unroll
            for (int n = 0; n < POSITIONS / 8; ++n)
#pragma unroll
                for (int j = i * 2; j < i * 2 + 2; ++j) {
                    score[n][j] = power_of_two(score[n][j] * unit - offset);
                    total[i] += score[n][j];
                }
        }
        u32 p[POSITIONS / 16][4];
#pragma unroll
        for (int s = 0; s < POSITIONS / 16; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &score[s * 2 + i / 2][i % 2 * 2];
                p[s][i] = (u32)to_real(pair[0]) | (u32)to_real(pair[1]) << 16;
            }
        multiply_values<SIZE>(sum, p, tile(from) + TILE_SIZE);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        const int at = mine + i * 8;
        if (at >= count) continue;
        Real* to = out + ((long)sequence * width + at) * heads * SIZE + (long)head * SIZE;
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n) {
            const float* pair = &sum[n / 8][n % 8][i * 2];
            *(u32*)(to + n * 8 + t * 2) = (u32)to_real(pair[0] / total[i]) |
                                          (u32)to_real(pair[1] / total[i]) << 16;
        }
    }
}

#endif
