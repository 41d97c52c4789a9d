// Optimizer steps of orthogonal factors on the CPU: what the scheduler (stiefel_cpu.cpp) and the
// kernels (stiefel_cpu_kernels.h, compiled once per SIMD level) know of each other. No torch
// headers here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral::cpu {

// From A = X^T G: g = gradient (A - A^T), Y <- keep Y - mix g, and for Adam
// p <- keep_square p + mix_square g*g. xi = rate Y, for Adam with the denominators below.
struct StiefelRule {
    double gradient;
    double keep, mix;
    double keep_square, mix_square;
    double eps;
    double rate;
};

// One matrix, everything [n, n], row-major and contiguous. `velocity` is null for SGD without
// momentum, `square` for SGD. Adam divides Y by `unbias` and p by `unbias_square`; a xi whose
// largest row sum exceeds `longest` is shortened to it.
template <typename T>
struct StiefelMatrix {
    T* factor;
    const T* grad;
    T* velocity;
    T* square;
    std::int64_t n;
    double unbias, unbias_square;
    double longest;
};

// One SIMD level's kernels, each for one thread and one matrix. `workspace` is 64-byte aligned and
// holds workspace_bytes of n and the element's size.
struct StiefelKernels {
    std::size_t (*workspace_bytes)(std::int64_t n, std::size_t element);
    void (*step_f32)(const StiefelRule&, const StiefelMatrix<float>&, void* workspace);
    void (*step_f64)(const StiefelRule&, const StiefelMatrix<double>&, void* workspace);
};

}  // namespace spectral::cpu
