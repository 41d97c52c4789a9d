// Which SIMD level the CPU kernels run at: the widest this processor and its system support.
#pragma once

#include <string>
#include <vector>

#include "cayley_cpu.h"

namespace spectral::cpu {

// The level in use; chosen at load.
const CayleyKernels& active_kernels();

// Names of the levels that can run here, widest first.
std::vector<std::string> available_levels();

// Switches to a level by name, for tests of the narrower ones; throws std::invalid_argument for a
// name that is not in available_levels().
void set_level(const std::string& name);

}  // namespace spectral::cpu
