// The CPU kernels for AVX-512 (F, DQ, VL, BW). Only this file's functions are compiled for it.
#include "cayley_pivoting.h"
#include "simd_level.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#define SPECTRAL_SIMD_LEVEL avx512
#define SPECTRAL_SIMD_BYTES 64
#define SPECTRAL_TILE 4
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
const SimdLevel kAvx512{
    "avx512", avx512::kCayleyKernels, avx512::kKronKernels, avx512::kStiefelKernels};
}
#endif
