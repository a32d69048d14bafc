// Softmax attention on Hopper in BF16, heads of 128 channels: out = softmax(q k^T / sqrt(128)) v.
//
// Persistent and warp-specialized, after FlashAttention-3 (Shah et al. 2024): one thread copies, the
// other warpgroups compute 64 queries each. They take turns, so that one computes exponentials while
// another's products run; and each mixes the values of one block of keys while it computes the next
// block's exponentials. `hopper_attention.py` sets the constants in capitals and writes `score` and
// `mix`, one wgmma over 16 channels or keys.

#include "hopper.cuh"
#include "products.cuh"

constexpr int HEAD = 128;  // channels
constexpr int QUERIES = 64 * WARPGROUPS;
constexpr int ROW_BYTES = 128;  // half of a head, as wide as the widest swizzle
constexpr int HALF_Q = QUERIES * ROW_BYTES, HALF_KV = KEYS * ROW_BYTES;
constexpr int STAGE_BYTES = 2 * HALF_KV;
constexpr int WARPS = 4 * WARPGROUPS;
constexpr float FACTOR = 1.4426950408889634f / 11.313708498984761f;  // log2(e) / sqrt(128)
// Probabilities are 2^(score - top). `top` follows the largest score only when that has grown by
// so much: until then they are at most 2^8, and what was summed need not be scaled.
constexpr float GROWTH = 8.0f / FACTOR;

__device__ __forceinline__ void load(
    u32 to, const TensorMap &map, u32 barrier, int x, int row, int picture) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];"
        :: "r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(row), "r"(picture) : "memory");
}

// Values as they lie, a key a row, in halves of 64 channels: wgmma reads them transposed.
__device__ __forceinline__ u64 transposed(u32 at) {
    return 1ull << 62 | 64ull << 32 | static_cast<u64>(HALF_KV >> 4) << 16 | (at & 0x3FFFF) >> 4;
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float largest_of_four_lanes(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Wait for all but the last `PENDING` groups of products; what follows reads their results.
template <int PENDING, class T, int COUNT>
__device__ __forceinline__ void finish(T (&results)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) hold(results[i]);
}

// Zero, once x is known: there are at most 32 bits in it. Without this dependence ptxas moves an
// arrival, and the wait for products behind it, above the arithmetic that shall run beside them.
__device__ __forceinline__ u32 zero_after(float x) {
    u32 zero;
    asm volatile("{\n.reg .b32 bits;\npopc.b32 bits, %1;\nshr.u32 %0, bits, 6;\n}"
        : "=r"(zero) : "r"(__float_as_int(x)));
    return zero;
}

// q, k, v [batch, tokens, heads * 128]; out the same, BF16 or codes under out_scale.
extern "C" __global__ void __launch_bounds__(128 * (WARPGROUPS + 1), 1)
hopper_attention_kernel(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                        const __grid_constant__ TensorMap v, void *out, const float *out_scale,
                        int batch, int heads, int tokens) {
    extern __shared__ u8 memory[];
    const u32 start = shared_address(memory);
    const u32 queries = (start + 1023) & ~1023u;  // what a swizzle repeats after
    const u32 keys = queries + 2 * HALF_Q, values = keys + STAGES * STAGE_BYTES;
    const u32 q_full = values + STAGES * STAGE_BYTES, q_empty = q_full + 8;
    const u32 k_full = q_empty + 8, k_empty = k_full + 8 * STAGES;
    const u32 v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        init(q_full, 1);
        init(q_empty, WARPS);
        for (int i = 0; i < STAGES; ++i) {
            init(k_full + 8 * i, 1);
            init(k_empty + 8 * i, WARPS);
            init(v_full + 8 * i, 1);
            init(v_empty + 8 * i, WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int tiles = (tokens + QUERIES - 1) / QUERIES, blocks = (tokens + KEYS - 1) / KEYS;
    const int work = batch * heads * tiles;
    Turn turn, of_tile;

    if (warp >= WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(PRODUCER_REGISTERS));
        if (warp > WARPS || lane) return;
        for (int tile = blockIdx.x; tile < work; tile += gridDim.x, of_tile.advance(1)) {
            const int x = tile / tiles % heads * 2 * ROW_BYTES, picture = tile / tiles / heads;
            const auto load_halves = [&](u32 to, int rows, const TensorMap &map, u32 barrier, int row) {
                expect(barrier, 2 * rows * ROW_BYTES);
                for (int half = 0; half < 2; ++half)
                    load(to + half * rows * ROW_BYTES, map, barrier, x + half * ROW_BYTES, row, picture);
            };
            wait(q_empty, of_tile.parity ^ 1);
            load_halves(queries, QUERIES, q, q_full, tile % tiles * QUERIES);
            for (int block = blocks - 1; block >= 0; --block, turn.advance(STAGES)) {
                const u32 at = turn.stage * STAGE_BYTES, barrier = 8 * turn.stage;
                wait(k_empty + barrier, turn.parity ^ 1);
                load_halves(keys + at, KEYS, k, k_full + barrier, block * KEYS);
                wait(v_empty + barrier, turn.parity ^ 1);
                load_halves(values + at, KEYS, v, v_full + barrier, block * KEYS);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(CONSUMER_REGISTERS));
    const int quad = lane % 4, warpgroup = warp / 4, next = (warpgroup + 1) % WARPGROUPS;
    const u32 own_queries = queries + warpgroup * 64 * ROW_BYTES;
    const auto take_turn = [&] { asm volatile("bar.sync %0, 256;" :: "r"(1 + warpgroup) : "memory"); };
    const auto give_turn = [&] { asm volatile("bar.arrive %0, 256;" :: "r"(1 + next) : "memory"); };
    const auto release = [&](u32 barrier) {
        __syncwarp();
        if (!lane) arrive(barrier);
    };
    if (warpgroup == WARPGROUPS - 1) give_turn();
    const float last_factor = TO_CODES ? 1.0f / *out_scale : 1.0f;

    float scores[KEYS / 2];  // then probabilities
    u32 weights[KEYS / 4];   // probabilities in BF16
    float mixed[HEAD / 2];
    for (int tile = blockIdx.x; tile < work; tile += gridDim.x, of_tile.advance(1)) {
        const int head = tile / tiles % heads, picture = tile / tiles / heads;
        float top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, shrink[2] = {0.0f, 0.0f};
        wait(q_full, of_tile.parity);

        const auto start_scores = [&] {
            wait(k_full + 8 * turn.stage, turn.parity);
            const u32 b = keys + turn.stage * STAGE_BYTES;
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            #pragma unroll
            for (int part = 0; part < HEAD / 16; ++part)
                score(scores, descriptor(own_queries + part / 4 * HALF_Q) + part % 4 * 2,
                      descriptor(b + part / 4 * HALF_KV) + part % 4 * 2, part);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };
        const auto start_mixing = [&](const Turn &of, bool adds) {
            wait(v_full + 8 * of.stage, of.parity);
            const u64 b = transposed(values + of.stage * STAGE_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            #pragma unroll
            for (int part = 0; part < KEYS / 16; ++part)
                mix(mixed, weights + 4 * part, b + part * (16 * ROW_BYTES >> 4), adds || part);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };
        // Scores become probabilities. Returns whether the sums so far have to shrink.
        const auto softmax = [&] {
            float largest[2] = {top[0], top[1]};
            #pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                largest[i % 4 / 2] = fmaxf(largest[i % 4 / 2], scores[i]);
            bool grew = false;
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                largest[half] = largest_of_four_lanes(largest[half]);
                grew |= largest[half] > top[half] + GROWTH;
            }
            grew = __any_sync(~0u, grew);
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float now = grew ? largest[half] : top[half];
                shrink[half] = power_of_two((top[half] - now) * FACTOR);
                top[half] = now;
                const float offset = now * FACTOR;
                float total = 0.0f;
                #pragma unroll
                for (int j = 0; j < KEYS / 8; ++j)
                    #pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float &x = scores[4 * j + 2 * half + i];
                        x = power_of_two(fmaf(x, FACTOR, -offset));
                        total += x;
                    }
                sum[half] = sum[half] * shrink[half] + total;
            }
            return grew;
        };
        const auto round_weights = [&] {
            #pragma unroll
            for (int i = 0; i < KEYS / 4; ++i)
                weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
        };

        take_turn();
        start_scores();
        give_turn();
        finish<0>(scores);
        release(k_empty + 8 * turn.stage);
        if (const int left = tokens - (blocks - 1) * KEYS; left < KEYS) {  // the last block's edge
            #pragma unroll
            for (int i = 0; i < KEYS / 2; ++i)
                if (i / 4 * 8 + 2 * quad + i % 2 >= left) scores[i] = -1e30f;
        }
        softmax();
        round_weights();
        Turn before = turn;
        turn.advance(STAGES);
        for (int block = 1; block < blocks; ++block) {
            take_turn();
            start_scores();
            start_mixing(before, block > 1);
            give_turn();
            finish<1>(scores);
            const bool shrinks = softmax();
            release(k_empty + 8 * turn.stage + zero_after(sum[0] + sum[1]));
            finish<0>(mixed);
            release(v_empty + 8 * before.stage);
            #pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) hold(weights[i]);  // read until here
            if (shrinks) {
                #pragma unroll
                for (int i = 0; i < HEAD / 2; ++i) mixed[i] *= shrink[i % 4 / 2];
            }
            round_weights();
            before = turn;
            turn.advance(STAGES);
        }
        release(q_empty);
        start_mixing(before, blocks > 1);
        finish<0>(mixed);
        release(v_empty + 8 * before.stage);

        const int row = tile % tiles * QUERIES + warp * 16 + lane / 4;
        for (int half = 0; half < 2; ++half) sum[half] = last_factor / sum_of_four_lanes(sum[half]);
        #pragma unroll
        for (int unit = 0; unit < HEAD / 32; ++unit) {
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 packed[4];
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = 16 * unit + 4 * i + 2 * half;
                    const float low = mixed[at] * sum[half], high = mixed[at + 1] * sum[half];
                    packed[i] = TO_CODES ? pack_e4m3(low, high) : pack_bf16(low, high);
                }
                gather(packed, lane & 1, lane & 2);
                if (row + 8 * half >= tokens) continue;
                const long long to = (static_cast<long long>(picture) * tokens + row + 8 * half)
                    * heads * HEAD + head * HEAD + 32 * unit + 8 * quad;
                if (TO_CODES)
                    *reinterpret_cast<uint2 *>(static_cast<u8 *>(out) + to) =
                        {packed[0] | packed[1] << 16, packed[2] | packed[3] << 16};
                else
                    *reinterpret_cast<uint4 *>(static_cast<u16 *>(out) + to) =
                        {packed[0], packed[1], packed[2], packed[3]};
            }
        }
    }
}
