// When elimination of I - Q needs pivoting after all, on both devices.
#pragma once

namespace spectral {

// I - Q has symmetric part I, so without pivoting no pivot is below 1, but entries grow to the
// order of |Q|^2 on the way and cancel later: measured in float64, max |R^T R - I| reaches 1e-13 at
// a spectral norm of 32, 5e-8 at 1000 and 1e-4 at 10^4. Rows are exchanged above these bounds, by
// storage type; ordinary rotations stay far below (1000 is an angle of 179.9 degrees). The test is
// on |Q|_F / sqrt(2), which is at least the spectral norm of a skew matrix.
template <typename T>
inline constexpr double kPivotAbove = sizeof(T) == 4 ? 1000.0 : 32.0;

}  // namespace spectral
