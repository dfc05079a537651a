// Products of a weight's rows with a step's tokens; weights are as they are, or in blocks of bits.
#pragma once
#include "common.cuh"

// A weight [rows, K]: BITS 0 for elements of type Real, else integers with one scale per block.
template <int BITS>
struct Weight {
    const char* values;
    const char* values8;  // where a lane's second row is; mostly the same
    const Real* scales;   // [rows, K / block]
    const Real* scales8;
    int block;
};

template <int BITS>
__device__ __forceinline__ Weight<BITS> one_weight(const char* values, const Real* scales,
                                                   int block) {
    return {values, values, scales, scales, block};
}

template <int K, int BITS>
struct Layout {
    // Elements that one 16-byte load gives a lane.
    static constexpr int LANE = BITS == 4 ? 32 : BITS == 8 ? 16 : PER_VEC;
    static constexpr int VECS = LANE / PER_VEC;  // loads of a token that go with it
    static constexpr long PITCH = BITS == 4 ? K / 2 : BITS == 8 ? K : (long)K * (int)sizeof(Real);
    static constexpr int LOADS = (K + 4 * LANE - 1) / (4 * LANE);  // of four lanes along a row
};

// What a lane has loaded of rows g and g + 8.
template <int BITS>
struct Piece {
    Vec row, row8;
    u32 scale, scale8;
};

template <int K, int BITS>
__device__ __forceinline__ Piece<BITS> load_piece(const Weight<BITS>& weight, long row, long row8,
                                                  int at) {
    typedef Layout<K, BITS> L;
    Piece<BITS> piece;
    const int lane = threadIdx.x % 4;
    const int k = (at * 4 + lane) * L::LANE;
    if (at < L::LOADS && k < K) {
        const long from = (long)(at * 4 + lane) * 16;
        piece.row = load_once(weight.values + from + row * L::PITCH);
        piece.row8 = load_once(weight.values8 + from + row8 * L::PITCH);
        if (BITS) {
            const int blocks = K / weight.block, block = k / weight.block;
            piece.scale = *(const u16*)(weight.scales + row * blocks + block) * 0x10001u;
            piece.scale8 = *(const u16*)(weight.scales8 + row8 * blocks + block) * 0x10001u;
        }
    } else {
        piece.row = piece.row8 = zeros();
        piece.scale = piece.scale8 = 0;
    }
    return piece;
}

#if TYPE == 0
// Eight 4-bit integers, minus 8 and scaled, as pairs (0, 4), (1, 5), (2, 6), (3, 7).
__device__ __forceinline__ void expand4(u32 q, u32 scale, u32 (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 biased = ((q >> (4 * i)) & 0x000f000f) | 0x64006400;  // 1024 + q
        pairs[i] = multiply_halves(subtract_halves(biased, 0x64086408), scale);
    }
}

// Four 8-bit integers, minus 128 and scaled, as pairs (0, 1), (2, 3).
__device__ __forceinline__ void expand8(u32 q, u32 scale, u32 (&pairs)[2]) {
    const u32 low = __byte_perm(q, 0x64646464, 0x4140), high = __byte_perm(q, 0x64646464, 0x4342);
    pairs[0] = multiply_halves(subtract_halves(low, 0x64806480), scale);
    pairs[1] = multiply_halves(subtract_halves(high, 0x64806480), scale);
}
#endif

// Adds a piece's products. `token(i)` gives the i-th load of the lane's token.
template <int BITS, class Token>
__device__ __forceinline__ void add_products(float (&c)[4], const Piece<BITS>& piece,
                                             const Token& token) {
    if constexpr (BITS == 0) {
        multiply_vecs(c, piece.row, piece.row8, token(0));
    }
#if TYPE == 0
    else if constexpr (BITS == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 a[4], a8[4];
            expand4(piece.row.w[i], piece.scale, a);
            expand4(piece.row8.w[i], piece.scale8, a8);
            const Vec x = token(i);
            multiply(c, a[0], a8[0], a[1], a8[1], __byte_perm(x.w[0], x.w[2], 0x5410),
                     __byte_perm(x.w[0], x.w[2], 0x7632));
            multiply(c, a[2], a8[2], a[3], a8[3], __byte_perm(x.w[1], x.w[3], 0x5410),
                     __byte_perm(x.w[1], x.w[3], 0x7632));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const Vec x = token(i / 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 a[2], a8[2];
                expand8(piece.row.w[i + j], piece.scale, a);
                expand8(piece.row8.w[i + j], piece.scale8, a8);
                multiply(c, a[0], a8[0], a[1], a8[1], x.w[2 * j], x.w[2 * j + 1]);
            }
        }
    }
#endif
}

// How the warps of a block share rows of K elements: UNROLL loads at once, STEPS times. A lane has
// twice MOST loads under way, of each of two rows.
template <int K, int BITS, int WARPS, int MOST>
struct Share {
    static constexpr int LOADS = Layout<K, BITS>::LOADS;
    static constexpr int EACH = (LOADS + WARPS - 1) / WARPS;
    static constexpr int UNROLL = EACH < MOST ? EACH : MOST;
    static constexpr int STEPS = (LOADS + WARPS * UNROLL - 1) / (WARPS * UNROLL);

    static __device__ __forceinline__ int at(int step, int warp, int i) {
        return (step * WARPS + warp) * UNROLL + i;
    }
};

template <int K, int BITS, int WARPS, int MOST = (BITS ? 2 : 4)>
struct Pieces {
    typedef Share<K, BITS, WARPS, MOST> S;
    Piece<BITS> piece[S::UNROLL];

    __device__ __forceinline__ void load(const Weight<BITS>& weight, long row, long row8, int step,
                                         int warp) {
#pragma unroll
        for (int i = 0; i < S::UNROLL; ++i)
            piece[i] = load_piece<K, BITS>(weight, row, row8, S::at(step, warp, i));
    }
};

// Multiplies rows `row` and `row8` with the tokens; `first` are the pieces of step 0.
// `token(group, k)` gives elements from k on of the lane's token in a group of 8, zeros where there
// is none.
template <int K, int BITS, int WARPS, int MOST, int GROUPS, class Token>
__device__ __forceinline__ void multiply_rows(float (&c)[GROUPS][4],
                                              Pieces<K, BITS, WARPS, MOST>& first,
                                              const Weight<BITS>& weight, long row, long row8,
                                              int warp, const Token& token) {
    typedef Share<K, BITS, WARPS, MOST> S;
    typedef Layout<K, BITS> L;
    Pieces<K, BITS, WARPS, MOST> current = first;
#pragma unroll(S::STEPS <= 8 ? S::STEPS : 2)
    for (int step = 0; step < S::STEPS; ++step) {
        Pieces<K, BITS, WARPS, MOST> next;
        if (step + 1 < S::STEPS) next.load(weight, row, row8, step + 1, warp);
#pragma unroll
        for (int i = 0; i < S::UNROLL; ++i) {
            const int at = S::at(step, warp, i), k = (at * 4 + threadIdx.x % 4) * L::LANE;
            if (at < L::LOADS) {  // for the whole warp, whose lanes multiply together
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
                    add_products<BITS>(c[group], current.piece[i], [&](int vec) {
                        return k < K ? token(group, k + vec * PER_VEC) : zeros();
                    });
            }
        }
        if (step + 1 < S::STEPS) current = next;
    }
}
