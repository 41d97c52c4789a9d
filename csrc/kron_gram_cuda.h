// The sums of kron_gram on CUDA's tensor cores: a plain launcher without headers of torch or CUDA.
#pragma once

#include <cstdint>

#include "kron_tiles.h"

struct CUstream_st;

namespace spectral::cuda {

// Numbers in one block's share of the sums: the transposes of both Grams and the column sums.
constexpr std::int64_t gram_length(std::int64_t n1, std::int64_t n2) {
    return n1 * n1 + n2 * n2 + n1 * n2;
}

struct GramProblem {
    const void* a;        // [rows, n1 * n2] bf16, 16-byte aligned
    const void* b;        // likewise
    const float* scale;   // [n1 * n2], or null for ones; multiplies b in the Grams
    void* scaled;         // [rows, n1 * n2] bf16 for a * scale, which may be a; or null
    float* partial;       // [blocks, gram_length]
    const float* first;   // R1 [n1, n1], or null
    const float* second;  // R2 [n2, n2], or null
    float* gram_first;    // [n1, n1]: gram_1, or with R1 the product R1 gram_1
    float* gram_second;   // [n2, n2]: likewise
    float* columns;       // [n1 * n2]: column sums of a * b
    std::int64_t rows;
    std::int32_t n1;
    std::int32_t n2;
    std::int32_t blocks;
    std::int32_t transpose;  // gram^T R instead of R gram
};

// Two kernels on `stream`; returns a cudaError_t without waiting. The same bits every time.
int launch_gram(const GramProblem& problem, CUstream_st* stream);

}  // namespace spectral::cuda
