// spectral::rotated_linear_fwd and _bwd, soda_linear_fwd and _bwd on the CPU: the tokens' gradients
// are rotated and their sums taken in one pass.
#include "rotated_linear.h"

#include <torch/library.h>

#include "kron_cpu_ops.h"

namespace spectral::cpu {
namespace {

struct Kron : PlainKron {
    static constexpr auto rotate = &kron_rotate;
    static constexpr auto gram = &kron_gram;
    static constexpr auto rotate_gram_ = &kron_rotate_gram_;

    static constexpr bool kSumsShareMemory = true;
    static bool is_fused(at::ScalarType type) { return type == at::kFloat || type == at::kDouble; }
};

using Layers = RotatedLinear<Kron>;

}  // namespace
}  // namespace spectral::cpu

TORCH_LIBRARY_IMPL(spectral, CPU, m) {
    m.impl("rotated_linear_fwd", &spectral::cpu::Layers::rotated_linear_fwd);
    m.impl("rotated_linear_bwd", &spectral::cpu::Layers::rotated_linear_bwd);
    m.impl("soda_linear_fwd", &spectral::cpu::Layers::soda_linear_fwd);
    m.impl("soda_linear_bwd", &spectral::cpu::Layers::soda_linear_bwd);
}
