// Runs the algorithms of csrc/low_rank_cuda.cuh on the host, number after number, for machines
// without a GPU.
#include "../csrc/low_rank_cuda.cuh"

#include <cstdint>

using namespace spectral::cuda;

namespace {

Matrix matrix(const void* data, std::int64_t rows, std::int64_t columns, std::int32_t type) {
    return {data, rows, columns, static_cast<Type>(type)};
}

}  // namespace

extern "C" {

// left [out, r] and shifts [n, r] in type `from`, right [r, in]; all contiguous.
void run_stack(
    const void* right, const void* shift_right, void* down, const void* left,
    const void* shift_left, void* up, std::int64_t in, std::int64_t out, std::int32_t r,
    std::int32_t from, std::int32_t shift, std::int32_t to) {
    const StackProblem problem{
        {{matrix(right, in, 1, from), matrix(shift_right, 1, r, shift), down, in},
         {matrix(left, 1, r, from), matrix(shift_left, 1, r, shift), up, out}},
        r,
        static_cast<Type>(to)};
    for (std::int64_t i = 0; i < stack_count(problem); ++i) stack_one(problem, i);
}

void run_mix(
    void* rows, const void* values, std::int64_t count, float scaling, std::int32_t r,
    std::int32_t type) {
    const MixProblem problem{rows, matrix(values, 0, 1, 0), count, scaling,
                             r,    static_cast<Type>(type)};
    for (std::int64_t i = 0; i < count * r; ++i) mix_one(problem, i);
}

void run_middle(
    const float* left, const float* right, const float* values, void* out, float scaling,
    std::int32_t r, std::int32_t type) {
    const MiddleProblem problem{
        matrix(left, r, 1, 0),  matrix(right, r, 1, 0), matrix(values, 0, 1, 0), out, scaling, r,
        static_cast<Type>(type)};
    for (std::int64_t i = 0; i < r * r; ++i) middle_one(problem, i);
}

void run_turn(
    const float* grad, const float* left, const float* right, const float* values, float* grad_left,
    float* grad_right, float scaling, std::int32_t r) {
    const TurnProblem problem{
        matrix(grad, r, 1, 0),
        matrix(left, r, 1, 0),
        matrix(right, r, 1, 0),
        matrix(values, 0, 1, 0),
        grad_left,
        grad_right,
        scaling,
        r};
    for (std::int64_t i = 0; i < 2 * r * r; ++i) turn_one(problem, i);
}
}
