// What calls of many tokens do row by row: queries and keys, the choice of experts, sums.
#pragma once
#include "attention.cu"
#include "route.cu"

// Grid: [sequences * width, heads / 8], of queries and keys together. Normalises and rotates a
// row's queries in place, and writes its key and value to the cache.
template <int SIZE>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
    append(Real* query, int query_pitch, const Real* query_norm, float query_epsilon,
           int query_normed, const Real* key, int key_pitch, const Real* key_norm,
           float key_epsilon, int key_normed, const Real* value, int value_pitch,
           const Real* cosine, const Real* sine, int rotary_size, int interleaved, Real* keys,
           Real* values, const int* lengths, const int* counts, int width, int heads, int kv_heads,
           int capacity) {
    __shared__ float raw[ATTENTION_WARPS][SIZE];
    __shared__ float sums[ATTENTION_WARPS];
    const int row = blockIdx.x, sequence = row / width, at = row % width;
    if (at >= counts[sequence]) return;
    const int position = lengths[sequence] + at, warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const Rotary rotary = {cosine, sine, rotary_size, interleaved};
    Real* queries = query + (long)row * query_pitch;
    const Real* new_keys = key + (long)row * key_pitch;
    float query_scale = 1.0f, key_scale = 1.0f;
    if (query_norm && query_normed != SIZE)
        query_scale = scale_of(queries, query_normed, query_epsilon, sums);
    if (key_norm && key_normed != SIZE)
        key_scale = scale_of(new_keys, key_normed, key_epsilon, sums);
    for (int h = blockIdx.y * ATTENTION_WARPS + warp; h < heads + kv_heads;
         h += gridDim.y * ATTENTION_WARPS) {
        const bool is_query = h < heads;
        const int head = is_query ? h : h - heads;
        const Real* from = (is_query ? queries : new_keys) + (long)head * SIZE;
        const Real* norm = is_query ? query_norm : key_norm;
        const bool whole = (is_query ? query_normed : key_normed) != SIZE;
        float scale = is_query ? query_scale : key_scale;
        if (norm && !whole) {
            float sum = 0.0f;
            for (int i = lane; i < SIZE; i += WARP) {
                const float x = to_float(from[i]);
                sum += x * x;
            }
            scale = rsqrtf(sum_of_warp(sum) / SIZE + (is_query ? query_epsilon : key_epsilon));
        }
        for (int i = lane; i < SIZE; i += WARP) {
            float x = to_float(from[i]);
            if (norm) {
                x = to_float(to_real(x * scale)) * to_float(norm[whole ? head * SIZE + i : i]);
                x = to_float(to_real(x));
            }
            raw[warp][i] = x;
        }
        __syncwarp();
        const long place = ((long)sequence * kv_heads + head) * capacity + position;
        Real* to = is_query ? queries + (long)head * SIZE : keys + place * SIZE;
        for (int i = lane; i < SIZE; i += WARP)
            to[i] = to_real(rotated(raw[warp], i, rotary, position));
        __syncwarp();
    }
    if (blockIdx.y) return;
    for (int i = threadIdx.x; i < kv_heads * SIZE; i += ATTENTION_WARPS * WARP) {
        const long head = (long)sequence * kv_heads + i / SIZE;
        values[(head * capacity + position) * SIZE + i % SIZE] = value[(long)row * value_pitch + i];
    }
}

// Grid: rows / 8. A warp chooses the experts of a row from `logits` [rows, E] float: ids [rows, K]
// are -1 where dropped, `counts` of the experts grow, `places` are the rows' among an expert's.
template <int EXPERTS>
__global__ void __launch_bounds__(ROUTE_WARPS * WARP)
    route_rows(int* ids, float* weights, int* places, int* expert_counts, const float* logits,
               const Router* router, const int* counts, int rounded_logits, int width, int rows) {
    __shared__ float scores[ROUTE_WARPS][EXPERTS], ranking[ROUTE_WARPS][EXPERTS];
    __shared__ float ranked[ROUTE_WARPS][MOST_CANDIDATES];
    __shared__ int experts[ROUTE_WARPS][MOST_CANDIDATES];
    const Router r = *router;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int row = blockIdx.x * ROUTE_WARPS + warp;
    if (row >= rows) return;
    const int sequence = row / width;
    const bool real = row % width < counts[sequence];
    for (int e = lane; e < r.experts; e += WARP) {
        const float x = logits[(long)row * r.experts + e];
        scores[warp][e] = rounded_logits ? to_float(to_real(x)) : x;
    }
    const Choice choice =
        choose_ranked(scores[warp], ranking[warp], ranked[warp], experts[warp], r, sequence);
    const Candidate& mine = choice.mine;
    const bool keep = choice.keep && real;
    const float share = sum_of_warp(keep ? mine.weight : 0.0f);
    if (choice.used) {
        const long at = (long)row * r.candidates + lane;
        ids[at] = keep ? mine.expert : -1;
        weights[at] = mine.weight * (r.renormalize_kept ? share_of(choice.whole, share) : 1.0f);
        if (keep) places[at] = atomicAdd(expert_counts + mine.expert, 1);
    }
}

// One block. offsets [E + 1] of the experts' rows; sets the counts to zero again.
__global__ void __launch_bounds__(WARP) sum_counts(int* offsets, int* expert_counts, int experts) {
    int before = 0;
    for (int from = 0; from < experts; from += WARP) {
        const int e = from + threadIdx.x, count = e < experts ? expert_counts[e] : 0;
        int sum = count;
        for (int offset = 1; offset < WARP; offset *= 2) {
            const int other = __shfl_sync(~0u, sum, (int)threadIdx.x - offset);
            if ((int)threadIdx.x >= offset) sum += other;
        }
        if (e < experts) {
            offsets[e] = before + sum - count;
            expert_counts[e] = 0;
        }
        before += __shfl_sync(~0u, sum, WARP - 1);
    }
    if (threadIdx.x == 0) offsets[experts] = before;
}

// Grid: any. Puts kept candidates in the order of their experts.
__global__ void __launch_bounds__(256)
    place_pairs(int* pair_rows, float* pair_weights, int* places, const int* ids,
                const float* weights, const int* offsets, int candidates, int size) {
    for (int i = blockIdx.x * 256 + threadIdx.x; i < size; i += gridDim.x * 256) {
        if (ids[i] < 0) continue;
        const int pair = offsets[ids[i]] + places[i];
        places[i] = pair;
        pair_rows[pair] = i / candidates;
        pair_weights[pair] = weights[i];
    }
}

// Grid: rows. out[t] = sum of the row's pairs + residual, candidates in the order of their weights.
__global__ void __launch_bounds__(256)
    sum_pairs(Real* out, const Real* pairs, const int* ids, const int* places,
              const Real* residual, int candidates, int n) {
    const long row = blockIdx.x;
    for (int k = threadIdx.x * PER_VEC; k < n; k += 256 * PER_VEC) {
        float sum[PER_VEC] = {};
        for (int j = 0; j < candidates; ++j) {
            if (ids[row * candidates + j] < 0) continue;
            float x[PER_VEC];
            unpack(load(pairs + (long)places[row * candidates + j] * n + k), x);
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i) sum[i] += x[i];
        }
        if (residual) {
            float x[PER_VEC];
            unpack(load(residual + row * n + k), x);
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i) sum[i] = to_float(to_real(sum[i])) + x[i];
        }
        *(Vec*)(out + row * n + k) = pack(sum);
    }
}

// Grid: any. x[t, i] += bias[i].
__global__ void __launch_bounds__(256) add_bias(Real* x, const Real* bias, int n, int rows) {
    for (long i = blockIdx.x * 256 + threadIdx.x; i < (long)n * rows; i += gridDim.x * 256)
        x[i] = to_real(to_float(x[i]) + to_float(bias[i % n]));
}

// Grid: sequences. The last real row of each.
__global__ void __launch_bounds__(256)
    last_rows(Real* out, const Real* x, const int* counts, int width, int n) {
    const long row = (long)blockIdx.x * width + max(counts[blockIdx.x] - 1, 0);
    for (int k = threadIdx.x * PER_VEC; k < n; k += 256 * PER_VEC)
        *(Vec*)(out + (long)blockIdx.x * n + k) = load(x + row * n + k);
}
