// The Cayley kernels for the compiler's default target: SSE2 on x86-64, NEON on AArch64.
#include "cayley_cpu.h"
#include "cayley_pivoting.h"

#define SPECTRAL_SIMD_LEVEL baseline
#define SPECTRAL_SIMD_BYTES 16
#define SPECTRAL_TILE 3
#include "cayley_cpu_kernels.h"

namespace spectral::cpu {
const CayleyKernels kBaselineKernels = baseline::kKernels;
}
