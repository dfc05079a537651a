// The next token without the host: the largest logit, and what the following step needs of it.
#pragma once
#include "common.cuh"

// Grid: tokens. Of equal logits the first wins. Lengths grow by one where the token is real.
__global__ void __launch_bounds__(1024)
    choose_largest(long long* ids, const Real* logits, int vocabulary) {
    __shared__ float best[32];
    __shared__ int best_at[32];
    let_next_begin();
    wait_for_previous();
    const Real* row = logits + (long)blockIdx.x * vocabulary;
    float largest = -3e38f;
    int at = 0;
    for (int i = threadIdx.x; i < vocabulary; i += 1024) {
        const float x = to_float(row[i]);
        if (x > largest) {
            largest = x;
            at = i;
        }
    }
    auto merge = [&](float other, int other_at) {
        if (other > largest || (other == largest && other_at < at)) {
            largest = other;
            at = other_at;
        }
    };
    for (int offset = WARP / 2; offset; offset /= 2) {
        const float other = __shfl_xor_sync(~0u, largest, offset);
        const int other_at = __shfl_xor_sync(~0u, at, offset);
        merge(other, other_at);
    }
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
        best[warp] = largest;
        best_at[warp] = at;
    }
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 0; w < 32; ++w) merge(best[w], best_at[w]);
    ids[blockIdx.x] = at;
}
