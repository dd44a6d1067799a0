// Linear layers with int8 weights and bfloat16 activations: codes become bfloat16 on their way, times their group's
// scale, so that activations lose nothing.
//
// Shape letters as in ops/quant.py: M rows, K input and N output features.

#include <cmath>

#include "quant.h"

namespace tandem {
namespace quant {
namespace {

#if defined(TANDEM_AMX)
// While it lives numbers too small for a float32 of full precision count as zero, as in the tile units.
class FlushToZero {
public:
    FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushToZero() { _mm_setcsr(before_); }

private:
    unsigned before_;
};

// A row in float32, zeros after it.
const float* widen_row(const bf16* x, int64_t terms, int64_t padded) {
    static thread_local Scratch mine;
    float* wide = reinterpret_cast<float*>(mine.take(padded * sizeof(float)));
    for (int64_t i = 0; i < terms; ++i) wide[i] = to_float(x[i]);
    std::fill(wide + terms, wide + padded, 0.0f);
    return wide;
}
#endif

struct Forward8 {
    static constexpr int64_t SUPER_PAIRS = 16;
    const uint8_t* weight;
    Strips strips;  // x as left strips
    const bf16* bias;
    bf16* y;
    int64_t rows, inputs, outputs, steps, stride;
    LoraForward lora;

    const uint8_t* block(int64_t index) const { return weight + index * Int8::block_bytes(inputs); }

    void expand(int64_t index, int64_t step, char* to) const {
        const uint8_t* of_block = block(index);
        expand_int8(Int8::codes(of_block, step), Scales(Int8::scales(of_block, step)), to, STRETCH * TILE_BYTES);
    }

    void fetch(int64_t index, int64_t step) const { quant::fetch(Int8::codes(block(index), step), 1024); }

    template <class Meanwhile>
    void multiply(int64_t pair, const char* tiles, int64_t step, int64_t length, float* sums,
                  const Meanwhile& meanwhile) const {
        const bf16 *left = strips.at(2 * pair, step), *right = reinterpret_cast<const bf16*>(tiles);
        const int64_t count = rows - pair * PAIR;
        if (count > TILE_ROWS) {
            multiply_strips<2, 2>(left, count, right, length, step > 0, sums, meanwhile);
        } else {
            multiply_strips<1, 2>(left, count, right, length, step > 0, sums, meanwhile);
        }
    }

    void finish(int64_t pair, int64_t begin, int64_t end, float* sums, int64_t apart) const {
        store_outputs(sums, apart, pair, begin, end, rows, outputs, lora, bias, y, stride);
    }

#if defined(TANDEM_AMX)
    // One row's sums: without tiles, which cost more than they save. Terms are added up as `tdpbf16ps` does: a step's
    // even ones and its odd ones each from zero, then their sum to the rest. `x`: [steps * 32].
    void one_row(int64_t index, const float* x, float* sums) const {
        constexpr int64_t FAR = Int8::group_bytes;
        const FlushToZero as_tiles_do;
        __m512 sum[2] = {};
        for (int64_t s = 0; s < steps; ++s) {
            const Scales scales(Int8::scales(block(index), s));
            const uint8_t* codes = Int8::codes(block(index), s);
            _mm_prefetch(reinterpret_cast<const char*>(codes - 64) + FAR, _MM_HINT_T1);
#pragma GCC unroll 1
            for (int half = 0; half < 2; ++half) {
                const Widen8 widen(scales.twice + 2 * half);
                __m512 even = _mm512_setzero_ps(), odd = even;
#pragma GCC unroll 2
                for (int64_t p = 0; p < 16; p += 2) {
                    const uint8_t* row = codes + half * 512 + p * 32;
                    _mm_prefetch(reinterpret_cast<const char*>(row) + FAR, _MM_HINT_T1);
                    __m512i pairs[2];
                    widen.rows(row, pairs);
                    for (int i = 0; i < 2; ++i) {
                        const float* at = x + s * TILE_TERMS + 2 * (p + i);
                        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
                        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
                        const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper));
                        even = _mm512_fmadd_ps(first, _mm512_set1_ps(at[0]), even);
                        odd = _mm512_fmadd_ps(second, _mm512_set1_ps(at[1]), odd);
                    }
                }
                sum[half] = _mm512_add_ps(sum[half], _mm512_add_ps(even, odd));
            }
        }
        for (int half = 0; half < 2; ++half) _mm512_store_ps(sums + half * TILE_OUT, sum[half]);
    }

    // Up to 32 rows: sums stay in the tiles for a whole block, and a step is expanded while an earlier one multiplies.
    template <int L>
    void stream_block(int64_t index, float* sums) const {
        constexpr int64_t RING = 4, BEHIND = 2, FAR = Int8::group_bytes;
        alignas(64) char ring[RING][2 * TILE_BYTES];
        const uint8_t* group = block(index);
        unrolled<2 * L>([&](auto i) { tile_zero<i>(); });
        auto product = [&](int64_t s) {
            const bf16* left = strips.tiles + (s / STRETCH * L * STRETCH + s % STRETCH) * TILE;
            const char* right = ring[s % RING];
            tile_load<4>(left);
            tile_load<6>(right);
            tile_multiply<0, 4, 6>();
            tile_load<7>(right + TILE_BYTES);
            tile_multiply<1, 4, 7>();
            if constexpr (L == 2) {
                tile_load<5>(left + STRETCH * TILE);
                tile_multiply<2, 5, 6>();
                tile_multiply<3, 5, 7>();
            }
        };
        for (int64_t s = 0; s < steps; s += 2, group += Int8::group_bytes) {
            const Scales scales(reinterpret_cast<const bf16*>(group));
            _mm_prefetch(reinterpret_cast<const char*>(group + FAR), _MM_HINT_T1);
            if (s >= BEHIND) product(s - BEHIND);
            expand_int8<FAR>(group + 64, scales, ring[s % RING], TILE_BYTES);
            if (s >= BEHIND) product(s + 1 - BEHIND);
            if (s + 1 < steps) expand_int8<FAR>(group + 64 + 1024, scales, ring[(s + 1) % RING], TILE_BYTES);
        }
        for (int64_t s = (steps - 1) / 2 * 2; s < steps; ++s) product(s);
        unrolled<2 * L>([&](auto i) { tile_store<i>(sums + i * TILE_OUT); });
    }
#endif
};

// The smallest bfloat16 that is not below a positive x.
bf16 round_up(float x) {
    bf16 found = to_bf16(x);
    if (to_float(found) < x) ++found.bits;
    return found;
}

// A group of up to 64 inputs of 32 rows of the weight, those that do not exist being 0.
void quantise_group(const bf16* weight, int64_t stride, int64_t rows, int64_t inputs, uint8_t* to) {
    alignas(64) uint8_t codes[OUTPUTS][64];
    for (int64_t o = 0; o < OUTPUTS; ++o) {
        alignas(64) float values[64] = {};
        if (o < rows)
            for (int64_t i = 0; i < inputs; ++i) values[i] = to_float(weight[o * stride + i]);
        const bf16 scale = round_up((o < rows ? largest(weight + o * stride, inputs) : 0.0f) / 127);
        const float divisor = scale.bits ? to_float(scale) : 1;
        for (int64_t i = 0; i < 64; ++i) codes[o][i] = static_cast<uint8_t>(std::nearbyint(values[i] / divisor) + 128);
        reinterpret_cast<bf16*>(to)[o] = scale;
    }
    uint8_t* at = to + 64;
    for (int64_t step = 0; step < 2; ++step)
        for (int64_t half = 0; half < 2; ++half)
            for (int64_t pair = 0; pair < 16; ++pair)
                for (int64_t o = 0; o < 16; ++o, at += 2) {
                    std::memcpy(at, &codes[16 * half + o][32 * step + 2 * pair], 2);
                }
}

struct Turned8 {
    static void fetch(const uint8_t* block, int64_t step) { quant::fetch(Int8::codes(block, step), 1024); }
    static int64_t block_bytes(int64_t inputs) { return Int8::block_bytes(inputs); }
    static void expand(const uint8_t* block, int64_t step, char* to) {
        expand_int8(Int8::codes(block, step), Scales(Int8::scales(block, step)), to, TILE_BYTES);
    }
};

}  // namespace
}  // namespace quant
}  // namespace tandem

using namespace tandem;
using namespace tandem::quant;

// y [m, n] = x [m, k] @ weight.T + bias (bfloat16 [n] or null) + what the parts add; strides in elements. `h` ([parts,
// m, rank], may be null) receives x a^T.
TANDEM_EXPORT void tandem_int8_forward(const bf16* x, int64_t x_stride, int64_t m, int64_t k, const uint8_t* weight,
                                       int64_t n, const bf16* bias, bf16* y, int64_t y_stride, const void* parts,
                                       int64_t num_parts, int64_t rank, const uint8_t* foreign,
                                       int64_t foreign_stride, bf16* h) {
    if (m == 0) return;
    Strips strips{nullptr, m, Int8::steps(k), STRETCH};
    bf16* packed = reinterpret_cast<bf16*>(activations().take(strips.bytes()));
    strips.tiles = packed;
    pack_rows<false>(x, x_stride, k, strips, packed);
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    const Forward8 op{weight, strips, bias, y, m, k, n, strips.steps, y_stride, LoraForward(lora, strips, k, h)};
#if defined(TANDEM_AMX)
    if (m <= PAIR) {
        const float* wide = m == 1 ? widen_row(x, k, strips.steps * TILE_TERMS) : nullptr;
        run_stream(op, divide_up(n, OUTPUTS), [&](int64_t index, float* sums) {
            if (m == 1) op.one_row(index, wide, sums);
            else if (m <= TILE_ROWS) op.stream_block<1>(index, sums);
            else op.stream_block<2>(index, sums);
        });
        return;
    }
#endif
    run_all(op, divide_up(n, OUTPUTS));
}

// gx [m, k] = gy [m, n] @ weight + what the parts add; `gh` ([parts, m, rank], may be null) receives the gradient of
// h = x a^T.
TANDEM_EXPORT void tandem_int8_backward(const bf16* gy, int64_t gy_stride, int64_t m, int64_t n, const uint8_t* weight,
                                        int64_t k, bf16* gx, int64_t gx_stride, const void* parts, int64_t num_parts,
                                        int64_t rank, const uint8_t* foreign, int64_t foreign_stride, bf16* gh) {
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    run_backward<Turned8>(gy, gy_stride, m, n, weight, k, gx, gx_stride, lora, gh);
}

// The bytes of weight [n, k], with the codes that `quantise_int8` of ops/quant.py finds.
TANDEM_EXPORT void tandem_int8_pack(const bf16* weight, int64_t stride, int64_t n, int64_t k, uint8_t* packed) {
    const int64_t groups = divide_up(k, 64);
    parallel_ranges(divide_up(n, OUTPUTS) * groups, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / groups * OUTPUTS, input = i % groups * 64;
            quantise_group(weight + row * stride + input, stride, std::min(OUTPUTS, n - row),
                           std::min<int64_t>(64, k - input), packed + i * Int8::group_bytes);
        }
    });
}

// The weight that the bytes stand for, [n, k].
TANDEM_EXPORT void tandem_int8_unpack(const uint8_t* packed, int64_t n, int64_t k, bf16* weight, int64_t stride) {
    unpack_tiles<Turned8>(packed, n, k, weight, stride);
}

// Rows `ids` of the weight, [count, k].
TANDEM_EXPORT void tandem_int8_rows(const uint8_t* packed, int64_t k, const int64_t* ids, int64_t count, bf16* rows) {
    parallel_ranges(count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const uint8_t* block = packed + ids[row] / OUTPUTS * Int8::block_bytes(k);
            const int64_t o = ids[row] % OUTPUTS;
            for (int64_t i = 0; i < k; ++i) {
                const int64_t step = i / 32, at = o / 16 * 512 + i % 32 / 2 * 32 + o % 16 * 2 + i % 2;
                const float code = static_cast<float>(Int8::codes(block, step)[at] - 128);
                rows[row * k + i] = to_bf16(code * to_float(Int8::scales(block, step)[o]));
            }
        }
    });
}
