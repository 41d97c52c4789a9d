// Batched Cayley map on the CPU: what the scheduler (cayley_cpu.cpp) and the kernels
// (cayley_cpu_kernels.h, compiled once per SIMD level) know of each other. No torch headers here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral::cpu {

// Up to these sizes matrices go through the kernel together, one per SIMD lane. Measured: forward
// the lanes win by 1.1 to 1.9 up to 24, backward they lose above 8, where one product fills a
// register.
inline constexpr std::int64_t kMaxLaneSizeForward = 24;
inline constexpr std::int64_t kMaxLaneSizeBackward = 8;
// Matrices of one size handed to a kernel at once; a multiple of every level's lane count.
inline constexpr std::int64_t kGroup = 16;

// One SIMD level's kernels. `count` matrices of one size n, 1 <= count <= kGroup, contiguous each:
// packed[i] has n(n-1)/2 entries, rotation[i] and grad_rotation[i] n*n, row-major. `workspace` is
// 64-byte aligned and holds workspace_bytes(n).
struct CayleyKernels {
    std::size_t (*workspace_bytes)(std::int64_t n);
    void (*forward_f32)(
        const float* const* packed, float* const* rotation, std::int64_t count, std::int64_t n,
        void* workspace);
    void (*forward_f64)(
        const double* const* packed, double* const* rotation, std::int64_t count, std::int64_t n,
        void* workspace);
    void (*backward_f32)(
        const float* const* grad_rotation, const float* const* rotation, float* const* grad_packed,
        std::int64_t count, std::int64_t n, void* workspace);
    void (*backward_f64)(
        const double* const* grad_rotation, const double* const* rotation,
        double* const* grad_packed, std::int64_t count, std::int64_t n, void* workspace);
};

}  // namespace spectral::cpu
