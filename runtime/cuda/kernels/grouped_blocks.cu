// Weights in blocks of bits, for calls of many tokens: experts in tiles, others as 16-bit elements.
#pragma once
#include "grouped.cu"
#include "product.cuh"

#if TYPE == 0

// Sixteen bytes of a row, minus the middle and scaled: four or two vectors of its elements.
template <int BITS>
__device__ __forceinline__ void decode(const Vec& packed, u32 scale, Vec (&out)[16 / BITS]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (BITS == 4) {
            u32 p[4];
            expand4(packed.w[i], scale, p);
            out[i].w[0] = __byte_perm(p[0], p[1], 0x5410);
            out[i].w[1] = __byte_perm(p[2], p[3], 0x5410);
            out[i].w[2] = __byte_perm(p[0], p[1], 0x7632);
            out[i].w[3] = __byte_perm(p[2], p[3], 0x7632);
        } else {
            u32 p[2];
            expand8(packed.w[i], scale, p);
            out[i / 2].w[i % 2 * 2] = p[0];
            out[i / 2].w[i % 2 * 2 + 1] = p[1];
        }
    }
}

// Stages of rows, of decoded columns and of packed ones. While a product is under way, and on
// Hopper the one before it too, the next columns are decoded.
template <int BITS, int COLUMNS, int STAGES, int DECODED>
struct Stages {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static_assert(DECODED >= 3, "columns would be overwritten while they are multiplied");
#endif
    static constexpr int LANE = 128 / BITS;        // elements of a thread's 16 bytes
    static constexpr int PARTS = DEPTH / LANE;     // threads of a column
    static constexpr int LINES = 256 / PARTS;      // columns at once
    static constexpr int LOADS = COLUMNS / LINES;  // of a thread
    static constexpr int PACKED = STAGES - 1;      // stages of packed columns
    Real *rows, *columns;
    Vec* packed;

    __device__ __forceinline__ explicit Stages(Real* shared)
        : rows(shared),
          columns(shared + STAGES * TILE * DEPTH),
          packed((Vec*)(columns + DECODED * COLUMNS * DEPTH)) {}

    __device__ __forceinline__ Real* rows_of(int step) const {
        return rows + step % STAGES * (TILE * DEPTH);
    }
    __device__ __forceinline__ Real* columns_of(int step) const {
        return columns + step % DECODED * (COLUMNS * DEPTH);
    }
    // A thread reads only what it copied itself.
    __device__ __forceinline__ Vec* packed_of(int step, int i) const {
        return packed + (step % PACKED * LOADS + i) * 256 + threadIdx.x;
    }
};

// What `multiply_tile` computes, of `columns` columns in blocks; `weight` begins at the first one.
// While a step multiplies, the next one's columns are decoded, and loads of rows for STAGES - 2
// steps and of columns for one more are under way.
template <int K, int BITS, int COLUMNS, int STAGES, int DECODED, class Row>
__device__ __forceinline__ void multiply_blocks(float (&c)[COLUMNS / 8][4], Real* shared,
                                                const Weight<BITS>& weight, int columns,
                                                const Row& row) {
    typedef Stages<BITS, COLUMNS, STAGES, DECODED> S;
    constexpr int STEPS = (K + DEPTH - 1) / DEPTH;
    const S stages(shared);
    const int line = threadIdx.x / 8, vec = threadIdx.x % 8;
    const int column = threadIdx.x / S::PARTS, part = threadIdx.x % S::PARTS;
    const int blocks = K / weight.block;
    const Real* from_rows[TILE / 32];
#pragma unroll
    for (int i = 0; i < TILE / 32; ++i) from_rows[i] = row(line + i * 32);
    u32 scales[S::LOADS];  // of the columns that are decoded next
    auto is_used = [&](int step, int i) {
        return column + i * S::LINES < columns && step * DEPTH + part * S::LANE < K;
    };
    auto fetch_columns = [&](int step) {
        if (step >= STEPS) return;
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i) {
            const long at = (long)(column + i * S::LINES) * Layout<K, BITS>::PITCH +
                            (step * S::PARTS + part) * 16;
            const bool used = is_used(step, i);
            copy_later(stages.packed_of(step, i), used ? weight.values + at : (char*)shared, used);
        }
    };
    auto fetch_scales = [&](int step) {
        const int block = (step * DEPTH + part * S::LANE) / weight.block;
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i)
            scales[i] = step < STEPS && is_used(step, i)
                            ? weight.scales[(column + i * S::LINES) * blocks + block] * 0x10001u
                            : 0;
    };
    auto fetch = [&](int step) {
        if (step < STEPS) {
#pragma unroll
            for (int i = 0; i < TILE / 32; ++i) {
                const bool used = from_rows[i] && step * DEPTH + vec * 8 < K;
                copy_later(stages.rows_of(step) + place(line + i * 32, vec),
                           used ? from_rows[i] + step * DEPTH + vec * 8 : shared, used);
            }
        }
        fetch_columns(step + 1);
        end_copies();
    };
    auto decode_columns = [&](int step) {
        if (step >= STEPS) return;
#pragma unroll
        for (int i = 0; i < S::LOADS; ++i) {
            Vec out[16 / BITS];
            decode<BITS>(*stages.packed_of(step, i), scales[i], out);
#pragma unroll
            for (int j = 0; j < 16 / BITS; ++j)
                *(Vec*)(stages.columns_of(step) +
                        place(column + i * S::LINES, part * (16 / BITS) + j)) = out[j];
        }
    };
    fetch_columns(0);
#pragma unroll
    for (int step = 0; step < STAGES - 2; ++step) fetch(step);
    fetch_scales(0);
    wait_for_copies<STAGES - 3>();
    decode_columns(0);
    fetch_scales(1);
    for (int step = 0; step < STEPS; ++step) {
        wait_for_copies<STAGES - 3>();
        show_copies_to_tensor_cores();
        __syncthreads();
        begin_products(c, stages.rows_of(step), stages.columns_of(step));
        decode_columns(step + 1);
        fetch(step + STAGES - 2);
        fetch_scales(step + 2);
        end_products<1>(c);
    }
    end_products<0>(c);
}

// `grouped_gate_up` of weights in blocks. Dynamic shared memory: see `Stages`, and 1024 bytes.
template <int K, int BITS, int COLUMNS, int STAGES, int DECODED>
__global__ void __launch_bounds__(256, COLUMNS == 128 ? 2 : 1)
    grouped_gate_up_blocks(Real* hidden, const Real* x, const int* offsets, const int* rows,
                           const float* pair_weights, const char* values, const Real* scales,
                           int block, const Real* bias, int experts, int inner) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int columns = 2 * inner, left = blockIdx.x * COLUMNS;
    const long begin = (long)expert * columns + left;
    const Real* none = nullptr;
    float c[COLUMNS / 8][4] = {};
    multiply_blocks<K, BITS, COLUMNS, STAGES, DECODED>(
        c, tiles(dynamic),
        one_weight<BITS>(values + begin * Layout<K, BITS>::PITCH, scales + begin * (K / block),
                         block),
        columns - left, [&](int i) { return i < count ? x + (long)rows[first + i] * K : none; });
    store_gated(hidden, c, pair_weights, bias, expert, first, count, left, columns);
}

// `grouped_down` of weights in blocks.
template <int INNER, int BITS, int COLUMNS, int STAGES, int DECODED>
__global__ void __launch_bounds__(256, COLUMNS == 128 ? 2 : 1)
    grouped_down_blocks(Real* out, const Real* hidden, const int* offsets,
                        const float* pair_weights, const char* values, const Real* scales,
                        int block, const Real* bias, int experts, int columns) {
    DYNAMIC_SHARED(dynamic);
    int expert, first, count;
    if (!find_tile(offsets, experts, blockIdx.y, expert, first, count)) return;
    const int left = blockIdx.x * COLUMNS;
    const long begin = (long)expert * columns + left;
    const Real* none = nullptr;
    float c[COLUMNS / 8][4] = {};
    multiply_blocks<INNER, BITS, COLUMNS, STAGES, DECODED>(
        c, tiles(dynamic),
        one_weight<BITS>(values + begin * Layout<INNER, BITS>::PITCH,
                         scales + begin * (INNER / block), block),
        columns - left,
        [&](int i) { return i < count ? hidden + (long)(first + i) * INNER : none; });
    store_pairs(out, c, pair_weights, bias, expert, first, count, left, columns);
}

// Grid: any. A weight's elements, eight to a thread: `vecs` times eight.
template <int BITS>
__global__ void __launch_bounds__(256)
    decode_weight(Real* out, const char* values, const Real* scales, int block, int vecs) {
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vecs; i += gridDim.x * 256) {
        const u32 scale = scales[(u32)i / (u32)(block / 8)] * 0x10001u;
        Vec packed = zeros(), decoded[16 / BITS];
        packed.w[0] = ((const u32*)values)[BITS == 4 ? i : 2 * i];
        if (BITS == 8) packed.w[1] = ((const u32*)values)[2 * i + 1];
        decode<BITS>(packed, scale, decoded);
        ((Vec*)out)[i] = decoded[0];
    }
}

#endif
