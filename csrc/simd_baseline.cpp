// The CPU kernels for the compiler's default target: SSE2 on x86-64, NEON on AArch64.
#include "cayley_pivoting.h"
#include "simd_level.h"

#define SPECTRAL_SIMD_LEVEL baseline
#define SPECTRAL_SIMD_BYTES 16
#define SPECTRAL_TILE 3
#include "simd_vector.h"

#include "simd_matrix.h"

#include "cayley_cpu_kernels.h"
#include "kron_cpu_kernels.h"
#include "stiefel_cpu_kernels.h"

namespace spectral::cpu {
const SimdLevel kBaseline{
    "baseline", baseline::kCayleyKernels, baseline::kKronKernels, baseline::kStiefelKernels};
}
