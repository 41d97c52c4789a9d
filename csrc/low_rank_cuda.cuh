// The algorithms of low_rank_cuda.cu, number by number; on a host in a loop
// (tests/low_rank_cuda_on_host.cpp). Everything is computed in fp32.
#pragma once

#include <cstdint>

#include "low_rank_cuda.h"
#include "tensor_core.cuh"

namespace spectral::cuda {

SPECTRAL_BOTH float widened_half(std::uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    _Float16 value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return static_cast<float>(value);
#endif
}

SPECTRAL_BOTH std::uint16_t rounded_to_half(float value) {
    std::uint16_t bits;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    const auto half = static_cast<_Float16>(value);
    __builtin_memcpy(&bits, &half, sizeof(bits));
#endif
    return bits;
}

SPECTRAL_BOTH float get(const void* data, Type type, std::int64_t index) {
    if (type == Type::kFloat) return static_cast<const float*>(data)[index];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[index];
    return type == Type::kHalf ? widened_half(bits) : widened(bits);
}

SPECTRAL_BOTH float get(const Matrix& matrix, std::int64_t i, std::int64_t j) {
    return get(matrix.data, matrix.type, i * matrix.rows + j * matrix.columns);
}

SPECTRAL_BOTH void set(void* data, Type type, std::int64_t index, float value) {
    if (type == Type::kFloat) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<std::uint16_t*>(data)[index] =
            type == Type::kHalf ? rounded_to_half(value) : rounded(value);
    }
}

SPECTRAL_BOTH std::int64_t stack_count(const StackProblem& problem) {
    return 2 * problem.r * (problem.stacks[0].n + problem.stacks[1].n);
}

// Number `index` of the first stack and, after them, of the second.
SPECTRAL_BOTH void stack_one(const StackProblem& problem, std::int64_t index) {
    const std::int64_t first = 2 * problem.r * problem.stacks[0].n;
    const bool is_second = index >= first;
    const Stack& stack = problem.stacks[is_second ? 1 : 0];
    if (is_second) index -= first;
    const std::int64_t i = index / stack.n, j = index % stack.n;
    const float value =
        i < problem.r ? get(stack.frozen, i, j) : get(stack.shift, i - problem.r, j);
    set(stack.out, problem.type, index, value);
}

// Pair number `index` of count * r.
SPECTRAL_BOTH void mix_one(const MixProblem& problem, std::int64_t index) {
    const std::int64_t row = index / problem.r, j = index % problem.r;
    const std::int64_t first = row * 2 * problem.r + j, second = first + problem.r;
    const float scale = get(problem.singular_values, 0, j) * problem.scaling;
    const float whole = get(problem.rows, problem.type, first);
    const float alone = get(problem.rows, problem.type, second);
    set(problem.rows, problem.type, first, alone * scale);
    set(problem.rows, problem.type, second, (whole + alone) * scale);
}

// Entry number `index` of r * r.
SPECTRAL_BOTH void middle_one(const MiddleProblem& problem, std::int64_t index) {
    const std::int64_t i = index / problem.r, j = index % problem.r;
    float sum = 0;
    for (int k = 0; k < problem.r; ++k) {
        const float scaled = get(problem.left, i, k) * get(problem.singular_values, 0, k);
        sum += scaled * get(problem.right, j, k);
    }
    if (i == j) sum -= get(problem.singular_values, 0, i);
    set(problem.out, problem.type, index, problem.scaling * sum);
}

// Entry number `index` of 2 * r * r: dR_U, then dR_V.
SPECTRAL_BOTH void turn_one(const TurnProblem& problem, std::int64_t index) {
    const std::int64_t size = static_cast<std::int64_t>(problem.r) * problem.r;
    const bool is_right = index >= size;
    if (is_right) index -= size;
    const std::int64_t i = index / problem.r, j = index % problem.r;
    const Matrix& other = is_right ? problem.left : problem.right;
    float sum = 0;
    for (int k = 0; k < problem.r; ++k) {
        sum += (is_right ? get(problem.grad, k, i) : get(problem.grad, i, k)) * get(other, k, j);
    }
    const float scale = problem.scaling * get(problem.singular_values, 0, j);
    (is_right ? problem.grad_right : problem.grad_left)[index] = scale * sum;
}

}  // namespace spectral::cuda
