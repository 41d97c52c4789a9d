// Kronecker-structured rotation and its gradient sums on the CPU: what the scheduler (kron_cpu.cpp)
// and the kernels (kron_cpu_kernels.h, compiled once per SIMD level) know of each other. No torch
// headers here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spectral::cpu {

// Rows [width] seen as [dims[0], ..., dims[count - 1]], the first axis outermost.
struct KronShape {
    const std::int64_t* dims;
    std::int64_t count;
    std::int64_t width;
};

// x and out [rows, width]; factors[i] [dims[i], dims[i]], row-major; the scales [width] or null.
template <typename T>
struct RotateArguments {
    const T* x;
    T* out;
    std::int64_t rows;
    const T* const* factors;
    bool transpose;
    const T* scale_before;
    const T* scale_after;
};

// a and b [rows, width] (a is not looked at by rotate_gram), scale_b [width] or null. Out, not
// added to: grams[i] [dims[i], dims[i]] and column_sums [width].
template <typename T>
struct GramArguments {
    const T* a;
    const T* b;
    std::int64_t rows;
    const T* scale_b;
    T* const* grams;
    T* column_sums;
};

// One SIMD level's kernels, each for one thread. `workspace` is 64-byte aligned and holds
// rotate_bytes or gram_bytes of the shape and the element's size, or their sum for rotate_gram,
// whose `a` is the rotated rows before scale_after. The rows may be rotated in place.
struct KronKernels {
    std::size_t (*rotate_bytes)(const KronShape& shape, std::size_t element);
    std::size_t (*gram_bytes)(const KronShape& shape, std::size_t element);
    void (*rotate_f32)(const KronShape&, const RotateArguments<float>&, void* workspace);
    void (*rotate_f64)(const KronShape&, const RotateArguments<double>&, void* workspace);
    void (*gram_f32)(const KronShape&, const GramArguments<float>&, void* workspace);
    void (*gram_f64)(const KronShape&, const GramArguments<double>&, void* workspace);
    void (*rotate_gram_f32)(
        const KronShape&, const RotateArguments<float>&, const GramArguments<float>&,
        void* workspace);
    void (*rotate_gram_f64)(
        const KronShape&, const RotateArguments<double>&, const GramArguments<double>&,
        void* workspace);
};

}  // namespace spectral::cpu
