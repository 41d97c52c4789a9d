// What lies between the products of Spectral Adapters A and R, on CUDA: plain launchers without
// headers of torch or CUDA. Each is one small kernel where ATen needs two to five.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace spectral::cuda {

enum class Type : std::int32_t { kFloat, kHalf, kBFloat16 };

// A matrix to read: entry (i, j) is number i * rows + j * columns.
struct Matrix {
    const void* data;
    std::int64_t rows;
    std::int64_t columns;
    Type type;
};

// `frozen` [r, n] above `shift` [r, n].
struct Stack {
    Matrix frozen;
    Matrix shift;
    void* out;  // [2r, n]
    std::int64_t n;
};

// Both stacks of an adapter in one launch.
struct StackProblem {
    Stack stacks[2];
    std::int32_t r;
    Type type;  // of what is written
};

// Every row [w, a] of 2r numbers becomes [a * s, (w + a) * s] with s = singular_values * scaling.
struct MixProblem {
    void* rows;              // [count, 2r], in place
    Matrix singular_values;  // entry (0, j)
    std::int64_t count;
    float scaling;
    std::int32_t r;
    Type type;  // of the rows
};

// The largest rotation that one thread's loop sums an entry of.
inline constexpr int kMaxRotation = 128;

// scaling * (R_U S1 R_V^T - S1); exactly zero for identities.
struct MiddleProblem {
    Matrix left;             // R_U [r, r]
    Matrix right;            // R_V [r, r]
    Matrix singular_values;  // entry (0, j)
    void* out;               // [r, r]
    float scaling;
    std::int32_t r;
    Type type;  // of what is written
};

// dR_U = scaling * dN R_V S1 and dR_V = scaling * dN^T R_U S1, from dN = d(middle) / scaling.
struct TurnProblem {
    Matrix grad;             // dN [r, r]
    Matrix left;             // R_U [r, r]
    Matrix right;            // R_V [r, r]
    Matrix singular_values;  // entry (0, j)
    float* grad_left;        // [r, r]
    float* grad_right;       // [r, r]
    float scaling;
    std::int32_t r;
};

// One kernel each on `stream`; they return a cudaError_t without waiting.
int launch_stack(const StackProblem& problem, CUstream_st* stream);
int launch_mix(const MixProblem& problem, CUstream_st* stream);
int launch_middle(const MiddleProblem& problem, CUstream_st* stream);
int launch_turn(const TurnProblem& problem, CUstream_st* stream);

}  // namespace spectral::cuda
