// Products of small bfloat16 matrices, the innermost loop of every matrix product here.
//
// A left tile is 16 rows x 32 terms, row by row. A right tile is 32 terms x 16 columns: 16 rows of pairs of terms, so
// that one 32-bit lane holds two neighbouring terms of one column. A strip is a sequence of tiles along the terms. The
// AMX tile registers and AVX512's and AVX2's vectors read the same layout. Every element of a product adds its terms in
// the same order whatever the block it is part of: a row's result does not depend on its neighbours.
#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include <cstdlib>
#include <type_traits>

#include "common.h"

namespace tandem {

constexpr int64_t TILE_ROWS = 16, TILE_COLUMNS = 16, TILE_TERMS = 32;
constexpr int64_t TILE = 512;        // bfloat16 numbers of a left or right tile: 1 KiB
constexpr int64_t TILE_OUT = 256;    // float32 numbers of a product of two
constexpr int64_t LINE = 64;         // bytes of a cache line

TANDEM_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that is used again and again, on large pages where the system has them. One per thread that calls.
class Scratch {
public:
    ~Scratch() { release(); }
    // At least `bytes` on a cache line's start, with anything in it; what was there is lost.
    char* take(size_t bytes) {
        if (bytes > capacity_) {
            release();
            capacity_ = (bytes + HUGE - 1) / HUGE * HUGE;
            whole_ = mmap(nullptr, capacity_ + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (whole_ == MAP_FAILED) std::abort();
            const uintptr_t start = (reinterpret_cast<uintptr_t>(whole_) + HUGE - 1) / HUGE * HUGE;
            start_ = reinterpret_cast<char*>(start);
            madvise(start_, capacity_, MADV_HUGEPAGE);
        }
        return start_;
    }

private:
    static constexpr size_t HUGE = size_t{2} << 20;
    void release() {
        if (capacity_) munmap(whole_, capacity_ + HUGE);
        capacity_ = 0;
    }
    void* whole_ = nullptr;
    char* start_ = nullptr;
    size_t capacity_ = 0;
};

// The side of a product whose tiles pass by: they take no place in the first-level cache, which keeps the other side's
// for the next block. Fewer misses there leave its fill buffers to what comes from memory.
enum class Side { NONE, LEFT, RIGHT };

// Left strips and a right one whose product is added to another one's, and the next ones.
struct Terms {
    const bf16 *left = nullptr, *right = nullptr;
    int64_t left_stride = 0, steps = 0;
    const Terms* next = nullptr;
};

// Where a block's lines to be read ahead are: `lines` of them with every step.
struct Ahead {
    const char* at = nullptr;
    int64_t lines = 0;
};

#if defined(TANDEM_AMX)

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread, ready for use while it lives.
class TileRegisters {
public:
    TileRegisters() {
        static constexpr TileConfig config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};

// The compiler's own intrinsics do not tell it that they read memory.
template <int R, bool PASSING = false>
TANDEM_INLINE void tile_load(const void* p) {
    if constexpr (PASSING) {
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{64}), "i"(R) : "memory");
    } else {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{64}), "i"(R) : "memory");
    }
}
template <int R>
TANDEM_INLINE void tile_store(void* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(R) : "memory");
}
template <int R>
TANDEM_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int C, int A, int B>
TANDEM_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// body(std::integral_constant<int, i>) for i in [0, N).
template <int N, int I = 0, class Body>
TANDEM_INLINE void unrolled(const Body& body) {
    if constexpr (I < N) {
        body(std::integral_constant<int, I>{});
        unrolled<N, I + 1>(body);
    }
}

// out[i][j] (+)= left strip i x right strip j over `steps` tiles; strips are `left_stride`, `right_stride` apart. One or
// two of each: four sums and four tiles use all eight registers, and every tile loaded is used as often as can be.
template <int L, int R, Side PASSING = Side::NONE>
TANDEM_INLINE void multiply_tiles(const bf16* left, int64_t left_stride, const bf16* right, int64_t right_stride,
                                  int64_t steps, float* out, bool adds, int64_t, Ahead ahead) {
    static_assert(L <= 2 && R <= 2);
    constexpr bool lefts_pass = PASSING == Side::LEFT, rights_pass = PASSING == Side::RIGHT;
    unrolled<L * R>([&](auto i) {
        if (adds) tile_load<i>(out + i * TILE_OUT);
        else tile_zero<i>();
    });
    for (int64_t step = 0; step < steps; ++step) {
        tile_load<4, lefts_pass>(left);
        tile_load<6, rights_pass>(right);
        tile_multiply<0, 4, 6>();
        if constexpr (R == 2) {
            tile_load<7, rights_pass>(right + right_stride);
            tile_multiply<1, 4, 7>();
        }
        if constexpr (L == 2) {
            tile_load<5, lefts_pass>(left + left_stride);
            tile_multiply<R, 5, 6>();
            if constexpr (R == 2) tile_multiply<3, 5, 7>();
        }
        for (int64_t line = 0; line < ahead.lines; ++line) _mm_prefetch(ahead.at + 64 * line, _MM_HINT_T1);
        ahead.at += 64 * ahead.lines;
        left += TILE;
        right += TILE;
    }
    unrolled<L * R>([&](auto i) { tile_store<i>(out + i * TILE_OUT); });
}

// The same for right strips that come from memory, each read ahead by `far` bytes. `more[j]`: further terms of right
// strip j's products, or null.
template <int L, int R>
TANDEM_INLINE void multiply_stream(const bf16* left, int64_t left_stride, const bf16* right, int64_t right_stride,
                                   int64_t steps, float* out, int64_t, int64_t far, const Terms* const* more) {
    static_assert(L * R + R + 2 <= 8);
    unrolled<L * R>([&](auto i) { tile_zero<i>(); });
    for (int64_t step = 0; step < steps; ++step, left += TILE, right += TILE) {
        unrolled<R>([&](auto j) {
            const char* at = reinterpret_cast<const char*>(right + j * right_stride);
            for (int64_t line = 0; line < 16; ++line) _mm_prefetch(at + far + 64 * line, _MM_HINT_T1);
            tile_load<7 - j>(at);
        });
        unrolled<L>([&](auto i) {
            constexpr int taken = 7 - R - i % 2;
            tile_load<taken>(left + i * left_stride);
            unrolled<R>([&](auto j) { tile_multiply<i * R + j, taken, 7 - j>(); });
        });
    }
    unrolled<R>([&](auto j) {
        for (const Terms* part = more[j]; part; part = part->next)
            for (int64_t step = 0; step < part->steps; ++step) {
                tile_load<7>(part->right + step * TILE);
                unrolled<L>([&](auto i) {
                    tile_load<7 - R>(part->left + i * part->left_stride + step * TILE);
                    tile_multiply<i * R + j, 7 - R, 7>();
                });
            }
    });
    unrolled<L * R>([&](auto i) { tile_store<i>(out + i * TILE_OUT); });
}

#else

// Nothing to prepare.
struct TileRegisters {
    TileRegisters() {}
    ~TileRegisters() {}
};

#if defined(TANDEM_AVX512)

// Rows [row, row + ROWS) of one left tile strip by one right strip.
template <int ROWS>
TANDEM_INLINE void multiply_rows(const bf16* left, const bf16* right, int64_t steps, float* out, bool adds,
                                 Ahead& ahead) {
    __m512 sums[ROWS];
    for (int r = 0; r < ROWS; ++r) sums[r] = adds ? _mm512_loadu_ps(out + 16 * r) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step) {
        for (int pair = 0; pair < 16; ++pair) {
            const __m512bh terms = (__m512bh)_mm512_loadu_si512(right + 32 * pair);
            for (int r = 0; r < ROWS; ++r) {
                int both;
                std::memcpy(&both, left + 32 * r + 2 * pair, 4);
                sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)_mm512_set1_epi32(both), terms);
            }
        }
        for (int64_t line = 0; line < ahead.lines; ++line) _mm_prefetch(ahead.at + 64 * line, _MM_HINT_T1);
        ahead.at += 64 * ahead.lines;
        left += TILE;
        right += TILE;
    }
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + 16 * r, sums[r]);
}

#else

template <int ROWS>
TANDEM_INLINE void multiply_rows(const bf16* left, const bf16* right, int64_t steps, float* out, bool adds,
                                 Ahead& ahead) {
    static_assert(ROWS % 4 == 0 || ROWS < 4);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    constexpr int GROUP = ROWS < 4 ? ROWS : 4;  // 8 sums, 4 terms, 2 factors: all 16 registers
    for (int first = 0; first < ROWS; first += GROUP) {
        __m256 sums[GROUP][2];
        for (int r = 0; r < GROUP; ++r)
            for (int h = 0; h < 2; ++h)
                sums[r][h] = adds ? _mm256_loadu_ps(out + 16 * (first + r) + 8 * h) : _mm256_setzero_ps();
        for (int64_t step = 0; step < steps; ++step) {
            for (int pair = 0; pair < 16; ++pair) {
                const bf16* at = right + step * TILE + 32 * pair;
                for (int h = 0; h < 2; ++h) {
                    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 16 * h));
                    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(both, high));
                    for (int r = 0; r < GROUP; ++r) {
                        const bf16* factors = left + step * TILE + 32 * (first + r) + 2 * pair;
                        sums[r][h] = _mm256_fmadd_ps(_mm256_set1_ps(to_float(factors[0])), even, sums[r][h]);
                        sums[r][h] = _mm256_fmadd_ps(_mm256_set1_ps(to_float(factors[1])), odd, sums[r][h]);
                    }
                }
            }
            for (int64_t line = 0; line < ahead.lines; ++line) _mm_prefetch(ahead.at + 64 * line, _MM_HINT_T1);
            ahead.at += 64 * ahead.lines;
        }
        ahead.lines = 0;
        for (int r = 0; r < GROUP; ++r)
            for (int h = 0; h < 2; ++h) _mm256_storeu_ps(out + 16 * (first + r) + 8 * h, sums[r][h]);
    }
}

#endif

// As above. `rows` of the left strips together count; the others' results are unspecified.
template <int L, int R, Side PASSING = Side::NONE>
TANDEM_INLINE void multiply_tiles(const bf16* left, int64_t left_stride, const bf16* right, int64_t right_stride,
                                  int64_t steps, float* out, bool adds, int64_t rows, Ahead ahead) {
    for (int64_t i = 0; i < L; ++i) {
        for (int64_t j = 0; j < R; ++j) {
            const bf16* strip = left + i * left_stride;
            const bf16* columns = right + j * right_stride;
            float* at = out + (i * R + j) * TILE_OUT;
            int64_t row = 0;
            const int64_t count = std::min<int64_t>(TILE_ROWS, rows - i * TILE_ROWS);
            while (row < count) {
                const int64_t left_over = count - row;
                const bf16* from = strip + 32 * row;
                float* to = at + 16 * row;
                if (left_over > 8) multiply_rows<16>(from, columns, steps, to, adds, ahead), row += 16;
                else if (left_over > 4) multiply_rows<8>(from, columns, steps, to, adds, ahead), row += 8;
                else if (left_over > 2) multiply_rows<4>(from, columns, steps, to, adds, ahead), row += 4;
                else if (left_over > 1) multiply_rows<2>(from, columns, steps, to, adds, ahead), row += 2;
                else multiply_rows<1>(from, columns, steps, to, adds, ahead), row += 1;
                ahead.lines = 0;
            }
        }
    }
}

template <int L, int R>
TANDEM_INLINE void multiply_stream(const bf16* left, int64_t left_stride, const bf16* right, int64_t right_stride,
                                   int64_t steps, float* out, int64_t rows, int64_t far, const Terms* const* more) {
    const Ahead ahead{reinterpret_cast<const char*>(right) + far, 16};
    multiply_tiles<L, R>(left, left_stride, right, right_stride, steps, out, false, rows, ahead);
    for (int64_t j = 0; j < R; ++j)
        for (const Terms* part = more[j]; part; part = part->next)
            for (int64_t i = 0; i < L; ++i)
                multiply_tiles<1, 1>(part->left + i * part->left_stride, 0, part->right, 0, part->steps,
                                     out + (i * R + j) * TILE_OUT, true, rows - i * TILE_ROWS, {});
}

#endif

// ---------------------------------------------------------------- between layouts

// 32 numbers of a row from `p`, of which `count` exist; the others are zero.
TANDEM_INLINE void copy_terms(bf16* to, const bf16* p, int64_t count) {
    if (count >= TILE_TERMS) {
        std::memcpy(to, p, 64);
    } else {
        std::memset(to, 0, 64);
        if (count > 0) std::memcpy(to, p, 2 * static_cast<size_t>(count));
    }
}

// Transpose 16 x 16 lanes of 32 bits, whatever they hold.
inline void transpose_lanes(const void* from, void* to) {
#if defined(TANDEM_AVX512)
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(static_cast<const char*>(from) + 64 * i);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<char*>(to) + 64 * i, r[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j)
            std::memcpy(static_cast<char*>(to) + 64 * j + 4 * i, static_cast<const char*>(from) + 64 * i + 4 * j, 4);
#endif
}

// A left tile of `rows` x `terms` numbers that exist, rows `stride` apart; the rest is zero.
inline void pack_left(const bf16* from, int64_t stride, int64_t rows, int64_t terms, bf16* to) {
    for (int64_t r = 0; r < TILE_ROWS; ++r) copy_terms(to + 32 * r, from + r * stride, r < rows ? terms : 0);
}

// A right tile from a matrix whose rows are the columns of the product: 16 rows of 32 terms.
inline void pack_right(const bf16* from, int64_t stride, int64_t columns, int64_t terms, bf16* to) {
    alignas(64) bf16 rows[TILE];
    pack_left(from, stride, columns, terms, rows);
    transpose_lanes(rows, to);
}

// A right tile from a matrix whose rows are the terms: `terms` rows of 16 columns, of which [first, last) count.
inline void pack_right_rows(const bf16* from, int64_t stride, int64_t terms, int64_t first, int64_t last, bf16* to) {
#if defined(TANDEM_AVX512)
    const __mmask16 mask = static_cast<__mmask16>(((1u << last) - 1u) & ~((1u << first) - 1u));
    for (int64_t pair = 0; pair < 16; ++pair) {
        const __mmask16 even = 2 * pair < terms ? mask : 0, odd = 2 * pair + 1 < terms ? mask : 0;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from + 2 * pair * stride));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + (2 * pair + 1) * stride));
        _mm512_storeu_si512(to + 32 * pair, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#else
    for (int64_t pair = 0; pair < 16; ++pair)
        for (int64_t c = 0; c < 16; ++c)
            for (int64_t h = 0; h < 2; ++h) {
                const int64_t term = 2 * pair + h;
                const bool counts = term < terms && c >= first && c < last;
                to[32 * pair + 2 * c + h] = counts ? from[term * stride + c] : bf16{0};
            }
#endif
}

// Two neighbouring right tiles (16 columns each, the same 32 terms) become two left tiles, `left` and `lower`, whose
// rows are those terms and whose terms are those 32 columns: the way back through a matrix, from the same bytes.
inline void turn(const bf16* right, const bf16* next, bf16* left, bf16* lower) {
#if defined(TANDEM_AVX512)
    alignas(64) static const struct Indices {
        uint16_t even[32], odd[32];
        constexpr Indices() : even(), odd() {
            for (int i = 0; i < 32; ++i) {
                even[i] = static_cast<uint16_t>(2 * i);
                odd[i] = static_cast<uint16_t>(2 * i + 1);
            }
        }
    } indices;
    const __m512i even = _mm512_load_si512(indices.even), odd = _mm512_load_si512(indices.odd);
    for (int pair = 0; pair < 16; ++pair) {
        const __m512i a = _mm512_loadu_si512(right + 32 * pair), b = _mm512_loadu_si512(next + 32 * pair);
        bf16* to = pair < 8 ? left + 64 * pair : lower + 64 * (pair - 8);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, even, b));
        _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, odd, b));
    }
#else
    for (int pair = 0; pair < 16; ++pair)
        for (int c = 0; c < 16; ++c)
            for (int h = 0; h < 2; ++h) {
                bf16* to = pair < 8 ? left + 64 * pair : lower + 64 * (pair - 8);
                to[32 * h + c] = right[32 * pair + 2 * c + h];
                to[32 * h + 16 + c] = next[32 * pair + 2 * c + h];
            }
#endif
}

// 16 float32 as bfloat16, of which `count` are written.
TANDEM_INLINE void store_row(bf16* to, const float* from, int64_t count) {
#if defined(TANDEM_AVX512)
    const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1u);
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
#else
    for (int64_t i = 0; i < std::min<int64_t>(count, 16); ++i) to[i] = to_bf16(from[i]);
#endif
}

// Numbers of a result that may be found in the caches later.
constexpr int64_t STAYING = 1 << 21;

// Two of them side by side, written as one cache line. `past`: past the caches, because so much is written that it
// would be gone before it is read; lines need not be read to be written then. `finish_stores` ends a series of those.
TANDEM_INLINE void store_rows(bf16* to, const float* left, const float* right, int64_t count, bool past = false) {
#if defined(TANDEM_AVX512)
    const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1u;
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(right), _mm512_loadu_ps(left));
    if (past && count >= 32 && reinterpret_cast<uintptr_t>(to) % LINE == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)both);
        return;
    }
    _mm512_mask_storeu_epi16(to, mask, (__m512i)both);
#else
    (void)past;
    store_row(to, left, count);
    if (count > 16) store_row(to + 16, right, count - 16);
#endif
}

TANDEM_INLINE void finish_stores() { _mm_sfence(); }

}  // namespace tandem
