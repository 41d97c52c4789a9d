// The Stiefel kernels of one SIMD level; see simd_vector.h for how this file is included.
//
// A matrix stays in the workspace from the gradient's product to the retracted factor; only the
// moments are read and written where they are. Rows are padded to whole vectors with zeros, which
// every operation here keeps zero.

namespace spectral::cpu::SPECTRAL_SIMD_LEVEL {
namespace {

template <typename T>
constexpr T kEpsilon = T(sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);

inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }

// [n, n] to rows of `stride` elements, padded with zeros.
template <typename T>
void copy_padded(const T* in, std::int64_t n, T* out, std::int64_t stride) {
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) out[i * stride + j] = in[i * n + j];
        for (std::int64_t j = n; j < stride; ++j) out[i * stride + j] = 0;
    }
}

// Replaces A by xi, given A^T, and steps the moments.
template <typename T, bool Adam>
void direction(
    const StiefelRule& rule, const StiefelMatrix<T>& matrix, const T* transposed, T* a,
    std::int64_t stride) {
    const std::int64_t n = matrix.n;
    const T gradient = T(rule.gradient), keep = T(rule.keep), mix = T(rule.mix);
    const T keep_square = T(rule.keep_square), mix_square = T(rule.mix_square);
    const T eps = T(rule.eps), rate = T(rule.rate);
    const T unbias = T(matrix.unbias), unbias_square = T(matrix.unbias_square);
    for (std::int64_t i = 0; i < n; ++i) {
        T* __restrict const row = a + i * stride;
        const T* __restrict const column = transposed + i * stride;
        if constexpr (Adam) {
            T* __restrict const velocity = matrix.velocity + i * n;
            T* __restrict const square = matrix.square + i * n;
            for (std::int64_t j = 0; j < n; ++j) {
                const T skew = gradient * (row[j] - column[j]);
                const T moved = keep * velocity[j] - mix * skew;
                const T spread = keep_square * square[j] + mix_square * (skew * skew);
                velocity[j] = moved;
                square[j] = spread;
                row[j] = rate * ((moved / unbias) / (square_root(spread / unbias_square) + eps));
            }
        } else if (matrix.velocity != nullptr) {
            T* __restrict const velocity = matrix.velocity + i * n;
            for (std::int64_t j = 0; j < n; ++j) {
                const T moved = keep * velocity[j] - gradient * (row[j] - column[j]);
                velocity[j] = moved;
                row[j] = rate * moved;
            }
        } else {
            for (std::int64_t j = 0; j < n; ++j) row[j] = rate * (gradient * (column[j] - row[j]));
        }
    }
}

// The largest sum of magnitudes in a column, which no spectral norm exceeds in a skew matrix: its
// rows have the same sums, and those of columns need no adding up within a vector.
template <typename T>
T largest_column_sum(const T* matrix, std::int64_t n, std::int64_t stride) {
    T largest = 0;
    for (std::int64_t j = 0; j < stride; j += kLaneCount<T>) {
        Vector<T> sum{};
        for (std::int64_t i = 0; i < n; ++i) {
            const Vector<T> entry = *reinterpret_cast<const Vector<T>*>(matrix + i * stride + j);
            sum += entry < 0 ? -entry : entry;
        }
        for (int lane = 0; lane < kLaneCount<T>; ++lane) {
            largest = sum[lane] > largest ? sum[lane] : largest;
        }
    }
    return largest;
}

// The diagonal of Y^T Y, summed in double. Near the identity a column holds one entry of 1 and
// small ones whose squares an fp32 sum that has the 1 already loses, all of them: an error of up to
// n 2^-24 that the iteration would never see.
template <typename T>
void sum_diagonal(T* gram, const T* y, std::int64_t n, std::int64_t stride) {
    constexpr std::int64_t lanes = kLaneCount<T>;
    for (std::int64_t j = 0; j < n; j += lanes) {
        double sums[lanes] = {};
        for (std::int64_t k = 0; k < n; ++k) {
            for (std::int64_t lane = 0; lane < lanes; ++lane) {
                const double entry = double(y[k * stride + j + lane]);
                sums[lane] += entry * entry;
            }
        }
        for (std::int64_t lane = 0; lane < lanes && j + lane < n; ++lane) {
            gram[(j + lane) * stride + j + lane] = T(sums[lane]);
        }
    }
}

// Y <- polar(Y) for Y = X (I + xi) with the norm of xi at most `reach`, so that Y's singular values
// are in [1, sqrt(1 + reach^2)]: scaled Newton-Schulz iterations, as in the reference, where each
// scale makes both ends of the interval meet. What the reference must assume of xi beforehand is
// known here, and may need fewer iterations. Y, `gram` and `next` are [n, stride]; the result is
// where the return value points, `y` or `next`.
template <typename T>
T* polar(T* y, T* gram, T* next, std::int64_t n, std::int64_t stride, double reach) {
    double low = 1, high = __builtin_sqrt(1 + reach * reach);
    do {
        const double scale = __builtin_sqrt(3 / (low * low + low * high + high * high));
        const T linear = T(1.5 * scale), cubic = T(-0.5 * scale * scale * scale);
        product<T, false>(gram, stride, y, 1, stride, y, stride, n, n, stride);
        sum_diagonal(gram, y, n, stride);
        for (std::int64_t i = 0; i < n * stride; ++i) {
            gram[i] *= cubic;
            next[i] = linear * y[i];
        }
        product<T, true>(next, stride, y, stride, 1, gram, stride, n, n, stride);
        T* const before = y;
        y = next;
        next = before;
        low = 0.5 * scale * low * (3 - scale * low * scale * low);
        high = 1;
    } while (1 - low > double(kEpsilon<T>));
    return y;
}

template <typename T>
void stiefel_step(const StiefelRule& rule, const StiefelMatrix<T>& matrix, void* workspace) {
    const std::int64_t n = matrix.n, stride = round_up(n, kLaneCount<T>);
    T* const x = static_cast<T*>(workspace);
    T* const y = x + n * stride;
    T* const a = y + n * stride;
    copy_padded(matrix.factor, n, x, stride);
    copy_padded(matrix.grad, n, y, stride);
    product<T, false>(a, stride, x, 1, stride, y, stride, n, n, stride);
    transpose(a, stride, n, n, y, stride);
    if (matrix.square != nullptr) {
        direction<T, true>(rule, matrix, y, a, stride);
    } else {
        direction<T, false>(rule, matrix, y, a, stride);
    }
    const double norm = double(largest_column_sum(a, n, stride));
    if (norm > matrix.longest) {
        const T shorten = T(matrix.longest / norm);
        for (std::int64_t i = 0; i < n * stride; ++i) a[i] *= shorten;
    }
    for (std::int64_t i = 0; i < n * stride; ++i) y[i] = x[i];
    product<T, true>(y, stride, x, stride, 1, a, stride, n, n, stride);
    const T* const result =
        polar(y, a, x, n, stride, norm < matrix.longest ? norm : matrix.longest);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) matrix.factor[i * n + j] = result[i * stride + j];
    }
}

// X (then every second Y), G (then A^T, then Y), A (then xi and the Grams).
std::size_t stiefel_workspace_bytes(std::int64_t n, std::size_t element) {
    const std::int64_t stride = round_up(n, SPECTRAL_SIMD_BYTES / std::int64_t(element));
    return 3 * static_cast<std::size_t>(n * stride) * element;
}

}  // namespace

inline constexpr StiefelKernels kStiefelKernels{
    stiefel_workspace_bytes, stiefel_step<float>, stiefel_step<double>};

}  // namespace spectral::cpu::SPECTRAL_SIMD_LEVEL
