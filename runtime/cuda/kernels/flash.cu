// Attention of many new tokens, which are in the cache already: tiles of 64 queries and 64 keys.
#pragma once
#include "matrix.cuh"

#if TYPE != 2

#define QUERIES 64
#define POSITIONS 64

// Grid: [width / 64, heads, sequences]; 4 warps of 16 queries. Dynamic shared memory: twice keys
// and values of POSITIONS rows, SIZE + 8 elements apart. Query `i` of a sequence is at `past + i`.
template <int SIZE>
__global__ void __launch_bounds__(128)
    flash(Real* out, const Real* query, int query_pitch, const Real* keys, const Real* values,
          const int* lengths, const int* counts, int width, int heads, int kv_heads, int capacity,
          float scale, float softcap) {
    constexpr int PITCH = SIZE + 8, STEPS = SIZE / 16, VECS = SIZE / 8;
    DYNAMIC_SHARED(dynamic);
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
    float sum[SIZE / 8][4] = {}, largest[2] = {-1e30f, -1e30f}, total[2] = {0.0f, 0.0f};
    const int end = past + min(begin + QUERIES, count);
    auto tile = [&](int from) {
        return (Real*)dynamic + from / POSITIONS % 2 * 2 * POSITIONS * PITCH;
    };
    auto fetch = [&](int from) {
        Real* to = tile(from);
        for (int i = thread; from < end && i < POSITIONS * VECS; i += 128) {
            const int at = i / VECS, k = i % VECS * 8;
            const bool used = from + at < end;
            const long source = (long)(used ? from + at : 0) * SIZE + k;
            copy_later(to + at * PITCH + k, key_rows + source, used);
            copy_later(to + (POSITIONS + at) * PITCH + k, value_rows + source, used);
        }
        end_copies();
    };
    fetch(0);
    for (int from = 0; from < end; from += POSITIONS) {
        fetch(from + POSITIONS);
        wait_for_copies<1>();
        __syncthreads();
        const Real *key_tile = tile(from), *value_tile = key_tile + POSITIONS * PITCH;
        float score[POSITIONS / 8][4] = {};
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int n = 0; n < POSITIONS; n += 16) {
                u32 b[4];
                load_matrices(b, key_tile + (n + lane % 8 + lane / 16 * 8) * PITCH + s * 16 +
                                     lane / 8 % 2 * 8);
                multiply(score[n / 8], q[s][0], q[s][1], q[s][2], q[s][3], b[0], b[1]);
                multiply(score[n / 8 + 1], q[s][0], q[s][1], q[s][2], q[s][3], b[2], b[3]);
            }
        float most[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < POSITIONS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int position = from + n * 8 + t * 2 + i % 2;
                float x = score[n][i] * scale;
                if (softcap > 0.0f) x = softcap * tanhf(x / softcap);
                if (position > past + mine + i / 2 * 8) x = -1e30f;
                score[n][i] = x;
                most[i / 2] = fmaxf(most[i / 2], x);
            }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 1));
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2));
            const float factor = __expf(largest[i] - most[i]);
            largest[i] = most[i];
            total[i] *= factor;
#pragma unroll
            for (int n = 0; n < SIZE / 8; ++n) {
                sum[n][i * 2] *= factor;
                sum[n][i * 2 + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < POSITIONS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[n][i] = __expf(score[n][i] - most[i / 2]);
                total[i / 2] += score[n][i];
            }
#pragma unroll
        for (int s = 0; s < POSITIONS / 16; ++s) {
            u32 p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &score[s * 2 + i / 2][i % 2 * 2];
                p[i] = (u32)to_real(pair[0]) | (u32)to_real(pair[1]) << 16;
            }
#pragma unroll
            for (int n = 0; n < SIZE; n += 16) {
                u32 b[4];
                load_transposed(b, value_tile + (s * 16 + lane % 16) * PITCH + n + lane / 16 * 8);
                multiply(sum[n / 8], p[0], p[1], p[2], p[3], b[0], b[1]);
                multiply(sum[n / 8 + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
            }
        }
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
        for (int n = 0; n < SIZE / 8; ++n)
            *(u32*)(to + n * 8 + t * 2) = (u32)to_real(sum[n][i * 2] / total[i]) |
                                          (u32)to_real(sum[n][i * 2 + 1] / total[i]) << 16;
    }
}

#endif
