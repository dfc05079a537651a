// Linear layers of a step: out[t, n] = norm(x[t]) . W[n] + bias[n] + residual[t, n].
#pragma once
#include "product.cuh"

struct Norm {
    const Real* weight;
    float epsilon;
    float offset;  // added to the weight
};

// Elements by which rows in shared memory are longer: two rows then lie in different banks.
#define ROW_PAD (64 / (int)sizeof(Real))

// Writes the tokens' RMS-normalised rows to shared memory [tokens, K + ROW_PAD]; rows of x are
// `pitch` apart.
template <int K, int WARPS>
__device__ __forceinline__ void normalize_rows(Real* rows, float* sums, const Real* x, int pitch,
                                               const Norm& norm, int tokens) {
    const int thread = threadIdx.x, warp = thread / WARP;
    for (int t = 0; t < tokens; ++t) {
        float sum = 0.0f;
        for (int k = thread * PER_VEC; k < K; k += WARPS * WARP * PER_VEC) {
            float values[PER_VEC];
            unpack(load(x + (long)t * pitch + k), values);
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i) sum += values[i] * values[i];
        }
        sum = sum_of_warp(sum);
        if (thread % WARP == 0) sums[t * WARPS + warp] = sum;
    }
    __syncthreads();
    for (int t = 0; t < tokens; ++t) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) sum += sums[t * WARPS + i];
        const float scale = rsqrtf(sum / K + norm.epsilon);
        for (int k = thread * PER_VEC; k < K; k += WARPS * WARP * PER_VEC) {
            float values[PER_VEC], weights[PER_VEC];
            unpack(load(x + (long)t * pitch + k), values);
            unpack(load(norm.weight + k), weights);
#pragma unroll
            for (int i = 0; i < PER_VEC; ++i)
                values[i] = to_float(to_real(values[i] * scale)) * (weights[i] + norm.offset);
            *(Vec*)(rows + t * (K + ROW_PAD) + k) = pack(values);
        }
    }
    __syncthreads();
}

// Writes a warp's products [16 rows, 8 tokens] to its part of shared memory, tokens outermost.
template <int GROUPS>
__device__ __forceinline__ void store_products(float* part, const float (&c)[GROUPS][4]) {
    const int row = (threadIdx.x % WARP) / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float* to = part + group * 128;
        to[column * 16 + row] = c[group][0];
        to[(column + 1) * 16 + row] = c[group][1];
        to[column * 16 + row + 8] = c[group][2];
        to[(column + 1) * 16 + row + 8] = c[group][3];
    }
}

// What all warps of a block have of an element that `store_products` wrote.
template <int GROUPS, int WARPS>
__device__ __forceinline__ float sum_of_parts(const float* parts, int i) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[warp * GROUPS * 128 + i];
    return sum;
}

// Grid: any number of blocks. Shared memory: [tokens, K + ROW_PAD] Real with a norm.
template <int K, int BITS, int GROUPS, int WARPS, bool NORMED>
__global__ void __launch_bounds__(WARPS * WARP)
    linear(Real* out, const Real* x, int pitch, const char* values, const Real* scales, int block,
           const Real* bias, const Real* residual, const Real* norm_weight, float norm_epsilon,
           float norm_offset, int n, int tokens) {
    DYNAMIC_SHARED(dynamic);
    __shared__ float parts[WARPS * GROUPS * 128];
    __shared__ float sums[WARPS * 16];
    const int warp = threadIdx.x / WARP, g = (threadIdx.x % WARP) / 4;
    const Weight<BITS> weight = one_weight<BITS>(values, scales, block);
    const int tiles = (n + 15) / 16;
    Real* rows = (Real*)dynamic;
    let_next_begin();
    bool waited = false;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long row = min(tile * 16 + g, n - 1), row8 = min(tile * 16 + g + 8, n - 1);
        Pieces<K, BITS, WARPS> first;
        first.load(weight, row, row8, 0, warp);
        if (!waited) {
            wait_for_previous();
            if (NORMED)
                normalize_rows<K, WARPS>(rows, sums, x, pitch,
                                         {norm_weight, norm_epsilon, norm_offset}, tokens);
            waited = true;
        }
        float c[GROUPS][4] = {};
        multiply_rows(c, first, weight, row, row8, warp, [&](int group, int k) {
            const int t = group * 8 + g;
            if (t >= tokens) return zeros();
            return NORMED ? load(rows + t * (K + ROW_PAD) + k) : load(x + (long)t * pitch + k);
        });
        store_products<GROUPS>(parts + warp * GROUPS * 128, c);
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * 16; i += WARPS * WARP) {
            const int t = i / 16, column = tile * 16 + i % 16;
            if (column < n) {
                float sum = sum_of_parts<GROUPS, WARPS>(parts, i);
                if (bias) sum = to_float(to_real(sum)) + to_float(bias[column]);
                if (residual)
                    sum = to_float(to_real(sum)) + to_float(residual[(long)t * n + column]);
                out[(long)t * n + column] = to_real(sum);
            }
        }
        __syncthreads();
    }
    if (!waited) wait_for_previous();
}

// Grid: tokens. Gathers rows of an embedding [vocabulary, K] of elements.
template <int K>
__global__ void __launch_bounds__(128)
    embed(Real* out, const Real* table, const long long* ids, float scale) {
    let_next_begin();
    wait_for_previous();
    const Real* row = table + ids[blockIdx.x] * K;
    Real* to = out + (long)blockIdx.x * K;
    for (int k = threadIdx.x * PER_VEC; k < K; k += 128 * PER_VEC) {
        float values[PER_VEC];
        unpack(load(row + k), values);
        if (scale != 1.0f)
            for (int i = 0; i < PER_VEC; ++i) values[i] *= scale;
        *(Vec*)(to + k) = pack(values);
    }
}

// Grid: tokens. Gathers rows of an embedding in blocks of BITS, unsigned with the middle as zero.
template <int K, int BITS>
__global__ void __launch_bounds__(128)
    embed_blocks(Real* out, const unsigned char* table, const Real* scales, int block,
                 const long long* ids, float scale) {
    let_next_begin();
    wait_for_previous();
    const long row = ids[blockIdx.x];
    for (int k = threadIdx.x; k < K; k += 128) {
        const long at = row * K + k;
        const int byte = table[BITS == 4 ? at / 2 : at];
        const int q = BITS == 4 ? ((byte >> (k % 2 * 4)) & 15) - 8 : byte - 128;
        const float step = to_float(scales[row * (K / block) + k / block]);
        out[(long)blockIdx.x * K + k] = to_real(to_float(to_real(q * step)) * scale);
    }
}

// Grid: [tokens, parts]. Each part of K elements of a row is normalised by itself.
template <int K>
__global__ void __launch_bounds__(256)
    normalize(Real* out, const Real* x, int pitch, const Real* weight, float epsilon,
              float offset) {
    DYNAMIC_SHARED(dynamic);
    __shared__ float sums[8];
    let_next_begin();
    wait_for_previous();
    Real* rows = (Real*)dynamic;
    const Real* row = x + (long)blockIdx.x * pitch + (long)blockIdx.y * K;
    normalize_rows<K, 8>(rows, sums, row, pitch, {weight, epsilon, offset}, 1);
    Real* to = out + ((long)blockIdx.x * gridDim.y + blockIdx.y) * K;
    for (int k = threadIdx.x * PER_VEC; k < K; k += 256 * PER_VEC) *(Vec*)(to + k) = load(rows + k);
}

__device__ __forceinline__ Real gated(float gate, float up) {
    return to_real(to_float(to_real(silu(gate))) * up);
}

// out[t, i] = silu(gate[t, i]) up[t, i]; rows are `pitch` apart. Grid: any.
__global__ void __launch_bounds__(256)
    swiglu(Real* out, const Real* gate, const Real* up, int pitch, int n, int tokens) {
    let_next_begin();
    wait_for_previous();
    const int each = (n | pitch) % PER_VEC ? 1 : PER_VEC;  // elements of a thread at a time
    const int count = n / each * tokens;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
        const int row = i / (n / each), column = i % (n / each) * each;
        const long at = (long)row * pitch + column, to = (long)row * n + column;
        if (each == 1) {
            out[to] = gated(to_float(gate[at]), to_float(up[at]));
            continue;
        }
        float x[PER_VEC], y[PER_VEC];
        unpack(load(gate + at), x);
        unpack(load(up + at), y);
#pragma unroll
        for (int j = 0; j < PER_VEC; ++j) x[j] = to_float(gated(x[j], y[j]));
        *(Vec*)(out + to) = pack(x);
    }
}

// Grid: any.
__global__ void __launch_bounds__(256)
    add(Real* out, const Real* x, const Real* y, int size) {
    let_next_begin();
    wait_for_previous();
    for (int i = blockIdx.x * 256 + threadIdx.x; i < size; i += gridDim.x * 256)
        out[i] = to_real(to_float(x[i]) + to_float(y[i]));
}

// out[t, i] = x[t, i] sigmoid(gate[t]). Grid: any.
__global__ void __launch_bounds__(256)
    scale_rows(Real* out, const Real* x, const Real* gate, int n, int tokens) {
    let_next_begin();
    wait_for_previous();
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n * tokens; i += gridDim.x * 256) {
        const float scale = 1.0f / (1.0f + __expf(-to_float(gate[i / n])));
        out[i] = to_real(to_float(x[i]) * to_float(to_real(scale)));
    }
}
