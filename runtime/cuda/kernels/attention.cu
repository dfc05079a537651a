// Attention of one new token per sequence: normalises, rotates, appends to the cache, attends.
#pragma once
#include "common.cuh"

#define ATTENTION_WARPS 8
// Lanes that share the elements of one position; a warp sees four positions at once.
#define SHARING 8

// What is done to a new query or key of SIZE elements.
struct Heads {
    const Real* from;    // [tokens, pitch]
    int pitch;
    const Real* norm;    // RMS weights, or none
    float epsilon;
    int normed;          // elements that share a mean: SIZE, or those of all heads
    const Real* shared;  // added to the first elements of each head, or none
    int shared_pitch, shared_size;
};

struct Rotary {
    const Real* cosine;  // [positions, size / 2], or none
    const Real* sine;
    int size;            // elements of a head that are rotated: the first ones
    int interleaved;     // whether pairs are neighbours, and not half a rotation apart
};

__device__ __forceinline__ float rotated(const float* head, int i, const Rotary& rotary,
                                         int position) {
    const int half = rotary.size / 2;
    if (!rotary.cosine || i >= rotary.size) return head[i];
    const int pair = rotary.interleaved ? i / 2 : i % half;
    const bool second = rotary.interleaved ? i % 2 : i >= half;
    const int first = rotary.interleaved ? pair * 2 : pair;
    const int other = rotary.interleaved ? pair * 2 + 1 : pair + half;
    const float c = to_float(rotary.cosine[(long)position * half + pair]);
    const float s = to_float(rotary.sine[(long)position * half + pair]);
    return second ? head[other] * c + head[first] * s : head[first] * c - head[other] * s;
}

// 1 / RMS of the elements that share a mean. `sums` has one entry per warp.
__device__ __forceinline__ float scale_of(const Real* x, int n, float epsilon, float* sums) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += ATTENTION_WARPS * WARP) {
        const float value = to_float(x[i]);
        sum += value * value;
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < ATTENTION_WARPS; ++i) sum += sums[i];
    __syncthreads();
    return rsqrtf(sum / n + epsilon);
}

// Normalises and rotates `count` heads from `head` on: to shared memory [count, SIZE].
template <int SIZE>
__device__ __forceinline__ void prepare_heads(float* to, float* raw, float* sums,
                                              const Heads& heads, const Rotary& rotary, int token,
                                              int head, int count, int position) {
    const Real* row = heads.from + (long)token * heads.pitch;
    float scale = 1.0f;
    for (int h = 0; h < count; ++h) {
        const Real* x = row + (long)(head + h) * SIZE;
        const bool whole = heads.normed != SIZE;
        if (heads.norm && (!whole || h == 0))
            scale = scale_of(whole ? row : x, heads.normed, heads.epsilon, sums);
        for (int i = threadIdx.x; i < SIZE; i += ATTENTION_WARPS * WARP) {
            float value = to_float(x[i]);
            if (heads.norm) {
                const int at = whole ? (head + h) * SIZE + i : i;
                value = to_float(to_real(value * scale)) * to_float(heads.norm[at]);
                value = to_float(to_real(value));
            }
            if (i < heads.shared_size)
                value += to_float(heads.shared[(long)token * heads.shared_pitch + i]);
            raw[h * SIZE + i] = value;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * SIZE; i += ATTENTION_WARPS * WARP)
        to[i] = to_float(to_real(rotated(raw + i / SIZE * SIZE, i % SIZE, rotary, position)));
    __syncthreads();
}

// Grid: [kv heads * (GROUP parts), splits, tokens]. A block attends to `chunk` positions with HEADS
// query heads of one key/value head; the last block of a head merges what its blocks found.
// Cache: [tokens, kv_heads, capacity, SIZE]. `lengths` are the positions before the new one.
// partial: [tokens, heads, splits, SIZE + 2] float; done: [tokens, blocks of a split], zeros.
template <int SIZE, int HEADS>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
    attention(Real* out, Real* keys, Real* values, const Real* query, int query_pitch,
              const Real* query_norm, float query_epsilon, int query_normed, const Real* key,
              int key_pitch, const Real* key_norm, float key_epsilon, int key_normed,
              const Real* value, int value_pitch, const Real* shared_key, int shared_pitch,
              int shared_size, const Real* cosine, const Real* sine, int rotary_size,
              int interleaved, const int* lengths, float* partial, int* done, int heads,
              int kv_heads, int capacity, int chunk, float scale, float softcap) {
    constexpr int VECS = (SIZE / PER_VEC + SHARING - 1) / SHARING;
    constexpr int STREAMS = ATTENTION_WARPS * WARP / SHARING;
    __shared__ float q[HEADS * SIZE], raw[HEADS * SIZE], k_new[SIZE];
    __shared__ float merged[ATTENTION_WARPS][HEADS][SIZE + 2];
    __shared__ float sums[ATTENTION_WARPS];
    __shared__ int arrived;
    const int token = blockIdx.z, split = blockIdx.y, thread = threadIdx.x;
    const int head = blockIdx.x * HEADS, kv_head = head / (heads / kv_heads);
    const bool first_of_group = head % (heads / kv_heads) == 0;
    let_next_begin();
    wait_for_previous();
    const int length = lengths[token], begin = split * chunk;
    if (begin > length) return;
    const int end = min(begin + chunk, length + 1), splits = length / chunk + 1;
    const Rotary rotary = {cosine, sine, rotary_size, interleaved};
    const Heads asking = {query,        query_pitch, query_norm, query_epsilon,
                          query_normed, nullptr,     0,          0};
    prepare_heads<SIZE>(q, raw, sums, asking, rotary, token, head, HEADS, length);
    Real* key_rows = keys + ((long)token * kv_heads + kv_head) * capacity * SIZE;
    Real* value_rows = values + ((long)token * kv_heads + kv_head) * capacity * SIZE;
    const Real* new_value = value + (long)token * value_pitch + (long)kv_head * SIZE;
    if (length < end) {
        const Heads new_keys = {key,        key_pitch,    key_norm,   key_epsilon,
                                key_normed, shared_key, shared_pitch, shared_size};
        prepare_heads<SIZE>(k_new, raw, sums, new_keys, rotary, token, kv_head, 1, length);
        if (first_of_group)
            for (int i = thread; i < SIZE; i += ATTENTION_WARPS * WARP) {
                key_rows[(long)length * SIZE + i] = to_real(k_new[i]);
                value_rows[(long)length * SIZE + i] = new_value[i];
            }
    }
    const int lane = thread % SHARING, stream = thread / SHARING;
    float largest[HEADS], total[HEADS], sum[HEADS][VECS * PER_VEC];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        largest[h] = -1e30f;
        total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < VECS * PER_VEC; ++i) sum[h][i] = 0.0f;
    }
    // All lanes of a warp take part in every round: their sums need each other.
    const int rounds = (end - begin + STREAMS - 1) / STREAMS;
#pragma unroll 2
    for (int round = 0; round < rounds; ++round) {
        const int position = begin + round * STREAMS + stream;
        const bool used = position < end, is_new = position == length;
        Vec k[VECS], v[VECS];
#pragma unroll
        for (int j = 0; j < VECS; ++j) {
            const int at = (lane + j * SHARING) * PER_VEC;
            k[j] = v[j] = zeros();
            if (used && at < SIZE) {
                if (is_new) {
                    float x[PER_VEC];
                    for (int i = 0; i < PER_VEC; ++i) x[i] = k_new[at + i];
                    k[j] = pack(x);
                    v[j] = load(new_value + at);
                } else {
                    k[j] = load(key_rows + (long)position * SIZE + at);
                    v[j] = load(value_rows + (long)position * SIZE + at);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float score = 0.0f;
#pragma unroll
            for (int j = 0; j < VECS; ++j) {
                const int at = (lane + j * SHARING) * PER_VEC;
                float x[PER_VEC];
                unpack(k[j], x);
                if (at < SIZE)
#pragma unroll
                    for (int i = 0; i < PER_VEC; ++i) score += x[i] * q[h * SIZE + at + i];
            }
#pragma unroll
            for (int offset = SHARING / 2; offset; offset /= 2)
                score += __shfl_xor_sync(~0u, score, offset);
            score *= scale;
            if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
            if (used) {
                const float most = fmaxf(largest[h], score);
                const float old = __expf(largest[h] - most), weight = __expf(score - most);
                largest[h] = most;
                total[h] = total[h] * old + weight;
#pragma unroll
                for (int j = 0; j < VECS; ++j) {
                    float x[PER_VEC];
                    unpack(v[j], x);
#pragma unroll
                    for (int i = 0; i < PER_VEC; ++i)
                        sum[h][j * PER_VEC + i] = sum[h][j * PER_VEC + i] * old + weight * x[i];
                }
            }
        }
    }
    // The four positions of a warp, then the warps of the block.
    const int warp = thread / WARP;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float most = largest[h];
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 8));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
        const float factor = __expf(largest[h] - most);
        float all = total[h] * factor;
        all += __shfl_xor_sync(~0u, all, 8);
        all += __shfl_xor_sync(~0u, all, 16);
#pragma unroll
        for (int i = 0; i < VECS * PER_VEC; ++i) {
            float x = sum[h][i] * factor;
            x += __shfl_xor_sync(~0u, x, 8);
            x += __shfl_xor_sync(~0u, x, 16);
            const int at = (lane + i / PER_VEC * SHARING) * PER_VEC + i % PER_VEC;
            if (thread % WARP < SHARING && at < SIZE) merged[warp][h][at] = x;
        }
        if (thread % WARP == 0) {
            merged[warp][h][SIZE] = most;
            merged[warp][h][SIZE + 1] = all;
        }
    }
    __syncthreads();
    const long stride = SIZE + 2;
    float* parts = partial + ((long)token * heads + head) * gridDim.y * stride;
    for (int i = thread; i < HEADS * SIZE; i += ATTENTION_WARPS * WARP) {
        const int h = i / SIZE, at = i % SIZE;
        float most = -1e30f, all = 0.0f, x = 0.0f;
        for (int w = 0; w < ATTENTION_WARPS; ++w) most = fmaxf(most, merged[w][h][SIZE]);
        for (int w = 0; w < ATTENTION_WARPS; ++w) {
            const float factor = __expf(merged[w][h][SIZE] - most);
            all += merged[w][h][SIZE + 1] * factor;
            x += merged[w][h][at] * factor;
        }
        if (splits == 1) {
            out[((long)token * heads + head + h) * SIZE + at] = to_real(x / all);
        } else {
            float* part = parts + ((long)h * gridDim.y + split) * stride;
            part[at] = x;
            if (at == 0) {
                part[SIZE] = most;
                part[SIZE + 1] = all;
            }
        }
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (thread == 0) arrived = atomicAdd(done + token * gridDim.x + blockIdx.x, 1);
    __syncthreads();
    if (arrived != splits - 1) return;
    __threadfence();
    for (int i = thread; i < HEADS * SIZE; i += ATTENTION_WARPS * WARP) {
        const float* part = parts + (long)(i / SIZE) * gridDim.y * stride;
        float most = -1e30f, all = 0.0f, x = 0.0f;
        for (int s = 0; s < splits; ++s) most = fmaxf(most, __ldcg(part + s * stride + SIZE));
        for (int s = 0; s < splits; ++s) {
            const float factor = __expf(__ldcg(part + s * stride + SIZE) - most);
            all += __ldcg(part + s * stride + SIZE + 1) * factor;
            x += __ldcg(part + s * stride + i % SIZE) * factor;
        }
        out[((long)token * heads + head) * SIZE + i] = to_real(x / all);
    }
    if (thread == 0) done[token * gridDim.x + blockIdx.x] = 0;
}
