// A layer's router: scores, the best candidates of each token, and which of them run.
#pragma once
#include "linear.cu"

#define ROUTE_WARPS 8
#define MOST_TOKENS 16
#define MOST_CANDIDATES 32

#define SOFTMAX 0
#define SIGMOID 1
#define SOFTMAX_AFTER 2

#define KEEP_TOP 0
#define KEEP_SCORE 1
#define KEEP_POOL 2

#define SCORE_WEIGHT 0
#define SCORE_PRICE 1
#define SCORE_OVERLAP 2
#define SCORE_RATIO 3
#define SCORE_TOP_P 4

// What a layer's kernels of the experts read. Kept experts come in the order of their numbers.
struct Routing {
    int count;                                // kept experts
    int expert[MOST_TOKENS * MOST_CANDIDATES];
    int tokens[MOST_TOKENS * MOST_CANDIDATES];  // which tokens run it, one bit each
    float weight[MOST_TOKENS * MOST_CANDIDATES][MOST_TOKENS];
    float shared[MOST_TOKENS];                // the shared expert's gate
};

// How candidates are chosen; the same for all tokens of a step.
struct Router {
    const float* selection_bias;  // [E] added for the choice only, or none
    const float* sizes;           // [E], for prices
    const float* price;           // of each sequence, in place of `threshold`, or none
    const Real* token_weights;    // [E, K]: of the logarithms of what a token multiplies sizes by
    const float* token_bias;      // [E]
    double quota;                 // of a call's candidates per token; below zero: none
    float threshold, twice_overlap;
    float renormalize_epsilon, scale, most_token_log;
    int experts, candidates, score, groups, kept_groups, best_of_group;
    int renormalize, rounded, keep, kept, kept_score, renormalize_kept;
};

// A candidate of each lane: lane j has the token's j-th best.
struct Candidate {
    float weight;
    int expert;
};

// Scores of one token's experts, in shared memory, by a warp. Returns each lane's candidate.
__device__ __forceinline__ Candidate choose(float* scores, float* ranking, const Router& r) {
    const int lane = threadIdx.x % WARP;
    float largest = -1e30f, total = 0.0f;
    for (int e = lane; e < r.experts; e += WARP) largest = fmaxf(largest, scores[e]);
    largest = largest_of_warp(largest);
    if (r.score == SOFTMAX) {
        for (int e = lane; e < r.experts; e += WARP) {
            scores[e] = expf(scores[e] - largest);
            total += scores[e];
        }
        total = sum_of_warp(total);
    }
    for (int e = lane; e < r.experts; e += WARP) {
        if (r.score == SOFTMAX) scores[e] /= total;
        if (r.score == SIGMOID) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
        ranking[e] = scores[e] + (r.selection_bias ? r.selection_bias[e] : 0.0f);
    }
    __syncwarp();
    if (r.groups > 1) {
        const int size = r.experts / r.groups;
        float best = -1e30f, second = -1e30f;
        if (lane < r.groups)
            for (int i = 0; i < size; ++i) {
                const float x = ranking[lane * size + i];
                second = fmaxf(second, fminf(best, x));
                best = fmaxf(best, x);
            }
        const float group = r.best_of_group == 2 ? best + second : best;
        int before = 0;  // groups that are better, or as good and earlier
        for (int other = 0; other < r.groups; ++other) {
            const float theirs = __shfl_sync(~0u, group, other);
            before += theirs > group || (theirs == group && other < lane);
        }
        const unsigned in = __ballot_sync(~0u, lane < r.groups && before < r.kept_groups);
        for (int e = lane; e < r.experts; e += WARP)
            if (!(in >> (e / size) & 1)) ranking[e] = -1e30f;
        __syncwarp();
    }
    Candidate mine = {0.0f, 0};
    for (int j = 0; j < r.candidates; ++j) {
        float best = -3e38f;
        unsigned at = r.experts;
        for (int e = lane; e < r.experts; e += WARP)
            if (ranking[e] > best) {
                best = ranking[e];
                at = e;
            }
        // Of equal ones the first; scores that are no numbers are never larger.
        const unsigned order = in_order(best), most = largest_of_warp(order);
        at = smallest_of_warp(order == most ? at : ~0u);
        if (at >= (unsigned)r.experts) at = 0;
        if (lane == j) mine = {scores[at], (int)at};
        if (lane == (int)at % WARP) ranking[at] = -3e38f;
        __syncwarp();
    }
    const bool used = lane < r.candidates;
    if (r.score == SOFTMAX_AFTER) {
        const float most = __shfl_sync(~0u, mine.weight, 0);
        mine.weight = used ? expf(mine.weight - most) : 0.0f;
        mine.weight /= sum_of_warp(mine.weight);
    }
    if (r.renormalize)
        mine.weight /= sum_of_warp(used ? mine.weight : 0.0f) + r.renormalize_epsilon;
    mine.weight *= r.scale;
    if (r.rounded) mine.weight = to_float(to_real(mine.weight));
    return mine;
}

// The candidate's place in the order of their weights: a router with a selection bias doesn't sort.
__device__ __forceinline__ int rank_of(const Candidate& mine, int candidates) {
    const int lane = threadIdx.x % WARP;
    int rank = 0;
    for (int j = 0; j < candidates; ++j) {
        const float other = __shfl_sync(~0u, mine.weight, j);
        rank += other > mine.weight || (other == mine.weight && j < lane);
    }
    return rank;
}

// What is compared with the threshold. Candidates are ranked. `token_logs` [E] are the token's
// products with `token_weights`, in global memory, or none.
__device__ __forceinline__ float score_of(const Candidate& mine, const float* token_logs,
                                          const Router& r) {
    const int lane = threadIdx.x % WARP;
    float added = mine.weight, behind = 0.0f;
    if (r.kept_score == SCORE_PRICE || r.kept_score == SCORE_OVERLAP) {
        added = r.sizes[mine.expert] * mine.weight;
        if (token_logs) {
            const float log = __ldcg(token_logs + mine.expert) + r.token_bias[mine.expert];
            added *= expf(fminf(fmaxf(log, -r.most_token_log), r.most_token_log));
        }
    }
    if (r.kept_score == SCORE_OVERLAP) {
        for (int j = r.candidates - 1; j > 0; --j) {
            const float other = __shfl_sync(~0u, added, j);
            if (j > lane) behind += other;
        }
        return sqrtf(added * (added + behind * r.twice_overlap));
    }
    if (r.kept_score == SCORE_RATIO)
        return mine.weight / fmaxf(__shfl_sync(~0u, mine.weight, 0), 1e-30f);
    if (r.kept_score == SCORE_TOP_P) {
        for (int j = 0; j < r.candidates - 1; ++j) {
            const float other = __shfl_sync(~0u, mine.weight, j);
            if (j < lane) behind += other;
        }
        return -behind;
    }
    return added;
}

// A token's candidates, lane j having the j-th by weight: whether it is kept before any contest,
// what it is judged by, and the sum of all weights.
struct Choice {
    Candidate mine;
    bool used, keep;
    float score, whole;
};

// Chooses for one token of a sequence, by a warp. `weights` and `experts` get the candidates in
// their order.
__device__ __forceinline__ Choice choose_ranked(float* scores, float* ranking, float* weights,
                                                int* experts, const float* token_logs,
                                                const Router& r, int sequence) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();
    Choice choice = {choose(scores, ranking, r), lane < r.candidates};
    Candidate& mine = choice.mine;
    choice.whole = sum_of_warp(choice.used ? mine.weight : 0.0f);
    const int rank = rank_of(mine, r.candidates);
    if (choice.used) {
        weights[rank] = mine.weight;
        experts[rank] = mine.expert;
    }
    __syncwarp();
    if (choice.used) mine = {weights[lane], experts[lane]};
    choice.keep = r.keep == KEEP_TOP ? lane < r.kept : lane == 0;
    choice.score = mine.weight;
    if (r.keep == KEEP_SCORE) {
        choice.score = score_of(mine, token_logs, r);
        choice.keep = choice.keep || choice.score >= (r.price ? r.price[sequence] : r.threshold);
    }
    choice.keep = choice.keep && choice.used;
    return choice;
}

// What kept weights are multiplied by, so that they sum to what all candidates' do.
__device__ __forceinline__ float share_of(float whole, float kept) {
    return whole / fmaxf(kept, 1e-30f);
}

typedef float PerCandidate[MOST_TOKENS][MOST_CANDIDATES];
typedef bool Kept[MOST_TOKENS][MOST_CANDIDATES];

// Others than the first compete in the whole call: the better win, of equals the earlier.
__device__ __forceinline__ void compete(Kept& kept, const PerCandidate& contest, const Router& r,
                                        const int* real, int tokens) {
    __shared__ bool won[MOST_TOKENS * MOST_CANDIDATES];
    const int others = r.candidates - 1;
    int reals = 0;
    for (int t = 0; t < tokens; ++t) reals += real[t] != 0;
    const int most =
        r.keep == KEEP_POOL ? (r.kept - 1) * reals : (int)floor(r.quota * reals);
    for (int i = threadIdx.x; i < tokens * others; i += ROUTE_WARPS * WARP) {
        const int t = i / others, j = i % others + 1;
        const float score = contest[t][j];
        int before = 0;
        for (int o = 0; o < tokens * others; ++o) {
            const int ot = o / others, oj = o % others + 1;
            const float theirs = contest[ot][oj];
            if (real[ot] && (r.keep == KEEP_POOL || kept[ot][oj]))
                before += theirs > score || (theirs == score && o < i);
        }
        won[i] = real[t] && (r.keep == KEEP_POOL || kept[t][j]) && before < most;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * others; i += ROUTE_WARPS * WARP)
        kept[i / others][i % others + 1] = won[i];
    __syncthreads();
}

// Chooses for all tokens, by one block. `logits`: [tokens, E] in global memory, after them as many
// products with `token_weights`, if there are any.
template <int EXPERTS>
__device__ __forceinline__ void choose_experts(Routing* routing, const float* logits,
                                               const Router& r, const int* real, int tokens) {
    __shared__ float scores[ROUTE_WARPS][EXPERTS], ranking[ROUTE_WARPS][EXPERTS];
    __shared__ float weights[MOST_TOKENS][MOST_CANDIDATES], contest[MOST_TOKENS][MOST_CANDIDATES];
    __shared__ int experts[MOST_TOKENS][MOST_CANDIDATES];
    __shared__ bool kept[MOST_TOKENS][MOST_CANDIDATES];
    __shared__ int users[EXPERTS], slots[EXPERTS];
    __shared__ float wholes[MOST_TOKENS];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    for (int e = thread; e < EXPERTS; e += ROUTE_WARPS * WARP) users[e] = 0;
    for (int t = warp; t < tokens; t += ROUTE_WARPS) {
        for (int e = lane; e < r.experts; e += WARP)
            scores[warp][e] = __ldcg(logits + (long)t * r.experts + e);
        const float* token_logs =
            r.token_weights ? logits + (long)(tokens + t) * r.experts : nullptr;
        const Choice choice =
            choose_ranked(scores[warp], ranking[warp], weights[t], experts[t], token_logs, r, t);
        if (choice.used) {
            kept[t][lane] = choice.keep && real[t];
            contest[t][lane] = choice.score;
        }
        if (lane == 0) wholes[t] = choice.whole;
    }
    __syncthreads();
    if (r.keep == KEEP_POOL || r.quota >= 0.0) compete(kept, contest, r, real, tokens);
    if (r.renormalize_kept) {
        for (int t = warp; t < tokens; t += ROUTE_WARPS) {
            const bool keep = lane < r.candidates && kept[t][lane];
            const float share = sum_of_warp(keep ? weights[t][lane] : 0.0f);
            if (keep) weights[t][lane] *= share_of(wholes[t], share);
        }
        __syncthreads();
    }
    for (int i = thread; i < tokens * r.candidates; i += ROUTE_WARPS * WARP) {
        const int t = i / r.candidates, j = i % r.candidates;
        if (kept[t][j]) atomicOr(&users[experts[t][j]], 1 << t);
    }
    __syncthreads();
    if (warp == 0) {
        int before = 0;
        for (int from = 0; from < r.experts; from += WARP) {
            const int e = from + lane;
            const bool is_used = e < r.experts && users[e];
            const unsigned mask = __ballot_sync(~0u, is_used);
            if (is_used) {
                const int slot = before + __popc(mask & ((1u << lane) - 1));
                slots[e] = slot;
                routing->expert[slot] = e;
                routing->tokens[slot] = users[e];
            }
            before += __popc(mask);
        }
        if (lane == 0) routing->count = before;
    }
    __syncthreads();
    for (int i = thread; i < tokens * r.candidates; i += ROUTE_WARPS * WARP) {
        const int t = i / r.candidates, j = i % r.candidates;
        if (kept[t][j]) routing->weight[slots[experts[t][j]]][t] = weights[t][j];
    }
}

// Grid: one block per 16 experts, again as many with token sizes, and one more with a shared
// expert's gate. The last block to end chooses. Shared memory: [tokens, K + ROW_PAD] Real.
// arrived: zero.
template <int K, int GROUPS, int EXPERTS, bool NORMED>
__global__ void __launch_bounds__(ROUTE_WARPS * WARP)
    route(Routing* routing, float* logits, Real* normed, int* arrived, const Real* x,
          const char* values, const Real* bias, const Real* norm_weight, float norm_epsilon,
          float norm_offset, const Real* shared_gate, const Router* router, const int* real,
          int rounded_logits, int tokens) {
    DYNAMIC_SHARED(dynamic);
    __shared__ float parts[ROUTE_WARPS * GROUPS * 128];
    __shared__ float sums[ROUTE_WARPS * 16];
    __shared__ int before;
    const int warp = threadIdx.x / WARP, g = (threadIdx.x % WARP) / 4, tile = blockIdx.x;
    const Router r = *router;
    const int tiles = (r.experts + 15) / 16;
    const bool is_log = r.token_weights && tile >= tiles && tile < 2 * tiles;
    const bool is_gate = tile >= tiles && !is_log;
    const int n = is_gate ? 1 : r.experts;
    const char* of_tile = is_log ? (const char*)r.token_weights : values;
    const Weight<0> weight =
        one_weight<0>(is_gate ? (const char*)shared_gate : of_tile, nullptr, 0);
    const int base = is_gate ? 0 : tile % tiles * 16;
    Real* rows = (Real*)dynamic;
    const long row = min(base + g, n - 1), row8 = min(base + g + 8, n - 1);
    Pieces<K, 0, ROUTE_WARPS> first;
    let_next_begin();
    first.load(weight, row, row8, 0, warp);
    wait_for_previous();
    if (NORMED) {
        normalize_rows<K, ROUTE_WARPS>(rows, sums, x, K, {norm_weight, norm_epsilon, norm_offset},
                                       tokens);
        if (tile == 0 && normed)
            for (int i = threadIdx.x * PER_VEC; i < tokens * K; i += ROUTE_WARPS * WARP * PER_VEC)
                *(Vec*)(normed + i) = load(rows + i / K * (K + ROW_PAD) + i % K);
    }
    float c[GROUPS][4] = {};
    multiply_rows(c, first, weight, row, row8, warp, [&](int group, int k) {
        const int t = group * 8 + g;
        if (t >= tokens) return zeros();
        return NORMED ? load(rows + t * (K + ROW_PAD) + k) : load(x + (long)t * K + k);
    });
    store_products<GROUPS>(parts + warp * GROUPS * 128, c);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * 16; i += ROUTE_WARPS * WARP) {
        const int t = i / 16, e = base + i % 16;
        if (e >= n) continue;
        float sum = sum_of_parts<GROUPS, ROUTE_WARPS>(parts, i);
        if (bias && !is_gate && !is_log) sum += to_float(bias[e]);
        if ((rounded_logits && !is_log) || is_gate) sum = to_float(to_real(sum));
        if (is_log) {
            logits[(long)(tokens + t) * r.experts + e] = sum;
        } else if (is_gate) {
            routing->shared[t] = to_float(to_real(1.0f / (1.0f + expf(-sum))));
        } else {
            logits[(long)t * r.experts + e] = sum;
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(arrived, 1);
    __syncthreads();
    if (before != (int)gridDim.x - 1) return;
    __threadfence();
    choose_experts<EXPERTS>(routing, logits, r, real, tokens);
    if (threadIdx.x == 0) *arrived = 0;
}
