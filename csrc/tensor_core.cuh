// What the tensor-core kernels share, on the device and on a host: bf16 numbers, operands in shared
// memory, and on the device the instructions themselves. No CUDA header here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPECTRAL_BOTH __host__ __device__ __forceinline__
#else
#define SPECTRAL_BOTH inline
#endif

// Before a loop whose variables name registers.
#if defined(__CUDA_ARCH__)
#define SPECTRAL_PRAGMA(text) _Pragma(#text)
#define SPECTRAL_UNROLL SPECTRAL_PRAGMA(unroll)
#define SPECTRAL_UNROLL_BY(times) SPECTRAL_PRAGMA(unroll times)
#else
#define SPECTRAL_UNROLL
#define SPECTRAL_UNROLL_BY(times)
#endif

namespace spectral::cuda {

using Bits = std::uint16_t;  // of one bf16 number
using Pair = std::uint32_t;  // of two, the first in the low half

struct Quad {  // sixteen bytes, loaded at once
    Pair pair[4];
};

SPECTRAL_BOTH float widened(Bits bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    static_assert(sizeof(value) == sizeof(wide));
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
}

// Half 0 or 1 of a pair.
SPECTRAL_BOTH float widened(Pair pair, int half) {
    return widened(static_cast<Bits>(pair >> (16 * half)));
}

// Rounds to the nearest bf16, ties to even; NaN stays NaN.
SPECTRAL_BOTH Bits rounded(float value) {
    std::uint32_t wide;
    __builtin_memcpy(&wide, &value, sizeof(wide));
    if ((wide & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((wide >> 16) | 0x40u);
    return static_cast<Bits>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

// A number as the sum of two of bf16, of which 2^-17 is missing: tensor cores multiply these
// exactly and add in fp32, so that two or three products are as good as one in fp32.
struct Split {
    Bits high;
    Bits low;
};

SPECTRAL_BOTH Split split(float value) {
    const Bits high = rounded(value);
    return {high, rounded(value - widened(high))};
}

// What lane `index` holds of a 16 x 16 (four pairs) or 8 x 16 (two) operand that lies in rows.
template <int kPairs, int kStride>
SPECTRAL_BOTH void along(Pair* out, const Bits* tile, int row, int column, int index) {
    const Bits* const at = tile + (row + index / 4) * kStride + column + 2 * (index % 4);
    out[0] = *reinterpret_cast<const Pair*>(at);
    if constexpr (kPairs == 4) {
        out[1] = *reinterpret_cast<const Pair*>(at + 8 * kStride);
        out[2] = *reinterpret_cast<const Pair*>(at + 8);
        out[3] = *reinterpret_cast<const Pair*>(at + 8 * kStride + 8);
    } else {
        out[1] = *reinterpret_cast<const Pair*>(at + 8);
    }
}

#if defined(__CUDACC__)

// What the kWarps warps of a row wrote to shared memory can be read by all of them. Several are a
// block.
template <int kWarps>
__device__ __forceinline__ void meet() {
    if constexpr (kWarps == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// One lane of a warp. A host has all of them (tests/warp_on_host.h).
template <typename Lane>
struct DeviceWarp {
    Lane& lane;
    int index;

    template <typename Step>
    __device__ __forceinline__ void each(const Step& step) {
        step(lane, index);
    }

    // sums [16, 8] += left [16, 16] times right [16, 8]
    template <typename Sums, typename Left, typename Right>
    __device__ __forceinline__ void multiply(
        const Sums& sums, const Left& left, const Right& right) {
        float* const c = sums(lane);
        const Pair* const a = left(lane);
        const Pair* const b = right(lane);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }

    // As `along`, of the transpose: the operand's rows are columns of the tile, from (0, 0) on.
    template <int kPairs, int kStride>
    __device__ __forceinline__ static void across(Pair* out, const Bits* tile, int index) {
        // Lane i names row i % 8 of the 8 x 8 matrix i / 8, in the order of the operand's pairs.
        const int matrix = index / 8, within = index % 8;
        if constexpr (kPairs == 4) {
            const Bits* const row = tile + (matrix / 2 * 8 + within) * kStride + matrix % 2 * 8;
            const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                         : "r"(address)
                         : "memory");
        } else {
            const Bits* const row = tile + (matrix % 2 * 8 + within) * kStride;
            const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                         : "=r"(out[0]), "=r"(out[1])
                         : "r"(address)
                         : "memory");
        }
    }
};

#endif

}  // namespace spectral::cuda
