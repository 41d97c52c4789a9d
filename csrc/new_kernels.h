// The newest CUDA kernels of the layers. They can be turned off, to compare and to test what runs
// instead; a kernel that no GPU has run belongs behind a switch that is off.
#pragma once

#include <atomic>
#include <cstdint>

#include "kron_tiles.h"

namespace spectral {

inline std::atomic<bool> new_kernels_are_on{true};

// Rows of more than 32 x 48 on tensor cores. No GPU has run these yet.
inline std::atomic<bool> wide_tiles_are_on{false};

// Whether layers give bf16 rows of two factors to the tensor-core kernels.
inline bool layers_use_tile(std::int64_t n1, std::int64_t n2) {
    return new_kernels_are_on && cuda::fits_a_tile(n1, n2) &&
           (wide_tiles_are_on || cuda::is_narrow(n1, n2));
}

}  // namespace spectral
