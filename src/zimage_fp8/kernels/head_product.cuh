// What `wgmma.cu` does to attention's queries and keys before it writes them: the RMS norm of every
// head, and its rotation (`qk_norm_rope.py` says the same in PyTorch).
//
// Two programs side by side compute three heads of 128 channels: 192 columns each, the first and the
// last head whole and half of the one between, whose sums of squares they exchange. A thread holds
// both channels of every pair that is rotated.

// The rotation of a token's pairs goes by its place along three axes, each of which has its own
// blocks of eight channels: FIRST_BLOCK_2 and FIRST_BLOCK_3 are where the second and third begin.
struct Heads {
    const uint4 *weights;     // BF16 [q or k, 4 pairs of a block, 16 blocks, 2]
    const float4 *rotations;  // [8 pairs of blocks, PLACES, 4 pairs, 2 blocks] of cosine and sine
    const u32 *positions;     // [tokens] the places along the axes, of PLACE_BITS each
    int tokens;
    float eps;
};

#if HEADS
constexpr int HEAD = 128;
static_assert(N == HEAD * 3 / 2 && CLUSTER == 2 && !GATED && !TO_CODES, "three heads a cluster");

// Read when it is needed: what is read ahead needs registers that are not there.
__device__ __forceinline__ float4 load_in_order(const float4 *from) {
    float4 value;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "l"(from));
    return value;
}

__device__ __forceinline__ uint4 load_in_order(const uint4 *from) {
    uint4 value;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(from));
    return value;
}

// Two numbers of each of a warp's 16 rows, for the same warp of the other program and from it. Of
// two buffers: that warp may be a tile ahead, and no more, since it waits for this one's numbers.
struct Exchange {
    static constexpr int WARPS = 4 * WARPGROUPS, BYTES = 16 * 4;
    u32 buffers, barriers, parity = 0;

    __device__ __forceinline__ explicit Exchange(u32 at)
        : buffers(at), barriers(at + 2 * WARPS * BYTES) {}

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < WARPS; ++i) init(barriers + 8 * i, 1);
    }

    __device__ __forceinline__ u32 own_buffer() const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return buffers + (parity * WARPS + warp) * BYTES + lane / 4 * 8;
    }

    __device__ __forceinline__ void send(const float (&numbers)[2], u32 to_program) const {
        const int lane = threadIdx.x % 32;
        const u32 barrier = barriers + 8 * (threadIdx.x / 32);
        if (!lane) expect(barrier, BYTES);
        __syncwarp();  // before it is known there that this warp is so far
        asm volatile(
            "{\n.reg .b32 to, done;\n.reg .pred first;\nsetp.eq.b32 first, %5, 0;\n"
            "mapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 done, %1, %2;\n"
            "@first st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"
            " [to], {%3, %4}, [done];\n}"
            :: "r"(own_buffer()), "r"(barrier), "r"(to_program), "f"(numbers[0]), "f"(numbers[1]),
               "r"(lane % 4) : "memory");
    }

    __device__ __forceinline__ void receive(float (&numbers)[2]) {
        wait(barriers + 8 * (threadIdx.x / 32), parity);
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
            : "=f"(numbers[0]), "=f"(numbers[1]) : "r"(own_buffer()) : "memory");
        parity ^= 1;
    }
};

// A pair, weighted by two numbers in BF16 and turned.
__device__ __forceinline__ u32 turned(float even, float odd, u32 weight, float cosine, float sine) {
    even *= low(weight);
    odd *= high(weight);
    return pack_bf16(even * cosine - odd * sine, odd * cosine + even * sine);
}

// values: a thread's 24 blocks of eight columns, [block][row][pair], each without the factor of its
// row. weights: of q or k. store: of four blocks, packed.
template <int RANK, class Store>
__device__ __forceinline__ void norm_and_turn(
    const float (&values)[N / 2], const float (&factor)[2], const uint4 *weights, const u32 (&positions)[2],
    const Heads &heads, Exchange &exchange, const Store &store) {
    constexpr int SPLIT = RANK ? 8 : 16;  // the first block of the second head in this program
    constexpr int SHARED = !RANK;         // which of the two is shared
    float squares[2][2] = {};
    #pragma unroll
    for (int block = 0; block < N / 8; ++block)
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            float &sum = squares[block >= SPLIT][i / 2];
            const float value = values[4 * block + i];
            sum = fmaf(value, value, sum);
        }
    #pragma unroll
    for (int i = 0; i < 4; ++i) squares[i / 2][i % 2] = sum_of_four_lanes(squares[i / 2][i % 2]);
    exchange.send(squares[SHARED], !RANK);

    const int quad = threadIdx.x % 4;
    const auto turn = [&](int first, int end, int in_head, const float (&sum)[2]) {
        float root[2];
        #pragma unroll
        for (int half = 0; half < 2; ++half)
            root[half] = factor[half]
                * rsqrtf(factor[half] * factor[half] * sum[half] / HEAD + heads.eps);
        #pragma unroll
        for (int block = first; block < end; block += 4) {
            u32 packed[2][4];
            const int of_head = in_head + block - first;
            const uint4 weight = load_in_order(weights + 4 * quad + of_head / 4);
            #pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const int axis = (of_head + i >= FIRST_BLOCK_2) + (of_head + i >= FIRST_BLOCK_3);
                #pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 place = positions[half] >> PLACE_BITS * axis & PLACES - 1;
                    const float4 by = load_in_order(
                        heads.rotations + 4 * ((of_head + i) / 2 * PLACES + place) + quad);
                    const float *pairs = values + 4 * (block + i) + 2 * half;
                    const float scale = root[half];
                    packed[half][i] =
                        turned(pairs[0] * scale, pairs[1] * scale, i ? weight.z : weight.x,
                               by.x, by.y);
                    packed[half][i + 1] =
                        turned(pairs[4] * scale, pairs[5] * scale, i ? weight.w : weight.y,
                               by.z, by.w);
                }
            }
            store(block / 4, packed);
        }
    };
    constexpr int WHOLE_FIRST = SHARED ? 0 : SPLIT, WHOLE_END = SHARED ? SPLIT : N / 8;
    constexpr int HALF_FIRST = SHARED ? SPLIT : 0, HALF_END = SHARED ? N / 8 : SPLIT;
    turn(WHOLE_FIRST, WHOLE_END, 0, squares[!SHARED]);
    float theirs[2];
    exchange.receive(theirs);
    #pragma unroll
    for (int half = 0; half < 2; ++half) theirs[half] += squares[SHARED][half];
    turn(HALF_FIRST, HALF_END, SHARED ? 0 : HEAD / 16, theirs);
}
#endif
