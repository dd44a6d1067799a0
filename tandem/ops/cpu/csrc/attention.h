// What attention's forward and backward share: packing rows for matrix products, the products, exponentials.
//
// All products run on "units" of 4 bytes: one float32, or a pair of neighbouring bfloat16 along the summed dimension.
//   rows:   [M][K units], as rows lie in memory; the left operand
//   panels: [N / W][K units][W], W = Vec::width columns side by side; the right operand
// A row of a product is computed the same way whatever other rows there are: every element sums over K in order.
#pragma once

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "vector.h"

namespace tandem {
namespace attention {

constexpr int64_t W = Vec::width;
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
// Stands for the largest score of a row that sees nothing.
constexpr float LOWEST = -1e30f;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What the products compute in. `units(d)` is how many units hold d elements along the summed dimension, padded to
// what a product takes at once.
struct Float {
    static constexpr int64_t pack = 1;
    static constexpr int64_t multiple = 16;
    static TANDEM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if defined(TANDEM_AVX512)
struct Pairs {
    static constexpr int64_t pack = 2;
    static constexpr int64_t multiple = 32;
    static TANDEM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
};
template <class Source>
using UnitOf = std::conditional_t<sizeof(Source) == 2, Pairs, Float>;
#else
template <class Source>
using UnitOf = Float;
#endif

template <class Unit>
constexpr int64_t units(int64_t d) {
    return (d + Unit::multiple - 1) / Unit::multiple * Unit::multiple / Unit::pack;
}

// ------------------------------------------------------------ exponentials

// 2^x; 0 where x is below -125, NaN at NaN. Relative error 2e-7 for Float, 3e-6 for pairs of bfloat16.
template <class Unit>
TANDEM_INLINE Vec exp2(Vec x) {
    // A result below the smallest normal number would cost some hundred cycles.
    const Vec least = set(-125.0f);
    const Mask vanishes = less(x, least);
    x = max(least, x);  // the second operand where one is NaN
    const Vec n = round(x), f = x - n;
    Vec p;
    if constexpr (Unit::pack == 2) {
        p = fma(set(0.009582853144f), f, set(0.05590642673f));
        p = fma(p, f, set(0.2402409862f));
        p = fma(p, f, set(0.6931241932f));
    } else {
        p = fma(set(0.0001535336203f), f, set(0.001339887465f));
        p = fma(p, f, set(0.009618437359f));
        p = fma(p, f, set(0.05550332471f));
        p = fma(p, f, set(0.2402264791f));
        p = fma(p, f, set(0.6931472029f));
    }
    return select(vanishes, zero(), scale_by_power(fma(p, f, set(1.0f)), n));
}

// ------------------------------------------------------------ rows and panels

// `n` units of a row of d elements from unit `at` on, as W lanes; elements beyond d are 0.
template <class Unit>
TANDEM_INLINE Vec load_units(const float* row, int64_t at, int64_t d) {
    const int64_t left = d - at;
    return left >= W ? load(row + at) : left > 0 ? load(row + at, left) : zero();
}

template <class Unit>
TANDEM_INLINE Vec load_units(const bf16* row, int64_t at, int64_t d) {
    const int64_t left = d - at * Unit::pack;
#if defined(TANDEM_AVX512)
    if constexpr (Unit::pack == 2) {
        if (left >= 2 * W) return {_mm512_castsi512_ps(_mm512_loadu_si512(row + 2 * at))};
        if (left <= 0) return zero();
        return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << left) - 1u, row + 2 * at))};
    }
#endif
    return left >= W ? load(row + at) : left > 0 ? load(row + at, left) : zero();
}

// Rows for a left operand: [count][width units].
template <class Unit, class Source>
void pack_rows(const Source* const* rows, int64_t count, int64_t d, float* out, int64_t width) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t u = 0; u < width; u += W) store(out + i * width + u, load_units<Unit>(rows[i], u, d));
    }
}

#if defined(TANDEM_AVX512)
TANDEM_INLINE void transpose(Vec* rows) {
    __m512 t[16], s[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            s[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            s[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_shuffle_f32x4(s[i], s[i + 4], 0x88), b = _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0x88);
        const __m512 e = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0xdd);
        rows[i] = {_mm512_shuffle_f32x4(a, c, 0x88)};
        rows[i + 4] = {_mm512_shuffle_f32x4(b, e, 0x88)};
        rows[i + 8] = {_mm512_shuffle_f32x4(a, c, 0xdd)};
        rows[i + 12] = {_mm512_shuffle_f32x4(b, e, 0xdd)};
    }
}
#else
TANDEM_INLINE void transpose(Vec* rows) {
    __m256 t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            s[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            s[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = {_mm256_permute2f128_ps(s[i], s[i + 4], 0x20)};
        rows[i + 4] = {_mm256_permute2f128_ps(s[i], s[i + 4], 0x31)};
    }
}
#endif

// Rows as the columns of a right operand that is summed over d: [count / W][width units][W]. `count` is a multiple
// of W.
template <class Unit, class Source>
void pack_columns(const Source* const* rows, int64_t count, int64_t d, float* out, int64_t width) {
    for (int64_t i = 0; i < count; i += W, out += width * W) {
        for (int64_t u = 0; u < width; u += W) {
            Vec tile[W];
            for (int64_t j = 0; j < W; ++j) tile[j] = load_units<Unit>(rows[i + j], u, d);
            transpose(tile);
            for (int64_t j = 0; j < W; ++j) store(out + (u + j) * W, tile[j]);
        }
    }
}

#if defined(TANDEM_AVX512)
// bfloat16 of two rows as pairs.
TANDEM_INLINE Vec pair(__m256i even, __m256i odd) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), high))};
}
#endif

// Rows as those of a right operand that is summed over the rows: W columns of units `at..` in every panel
// [ceil(d / W)][stride units][W]. `count` is a multiple of Unit::pack.
template <class Unit, class Source>
void pack_summed(const Source* const* rows, int64_t count, int64_t d, float* out, int64_t at, int64_t stride) {
    const int64_t whole = d / W * W, left = d - whole;
    for (int64_t i = 0; i < count; i += Unit::pack) {
        float* unit = out + (at + i / Unit::pack) * W;
#if defined(TANDEM_AVX512)
        if constexpr (Unit::pack == 2) {
            const bf16 *even = rows[i], *odd = rows[i + 1];
            for (int64_t c = 0; c < whole; c += W, unit += stride * W) {
                store(unit, pair(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + c)),
                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + c))));
            }
            if (left) {
                store(unit, pair(_mm256_maskz_loadu_epi16(first(left), even + whole),
                                 _mm256_maskz_loadu_epi16(first(left), odd + whole)));
            }
            continue;
        }
#endif
        for (int64_t c = 0; c < whole; c += W, unit += stride * W) store(unit, load(rows[i] + c));
        if (left) store(unit, load(rows[i] + whole, left));
    }
}

// Two neighbouring vectors of a row as units of a left operand, from column `column` on.
template <class Unit>
TANDEM_INLINE void store_row(float* row, int64_t column, Vec a, Vec b) {
#if defined(TANDEM_AVX512)
    if constexpr (Unit::pack == 2) {
        _mm512_storeu_si512(row + column / 2, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
        return;
    }
#endif
    store(row + column, a), store(row + column + W, b);
}

// ------------------------------------------------------------ products

template <class Unit, int M, int N>
TANDEM_INLINE void multiply_block(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t k, bool add
) {
    Vec sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * c_stride + n * W) : zero();
    }
    for (int64_t i = 0; i < k; ++i) {
        Vec columns[N];
        for (int n = 0; n < N; ++n) columns[n] = load(b + n * b_stride + i * W);
        for (int m = 0; m < M; ++m) {
            const Vec left = set(a[m * a_stride + i]);
            for (int n = 0; n < N; ++n) sums[m][n] = Unit::multiply_add(left, columns[n], sums[m][n]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) store(c + m * c_stride + n * W, sums[m][n]);
    }
}

template <class Unit, int M>
TANDEM_INLINE void multiply_rows(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t n,
    int64_t k, bool add
) {
#if defined(TANDEM_AVX512)
    constexpr int wide = 4;
#else
    constexpr int wide = 2;
#endif
    int64_t j = 0;
    for (; j + wide * W <= n; j += wide * W) {
        multiply_block<Unit, M, wide>(a, a_stride, b + j / W * b_stride, b_stride, c + j, c_stride, k, add);
    }
    for (; j < n; j += W) multiply_block<Unit, M, 1>(a, a_stride, b + j / W * b_stride, b_stride, c + j, c_stride, k, add);
}

#if defined(TANDEM_AMX)

// Tiles for a thread's products of bfloat16 pairs, while this lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

template <bool two_rows, bool two_columns>
TANDEM_INLINE void multiply_tiles(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t k, bool add
) {
    if (add) {
        _tile_loadd(0, c, c_stride * 4);
        if (two_columns) _tile_loadd(1, c + 16, c_stride * 4);
        if (two_rows) _tile_loadd(2, c + 16 * c_stride, c_stride * 4);
        if (two_rows && two_columns) _tile_loadd(3, c + 16 * c_stride + 16, c_stride * 4);
    } else {
        _tile_zero(0);
        if (two_columns) _tile_zero(1);
        if (two_rows) _tile_zero(2);
        if (two_rows && two_columns) _tile_zero(3);
    }
    for (int64_t i = 0; i < k; i += 16) {
        _tile_loadd(6, b + i * 16, 64);
        _tile_loadd(4, a + i, a_stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
            _tile_loadd(7, b + b_stride + i * 16, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
            _tile_loadd(5, a + 16 * a_stride + i, a_stride * 4);
            _tile_dpbf16ps(2, 5, 6);
            if (two_columns) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    if (two_columns) _tile_stored(1, c + 16, c_stride * 4);
    if (two_rows) _tile_stored(2, c + 16 * c_stride, c_stride * 4);
    if (two_rows && two_columns) _tile_stored(3, c + 16 * c_stride + 16, c_stride * 4);
}

template <bool two_rows>
TANDEM_INLINE void multiply_tile_rows(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t n,
    int64_t k, bool add
) {
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        multiply_tiles<two_rows, true>(a, a_stride, b + j / 16 * b_stride, b_stride, c + j, c_stride, k, add);
    }
    if (j < n) multiply_tiles<two_rows, false>(a, a_stride, b + j / 16 * b_stride, b_stride, c + j, c_stride, k, add);
}

#else
struct Tiles {
    Tiles() {}
    ~Tiles() {}
};
#endif

// c[m, n] = (add ? c[m, n] : 0) + rows a x panels b, over k units. Strides in units: of a row of a, a panel of b, a row
// of c. n is a multiple of W, k as `units` gives it. Tiles work on 16 rows at once: up to 15 rows beyond m are read
// and written.
template <class Unit>
void multiply(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t m,
    int64_t n, int64_t k, bool add
) {
#if defined(TANDEM_AMX)
    if constexpr (Unit::pack == 2) {
        int64_t i = 0;
        for (; i + 16 < m; i += 32) {
            multiply_tile_rows<true>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, n, k, add);
        }
        if (i < m) {
            multiply_tile_rows<false>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, n, k, add);
        }
        return;
    }
#endif
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
        multiply_rows<Unit, 4>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, n, k, add);
    }
    for (; i < m; ++i) {
        multiply_rows<Unit, 1>(a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, n, k, add);
    }
}

// ------------------------------------------------------------ memory

TANDEM_INLINE void fetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T0);
}


// Memory of one thread, kept from call to call: touching it for the first time costs more than using it.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }

    // Room for so many floats; what was taken before is gone.
    void reserve(int64_t floats) {
        at_ = 0;
        if (floats <= size_) return;
        std::free(memory_);
        size_ = round_up(floats, 1024);
        memory_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
        if (memory_ == nullptr) std::abort();
    }

    float* take(int64_t floats) {
        float* part = memory_ + at_;
        at_ += round_up(floats, 16);
        return part;
    }

  private:
    float* memory_ = nullptr;
    int64_t size_ = 0, at_ = 0;
};

}  // namespace attention
}  // namespace tandem
