// A token's row in 8 bits, as the next product reads it (`encode.py`), or the residual between two
// products and what the second of them reads (`norm.py`; both say the same in PyTorch and in Triton):
// total = x + h / rms(h) * gate, then total / rms(total) * vector in 8 bits.
//
// PARTS warps hold a row of DIM channels, a lane eight neighbouring ones of every 256. `h` comes into
// registers, where it becomes the total, both in BF16; `x` waits in shared memory. Nobody waits for
// another row, and lanes read only what they copied themselves.

#include "hopper.cuh"

constexpr int CHUNKS = DIM / 256 / PARTS;
static_assert(PARTS == 1 || PARTS == WARPS && !RESIDUAL, "a block is rows of a warp each, or one row");
enum { E4M3 = 1, INT8 = 2 };  // as in activation.py
static_assert(FORMAT == E4M3 || FORMAT == INT8, "a format that is not written here");

// Whoever reads them next unpacks them again: both halves of all pairs are too many registers.
__device__ __forceinline__ void hold(u32 (&pairs)[CHUNKS][4]) {
    #pragma unroll
    for (int i = 0; i < 4 * CHUNKS; ++i) hold(pairs[i / 4][i % 4]);
}

template <class Of>
__device__ __forceinline__ float over_warp(float x, const Of &of) {
    #pragma unroll
    for (int lane = 16; lane; lane /= 2) x = of(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

__device__ __forceinline__ float reciprocal_rms(float squares, float eps) {
    return rsqrtf(over_warp(squares, [](float a, float b) { return a + b; }) / DIM + eps);
}

// Read once: not worth a place in the cache that keeps the vectors.
__device__ __forceinline__ uint4 load_once(const uint4 *from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

// Every four values `stride` apart: half of their sum, less each (`rotate.py`). The values of a lane
// are neighbours, so strides from 8 on are lanes, and at 4 two of the four are the next lane's.
__device__ __forceinline__ void rotate(float (&v)[8]) {
    #pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float half = 0.5f * ((v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]));
        #pragma unroll
        for (int j = i; j < i + 4; ++j) v[j] = half - v[j];
    }
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        float half = v[i] + v[i + 4];
        half = 0.5f * (half + __shfl_xor_sync(~0u, half, 1));
        v[i] = half - v[i];
        v[i + 4] = half - v[i + 4];
    }
    #pragma unroll
    for (int lane = 2; lane < 32; lane *= 4)
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            float half = v[i] + __shfl_xor_sync(~0u, v[i], lane);
            half = 0.5f * (half + __shfl_xor_sync(~0u, half, 2 * lane));
            v[i] = half - v[i];
        }
}

// Four codes.
__device__ __forceinline__ u32 codes(const float *of, float scale, float inverse) {
    float q[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        q[i] = quotient(of[i], scale, inverse);
        if (FORMAT == E4M3) continue;
        if (!PER_TOKEN) q[i] = fminf(fmaxf(q[i], -QMAX), QMAX);
        q[i] += 12582912.0f;  // 1.5 * 2^23 leaves no fraction bits: rounded half to even
    }
    if (FORMAT == E4M3) return pack_e4m3(q[0], q[1]) | pack_e4m3(q[2], q[3]) << 16;
    return __byte_perm(__byte_perm(__float_as_uint(q[0]), __float_as_uint(q[1]), 0x0040),
                       __byte_perm(__float_as_uint(q[2]), __float_as_uint(q[3]), 0x0040), 0x5410);
}

// h [rows, DIM] in BF16; values: codes of the same shape; scales: [1] read, or [rows] written with a
// scale per token. With a residual x and total are as h, and gate and vector fp32 [samples, DIM], a
// sample of `tokens` rows each, their strides in channels, 0 where all share one.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)
row_kernel(const uint4 *h, const uint4 *x, uint4 *total, const float *gate, const float *vector,
           uint2 *values, float *scales, int rows, int tokens, int gate_stride, int vector_stride,
           float eps) {
    extern __shared__ uint4 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = (blockIdx.x * WARPS + warp) / PARTS;
    if (row >= rows) return;
    const long long at =
        static_cast<long long>(row) * (DIM / 8) + warp % PARTS * 32 * CHUNKS + lane;
    uint4 *own = memory + warp * 32 * CHUNKS + lane;

    u32 pairs[CHUNKS][4];
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const uint4 loaded = load_once(h + at + 32 * c);
        pairs[c][0] = loaded.x, pairs[c][1] = loaded.y, pairs[c][2] = loaded.z, pairs[c][3] = loaded.w;
    }
    float root = 1.0f;
    const float4 *weights;
    if (RESIDUAL) {
        #pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                :: "r"(shared_address(own + 32 * c)), "l"(x + at + 32 * c) : "memory");
        const int sample = row / tokens;
        const float4 *gates = reinterpret_cast<const float4 *>(gate + sample * gate_stride) + 2 * lane;
        weights = reinterpret_cast<const float4 *>(vector + sample * vector_stride) + 2 * lane;

        float squares[2] = {};
        #pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                squares[0] = fmaf(low(pairs[c][i]), low(pairs[c][i]), squares[0]);
                squares[1] = fmaf(high(pairs[c][i]), high(pairs[c][i]), squares[1]);
            }
        hold(pairs);
        root = reciprocal_rms(squares[0] + squares[1], eps);

        asm volatile("cp.async.wait_all;" ::: "memory");
        squares[0] = squares[1] = 0.0f;
        #pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const uint4 old = own[32 * c];
            const float4 g[2] = {__ldg(gates + 64 * c), __ldg(gates + 64 * c + 1)};
            const u32 of_x[4] = {old.x, old.y, old.z, old.w};
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 by = g[i / 2];
                u32 &pair = pairs[c][i];
                pair = pack_bf16(fmaf(low(pair) * root, i % 2 ? by.z : by.x, low(of_x[i])),
                                 fmaf(high(pair) * root, i % 2 ? by.w : by.y, high(of_x[i])));
                squares[0] = fmaf(low(pair), low(pair), squares[0]);
                squares[1] = fmaf(high(pair), high(pair), squares[1]);
            }
            total[at + 32 * c] = {pairs[c][0], pairs[c][1], pairs[c][2], pairs[c][3]};
        }
        hold(pairs);
        root = reciprocal_rms(squares[0] + squares[1], eps);
    }

    const auto values_of = [&](int c, float (&v)[8]) {
        float4 w[2];
        if (RESIDUAL) w[0] = __ldg(weights + 64 * c), w[1] = __ldg(weights + 64 * c + 1);
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Rounded before a rotation adds to it, as in the reference.
            v[2 * i] = low(pairs[c][i]);
            v[2 * i + 1] = high(pairs[c][i]);
            if (RESIDUAL) {
                v[2 * i] = __fmul_rn(v[2 * i] * root, i % 2 ? w[i / 2].z : w[i / 2].x);
                v[2 * i + 1] = __fmul_rn(v[2 * i + 1] * root, i % 2 ? w[i / 2].w : w[i / 2].y);
            }
        }
        if (ROTATE) rotate(v);
    };
    float scale;
    if (PER_TOKEN) {
        // Values wait where the total was, and where x was.
        float largest = AMAX_FLOOR;
        #pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            float v[8];
            values_of(c, v);
            #pragma unroll
            for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
            #pragma unroll
            for (int i = 0; i < 4; ++i) pairs[c][i] = __float_as_uint(v[i]);
            *reinterpret_cast<float4 *>(own + 32 * c) = {v[4], v[5], v[6], v[7]};
        }
        largest = over_warp(largest, [](float a, float b) { return fmaxf(a, b); });
        if (PARTS > 1) {
            __shared__ float of_parts[PARTS];
            if (!lane) of_parts[warp] = largest;
            __syncthreads();
            #pragma unroll
            for (int part = 0; part < PARTS; ++part) largest = fmaxf(largest, of_parts[part]);
        }
        scale = __fdiv_rn(largest, QMAX);
        if (!lane && warp % PARTS == 0) scales[row] = scale;
    } else {
        scale = *scales;
    }
    const float inverse = __frcp_rn(scale);
    #pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        float v[8];
        if (PER_TOKEN) {
            const float4 rest = *reinterpret_cast<float4 *>(own + 32 * c);
            #pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(pairs[c][i]);
            v[4] = rest.x, v[5] = rest.y, v[6] = rest.z, v[7] = rest.w;
        } else {
            values_of(c, v);
        }
        values[at + 32 * c] = {codes(v, scale, inverse), codes(v + 4, scale, inverse)};
    }
}
