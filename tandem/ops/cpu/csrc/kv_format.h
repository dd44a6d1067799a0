// The bytes of a quantised KV cache (KIVI, arXiv 2402.02750): a block of one kv head holds its keys, quantised per
// channel over the block's tokens, then its values, quantised per token. A number is low + step * code.
//
//   keys:   low[dim], step[dim] (bfloat16), codes [block_size][code bytes]
//   values: low[block_size], step[block_size] (bfloat16), codes [block_size][code bytes]
// 8 bits: a byte a code. 4 bits: byte i holds the codes of i (low half) and of i + ceil(dim / 2).
#pragma once

#include <cmath>
#include <vector>

#include "vector.h"

namespace tandem {

struct QuantizedBlock {
    int64_t bits, block_size, dim;

    int64_t code_bytes() const { return bits == 8 ? dim : (dim + 1) / 2; }
    int64_t key_bytes() const { return 4 * dim + block_size * code_bytes(); }
    int64_t bytes() const { return key_bytes() + 4 * block_size + block_size * code_bytes(); }
    float levels() const { return bits == 8 ? 255.0f : 15.0f; }
};

namespace quantized {

inline float read(const uint8_t* at, int64_t i) {
    bf16 x;
    std::memcpy(&x, at + 2 * i, 2);
    return to_float(x);
}

inline void write(uint8_t* at, int64_t i, float x) {
    const bf16 rounded = to_bf16(x);
    std::memcpy(at + 2 * i, &rounded, 2);
}

// A bfloat16 near x that is not above, or not below; at most two steps away.
inline float round_down(float x) {
    const float y = to_float(to_bf16(x));
    return y > x ? to_float(to_bf16(y - std::fabs(y) * 0.0078125f)) : y;
}
inline float round_up(float x) {
    const float y = to_float(to_bf16(x));
    return y < x ? to_float(to_bf16(y + std::fabs(y) * 0.0078125f)) : y;
}

inline int encode(float x, float low, float step, float levels) {
    const float code = step > 0.0f ? std::nearbyint((x - low) / step) : 0.0f;
    return static_cast<int>(std::min(std::max(0.0f, code), levels));  // 0 where it is NaN; low or step is NaN then
}

inline void store_codes(const QuantizedBlock& form, const int* codes, uint8_t* out) {
    if (form.bits == 8) {
        for (int64_t d = 0; d < form.dim; ++d) out[d] = static_cast<uint8_t>(codes[d]);
        return;
    }
    const int64_t half = form.code_bytes();
    for (int64_t d = 0; d < half; ++d) {
        const int high = d + half < form.dim ? codes[d + half] : 0;
        out[d] = static_cast<uint8_t>(codes[d] | high << 4);
    }
}

inline int load_code(const QuantizedBlock& form, const uint8_t* codes, int64_t d) {
    if (form.bits == 8) return codes[d];
    const int64_t half = form.code_bytes();
    return d < half ? codes[d] & 15 : codes[d - half] >> 4;
}

// The range low, low + levels * step that holds `least` to `most`.
inline void cover(float least, float most, float levels, float* low, float* step) {
    *low = round_down(least);
    *step = round_up((most - *low) / levels);
}

// `count` keys from slot `slot` on, beside those already there: where one leaves its channel's range, the range grows
// and the channel's codes are computed again.
template <class Source>
void write_keys(const QuantizedBlock& form, uint8_t* block, int64_t slot, int64_t count, const Source* rows, int64_t stride) {
    const int64_t dim = form.dim, bytes = form.code_bytes();
    const float levels = form.levels();
    uint8_t *low = block, *step = block + 2 * dim, *codes = block + 4 * dim;
    std::vector<int> all((slot + count) * dim);
    for (int64_t d = 0; d < dim; ++d) {
        float least = to_float(rows[d]), most = least;
        bool is_nan = least != least;
        for (int64_t i = 1; i < count; ++i) {
            const float x = to_float(rows[i * stride + d]);
            least = std::min(least, x), most = std::max(most, x), is_nan |= x != x;
        }
        const float old_low = read(low, d), old_step = read(step, d);
        float new_low = old_low, new_step = old_step;
        if (slot == 0) {
            cover(least, most, levels, &new_low, &new_step);
        } else if (least < old_low || most > old_low + levels * old_step) {
            cover(std::min(least, old_low), std::max(most, old_low + levels * old_step), levels, &new_low, &new_step);
        }
        if (is_nan) new_low = NAN;
        for (int64_t i = 0; i < slot; ++i) {
            const int code = load_code(form, codes + i * bytes, d);
            const bool same = new_low == old_low && new_step == old_step;
            all[i * dim + d] = same ? code : encode(old_low + old_step * code, new_low, new_step, levels);
        }
        for (int64_t i = 0; i < count; ++i) {
            all[(slot + i) * dim + d] = encode(to_float(rows[i * stride + d]), new_low, new_step, levels);
        }
        write(low, d, new_low), write(step, d, new_step);
    }
    for (int64_t i = 0; i < slot + count; ++i) store_codes(form, all.data() + i * dim, codes + i * bytes);
}

template <class Source>
void write_values(const QuantizedBlock& form, uint8_t* block, int64_t slot, int64_t count, const Source* rows, int64_t stride) {
    const int64_t dim = form.dim, bytes = form.code_bytes();
    uint8_t *low = block + form.key_bytes(), *step = low + 2 * form.block_size, *codes = low + 4 * form.block_size;
    std::vector<int> row(dim);
    for (int64_t i = 0; i < count; ++i) {
        const Source* x = rows + i * stride;
        float least = to_float(x[0]), most = least, new_low, new_step;
        bool is_nan = least != least;
        for (int64_t d = 1; d < dim; ++d) {
            const float y = to_float(x[d]);
            least = std::min(least, y), most = std::max(most, y), is_nan |= y != y;
        }
        cover(least, most, form.levels(), &new_low, &new_step);
        if (is_nan) new_low = NAN;
        for (int64_t d = 0; d < dim; ++d) row[d] = encode(to_float(x[d]), new_low, new_step, form.levels());
        write(low, slot + i, new_low), write(step, slot + i, new_step);
        store_codes(form, row.data(), codes + (slot + i) * bytes);
    }
}

// n codes as floats: `shift` 4 takes the high halves of bytes, `mask` 15 the low ones, 0 and 255 whole bytes.
TANDEM_INLINE Vec load_codes(const uint8_t* codes, int64_t n, int shift, int mask) {
#if defined(TANDEM_AVX512)
    const auto* at = reinterpret_cast<const __m128i*>(codes);
    const __m512i wide = _mm512_cvtepu8_epi32(n == 16 ? _mm_loadu_si128(at) : _mm_maskz_loadu_epi8(first(n), codes));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(wide, shift), _mm512_set1_epi32(mask)))};
#else
    uint8_t padded[8] = {};
    if (n == 8) std::memcpy(padded, codes, 8);
    else std::memcpy(padded, codes, n);
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(padded)));
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(wide, shift), _mm256_set1_epi32(mask)))};
#endif
}

// `count` codes, from `codes` on, as numbers. Per-token scales have `each` false: one low and step for all.
template <bool each, class Source>
TANDEM_INLINE void decode_part(
    const uint8_t* codes, int64_t count, int shift, int mask, const bf16* low, const bf16* step, Source* out
) {
    const int64_t whole = count / Vec::width * Vec::width, left = count - whole;
    const Vec one_low = set(to_float(*low)), one_step = set(to_float(*step));
    for (int64_t d = 0; d < whole; d += Vec::width) {
        const Vec lows = each ? load(low + d) : one_low, steps = each ? load(step + d) : one_step;
        store(out + d, fma(load_codes(codes + d, Vec::width, shift, mask), steps, lows));
    }
    if (left == 0) return;
    const Vec lows = each ? load(low + whole, left) : one_low, steps = each ? load(step + whole, left) : one_step;
    store(out + whole, fma(load_codes(codes + whole, left, shift, mask), steps, lows), left);
}

template <bool each, class Source>
TANDEM_INLINE void decode(
    const QuantizedBlock& form, const uint8_t* codes, const bf16* low, const bf16* step, Source* out
) {
    if (form.bits == 8) return decode_part<each>(codes, form.dim, 0, 255, low, step, out);
    const int64_t half = form.code_bytes(), skip = each ? half : 0;
    decode_part<each>(codes, half, 0, 15, low, step, out);
    decode_part<each>(codes, form.dim - half, 4, 15, low + skip, step + skip, out + half);
}

// The keys and values of slots first:stop, [stop - first][dim] each.
template <class Source>
void read_block(const QuantizedBlock& form, const uint8_t* block, int64_t first, int64_t stop, Source* keys, Source* values) {
    const auto* scales = reinterpret_cast<const bf16*>(block);
    const auto* token_scales = reinterpret_cast<const bf16*>(block + form.key_bytes());
    const uint8_t* key_codes = block + 4 * form.dim;
    const uint8_t* value_codes = block + form.key_bytes() + 4 * form.block_size;
    const int64_t bytes = form.code_bytes();
    for (int64_t i = first; i < stop; ++i, keys += form.dim, values += form.dim) {
        decode<true>(form, key_codes + i * bytes, scales, scales + form.dim, keys);
        decode<false>(form, value_codes + i * bytes, token_scales + i, token_scales + form.block_size + i, values);
    }
}

}  // namespace quantized
}  // namespace tandem
