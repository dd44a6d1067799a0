// Linear layers with int8 weights and bfloat16 activations: codes become bfloat16 on their way, times their group's
// scale, so that activations lose nothing.
//
// Shape letters as in ops/quant.py: M rows, K input and N output features.

#include <cmath>

#include "quant.h"

namespace tandem {
namespace quant {
namespace {

struct Forward8 {
    const uint8_t* weight;
    const char* strips;  // x as left strips
    const bf16* bias;
    bf16* y;
    int64_t rows, inputs, outputs, steps, stride;

    const uint8_t* block(int64_t index) const { return weight + index * Int8::block_bytes(inputs); }

    void expand(int64_t index, int64_t step, char* to) const {
        const uint8_t* of_block = block(index);
        expand_int8(Int8::codes(of_block, step), Scales(Int8::scales(of_block, step)), to, STRETCH * TILE_BYTES);
    }

    void fetch(int64_t index, int64_t step) const { quant::fetch(Int8::codes(block(index), step), 1024); }

    template <class Meanwhile>
    void multiply(int64_t pair, const char* tiles, int64_t step, int64_t length, float* sums,
                  const Meanwhile& meanwhile) const {
        const int64_t count = std::min(PAIR, rows - pair * PAIR);
        multiply_wide(strips + rows_place(divide_up(rows, TILE_ROWS), 2 * pair, step), count > TILE_ROWS ? 2 : 1, count,
                      tiles, 2, length, step > 0, sums, meanwhile);
    }

    void finish(int64_t pair, int64_t index, const float* sums) const {
        const int64_t row = pair * PAIR, column = index * OUTPUTS;
        store_cell(sums, std::min(PAIR, rows - row), outputs - column, nullptr, bias ? bias + column : nullptr,
                   y + row * stride + column, stride);
    }

#if defined(TANDEM_AMX)
    // Up to 32 rows: sums stay in the tiles for a whole block, and a step is expanded while an earlier one multiplies.
    void stream(int64_t begin, int64_t end) const {
        const TileRegisters registers;
        alignas(64) float sums[CELL];
        for (int64_t index = begin; index < end; ++index) {
            if (rows > TILE_ROWS) stream_block<true>(index, sums);
            else stream_block<false>(index, sums);
            finish(0, index, sums);
        }
    }

    template <bool BOTH>
    void stream_block(int64_t index, float* sums) const {
        constexpr int64_t RING = 4, BEHIND = 2, FAR = 2 * Int8::group_bytes;
        alignas(64) char ring[RING][2 * TILE_BYTES];
        const uint8_t* group = block(index);
        unrolled<BOTH ? 4 : 2>([&](auto i) { tile_zero<i>(); });
        auto product = [&](int64_t s) {
            const char* right = ring[s % RING];
            tile_load<4>(strips + rows_place(BOTH ? 2 : 1, 0, s));
            tile_load<6>(right);
            tile_multiply<0, 4, 6>();
            tile_load<7>(right + TILE_BYTES);
            tile_multiply<1, 4, 7>();
            if constexpr (BOTH) {
                tile_load<5>(strips + rows_place(2, 1, s));
                tile_multiply<2, 5, 6>();
                tile_multiply<3, 5, 7>();
            }
        };
        for (int64_t s = 0; s < steps; s += 2, group += Int8::group_bytes) {
            const Scales scales(reinterpret_cast<const bf16*>(group));
            _mm_prefetch(reinterpret_cast<const char*>(group + FAR), _MM_HINT_T0);
            if (s >= BEHIND) product(s - BEHIND);
            expand_int8<FAR>(group + 64, scales, ring[s % RING], TILE_BYTES);
            if (s >= BEHIND) product(s + 1 - BEHIND);
            expand_int8<FAR>(group + 64 + 1024, scales, ring[(s + 1) % RING], TILE_BYTES);
        }
        for (int64_t s = std::max<int64_t>(0, steps - BEHIND); s < steps; ++s) product(s);
        unrolled<BOTH ? 4 : 2>([&](auto i) { tile_store<i>(sums + i * TILE_OUT); });
    }
#endif
};

// x as left strips of `steps` tiles.
const char* pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t terms, int64_t steps) {
    const int64_t strips = divide_up(rows, TILE_ROWS);
    char* packed = activations().take(rows_bytes(strips, steps));
    parallel_ranges(strips * steps, 512, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i % strips * TILE_ROWS, step = i / strips, term = step * TILE_TERMS;
            pack_left(x + row * stride + term, stride, rows - row, terms - term,
                      reinterpret_cast<bf16*>(packed + rows_place(strips, i % strips, step)));
        }
    });
    return packed;
}

// The smallest bfloat16 that is not below a positive x.
bf16 round_up(float x) {
    bf16 found = to_bf16(x);
    if (to_float(found) < x) ++found.bits;
    return found;
}

// A group of up to 64 inputs of 32 rows of the weight, those that do not exist being 0.
void quantise_group(const bf16* weight, int64_t stride, int64_t rows, int64_t inputs, uint8_t* to) {
    alignas(64) int8_t codes[OUTPUTS][64];
    for (int64_t o = 0; o < OUTPUTS; ++o) {
        alignas(64) float values[64] = {};
        if (o < rows)
            for (int64_t i = 0; i < inputs; ++i) values[i] = to_float(weight[o * stride + i]);
        const bf16 scale = round_up((o < rows ? largest(weight + o * stride, inputs) : 0.0f) / 127);
        const float divisor = scale.bits ? to_float(scale) : 1;
        for (int64_t i = 0; i < 64; ++i) codes[o][i] = static_cast<int8_t>(std::nearbyint(values[i] / divisor));
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
    static int64_t block_bytes(int64_t inputs) { return Int8::block_bytes(inputs); }
    static void expand(const uint8_t* block, int64_t step, char* to) {
        expand_int8(Int8::codes(block, step), Scales(Int8::scales(block, step)), to, TILE_BYTES);
    }
    static void fetch(const uint8_t* block, int64_t step) { quant::fetch(Int8::codes(block, step), 1024); }
};

}  // namespace
}  // namespace quant
}  // namespace tandem

using namespace tandem;
using namespace tandem::quant;

// y [m, n] = x [m, k] @ weight.T + bias (bfloat16 [n] or null); strides in elements.
TANDEM_EXPORT void tandem_int8_forward(const bf16* x, int64_t x_stride, int64_t m, int64_t k, const uint8_t* weight,
                                       int64_t n, const bf16* bias, bf16* y, int64_t y_stride) {
    const int64_t steps = Int8::steps(k), blocks = divide_up(n, OUTPUTS);
    for (int64_t row = 0; row < m; row += MOST_ROWS) {
        const int64_t rows = std::min(MOST_ROWS, m - row);
        Forward8 op{weight, nullptr, bias, y + row * y_stride, rows, k, n, steps, y_stride};
        op.strips = pack_rows(x + row * x_stride, x_stride, rows, k, steps);
        parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
#if defined(TANDEM_AMX)
            if (rows <= PAIR) return op.stream(begin, end);
#endif
            run_blocks(op, begin, end);
        });
    }
}

// gx [m, k] = gy [m, n] @ weight.
TANDEM_EXPORT void tandem_int8_backward(const bf16* gy, int64_t gy_stride, int64_t m, int64_t n, const uint8_t* weight,
                                        int64_t k, bf16* gx, int64_t gx_stride) {
    run_backward<Turned8>(gy, gy_stride, m, n, weight, k, gx, gx_stride);
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
                const float code = static_cast<int8_t>(Int8::codes(block, step)[at]);
                rows[row * k + i] = to_bf16(code * to_float(Int8::scales(block, step)[o]));
            }
        }
    });
}
