// The CPU kernels, once per SIMD level, and which level they run at: the widest that this processor
// and its system support.
#pragma once

#include <string>
#include <vector>

#include "cayley_cpu.h"
#include "kron_cpu.h"
#include "stiefel_cpu.h"

namespace spectral::cpu {

// All kernels compiled for one level (simd_{baseline,avx2,avx512}.cpp).
struct SimdLevel {
    const char* name;
    CayleyKernels cayley;
    KronKernels kron;
    StiefelKernels stiefel;
};

extern const SimdLevel kBaseline;
#if defined(__x86_64__)
extern const SimdLevel kAvx2;
extern const SimdLevel kAvx512;
#endif

// The level in use; chosen at load.
const SimdLevel& active_level();

// Names of the levels that can run here, widest first.
std::vector<std::string> available_levels();

// Switches to a level by name, for tests of the narrower ones; throws std::invalid_argument for a
// name that is not in available_levels().
void set_level(const std::string& name);

}  // namespace spectral::cpu
