// The element type: TYPE is 0 for float16, 1 for bfloat16, 2 for float32.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;

#if TYPE == 2
typedef float Real;
#else
typedef u16 Real;
#endif

struct alignas(16) Vec {
    u32 w[4];
};

#define WARP 32
// Elements of 16 bytes.
#define PER_VEC (16 / (int)sizeof(Real))
