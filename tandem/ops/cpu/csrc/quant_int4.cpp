// Linear layers with int4 weights and int8 activations: 4-bit codes become 8-bit integers on their way, sums are whole
// numbers, and scales come after them. Gradients take the weight as bfloat16 and lose nothing else.
//
// Shape letters as in ops/quant.py: M rows, K input and N output features.

#include <cmath>

#include "quant.h"

namespace tandem {
namespace quant {
namespace {

constexpr int64_t STEP = 64;               // inputs of a step
constexpr int64_t SPAN = STRETCH * STEP;   // inputs of a row that share a scale
constexpr int64_t TRIED = 4;               // multipliers of a group

#if defined(TANDEM_AVX512)

// The multipliers and offsets of a half's two groups, where the codes want them.
struct Levels {
    __m512i multipliers[2], offsets[2];

    TANDEM_INLINE explicit Levels(const uint8_t* parameters) {
        const __m512i all = _mm512_loadu_si512(parameters), four = _mm512_set1_epi32(0x10101);
        // Byte j of a lane of four belongs to output j / 4.
        const __m512i output = _mm512_mullo_epi32(
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
            _mm512_add_epi32(four, _mm512_set1_epi32(1 << 24)));
        for (int group = 0; group < 2; ++group) {
            const __m512i at = _mm512_add_epi8(output, _mm512_set1_epi8(static_cast<char>(32 * group)));
            multipliers[group] = _mm512_maskz_permutexvar_epi8(0x5555555555555555ull, at, all);
            offsets[group] = _mm512_permutexvar_epi8(_mm512_add_epi8(at, _mm512_set1_epi8(16)), all);
        }
    }

    // 64 codes of one group as integers. Two products share 16 bits: the lower one is at most 17 * 15 = 255.
    TANDEM_INLINE __m512i integers(__m512i both, int group) const {
        const __m512i shifted = group ? _mm512_srli_epi16(both, 4) : both;
        const __m512i codes = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
        return _mm512_add_epi8(_mm512_mullo_epi16(codes, multipliers[group]), offsets[group]);
    }
};

#endif

// One step as two right tiles of int8 (16 rows of four inputs by 16 outputs), `apart` bytes from each other. FAR as for
// `expand_int8`.
template <int64_t FAR = 0>
TANDEM_INLINE void expand_int4(const uint8_t* step, char* to, int64_t apart) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* codes = step + 128 + half * 512;
#if defined(TANDEM_AVX512)
        const Levels levels(step + half * 64);
        if (FAR) _mm_prefetch(reinterpret_cast<const char*>(step + half * 64 + FAR), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int64_t row = 0; row < 8; ++row) {
            if (FAR) _mm_prefetch(reinterpret_cast<const char*>(codes + row * 64 + FAR), _MM_HINT_T0);
            const __m512i both = _mm512_loadu_si512(codes + row * 64);
            _mm512_storeu_si512(to + half * apart + row * 64, levels.integers(both, 0));
            _mm512_storeu_si512(to + half * apart + (row + 8) * 64, levels.integers(both, 1));
        }
#else
        for (int64_t group = 0; group < 2; ++group) {
            const uint8_t* multipliers = step + half * 64 + group * 32;
            for (int64_t i = 0; i < 512; ++i) {
                const int64_t output = i % 64 / 4, code = codes[i] >> (4 * group) & 15;
                const int64_t offset = static_cast<int8_t>(multipliers[16 + output]);
                to[half * apart + group * 512 + i] = static_cast<char>(code * multipliers[output] + offset);
            }
        }
#endif
    }
}

#if defined(TANDEM_AVX512)

constexpr int64_t FEW = 4;

// Of M rows' 64 inputs, as a left tile has them, and a block's codes for them: sums of the products by half of the
// outputs, group of inputs and row; the second group's are times 16.
template <int M>
struct GroupSums {
    __m512i of[2][2][M] = {};

    TANDEM_INLINE GroupSums(const uint8_t* codes, const char* left, int64_t far) {
        const __m512i low = _mm512_set1_epi8(15);
        // Unrolled, broadcasts would be moved ahead until no register is left for sums.
#pragma GCC unroll 1
        for (int64_t four = 0; four < 8; ++four) {
            __m512i factors[2][2];
            for (int half = 0; half < 2; ++half) {
                const uint8_t* at = codes + half * 512 + four * 64;
                _mm_prefetch(reinterpret_cast<const char*>(at + far), _MM_HINT_T1);
                const __m512i both = _mm512_loadu_si512(at);
                factors[half][0] = _mm512_and_si512(both, low);
                factors[half][1] = _mm512_andnot_si512(low, both);
            }
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r)
                for (int group = 0; group < 2; ++group) {
                    int32_t inputs;
                    std::memcpy(&inputs, left + r * STEP + 32 * group + 4 * four, 4);
                    const __m512i same = _mm512_set1_epi32(inputs);
                    for (int half = 0; half < 2; ++half)
                        of[half][group][r] = _mm512_dpbusd_epi32(of[half][group][r], factors[half][group], same);
                }
        }
    }
};

// 16 multipliers.
TANDEM_INLINE __m512 widened(const uint8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

// 16 outputs' offsets for the two groups, side by side as 16-bit numbers.
TANDEM_INLINE __m512i offset_pairs(const uint8_t* levels) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 16));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 48));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(first, second)),
                                                 _mm_unpackhi_epi8(first, second), 1);
    return _mm512_cvtepi8_epi16(both);
}

Scratch& sums_of_groups() {
    static thread_local Scratch mine;
    return mine;
}

// Sums of the inputs of each step's two groups, side by side as 16-bit numbers: [steps][rows].
const int32_t* sum_inputs(const Strips& strips, int64_t rows) {
    int32_t* sums = reinterpret_cast<int32_t*>(sums_of_groups().take(strips.steps * rows * sizeof(int32_t)));
    for (int64_t s = 0; s < strips.steps; ++s)
        for (int64_t r = 0; r < rows; ++r) {
            const char* inputs = reinterpret_cast<const char*>(strips.at(0, s)) + r * STEP;
            const __m512i fours =
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(inputs));
            const int16_t both[2] = {static_cast<int16_t>(_mm512_mask_reduce_add_epi32(0x00ff, fours)),
                                     static_cast<int16_t>(_mm512_mask_reduce_add_epi32(0xff00, fours))};
            std::memcpy(sums + s * rows + r, both, sizeof both);
        }
    return sums;
}

#endif

#if defined(TANDEM_AMX)
template <int C, int A, int B>
TANDEM_INLINE void tile_multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else

// Whole sums of one row of a left tile strip and one right one, 16 of them.
inline void multiply_row(const int8_t* left, const int8_t* right, int64_t steps, int32_t* out) {
#if defined(TANDEM_AVX512)
    // The products take one unsigned factor: 128 is added to the row, and 128 times the weights taken away.
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    __m512i sum = _mm512_setzero_si512(), too_much = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s)
        for (int64_t four = 0; four < 16; ++four) {
            int32_t inputs;
            std::memcpy(&inputs, left + s * TILE_BYTES + 4 * four, 4);
            const __m512i weights = _mm512_loadu_si512(right + s * TILE_BYTES + 64 * four);
            sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_set1_epi32(inputs), sign), weights);
            too_much = _mm512_dpbusd_epi32(too_much, sign, weights);
        }
    _mm512_storeu_si512(out, _mm512_sub_epi32(sum, too_much));
#else
    __m256i sums[4] = {};
    for (int64_t s = 0; s < steps; ++s)
        for (int64_t four = 0; four < 16; ++four) {
            int32_t inputs;
            std::memcpy(&inputs, left + s * TILE_BYTES + 4 * four, 4);
            const __m256i factors = _mm256_cvtepi8_epi16(_mm_set1_epi32(inputs));
            for (int64_t q = 0; q < 4; ++q) {
                const int8_t* at = right + s * TILE_BYTES + 64 * four + 16 * q;
                const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
                sums[q] = _mm256_add_epi32(sums[q], _mm256_madd_epi16(factors, weights));
            }
        }
    alignas(32) int32_t halves[32];
    for (int64_t q = 0; q < 4; ++q) _mm256_store_si256(reinterpret_cast<__m256i*>(halves + 8 * q), sums[q]);
    for (int64_t o = 0; o < 16; ++o) out[o] = halves[2 * o] + halves[2 * o + 1];
#endif
}

#endif

// Whole sums times their rows' scales, added to `sums` (or put there).
TANDEM_INLINE void add_scaled(const int32_t* whole, const float* scales, int64_t rows, bool adds, float* sums) {
    for (int64_t r = 0; r < rows; ++r) {
#if defined(TANDEM_AVX512)
        const __m512 value = _mm512_cvtepi32_ps(_mm512_loadu_si512(whole + 16 * r)), scale = _mm512_set1_ps(scales[r]);
        const __m512 before = adds ? _mm512_loadu_ps(sums + 16 * r) : _mm512_setzero_ps();
        _mm512_storeu_ps(sums + 16 * r, _mm512_fmadd_ps(value, scale, before));
#else
        for (int64_t c = 0; c < 16; ++c) {
            const float before = adds ? sums[16 * r + c] : 0.0f;
            sums[16 * r + c] = std::fma(static_cast<float>(whole[16 * r + c]), scales[r], before);
        }
#endif
    }
}

struct Forward4 {
    static constexpr int64_t SUPER_PAIRS = 16;
    const uint8_t* weight;
    Strips strips;        // x as left strips of int8
    const float* scales;  // of the rows, span by span, each `padded` of them
    const bf16* bias;
    bf16* y;
    int64_t rows, padded, inputs, outputs, steps, stride;
    LoraForward lora;

    const uint8_t* block(int64_t index) const { return weight + index * Int4::block_bytes(inputs); }

    void expand(int64_t index, int64_t step, char* to) const {
        expand_int4(Int4::step(block(index), step), to, STRETCH * TILE_BYTES);
    }

    void fetch(int64_t index, int64_t step) const { quant::fetch(Int4::step(block(index), step), Int4::step_bytes); }

    // A stretch is a span: its whole sums are complete.
    template <class Meanwhile>
    void multiply(int64_t pair, const char* right, int64_t step, int64_t length, float* sums,
                  const Meanwhile& meanwhile) const {
        const int64_t count = std::min(PAIR, rows - pair * PAIR);
        const char* left = reinterpret_cast<const char*>(strips.at(2 * pair, step));
        alignas(64) int32_t whole[CELL];
#if defined(TANDEM_AMX)
        unrolled<4>([&](auto i) { tile_zero<i>(); });
        for (int64_t s = 0; s < length; ++s, left += TILE_BYTES, right += TILE_BYTES) {
            tile_load<4>(left);
            tile_load<6>(right);
            tile_multiply_int8<0, 4, 6>();
            tile_load<7>(right + STRETCH * TILE_BYTES);
            tile_multiply_int8<1, 4, 7>();
            if (count > TILE_ROWS) {
                tile_load<5>(left + STRETCH * TILE_BYTES);
                tile_multiply_int8<2, 5, 6>();
                tile_multiply_int8<3, 5, 7>();
            }
            meanwhile();
        }
        unrolled<4>([&](auto i) { tile_store<i>(whole + i * TILE_OUT); });
#else
        for (int64_t s = 0; s < length; ++s) meanwhile();
        for (int64_t r = 0; r < count; ++r)
            for (int64_t j = 0; j < 2; ++j)
                multiply_row(reinterpret_cast<const int8_t*>(left) + (r / 16 * STRETCH * TILE_BYTES) + r % 16 * 64,
                             reinterpret_cast<const int8_t*>(right) + j * STRETCH * TILE_BYTES, length,
                             whole + (r / 16 * 2 + j) * TILE_OUT + r % 16 * 16);
#endif
        scale_cell(whole, pair, step, count, sums);
    }

    TANDEM_INLINE void scale_cell(const int32_t* whole, int64_t pair, int64_t step, int64_t count, float* sums) const {
        const float* of_rows = scales + step / STRETCH * padded + pair * PAIR;
        for (int64_t i = 0; i * TILE_ROWS < count; ++i)
            for (int64_t j = 0; j < 2; ++j)
                add_scaled(whole + (2 * i + j) * TILE_OUT, of_rows + i * TILE_ROWS,
                           std::min(TILE_ROWS, count - i * TILE_ROWS), step >= STRETCH, sums + (2 * i + j) * TILE_OUT);
    }

#if defined(TANDEM_AVX512)
    // Up to FEW rows: codes are multiplied as they are, and levels come after a group's sum. Reading the weight takes
    // longer than that, which expanding it for the tiles does not leave room for. The whole sums are the same ones: as
    // float32 they and all their parts are exact, 16 groups of at most 17 * 15 * 127 * 32 being below 2 ** 24.
    // Inlined, its sums would not all stay in registers.
    template <int M>
    __attribute__((noinline)) void few_rows(int64_t index, const int32_t* sums_of_inputs, float* sums) const {
        constexpr int64_t FAR = 3 * Int4::step_bytes;
        alignas(64) int32_t whole[CELL];
        const uint8_t* at = Int4::step(block(index), 0);
        for (int64_t first = 0; first < steps; first += STRETCH) {
            const int64_t last = std::min(first + STRETCH, steps);
            __m512 scaled[2][M];
            __m512i moved[2][M];
            for (int half = 0; half < 2; ++half)
                for (int r = 0; r < M; ++r) scaled[half][r] = _mm512_setzero_ps(), moved[half][r] = __m512i{};
            const char* left = reinterpret_cast<const char*>(strips.at(0, first));
            for (int64_t s = first; s < last; ++s, at += Int4::step_bytes, left += TILE_BYTES) {
                const GroupSums<M> found(at + 128, left, FAR);
                for (int half = 0; half < 2; ++half) {
                    const uint8_t* levels = at + half * 64;
                    _mm_prefetch(reinterpret_cast<const char*>(levels) + FAR, _MM_HINT_T1);
                    const __m512 multipliers[2] = {widened(levels),
                                                   _mm512_mul_ps(widened(levels + 32), _mm512_set1_ps(1.0f / 16))};
                    const __m512i offsets = offset_pairs(levels);
#pragma GCC unroll 4
                    for (int r = 0; r < M; ++r) {
                        const __m512i of_inputs = _mm512_set1_epi32(sums_of_inputs[s * M + r]);
                        moved[half][r] = _mm512_dpwssd_epi32(moved[half][r], offsets, of_inputs);
                        for (int group = 0; group < 2; ++group)
                            scaled[half][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(found.of[half][group][r]),
                                                              multipliers[group], scaled[half][r]);
                    }
                }
            }
            for (int half = 0; half < 2; ++half)
                for (int r = 0; r < M; ++r)
                    _mm512_store_si512(whole + half * TILE_OUT + 16 * r,
                                       _mm512_add_epi32(_mm512_cvtps_epi32(scaled[half][r]), moved[half][r]));
            scale_cell(whole, 0, first, M, sums);
        }
    }
#endif

    void finish(int64_t pair, int64_t begin, int64_t end, float* sums, int64_t apart) const {
        for (int64_t index = begin; index < end; ++index) {
            const float* of_outputs = reinterpret_cast<const float*>(block(index));
            float* cell = sums + (index - begin) * apart;
            for (int64_t r = 0; r < std::min(PAIR, rows - pair * PAIR); ++r)
                for (int64_t c = 0; c < OUTPUTS; ++c)
                    cell[(r / TILE_ROWS * 2 + c / 16) * TILE_OUT + r % TILE_ROWS * 16 + c % 16] *= of_outputs[c];
        }
        store_outputs(sums, apart, pair, begin, end, rows, outputs, lora, bias, y, stride);
    }

#if defined(TANDEM_AMX)
    // Up to 32 rows: a step is expanded while an earlier one multiplies.
    template <int L>
    void stream_block(int64_t index, float* sums) const {
        constexpr int64_t RING = 4, BEHIND = 2, FAR = 4 * Int4::step_bytes;
        alignas(64) char ring[RING][2 * TILE_BYTES];
        alignas(64) int32_t whole[CELL];
        const uint8_t* at = Int4::step(block(index), 0);
        auto product = [&](int64_t s) {
            if (s % STRETCH == 0) unrolled<2 * L>([&](auto i) { tile_zero<i>(); });
            const char* right = ring[s % RING];
            const bf16* left = strips.tiles + (s / STRETCH * L * STRETCH + s % STRETCH) * TILE;
            tile_load<4>(left);
            tile_load<6>(right);
            tile_multiply_int8<0, 4, 6>();
            tile_load<7>(right + TILE_BYTES);
            tile_multiply_int8<1, 4, 7>();
            if constexpr (L == 2) {
                tile_load<5>(left + STRETCH * TILE);
                tile_multiply_int8<2, 5, 6>();
                tile_multiply_int8<3, 5, 7>();
            }
            if ((s + 1) % STRETCH == 0 || s + 1 == steps) {
                unrolled<2 * L>([&](auto i) { tile_store<i>(whole + i * TILE_OUT); });
                scale_cell(whole, 0, s / STRETCH * STRETCH, rows, sums);
            }
        };
        for (int64_t s = 0; s < steps; ++s, at += Int4::step_bytes) {
            if (s >= BEHIND) product(s - BEHIND);
            expand_int4<FAR>(at, ring[s % RING], TILE_BYTES);
        }
        for (int64_t s = std::max<int64_t>(0, steps - BEHIND); s < steps; ++s) product(s);
    }
#endif
};

// A row's span as int8 codes, and what they are multiples of.
float round_span(const bf16* x, int64_t count, int8_t* to, int64_t apart) {
    const float most = largest(x, count);
    const float inverse = most < 1e-30f ? 0.0f : 127.0f / most;
    alignas(64) int8_t codes[SPAN] = {};
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<int8_t>(std::nearbyint(to_float(x[i]) * inverse));
    for (int64_t s = 0; s * STEP < SPAN; ++s) std::memcpy(to + s * apart, codes + s * STEP, STEP);
    return most < 1e-30f ? 0.0f : most / 127.0f;
}

Scratch& row_scales() {
    static thread_local Scratch mine;
    return mine;
}

Scratch& codes_of_rows() {
    static thread_local Scratch mine;
    return mine;
}

// x as left strips of int8, and the scales of each span of all rows.
const float* round_rows(const bf16* x, int64_t stride, int64_t terms, Strips& strips) {
    const int64_t spans = divide_up(strips.steps, STRETCH), padded = strips.count() * TILE_ROWS;
    char* packed = codes_of_rows().take(strips.bytes());
    strips.tiles = reinterpret_cast<const bf16*>(packed);
    float* scales = reinterpret_cast<float*>(row_scales().take(spans * padded * sizeof(float)));
    // A strip's rows that do not exist stay as they are: integers, whose sums nobody reads.
    parallel_ranges(spans * strips.rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t span = i / strips.rows, row = i % strips.rows, term = span * SPAN;
            char* to = packed + strips.place(row / TILE_ROWS, span * STRETCH) * 2 + row % TILE_ROWS * STEP;
            scales[span * padded + row] = round_span(x + row * stride + term, std::min(SPAN, terms - term),
                                                     reinterpret_cast<int8_t*>(to), TILE_BYTES);
        }
    });
    return scales;
}

struct Turned4 {
    static void fetch(const uint8_t* block, int64_t part) {
        quant::fetch(Int4::step(block, part / 2), Int4::step_bytes);
    }

    static int64_t block_bytes(int64_t inputs) { return Int4::block_bytes(inputs); }

    // Half a step, 32 inputs, as two right tiles of bfloat16.
    static void expand(const uint8_t* block, int64_t part, char* to) {
        const uint8_t* step = Int4::step(block, part / 2);
        const Scales scales(reinterpret_cast<const float*>(block));
        const int group = part % 2;
        for (int half = 0; half < 2; ++half) {
            bf16* tile = reinterpret_cast<bf16*>(to) + half * TILE;
            const uint8_t* codes = step + 128 + half * 512;
#if defined(TANDEM_AVX512)
            const Levels levels(step + half * 64);
            for (int64_t row = 0; row < 8; ++row) {
                const __m512i fours = levels.integers(_mm512_loadu_si512(codes + row * 64), group);
                for (int64_t pair = 0; pair < 2; ++pair) {
                    const __m256i two = _mm512_cvtepi32_epi16(pair ? _mm512_srli_epi32(fours, 16) : fours);
                    widen_row(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1), scales.twice + 2 * half,
                              tile + (2 * row + pair) * 32);
                }
            }
#else
            const uint8_t* multipliers = step + half * 64 + group * 32;
            for (int64_t i = 0; i < 512; ++i) {
                const int64_t four = i / 64, output = i % 64 / 4, input = i % 4, code = codes[i] >> (4 * group) & 15;
                const int64_t whole = code * multipliers[output] + static_cast<int8_t>(multipliers[16 + output]);
                tile[(2 * four + input / 2) * 32 + 2 * output + input % 2] =
                    to_bf16(static_cast<float>(whole) * scales.once[half * 16 + output]);
            }
#endif
        }
    }

};

struct Group {
    alignas(64) float values[32];
    uint8_t codes[32];
    uint8_t multiplier;
    int8_t offset;
};

TANDEM_INLINE Vec nearest_codes(Vec values, float offset, float inverse) {
    return min(max(round((values - set(offset)) * set(inverse)), zero()), set(15.0f));
}

// Multiplier, offset and codes of 32 values within -127 .. 127; see `quantise_int4` of ops/quant.py.
void choose_levels(Group& group) {
    constexpr int64_t PARTS = 32 / Vec::width;
    Vec values[PARTS], low = set(INFINITY), high = set(-INFINITY);
    for (int64_t p = 0; p < PARTS; ++p) {
        values[p] = load(group.values + p * Vec::width);
        low = min(low, values[p]), high = max(high, values[p]);
    }
    const float lowest = -tandem::largest(zero() - low), highest = tandem::largest(high);
    const float widest = std::min(std::max(std::ceil((highest - lowest) / 15), 1.0f), 17.0f);
    float least = INFINITY, multiplier = 1, offset = 0;
    for (int64_t smaller = 0; smaller < TRIED; ++smaller) {
        const float tried = std::max(widest - static_cast<float>(smaller), 1.0f), inverse = 1 / tried;
        const float middle = std::nearbyint((lowest + highest) / 2 - tried * 7.5f);
        Vec rest = zero(), error = zero();
        for (int64_t p = 0; p < PARTS; ++p) {
            rest = rest + fnma(nearest_codes(values[p], middle, inverse), set(tried), values[p]);
        }
        const float mean = std::max(std::nearbyint(sum(rest) / 32), -128.0f);
        const float moved = std::max(std::min(mean, 127 - 15 * tried), -128.0f);
        for (int64_t p = 0; p < PARTS; ++p) {
            const Vec off = fnma(nearest_codes(values[p], moved, inverse), set(tried), values[p] - set(moved));
            error = fma(off, off, error);
        }
        const float total = sum(error);
        if (total < least) least = total, multiplier = tried, offset = moved;
    }
    group.multiplier = static_cast<uint8_t>(multiplier), group.offset = static_cast<int8_t>(offset);
    alignas(64) float codes[32];
    for (int64_t p = 0; p < PARTS; ++p) store(codes + p * Vec::width, nearest_codes(values[p], offset, 1 / multiplier));
    for (int64_t i = 0; i < 32; ++i) group.codes[i] = static_cast<uint8_t>(codes[i]);
}

// Up to 32 rows of the weight.
void pack_block(const bf16* weight, int64_t stride, int64_t rows, int64_t inputs, uint8_t* to) {
    float* scales = reinterpret_cast<float*>(to);
    const int64_t steps = Int4::steps(inputs);
    std::memset(to, 0, Int4::block_bytes(inputs));
    for (int64_t o = 0; o < rows; ++o) {
        const float most = largest(weight + o * stride, inputs);
        scales[o] = (most == 0 ? 1.0f : most) / 127;
        for (int64_t part = 0; part < 2 * steps; ++part) {
            const int64_t first = part * 32, count = std::min<int64_t>(32, inputs - first);
            if (count <= 0) break;
            Group group{};
            for (int64_t i = 0; i < count; ++i) group.values[i] = to_float(weight[o * stride + first + i]) / scales[o];
            choose_levels(group);
            std::memset(group.codes + count, 0, 32 - count);
            uint8_t* step = to + Int4::head_bytes + part / 2 * Int4::step_bytes;
            uint8_t* parameters = step + o / 16 * 64 + part % 2 * 32 + o % 16;
            parameters[0] = group.multiplier, parameters[16] = static_cast<uint8_t>(group.offset);
            uint8_t* codes = step + 128 + o / 16 * 512 + o % 16 * 4;
            for (int64_t four = 0; four < 8; ++four) {
                uint32_t old, fresh;
                std::memcpy(&old, codes + four * 64, 4), std::memcpy(&fresh, group.codes + four * 4, 4);
                old |= fresh << (4 * (part % 2));
                std::memcpy(codes + four * 64, &old, 4);
            }
        }
    }
}

}  // namespace
}  // namespace quant
}  // namespace tandem

using namespace tandem;
using namespace tandem::quant;

// y [m, n] = x [m, k] @ weight.T + bias (bfloat16 [n] or null) + what the parts add; strides in elements. `h` ([parts,
// m, rank], may be null) receives x a^T, of x as it is.
TANDEM_EXPORT void tandem_int4_forward(const bf16* x, int64_t x_stride, int64_t m, int64_t k, const uint8_t* weight,
                                       int64_t n, const bf16* bias, bf16* y, int64_t y_stride, const void* parts,
                                       int64_t num_parts, int64_t rank, const uint8_t* foreign,
                                       int64_t foreign_stride, bf16* h) {
    if (m == 0) return;
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    Strips whole{nullptr, m, divide_up(k, TILE_TERMS), STRETCH};
    if (lora.num_parts) {
        bf16* packed = reinterpret_cast<bf16*>(activations().take(whole.bytes()));
        whole.tiles = packed;
        pack_rows<false>(x, x_stride, k, whole, packed);
    }
    Strips strips{nullptr, m, Int4::steps(k), STRETCH};
    const float* scales = round_rows(x, x_stride, k, strips);
    const Forward4 op{weight, strips, scales, bias, y, m, strips.count() * TILE_ROWS, k, n, strips.steps, y_stride,
                      LoraForward(lora, whole, k, h)};
    const int64_t blocks = divide_up(n, OUTPUTS);
#if defined(TANDEM_AVX512)
    if (m <= FEW) {
        const int32_t* inputs = sum_inputs(strips, m);
        run_stream(op, blocks, [&](int64_t index, float* sums) {
            if (m == 1) op.few_rows<1>(index, inputs, sums);
            else if (m == 2) op.few_rows<2>(index, inputs, sums);
            else if (m == 3) op.few_rows<3>(index, inputs, sums);
            else op.few_rows<4>(index, inputs, sums);
        });
        return;
    }
#endif
#if defined(TANDEM_AMX)
    if (m <= PAIR) {
        run_stream(op, blocks, [&](int64_t index, float* sums) {
            if (m <= TILE_ROWS) op.stream_block<1>(index, sums);
            else op.stream_block<2>(index, sums);
        });
        return;
    }
#endif
    run_all(op, blocks);
}

// gx [m, k] = gy [m, n] @ weight + what the parts add; `gh` ([parts, m, rank], may be null) receives the gradient of
// h = x a^T.
TANDEM_EXPORT void tandem_int4_backward(const bf16* gy, int64_t gy_stride, int64_t m, int64_t n, const uint8_t* weight,
                                        int64_t k, bf16* gx, int64_t gx_stride, const void* parts, int64_t num_parts,
                                        int64_t rank, const uint8_t* foreign, int64_t foreign_stride, bf16* gh) {
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    run_backward<Turned4>(gy, gy_stride, m, n, weight, k, gx, gx_stride, lora, gh);
}

// The bytes of weight [n, k].
TANDEM_EXPORT void tandem_int4_pack(const bf16* weight, int64_t stride, int64_t n, int64_t k, uint8_t* packed) {
    parallel_ranges(divide_up(n, OUTPUTS), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            pack_block(weight + i * OUTPUTS * stride, stride, std::min(OUTPUTS, n - i * OUTPUTS), k,
                       packed + i * Int4::block_bytes(k));
        }
    });
}

// The weight that the bytes stand for, [n, k].
TANDEM_EXPORT void tandem_int4_unpack(const uint8_t* packed, int64_t n, int64_t k, bf16* weight, int64_t stride) {
    unpack_tiles<Turned4>(packed, n, k, weight, stride);
}
