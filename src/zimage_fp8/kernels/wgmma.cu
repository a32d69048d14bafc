// A linear layer's matrix product on Hopper, with its scales and with what follows it: the gate of
// the feed-forward, or the norm and rotation of attention's heads (`head_product.cuh`).
// out = (left right^T) * x_scale * weight_scale, or silu of its first half times its second.
//
// Persistent and warp-specialized: one thread of the last warpgroup copies tiles of both operands
// into a ring of stages (bulk copies), the other warpgroups multiply 64 rows each (wgmma) and write
// their results straight from registers. The programs of a cluster compute tiles side by side, read
// the same rows of `left` and load a part each for all. `wgmma.py` sets the constants in capitals and
// writes `multiply`, one wgmma over 32 bytes of depth.

#include "hopper.cuh"
#include "products.cuh"

constexpr int M = 64 * WARPGROUPS;
constexpr int SHARED_M = M / CLUSTER;  // rows of `left` that one program loads for its cluster
constexpr int K_BYTES = 128;  // a row of a stage, as wide as the widest swizzle
constexpr int LEFT_BYTES = M * K_BYTES;
constexpr int STAGE_BYTES = LEFT_BYTES + N * K_BYTES;
// Two scalars are multiplied with each other once, except where results are promised bit for bit.
constexpr bool ONE_FACTOR = !PER_TOKEN && !PER_CHANNEL && !EXACT_SUMS;
constexpr int WIDTH = GATED ? N / 2 : N;  // columns that a tile writes

// At the barrier of every program in the cluster, one lane for each. What it says, that wgmma has
// read a stage, needs no fence: `.release.cluster` would wait for all memory, 0.5 us a stage.
__device__ __forceinline__ void arrive(u32 barrier, u32 program) {
#if CLUSTER == 1
    arrive(barrier);
#else
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
        :: "r"(barrier), "r"(program) : "memory");
#endif
}

__device__ __forceinline__ void meet() {
#if CLUSTER == 1
    __syncthreads();
#else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void load(u32 to, const TensorMap &map, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];"
        :: "r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row) : "memory");
}

// Into the same place of every program in the cluster, each of whose barriers hears of it.
__device__ __forceinline__ void load_for_all(u32 to, const TensorMap &map, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
        :: "r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row),
           "h"(static_cast<u16>((1 << CLUSTER) - 1)) : "memory");
}

// The same rows of two matrices, one below the other.
__device__ __forceinline__ void load_both(u32 to, const TensorMap &map, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];"
        :: "r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row), "r"(0) : "memory");
}

// Not reordered behind the product, which hides its latency.
__device__ __forceinline__ float load_early(const float *from) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}

__device__ __forceinline__ u32 load_early(const u32 *from) {
    u32 value;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

__device__ __forceinline__ float silu(float x) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    return TO_CODES ? pack_e4m3(low, high) : pack_bf16(low, high);
}

#include "head_product.cuh"

// left [rows, depth], right [columns, depth], or [2, columns, depth] with a gate, of `steps` times
// 128 bytes; out [rows, columns]. Tiles are walked `group` rows of them before the next column.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(128 * (WARPGROUPS + 1), 1)
wgmma_kernel(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
            void *out, const float *x_scale, const float *weight_scale, const float *out_scale,
            int rows, int columns, int steps, int group, const Heads heads) {
    extern __shared__ u8 memory[];
    const u32 start = shared_address(memory);
    const u32 stages = (start + 1023) & ~1023u;  // what a swizzle repeats after
    const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
    float *scales = reinterpret_cast<float *>(memory + (empty + 8 * STAGES - start));
#if HEADS
    Exchange exchange(empty + 8 * STAGES + 2 * WARPGROUPS * N * 4);
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER;
    const int tiles_m = (rows + M - 1) / M;
    const int tiles_n = (columns + WIDTH * CLUSTER - 1) / (WIDTH * CLUSTER);  // of a cluster

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init(full + 8 * i, 1);
            init(empty + 8 * i, 4 * WARPGROUPS * CLUSTER);  // each warp: its wgmma is done
        }
#if HEADS
        exchange.init_barriers();
#endif
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet();

    Turn turn;
    const auto place = [&](int tile, int &m, int &n) {
        const int first = tile / (group * tiles_n) * group, within = tile % (group * tiles_n);
        const int height = min(tiles_m - first, group);
        m = (first + within % height) * M;
        n = (within / height * CLUSTER + rank) * WIDTH;
    };

    const int first_tile = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;

    if (warp >= 4 * WARPGROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(PRODUCER_REGISTERS));
        if (warp == 4 * WARPGROUPS && lane == 0) {
            for (int tile = first_tile; tile < tiles_m * tiles_n; tile += stride) {
                int m, n;
                place(tile, m, n);
                for (int k = 0; k < steps; ++k, turn.advance(STAGES)) {
                    const u32 at = stages + turn.stage * STAGE_BYTES, ready = full + 8 * turn.stage;
                    wait(empty + 8 * turn.stage, turn.parity ^ 1);
                    expect(ready, STAGE_BYTES);
                    (CLUSTER > 1 ? load_for_all : load)(
                        at + rank * SHARED_M * K_BYTES, left, ready, k * K_BYTES, m + rank * SHARED_M);
                    (GATED ? load_both : load)(at + LEFT_BYTES, right, ready, k * K_BYTES, n);
                }
            }
        }
        __syncwarp();
        if (CLUSTER > 1) meet();  // none leaves while another may write to it
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(CONSUMER_REGISTERS));
    const int quad = lane % 4, warpgroup = warp / 4;
    float of_row[2] = {1.0f, 1.0f}, of_all = 1.0f, scale = 1.0f, inverse = 1.0f;
    if (SCALED && !PER_CHANNEL) of_all = *weight_scale;
    if (SCALED && !PER_TOKEN) of_row[0] = of_row[1] = ONE_FACTOR ? *x_scale * of_all : *x_scale;
    if (TO_CODES) {
        scale = *out_scale;
        inverse = __frcp_rn(scale);
    }
    Sum sums[N / 2];
    for (int tile = first_tile, count = 0; tile < tiles_m * tiles_n; tile += stride, ++count) {
        int m, n;
        place(tile, m, n);
        const int row = m + warp * 16 + lane / 4;
        if (PER_TOKEN)
            for (int half = 0; half < 2; ++half)
                of_row[half] = load_early(x_scale + min(row + 8 * half, rows - 1));
#if HEADS
        u32 positions[2];
        #pragma unroll
        for (int half = 0; half < 2; ++half)
            positions[half] = load_early(heads.positions + min(row + 8 * half, rows - 1) % heads.tokens);
#endif
        // Of two buffers, since a fast warp may be a tile ahead.
        float *of_columns = scales + (count % 2 * WARPGROUPS + warpgroup) * N;
        if (PER_CHANNEL) {
            for (int i = threadIdx.x % 128; i < N; i += 128) {
                const int column = min(n + i % WIDTH, columns - 1) + i / WIDTH * columns;
                asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                    :: "r"(shared_address(of_columns + i)),
                       "l"(weight_scale + column) : "memory");
            }
        }
        const auto multiply_step = [&](bool first) {
            wait(full + 8 * turn.stage, turn.parity);
            const u32 at = stages + turn.stage * STAGE_BYTES;
            const u64 a = descriptor(at + warpgroup * 64 * K_BYTES), b = descriptor(at + LEFT_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            if (first) multiply_first(sums, a, b);
            else multiply(sums, a, b, 1);
            #pragma unroll
            for (int part = 1; part < 4; ++part)  // of 32 bytes
                multiply(sums, a + 2 * part, b + 2 * part, 1);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        };
        multiply_step(true);
        int before = turn.stage;
        turn.advance(STAGES);
        for (int k = 1; k < steps; ++k, turn.advance(STAGES)) {
            multiply_step(false);
            // One step multiplies while the stage of the one before is given back.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (lane < CLUSTER) arrive(empty + 8 * before, lane);
            before = turn.stage;
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (lane < CLUSTER) arrive(empty + 8 * before, lane);
        #pragma unroll
        for (int i = 0; i < N / 2; ++i) hold(sums[i]);
        if (PER_CHANNEL) {
            asm volatile("cp.async.wait_all;" ::: "memory");
            asm volatile("bar.sync %0, 128;" :: "r"(1 + warpgroup) : "memory");
        }

        // 32 columns of two rows, packed: a lane gathers eight columns of its row and writes them.
        const auto store = [&](int unit, u32 (&packed)[2][4]) {
            const int column = n + 32 * unit + 8 * quad;
            #pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32(&of)[4] = packed[half];
                gather(of, lane & 1, lane & 2);
                if (row + 8 * half >= rows || column >= columns) continue;
                const long long to = static_cast<long long>(row + 8 * half) * columns + column;
                if (TO_CODES)
                    *reinterpret_cast<uint2 *>(static_cast<u8 *>(out) + to) =
                        {of[0] | of[1] << 16, of[2] | of[3] << 16};
                else
                    *reinterpret_cast<uint4 *>(static_cast<u16 *>(out) + to) =
                        {of[0], of[1], of[2], of[3]};
            }
        };
#if HEADS
        float factor[2];
        #pragma unroll
        for (int half = 0; half < 2; ++half)
            factor[half] = of_row[half] * (PER_CHANNEL || ONE_FACTOR ? 1.0f : of_all);
        float values[N / 2];
        #pragma unroll
        for (int block = 0; block < N / 8; ++block) {
            float2 of_column = {1.0f, 1.0f};
            if (PER_CHANNEL)
                of_column = *reinterpret_cast<float2 *>(of_columns + 8 * block + 2 * quad);
            #pragma unroll
            for (int i = 4 * block; i < 4 * block + 4; ++i)
                values[i] = static_cast<float>(sums[i]) * (i % 2 ? of_column.y : of_column.x);
        }
        // The first third of the columns are queries, the second keys. Both programs of a cluster
        // are in the same third, which the shuffle tells the compiler is the same for all lanes.
        const int third = __shfl_sync(~0u, 3 * (n - rank * N) / columns, 0);
        if (third < 2) {
            const uint4 *weights = heads.weights + third * HEAD / 8;
            if (rank) norm_and_turn<1>(values, factor, weights, positions, heads, exchange, store);
            else norm_and_turn<0>(values, factor, weights, positions, heads, exchange, store);
            continue;
        }
#endif
        #pragma unroll
        for (int unit = 0; unit < WIDTH / 32; ++unit) {
            u32 packed[2][4];
            #pragma unroll
            for (int block = 0; block < 4; ++block) {
                const int j = 4 * unit + block;
                float2 of_column[GATED + 1];
                #pragma unroll
                for (int part = 0; part <= GATED; ++part)
                    of_column[part] = PER_CHANNEL
                        ? *reinterpret_cast<float2 *>(of_columns + part * WIDTH + 8 * j + 2 * quad)
                        : float2{of_all, of_all};
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float2 y[GATED + 1];
#if HEADS
                    y[0] = {values[4 * j + 2 * half] * factor[half],
                            values[4 * j + 2 * half + 1] * factor[half]};
#else
                    #pragma unroll
                    for (int part = 0; part <= GATED; ++part) {
                        const int at = part * N / 4 + 4 * j + 2 * half;
                        y[part] = {static_cast<float>(sums[at]), static_cast<float>(sums[at + 1])};
                        if (SCALED) {
                            y[part].x *= of_row[half];
                            y[part].y *= of_row[half];
                        }
                        if (SCALED && !ONE_FACTOR) {
                            y[part].x *= of_column[part].x;
                            y[part].y *= of_column[part].y;
                        }
                    }
#endif
                    if (GATED) {
                        y[0].x = silu(y[0].x) * y[GATED].x;
                        y[0].y = silu(y[0].y) * y[GATED].y;
                    }
                    if (TO_CODES) {
                        y[0].x = quotient(y[0].x, scale, inverse);
                        y[0].y = quotient(y[0].y, scale, inverse);
                    }
                    packed[half][block] = pack(y[0].x, y[0].y);
                }
            }
            store(unit, packed);
        }
    }
    __syncwarp();
    if (CLUSTER > 1) meet();
}
