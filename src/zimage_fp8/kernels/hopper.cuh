// What the kernels of CUDA C++ share: Hopper's barriers and the operands of its tensor cores.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ u32 shared_address(const void *of) {
    return static_cast<u32>(__cvta_generic_to_shared(of));
}

__device__ __forceinline__ void init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count));
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// What follows does not move before this, and reads the register as it is then.
__device__ __forceinline__ void hold(int &x) { asm volatile("" : "+r"(x) :: "memory"); }
__device__ __forceinline__ void hold(u32 &x) { asm volatile("" : "+r"(x) :: "memory"); }
__device__ __forceinline__ void hold(float &x) { asm volatile("" : "+f"(x) :: "memory"); }

// A place in a ring of stages, and how often it went around.
struct Turn {
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A matrix in shared memory as wgmma reads it: rows of 128 bytes, swizzled over groups of eight.
__device__ __forceinline__ u64 descriptor(u32 at) {
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at & 0x3FFFF) >> 4;
}

// x / scale as IEEE divides (see `codes_of` in activation.py).
__device__ __forceinline__ float quotient(float x, float scale, float inverse) {
    const float q = x * inverse;
    return fmaf(fmaf(-q, scale, x), inverse, q);
}

// The two numbers of a pair in BF16.
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float sum_of_four_lanes(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Four neighbouring lanes hold two columns each of four blocks of eight columns. Afterwards lane i
// holds all of block i: a transposition, in two exchanges.
__device__ __forceinline__ void gather(u32 (&of)[4], bool odd, bool upper) {
    #pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = __shfl_xor_sync(~0u, odd ? of[i] : of[i + 1], 1);
        if (odd) of[i] = other; else of[i + 1] = other;
    }
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 other = __shfl_xor_sync(~0u, upper ? of[i] : of[i + 2], 2);
        if (upper) of[i] = other; else of[i + 2] = other;
    }
}
