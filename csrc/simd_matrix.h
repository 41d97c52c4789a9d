// Products and transposition of small matrices at one SIMD level, for the kernels; see
// simd_vector.h for how this file is included.

namespace spectral::cpu::SPECTRAL_SIMD_LEVEL {
namespace {

// Elements of a buffer of the workspace: what is asked for, and a vector of overhang.
template <typename T>
constexpr std::int64_t with_overhang(std::int64_t elements) {
    return round_up(elements, kLaneCount<T>) + kLaneCount<T>;
}

// c[i, j] (+)= sum over k of a[i * a_row + k * a_depth] b[k * b_stride + j] for Rows x Columns
// vectors.
template <typename T, bool Accumulate, int Rows, int Columns>
inline void product_tile(
    T* c, std::int64_t c_stride, const T* a, std::int64_t a_row, std::int64_t a_depth, const T* b,
    std::int64_t b_stride, std::int64_t depth) {
    using Unaligned = typename VectorOf<T>::unaligned;
    Vector<T> sum[Rows][Columns];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
            T* const place = c + i * c_stride + j * kLaneCount<T>;
            sum[i][j] = Accumulate ? Vector<T>(*reinterpret_cast<Unaligned*>(place)) : Vector<T>{};
        }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vector<T> right[Columns];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
            right[j] = *reinterpret_cast<const Unaligned*>(b + k * b_stride + j * kLaneCount<T>);
        }
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
            const T left = a[i * a_row + k * a_depth];
#pragma GCC unroll 4
            for (int j = 0; j < Columns; ++j) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) {
            *reinterpret_cast<Unaligned*>(c + i * c_stride + j * kLaneCount<T>) = sum[i][j];
        }
    }
}

// One stretch of Columns vectors for all rows of c.
template <typename T, bool Accumulate, int Columns>
inline void product_stretch(
    T* c, std::int64_t c_stride, const T* a, std::int64_t a_row, std::int64_t a_depth, const T* b,
    std::int64_t b_stride, std::int64_t depth, std::int64_t rows) {
    const auto run = [&](auto tile, std::int64_t i) {
        tile(c + i * c_stride, c_stride, a + i * a_row, a_row, a_depth, b, b_stride, depth);
    };
    std::int64_t i = 0;
    for (; i + 4 <= rows; i += 4) run(product_tile<T, Accumulate, 4, Columns>, i);
    switch (rows - i) {
        case 3:
            run(product_tile<T, Accumulate, 3, Columns>, i);
            break;
        case 2:
            run(product_tile<T, Accumulate, 2, Columns>, i);
            break;
        case 1:
            run(product_tile<T, Accumulate, 1, Columns>, i);
            break;
        default:
            break;
    }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], all with strides. Columns that are no
// whole number of vectors: with Accumulate c must have room for it in every row (and its padding
// is garbage); without, the last vector is moved back over columns that are done, or, of a single
// stretch, reaches over into the next row.
template <typename T, bool Accumulate>
void product(
    T* c, std::int64_t c_stride, const T* a, std::int64_t a_row, std::int64_t a_depth, const T* b,
    std::int64_t b_stride, std::int64_t depth, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t lanes = kLaneCount<T>;
    static_assert(SPECTRAL_TILE == 3 || SPECTRAL_TILE == 4);
    const std::int64_t vectors = (columns + lanes - 1) / lanes;
    for (std::int64_t done = 0; done < vectors;) {
        const std::int64_t left = vectors - done;
        // Split the last stretch evenly: one vector alone cannot hide the latency of its sums.
        const std::int64_t take = left >= 2 * SPECTRAL_TILE || left == SPECTRAL_TILE
                                      ? SPECTRAL_TILE
                                      : (left > SPECTRAL_TILE ? (left + 1) / 2 : left);
        std::int64_t j = done * lanes;
        if (!Accumulate && take == left && columns >= take * lanes) j = columns - take * lanes;
        const auto run = [&](auto stretch) {
            stretch(c + j, c_stride, a, a_row, a_depth, b + j, b_stride, depth, rows);
        };
        switch (take) {
            case 1:
                run(product_stretch<T, Accumulate, 1>);
                break;
            case 2:
                run(product_stretch<T, Accumulate, 2>);
                break;
            case 3:
                run(product_stretch<T, Accumulate, 3>);
                break;
            default:
                run(product_stretch<T, Accumulate, SPECTRAL_TILE>);
                break;
        }
        done += take;
    }
}

#if defined(__GNUC__) && !defined(__clang__)
template <int Bytes>
struct LaneIndex;
template <>
struct LaneIndex<4> {
    typedef std::int32_t type __attribute__((vector_size(SPECTRAL_SIMD_BYTES)));
};
template <>
struct LaneIndex<8> {
    typedef std::int64_t type __attribute__((vector_size(SPECTRAL_SIMD_BYTES)));
};

// Exchanges the off-diagonal Distance x Distance blocks of a square of vectors, then those inside.
template <typename T, int Distance>
inline void transpose_square(Vector<T>* rows) {
    if constexpr (Distance > 0) {
        constexpr int lanes = static_cast<int>(kLaneCount<T>);
        typename LaneIndex<sizeof(T)>::type low, high;
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) {
            low[lane] = lane & Distance ? lanes + lane - Distance : lane;
            high[lane] = lane & Distance ? lanes + lane : lane + Distance;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & Distance) continue;
            const Vector<T> upper = rows[i], lower = rows[i + Distance];
            rows[i] = __builtin_shuffle(upper, lower, low);
            rows[i + Distance] = __builtin_shuffle(upper, lower, high);
        }
        transpose_square<T, Distance / 2>(rows);
    }
}
#endif

// out[j * out_stride + i] = in[i * in_stride + j] for [rows, columns].
template <typename T>
void transpose(
    const T* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns, T* out,
    std::int64_t out_stride) {
    constexpr std::int64_t lanes = kLaneCount<T>;
#if defined(__GNUC__) && !defined(__clang__)
    if (rows >= lanes && columns >= lanes) {
        using Unaligned = typename VectorOf<T>::unaligned;
        // The last square of a row or column is moved back over what is done.
        for (std::int64_t i = 0; i < rows; i += lanes) {
            const std::int64_t row = i + lanes <= rows ? i : rows - lanes;
            for (std::int64_t j = 0; j < columns; j += lanes) {
                const std::int64_t column = j + lanes <= columns ? j : columns - lanes;
                Vector<T> square[lanes];
#pragma GCC unroll 16
                for (int k = 0; k < lanes; ++k) {
                    square[k] =
                        *reinterpret_cast<const Unaligned*>(in + (row + k) * in_stride + column);
                }
                transpose_square<T, lanes / 2>(square);
#pragma GCC unroll 16
                for (int k = 0; k < lanes; ++k) {
                    *reinterpret_cast<Unaligned*>(out + (column + k) * out_stride + row) =
                        square[k];
                }
            }
        }
        return;
    }
#endif
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
    }
}

}  // namespace
}  // namespace spectral::cpu::SPECTRAL_SIMD_LEVEL
