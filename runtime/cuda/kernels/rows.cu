// What calls of many tokens do row by row: queries and keys, the choice of experts, sums.
#pragma once
#include "attention.cu"
#include "route.cu"

// Eight elements of a head, rotated: `head` has all of it, `at` is the first.
template <int SIZE>
__device__ __forceinline__ void rotate_vec(float (&x)[PER_VEC], const float* head, int at,
                                           const Rotary& rotary, int position) {
    const int half = rotary.size / 2;
    if (!rotary.cosine || at >= rotary.size) {
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) x[i] = head[at + i];
    } else if (rotary.interleaved || half % PER_VEC) {
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) x[i] = rotated(head, at + i, rotary, position);
    } else {  // all are of one half, so tables and the other half are read in whole vectors
        const int pair = at % half;
        const float sign = at < half ? -1.0f : 1.0f;
        float c[PER_VEC], s[PER_VEC];
        unpack(load(rotary.cosine + (long)position * half + pair), c);
        unpack(load(rotary.sine + (long)position * half + pair), s);
        const float* other = head + (at < half ? at + half : pair);
#pragma unroll
        for (int i = 0; i < PER_VEC; ++i) x[i] = head[at + i] * c[i] + sign * other[i] * s[i];
    }
}

// Grid: [sequences * width, any], of queries and keys together. Normalises and rotates a
// row's queries in place, and writes its key and value to the cache. SIZE is a multiple of 16.
// With a norm over all queries one block has them all: others would read what it has rotated.
template <int SIZE>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
    append(Real* query, int query_pitch, const Real* query_norm, float query_epsilon,
           int query_normed, const Real* key, int key_pitch, const Real* key_norm,
           float key_epsilon, int key_normed, const Real* value, int value_pitch,
           const Real* shared_key, int shared_pitch, int shared_size, const Real* cosine,
           const Real* sine, int rotary_size, int interleaved, Real* keys, Real* values,
           const int* lengths, const int* counts, int width, int heads, int kv_heads,
           int capacity) {
    // Lanes that share a head; a warp has several heads where that uses more of its lanes.
    constexpr int VECS = SIZE / PER_VEC, LANES = VECS & (VECS - 1) || VECS > WARP ? WARP : VECS;
    constexpr int TOGETHER = WARP / LANES;
    alignas(16) __shared__ float raw[ATTENTION_WARPS][TOGETHER][SIZE];
    __shared__ float sums[ATTENTION_WARPS];
    const int row = blockIdx.x, sequence = row / width, at = row % width;
    if (at >= counts[sequence]) return;
    const int position = lengths[sequence] + at, warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % LANES, slot = threadIdx.x % WARP / LANES;
    const Rotary rotary = {cosine, sine, rotary_size, interleaved};
    Real* queries = query + (long)row * query_pitch;
    const Real* new_keys = key + (long)row * key_pitch;
    float query_scale = 1.0f, key_scale = 1.0f;
    if (query_norm && query_normed != SIZE)
        query_scale = scale_of(queries, query_normed, query_epsilon, sums);
    if (key_norm && key_normed != SIZE)
        key_scale = scale_of(new_keys, key_normed, key_epsilon, sums);
    const int first = blockIdx.y * ATTENTION_WARPS * TOGETHER + warp * TOGETHER;
    for (int base = first; base < heads + kv_heads;
         base += gridDim.y * ATTENTION_WARPS * TOGETHER) {
        const int h = base + slot;
        const bool is_query = h < heads, used = h < heads + kv_heads;
        const int head = is_query ? h : h - heads;
        const Real* from = (is_query ? queries : new_keys) + (long)head * SIZE;
        const Real* norm = is_query ? query_norm : key_norm;
        const bool whole = (is_query ? query_normed : key_normed) != SIZE;
        float* mine = raw[warp][slot];
        float sum = 0.0f;
        for (int vec = lane; vec < VECS && used; vec += LANES) {
            float x[PER_VEC];
            unpack(load(from + vec * PER_VEC), x);
            if (!is_query && vec * PER_VEC < shared_size) {
                float y[PER_VEC];
                unpack(load(shared_key + (long)row * shared_pitch + vec * PER_VEC), y);
#pragma unroll
                for (int i = 0; i < PER_VEC; ++i) x[i] += y[i];
            }
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i) {
                mine[vec * PER_VEC + i] = x[i];
                sum += x[i] * x[i];
            }
        }
#pragma unroll
        for (int offset = LANES / 2; offset; offset /= 2)
            sum += __shfl_xor_sync(~0u, sum, offset);
        float scale = is_query ? query_scale : key_scale;
        if (!whole) scale = rsqrtf(sum / SIZE + (is_query ? query_epsilon : key_epsilon));
        __syncwarp();
        for (int vec = lane; norm && vec < VECS && used; vec += LANES) {
            float weight[PER_VEC];
            unpack(load(norm + (whole ? head * SIZE : 0) + vec * PER_VEC), weight);
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i) {
                float& x = mine[vec * PER_VEC + i];
                x = to_float(to_real(to_float(to_real(x * scale)) * weight[i]));
            }
        }
        __syncwarp();
        const long place = ((long)sequence * kv_heads + head) * capacity + position;
        Real* to = is_query ? queries + (long)head * SIZE : keys + place * SIZE;
        for (int vec = lane; vec < VECS && used; vec += LANES) {
            float x[PER_VEC];
            rotate_vec<SIZE>(x, mine, vec * PER_VEC, rotary, position);
            *(Vec*)(to + vec * PER_VEC) = pack(x);
        }
        __syncwarp();
    }
    if (blockIdx.y) return;
    for (int i = threadIdx.x; i < kv_heads * VECS; i += ATTENTION_WARPS * WARP) {
        const long head = (long)sequence * kv_heads + i / VECS;
        *(Vec*)(values + (head * capacity + position) * SIZE + i % VECS * PER_VEC) =
            load(value + (long)row * value_pitch + i * PER_VEC);
    }
}

// Grid: rows / 8. A warp chooses the experts of a row from `logits` [rows, E] float: ids [rows, K]
// are -1 where dropped, `counts` of the experts grow, `places` are the rows' among an expert's.
// `token_logs` [rows, E] are products with the router's `token_weights`, or none.
template <int EXPERTS>
__global__ void __launch_bounds__(ROUTE_WARPS * WARP)
    route_rows(int* ids, float* weights, int* places, int* expert_counts, const float* logits,
               const float* token_logs, const Router* router, const int* counts,
               int rounded_logits, int width, int rows) {
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
        choose_ranked(scores[warp], ranking[warp], ranked[warp], experts[warp],
                      token_logs ? token_logs + (long)row * r.experts : nullptr, r, sequence);
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
