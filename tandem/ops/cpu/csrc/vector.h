// Vectors of float32, 16 wide with AVX512 and 8 wide with AVX2, that load and store float32 and bfloat16.
//
// One vector-length loop written with these does all instruction sets. `n` in a load or store is how many elements
// count, from 0 to Vec::width: the others are neither read nor written, and read as 0.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace tandem {

#if defined(TANDEM_AVX512)

struct Vec {
    static constexpr int64_t width = 16;
    __m512 v;
};
using Mask = __mmask16;

TANDEM_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
TANDEM_INLINE Vec zero() { return {_mm512_setzero_ps()}; }

TANDEM_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

TANDEM_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TANDEM_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
TANDEM_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
TANDEM_INLINE void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x.v); }

TANDEM_INLINE Vec widen(__m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
TANDEM_INLINE __m256i narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }

TANDEM_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TANDEM_INLINE Vec load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
TANDEM_INLINE void store(bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
TANDEM_INLINE void store(bf16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }

TANDEM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c and c - a * b, rounded once.
TANDEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TANDEM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
// Where one is NaN: the second.
TANDEM_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
TANDEM_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
TANDEM_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
TANDEM_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
TANDEM_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// False where one is NaN.
TANDEM_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
TANDEM_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
TANDEM_INLINE Mask first_lanes(int64_t n) { return first(n); }
TANDEM_INLINE Vec select(Mask where, Vec yes, Vec no) { return {_mm512_mask_blend_ps(where, no.v, yes.v)}; }
// |magnitude| with the sign of `sign`.
TANDEM_INLINE Vec copysign(Vec magnitude, Vec sign) {
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    const __m512i sign_bits = _mm512_and_si512(_mm512_castps_si512(sign.v), bit);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_andnot_si512(bit, _mm512_castps_si512(magnitude.v)), sign_bits))};
}
// x * 2^n for whole n; right also where the result is 0, subnormal or infinite.
TANDEM_INLINE Vec scale_by_power(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// The order of additions is fixed: halves, then quarters, and so on.
TANDEM_INLINE float sum(Vec x) { return _mm512_reduce_add_ps(x.v); }
TANDEM_INLINE float largest(Vec x) { return _mm512_reduce_max_ps(x.v); }

#elif defined(TANDEM_AVX2)

struct Vec {
    static constexpr int64_t width = 8;
    __m256 v;
};
struct Mask {
    __m256 m;
};

TANDEM_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
TANDEM_INLINE Vec zero() { return {_mm256_setzero_ps()}; }

TANDEM_INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TANDEM_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
TANDEM_INLINE Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
TANDEM_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
TANDEM_INLINE void store(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first(n), x.v); }

TANDEM_INLINE Vec widen(__m128i half) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
TANDEM_INLINE __m128i narrow(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
    return _mm256_castsi256_si128(packed);
}

TANDEM_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TANDEM_INLINE Vec load(const bf16* p, int64_t n) {
    bf16 padded[8] = {};
    std::memcpy(padded, p, n * sizeof(bf16));
    return load(padded);
}
TANDEM_INLINE void store(bf16* p, Vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
TANDEM_INLINE void store(bf16* p, Vec x, int64_t n) {
    bf16 padded[8];
    store(padded, x);
    std::memcpy(p, padded, n * sizeof(bf16));
}

TANDEM_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
TANDEM_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// a * b + c and c - a * b, rounded once.
TANDEM_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TANDEM_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
// Where one is NaN: the second.
TANDEM_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
TANDEM_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
TANDEM_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
TANDEM_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
TANDEM_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// False where one is NaN.
TANDEM_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
TANDEM_INLINE Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
TANDEM_INLINE Mask first_lanes(int64_t n) { return {_mm256_castsi256_ps(first(n))}; }
TANDEM_INLINE Vec select(Mask where, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, where.m)}; }
// |magnitude| with the sign of `sign`.
TANDEM_INLINE Vec copysign(Vec magnitude, Vec sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
// x * 2^n for whole n in [-252, 254]; in two halves, so that the result may be 0, subnormal or infinite.
TANDEM_INLINE Vec scale_by_power(Vec x, Vec n) {
    const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(whole, half);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}

// The order of additions is fixed: halves, then quarters, and so on.
TANDEM_INLINE float sum(Vec x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
TANDEM_INLINE float largest(Vec x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#else
#error "compile with TANDEM_AMX, TANDEM_AVX512 or TANDEM_AVX2"
#endif

// Relative error below 2e-7 where the result is normal; 0 at -inf, inf from 88.73 on, NaN at NaN.
TANDEM_INLINE Vec exp(Vec x) {
    // max and min give the second operand where one is NaN, so NaN passes.
    x = min(set(89.0f), max(set(-104.0f), x));
    const Vec n = round(x * set(1.44269504088896341f));
    // ln 2 in two parts: the first has trailing zeros, so that n times it is exact.
    const Vec r = fnma(n, set(-2.12194440e-4f), fnma(n, set(0.693359375f), x));
    Vec p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    return scale_by_power(fma(p, r * r, r) + set(1.0f), n);
}

TANDEM_INLINE Vec sigmoid(Vec x) { return set(1.0f) / (set(1.0f) + exp(zero() - x)); }

// Relative error below 4e-7.
TANDEM_INLINE Vec tanh(Vec x) {
    const Vec size = abs(x), square = x * x;
    Vec p = set(-5.70498872745e-3f);
    p = fma(p, square, set(2.06390887954e-2f));
    p = fma(p, square, set(-5.37397155531e-2f));
    p = fma(p, square, set(1.33314422036e-1f));
    p = fma(p, square, set(-3.33332819422e-1f));
    const Vec small = fma(p * square, x, x);
    const Vec far = set(1.0f) - set(2.0f) / (exp(size + size) + set(1.0f));
    return select(less(size, set(0.625f)), small, copysign(far, x));
}

// How many lanes of a vector count: all, or the first n.
struct Whole {};
struct Part {
    int64_t n;
};

template <class T>
TANDEM_INLINE Vec load(const T* p, Whole) {
    return load(p);
}
template <class T>
TANDEM_INLINE Vec load(const T* p, Part part) {
    return load(p, part.n);
}
template <class T>
TANDEM_INLINE void store(T* p, Vec x, Whole) {
    store(p, x);
}
template <class T>
TANDEM_INLINE void store(T* p, Vec x, Part part) {
    store(p, x, part.n);
}

// body(i, lanes) for vectors that start at i and together are [0, n).
template <class Body>
TANDEM_INLINE void for_vectors(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) body(i, Whole{});
    if (i < n) body(i, Part{n - i});
}

// Sum of the vectors term(i, lanes), whose lanes that do not count must be 0. The order of additions is set by n alone.
template <class Term>
TANDEM_INLINE float sum_vectors(int64_t n, const Term& term) {
    Vec a = zero(), b = zero(), c = zero(), d = zero();
    int64_t i = 0;
    for (; i + 4 * Vec::width <= n; i += 4 * Vec::width) {
        a = a + term(i, Whole{});
        b = b + term(i + Vec::width, Whole{});
        c = c + term(i + 2 * Vec::width, Whole{});
        d = d + term(i + 3 * Vec::width, Whole{});
    }
    for (; i + Vec::width <= n; i += Vec::width) a = a + term(i, Whole{});
    if (i < n) b = b + term(i, Part{n - i});
    return sum((a + b) + (c + d));
}

}  // namespace tandem
