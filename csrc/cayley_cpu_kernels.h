// The Cayley kernels of one SIMD level; see simd_vector.h for how this file is included.
//
// Forward. A = I - Q has symmetric part I, so every pivot of elimination without pivoting is >= 1.
// A is inverted in place by blocked Gauss-Jordan; then R = 2 A^-1 - I. It is computed in float64
// for float32 too: elimination in float32 loses orthogonality as |Q| grows, and the two products of
// a Newton-Schulz polish, 3 n^3, cost more than the doubled width of the elimination, 2 n^3. Very
// large Q take a slower path with pivoting, see cayley_pivoting.h.
//
// Backward. G = R^T dR gives dQ = 1/2 (I+R) R^T dR (I+R)^T = 1/2 (I+R)^T dR (I+R)^T because R is
// orthogonal: with Z = I + R and S = dR^T Z, dQ^T = 1/2 Z S. Two products, neither transposes
// memory.
//
// Both are written once for two layouts of "a matrix of elements":
//   Wide   one matrix; elements are scalars, a row is cut into vectors
//   Lanes  as many small matrices as a vector has lanes; an element is a vector, one lane a matrix

namespace spectral::cpu::SPECTRAL_SIMD_LEVEL {
namespace {

template <typename T>
struct Wide {
    using Element = T;
    using Vec = Vector<T>;
    static constexpr std::int64_t kWidth = kLaneCount<T>;
    // Pivot block: a whole vector of columns, and at least the four rows of a tile.
    static constexpr std::int64_t kBlock = kWidth < 4 ? 4 : kWidth;
    static Element get(const Vec* row, std::int64_t column) {
        return row[column / kWidth][column % kWidth];
    }
    static void set(Vec* row, std::int64_t column, T value) {
        row[column / kWidth][column % kWidth] = value;
    }
};

template <typename T>
struct Lanes {
    using Element = Vector<T>;
    using Vec = Vector<T>;
    static constexpr std::int64_t kWidth = 1;
    static constexpr std::int64_t kBlock = 4;
    static Element get(const Vec* row, std::int64_t column) { return row[column]; }
    static void set(Vec* row, std::int64_t column, T value) { row[column] = value - Vec{}; }
};

// c[4, Columns] (+)= a[4, depth] b[depth, Columns]: Columns and the strides of b and c count
// vectors, those of a elements.
template <typename Layout, int Columns>
inline void multiply_tile(
    typename Layout::Vec* c, std::int64_t c_stride, const typename Layout::Element* a,
    std::int64_t a_row, std::int64_t a_depth, const typename Layout::Vec* b, std::int64_t b_stride,
    std::int64_t depth, bool accumulate) {
    using Vec = typename Layout::Vec;
    Vec sum[kTileRows][Columns];
    for (int i = 0; i < kTileRows; ++i) {
        for (int j = 0; j < Columns; ++j) sum[i][j] = accumulate ? c[i * c_stride + j] : Vec{};
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec right[Columns];
        for (int j = 0; j < Columns; ++j) right[j] = b[k * b_stride + j];
        for (int i = 0; i < kTileRows; ++i) {
            const typename Layout::Element left = a[i * a_row + k * a_depth];
            for (int j = 0; j < Columns; ++j) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < kTileRows; ++i) {
        for (int j = 0; j < Columns; ++j) c[i * c_stride + j] = sum[i][j];
    }
}

// The same for four whole rows of `columns` vectors.
template <typename Layout>
void multiply_rows(
    typename Layout::Vec* c, std::int64_t c_stride, const typename Layout::Element* a,
    std::int64_t a_row, std::int64_t a_depth, const typename Layout::Vec* b, std::int64_t b_stride,
    std::int64_t depth, std::int64_t columns, bool accumulate) {
    static_assert(SPECTRAL_TILE == 3 || SPECTRAL_TILE == 4);
    std::int64_t j = 0;
    while (j < columns) {
        // Split the last stretch evenly: a tile of one column cannot hide the latency of its sums.
        const std::int64_t left = columns - j;
        const std::int64_t take = left >= 2 * SPECTRAL_TILE || left == SPECTRAL_TILE
                                      ? SPECTRAL_TILE
                                      : (left > SPECTRAL_TILE ? (left + 1) / 2 : left);
        switch (take) {
            case 1:
                multiply_tile<Layout, 1>(
                    c + j, c_stride, a, a_row, a_depth, b + j, b_stride, depth, accumulate);
                break;
            case 2:
                multiply_tile<Layout, 2>(
                    c + j, c_stride, a, a_row, a_depth, b + j, b_stride, depth, accumulate);
                break;
            case 3:
                multiply_tile<Layout, 3>(
                    c + j, c_stride, a, a_row, a_depth, b + j, b_stride, depth, accumulate);
                break;
            default:
                multiply_tile<Layout, SPECTRAL_TILE>(
                    c + j, c_stride, a, a_row, a_depth, b + j, b_stride, depth, accumulate);
                break;
        }
        j += take;
    }
}

// Inverts the kBlock x kBlock matrix at `a` (row stride in vectors) in registers: Gauss-Jordan, no
// pivoting. The loops must be unrolled so that every lane index is a constant.
template <typename Layout>
inline void invert_block(typename Layout::Vec* a, std::int64_t stride) {
    using Vec = typename Layout::Vec;
    constexpr int size = Layout::kBlock;
    constexpr int vectors = Layout::kBlock / Layout::kWidth;
    Vec rows[size][vectors];
    for (int i = 0; i < size; ++i) {
        for (int j = 0; j < vectors; ++j) rows[i][j] = a[i * stride + j];
    }
#pragma GCC unroll 8
    for (int k = 0; k < size; ++k) {
        const typename Layout::Element scale = 1 / Layout::get(rows[k], k);
        Layout::set(rows[k], k, 1);
        for (int j = 0; j < vectors; ++j) rows[k][j] *= scale;
#pragma GCC unroll 8
        for (int i = 0; i < size; ++i) {
            if (i == k) continue;
            const typename Layout::Element factor = Layout::get(rows[i], k);
            Layout::set(rows[i], k, 0);
            for (int j = 0; j < vectors; ++j) rows[i][j] -= factor * rows[k][j];
        }
    }
    for (int i = 0; i < size; ++i) {
        for (int j = 0; j < vectors; ++j) a[i * stride + j] = rows[i][j];
    }
}

// Inverts the padded [size, size] matrix in place. `pivot_rows` is scratch for kBlock rows. At each
// step the rows of the pivot block become D^-1 A[block, :] with D^-1 in place of D, and every other
// row, its entries f in the block's columns set to zero first, loses f times those rows.
template <typename Layout>
void invert(typename Layout::Vec* matrix, std::int64_t size, typename Layout::Vec* pivot_rows) {
    using Vec = typename Layout::Vec;
    using Element = typename Layout::Element;
    constexpr std::int64_t block = Layout::kBlock;
    constexpr std::int64_t block_vectors = block / Layout::kWidth;
    const std::int64_t columns = size / Layout::kWidth;
    for (std::int64_t start = 0; start < size; start += block) {
        Vec* const block_rows = matrix + start * columns;
        Vec* const diagonal = block_rows + start / Layout::kWidth;
        invert_block<Layout>(diagonal, columns);
        alignas(64) Element factors[block * block];
        for (int i = 0; i < block; ++i) {
            for (int j = 0; j < block; ++j) {
                factors[i * block + j] = Layout::get(diagonal + i * columns, j);
            }
            for (int j = 0; j < block_vectors; ++j) diagonal[i * columns + j] = Vec{};
            Layout::set(diagonal + i * columns, i, 1);
        }
        for (std::int64_t i = 0; i < block; i += kTileRows) {
            multiply_rows<Layout>(
                pivot_rows + i * columns, columns, factors + i * block, block, 1, block_rows,
                columns, block, columns, false);
        }
        for (std::int64_t i = 0; i < block * columns; ++i) block_rows[i] = pivot_rows[i];
        for (std::int64_t row = 0; row < size; row += kTileRows) {
            if (row == start) row += block;
            if (row >= size) break;
            Vec* const rows = matrix + row * columns;
            for (int i = 0; i < kTileRows; ++i) {
                Vec* const entries = rows + i * columns + start / Layout::kWidth;
                for (int j = 0; j < block; ++j) factors[i * block + j] = -Layout::get(entries, j);
                for (int j = 0; j < block_vectors; ++j) entries[j] = Vec{};
            }
            multiply_rows<Layout>(
                rows, columns, factors, block, 1, pivot_rows, columns, block, columns, true);
        }
    }
}

// The identity outside the leading n x n of a [size, size] matrix, so that padding inverts to
// itself.
template <typename Layout>
void pad_with_identity(typename Layout::Vec* matrix, std::int64_t n, std::int64_t size) {
    auto* const elements = reinterpret_cast<typename Layout::Element*>(matrix);
    for (std::int64_t i = 0; i < size; ++i) {
        for (std::int64_t j = i < n ? n : 0; j < size; ++j) {
            elements[i * size + j] = typename Layout::Element{};
        }
        if (i >= n) Layout::set(matrix + i * (size / Layout::kWidth), i, 1);
    }
}

// Whether |Q|_F / sqrt(2) exceeds the bound; false for NaN, which needs no accuracy.
template <typename S>
bool needs_pivoting(double squared_norm) {
    return squared_norm > 2 * kPivotAbove<S> * kPivotAbove<S>;
}

// Inverts the leading n x n of the padded [size, size] matrix in place by Gauss-Jordan with partial
// pivoting, one column at a time. `pivot_rows` is scratch for n integers.
void invert_pivoted(
    Vector<double>* matrix, std::int64_t n, std::int64_t size, std::int64_t* pivot_rows) {
    using Layout = Wide<double>;
    const std::int64_t columns = size / Layout::kWidth;
    const auto magnitude = [](double value) { return value < 0 ? -value : value; };
    for (std::int64_t k = 0; k < n; ++k) {
        std::int64_t pivot = k;
        for (std::int64_t i = k + 1; i < n; ++i) {
            if (magnitude(Layout::get(matrix + i * columns, k)) >
                magnitude(Layout::get(matrix + pivot * columns, k))) {
                pivot = i;
            }
        }
        pivot_rows[k] = pivot;
        Layout::Vec* const pivot_row = matrix + k * columns;
        for (std::int64_t j = 0; j < columns; ++j) {
            const Layout::Vec moved = matrix[pivot * columns + j];
            matrix[pivot * columns + j] = pivot_row[j];
            pivot_row[j] = moved;
        }
        const double scale = 1 / Layout::get(pivot_row, k);
        Layout::set(pivot_row, k, 1);
        for (std::int64_t j = 0; j < columns; ++j) pivot_row[j] *= scale;
        for (std::int64_t i = 0; i < n; ++i) {
            if (i == k) continue;
            Layout::Vec* const row = matrix + i * columns;
            const double factor = Layout::get(row, k);
            Layout::set(row, k, 0);
            for (std::int64_t j = 0; j < columns; ++j) row[j] -= factor * pivot_row[j];
        }
    }
    // Rows of A were exchanged, so columns of its inverse are, in the opposite order.
    for (std::int64_t i = 0; i < n; ++i) {
        Layout::Vec* const row = matrix + i * columns;
        for (std::int64_t k = n - 1; k >= 0; --k) {
            const double moved = Layout::get(row, k);
            Layout::set(row, k, Layout::get(row, pivot_rows[k]));
            Layout::set(row, pivot_rows[k], moved);
        }
    }
}

template <typename S>
void forward_wide(const S* packed, S* rotation, std::int64_t n, void* workspace) {
    using Layout = Wide<double>;
    const std::int64_t size = round_up(n, Layout::kBlock);
    auto* const matrix = static_cast<Layout::Vec*>(workspace);
    auto* const a = static_cast<double*>(workspace);
    pad_with_identity<Layout>(matrix, n, size);
    for (std::int64_t i = 0; i < n; ++i) {
        a[i * size + i] = 1;
        for (std::int64_t j = i + 1; j < n; ++j) a[i * size + j] = -0.5 * double(packed[j - i - 1]);
        for (std::int64_t j = i + 1; j < n; ++j) a[j * size + i] = -a[i * size + j];
        packed += n - i - 1;
    }
    Layout::Vec* const scratch = matrix + size * size / Layout::kWidth;
    // Four sums at once, or each addition would wait for the one before.
    Layout::Vec squares[4]{};
    for (std::int64_t i = 0; i < size * size / Layout::kWidth; i += 4) {
        for (int j = 0; j < 4; ++j) squares[j] += matrix[i + j] * matrix[i + j];
    }
    const Layout::Vec sums = squares[0] + squares[1] + squares[2] + squares[3];
    double squared_norm = -double(size);  // of Q: without the diagonal of I - Q
    for (std::int64_t lane = 0; lane < Layout::kWidth; ++lane) squared_norm += sums[lane];
    if (needs_pivoting<S>(squared_norm)) {
        invert_pivoted(matrix, n, size, reinterpret_cast<std::int64_t*>(scratch));
    } else {
        invert<Layout>(matrix, size, scratch);
    }
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) rotation[i * n + j] = S(2 * a[i * size + j]);
        rotation[i * n + i] = S(2 * a[i * size + i] - 1);
    }
}

// Loads one element of several matrices; lanes beyond `count` repeat the last matrix.
template <typename T, typename S>
inline Vector<T> gather(const S* const* sources, std::int64_t count, std::int64_t index) {
    Vector<T> value;
    for (int lane = 0; lane < kLaneCount<T>; ++lane) {
        value[lane] = T(sources[lane < count ? lane : count - 1][index]);
    }
    return value;
}

// Stores entries [0, length) of `values` to several matrices, eight entries at a time: the detour
// through a small buffer turns strided single loads into a transpose in registers.
template <typename T, typename S>
void scatter(const Vector<T>* values, S* const* targets, std::int64_t count, std::int64_t length) {
    constexpr std::int64_t chunk = 8;
    for (std::int64_t start = 0; start < length; start += chunk) {
        const std::int64_t here = length - start < chunk ? length - start : chunk;
        alignas(64) S buffer[chunk][kLaneCount<T>];
        for (int i = 0; i < here; ++i) {
            for (int lane = 0; lane < kLaneCount<T>; ++lane) {
                buffer[i][lane] = S(values[start + i][lane]);
            }
        }
        for (std::int64_t lane = 0; lane < count; ++lane) {
            S* const target = targets[lane] + start;
            for (int i = 0; i < here; ++i) target[i] = buffer[i][lane];
        }
    }
}

template <typename S>
void forward_lanes(
    const S* const* packed, S* const* rotation, std::int64_t count, std::int64_t n,
    void* workspace) {
    using Layout = Lanes<double>;
    const std::int64_t size = round_up(n, Layout::kBlock);
    auto* const a = static_cast<Layout::Vec*>(workspace);
    pad_with_identity<Layout>(a, n, size);
    Layout::Vec squares{};
    for (std::int64_t i = 0, entry = 0; i < n; ++i) {
        Layout::set(a + i * size, i, 1);
        for (std::int64_t j = i + 1; j < n; ++j, ++entry) {
            const Layout::Vec half = 0.5 * gather<double>(packed, count, entry);
            a[i * size + j] = -half;
            a[j * size + i] = half;
            squares += half * half;
        }
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
        if (!needs_pivoting<S>(2 * squares[lane])) continue;
        for (std::int64_t i = 0; i < count; ++i) {
            forward_wide<S>(packed[i], rotation[i], n, workspace);
        }
        return;
    }
    invert<Layout>(a, size, a + size * size);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) a[i * n + j] = 2 * a[i * size + j];
        a[i * n + i] -= 1;
    }
    scatter<double, S>(a, rotation, count, n * n);
}

// From Z = I + R [depth rows] and dR, both padded with zeros: E = Z (dR^T Z) = 2 dQ^T. The sum runs
// over n; `rows` and `columns` are the padded sizes. The result replaces dR.
template <typename Layout>
void backward_products(
    typename Layout::Vec* grad, const typename Layout::Vec* shifted, typename Layout::Vec* inner,
    std::int64_t n, std::int64_t rows, std::int64_t columns) {
    using Element = typename Layout::Element;
    const std::int64_t stride = columns * Layout::kWidth;
    const auto* const grad_elements = reinterpret_cast<const Element*>(grad);
    const auto* const shifted_elements = reinterpret_cast<const Element*>(shifted);
    for (std::int64_t i = 0; i < rows; i += kTileRows) {
        multiply_rows<Layout>(
            inner + i * columns, columns, grad_elements + i, 1, stride, shifted, columns, n,
            columns, false);
    }
    for (std::int64_t i = 0; i < rows; i += kTileRows) {
        multiply_rows<Layout>(
            grad + i * columns, columns, shifted_elements + i * stride, stride, 1, inner, columns,
            n, columns, false);
    }
}

template <typename T>
void backward_wide(
    const T* grad_rotation, const T* rotation, T* grad_packed, std::int64_t n, void* workspace) {
    using Layout = Wide<T>;
    const std::int64_t rows = round_up(n, kTileRows);
    const std::int64_t stride = round_up(rows, Layout::kWidth);
    T* const shifted = static_cast<T*>(workspace);
    T* const grad = shifted + rows * stride;
    T* const inner = grad + rows * stride;
    for (std::int64_t i = 0; i < 2 * rows * stride; ++i) shifted[i] = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) shifted[i * stride + j] = rotation[i * n + j];
        for (std::int64_t j = 0; j < n; ++j) grad[i * stride + j] = grad_rotation[i * n + j];
        shifted[i * stride + i] += 1;
    }
    backward_products<Layout>(
        reinterpret_cast<typename Layout::Vec*>(grad),
        reinterpret_cast<const typename Layout::Vec*>(shifted),
        reinterpret_cast<typename Layout::Vec*>(inner), n, rows, stride / Layout::kWidth);
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = i + 1; j < n; ++j) {
            *grad_packed++ = T(0.25) * (grad[j * stride + i] - grad[i * stride + j]);
        }
    }
}

template <typename T>
void backward_lanes(
    const T* const* grad_rotation, const T* const* rotation, T* const* grad_packed,
    std::int64_t count, std::int64_t n, void* workspace) {
    using Layout = Lanes<T>;
    const std::int64_t rows = round_up(n, kTileRows);
    auto* const shifted = static_cast<typename Layout::Vec*>(workspace);
    auto* const grad = shifted + rows * rows;
    auto* const inner = grad + rows * rows;
    for (std::int64_t i = 0; i < 2 * rows * rows; ++i) shifted[i] = typename Layout::Vec{};
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < n; ++j) {
            shifted[i * rows + j] = gather<T>(rotation, count, i * n + j);
            grad[i * rows + j] = gather<T>(grad_rotation, count, i * n + j);
        }
        shifted[i * rows + i] += 1;
    }
    backward_products<Layout>(grad, shifted, inner, n, rows, rows);
    std::int64_t entries = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = i + 1; j < n; ++j) {
            inner[entries++] = T(0.25) * (grad[j * rows + i] - grad[i * rows + j]);
        }
    }
    scatter<T, T>(inner, grad_packed, count, entries);
}

// A half-empty vector still beats one matrix at a time.
template <typename T>
bool worth_lanes(std::int64_t count, std::int64_t n, std::int64_t max_size) {
    return n <= max_size && 2 * count >= kLaneCount<T>;
}

template <typename S>
void forward(
    const S* const* packed, S* const* rotation, std::int64_t count, std::int64_t n,
    void* workspace) {
    for (std::int64_t i = 0; i < count;) {
        const std::int64_t left = count - i;
        const std::int64_t take = left < kLaneCount<double> ? left : kLaneCount<double>;
        if (worth_lanes<double>(take, n, kMaxLaneSizeForward)) {
            forward_lanes<S>(packed + i, rotation + i, take, n, workspace);
            i += take;
        } else {
            forward_wide<S>(packed[i], rotation[i], n, workspace);
            ++i;
        }
    }
}

template <typename T>
void backward(
    const T* const* grad_rotation, const T* const* rotation, T* const* grad_packed,
    std::int64_t count, std::int64_t n, void* workspace) {
    for (std::int64_t i = 0; i < count;) {
        const std::int64_t left = count - i;
        const std::int64_t take = left < kLaneCount<T> ? left : kLaneCount<T>;
        if (worth_lanes<T>(take, n, kMaxLaneSizeBackward)) {
            backward_lanes<T>(grad_rotation + i, rotation + i, grad_packed + i, take, n, workspace);
            i += take;
        } else {
            backward_wide<T>(grad_rotation[i], rotation[i], grad_packed[i], n, workspace);
            ++i;
        }
    }
}

// Three matrices of the widest padding (backward), or one and the pivot rows (forward).
std::size_t workspace_bytes(std::int64_t n) {
    const std::int64_t size = round_up(n, SPECTRAL_SIMD_BYTES / 4);
    const std::int64_t wide = 3 * size * size * std::int64_t{sizeof(double)};
    const std::int64_t lane_size = n <= kMaxLaneSizeForward ? round_up(n, kTileRows) : 0;
    const std::int64_t lanes = 3 * lane_size * lane_size * SPECTRAL_SIMD_BYTES;
    return static_cast<std::size_t>(wide > lanes ? wide : lanes);
}

}  // namespace

inline constexpr CayleyKernels kCayleyKernels{
    workspace_bytes, forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace spectral::cpu::SPECTRAL_SIMD_LEVEL
