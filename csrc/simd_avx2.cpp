// The CPU kernels for AVX2 with FMA. Only this file's functions are compiled for it.
#include "cayley_pivoting.h"
#include "simd_level.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define SPECTRAL_SIMD_LEVEL avx2
#define SPECTRAL_SIMD_BYTES 32
#define SPECTRAL_TILE 3
#include "simd_vector.h"

#include "simd_matrix.h"

#include "cayley_cpu_kernels.h"
#include "kron_cpu_kernels.h"
#include "stiefel_cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace spectral::cpu {
const SimdLevel kAvx2{"avx2", avx2::kCayleyKernels, avx2::kKronKernels, avx2::kStiefelKernels};
}
#endif
