// kron_rotate on CUDA's tensor cores: a plain launcher without headers of torch or CUDA.
#pragma once

#include <cstdint>

#include "kron_tiles.h"

struct CUstream_st;

namespace spectral::cuda {

struct RotateProblem {
    const void* x;        // [rows, n1 * n2] bf16, 16-byte aligned
    void* y;              // likewise
    const float* first;   // R1 [n1, n1]
    const float* second;  // R2 [n2, n2]
    const float* before;  // [n1 * n2], or null for ones
    const float* after;   // likewise
    std::int64_t rows;
    std::int32_t n1;
    std::int32_t n2;
    std::int32_t transpose;
    std::int32_t blocks;
};

// What the launches depend on.
struct DeviceFacts {
    int multiprocessors;
    int major;  // of the compute capability
};
DeviceFacts device_facts(int device);

// One kernel on `stream`; returns a cudaError_t without waiting.
int launch_rotate(const RotateProblem& problem, CUstream_st* stream);

}  // namespace spectral::cuda
