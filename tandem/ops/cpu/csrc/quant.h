// Packed int8 and int4 weights, and the loop over the products they take part in; `tandem/ops/quant.py` defines the
// bytes, `tiles.h` the tiles.
//
// A weight [N, K] is stored in blocks of 32 outputs, each block in steps along K, so that a product reads it from the
// first byte to the last. A product expands a stretch of steps into the first-level cache as tiles and multiplies it
// with many rows. Every element of a product is summed in the order of its terms, whatever the number of rows, blocks
// and threads, so its bits depend on none of them.
#pragma once

#include "lora.h"
#include "vector.h"

namespace tandem {
namespace quant {

constexpr int64_t OUTPUTS = 32;           // of a block: two strips
constexpr int64_t PAIR = 2 * TILE_ROWS;   // rows multiplied at once
constexpr int64_t CELL = 4 * TILE_OUT;    // sums of a pair of rows' strips and a block's strips
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t STRETCH = 8;            // steps expanded at once
// Blocks that are multiplied in one go with as many rows (an operation's SUPER_PAIRS of their strips): a stretch of the
// rows and all sums stay in the second-level cache.
constexpr int64_t BLOCKS_AT_ONCE = 8;
constexpr int64_t LARGEST_GROUP = 32;  // blocks of a task

// int8: blocks of groups of 64 inputs: 32 scales (bfloat16), then two steps of 32 inputs, each [2][16 pairs of
// inputs][16 outputs][2]; a code is stored as code + 128.
struct Int8 {
    static constexpr int64_t group_bytes = 64 + 2 * 1024;
    static int64_t steps(int64_t inputs) { return divide_up(inputs, 32); }
    static int64_t block_bytes(int64_t inputs) { return divide_up(inputs, 64) * group_bytes; }
    static const uint8_t* group(const uint8_t* block, int64_t step) { return block + (step / 2) * group_bytes; }
    static const bf16* scales(const uint8_t* block, int64_t step) {
        return reinterpret_cast<const bf16*>(group(block, step));
    }
    static const uint8_t* codes(const uint8_t* block, int64_t step) {
        return group(block, step) + 64 + (step % 2) * 1024;
    }
};

// int4: blocks of 32 scales (float32), then steps of 64 inputs: [2 halves of the outputs][2 groups of 32 inputs]
// [multipliers, offsets][16 outputs], then [2][8 fours of inputs][16 outputs][4], the first group's codes in the low
// bits and the second's in the high ones. A code c stands for multiplier * c + offset, an int8.
struct Int4 {
    static constexpr int64_t head_bytes = 128, step_bytes = 128 + 1024;
    static int64_t steps(int64_t inputs) { return divide_up(inputs, 64); }
    static int64_t block_bytes(int64_t inputs) { return head_bytes + steps(inputs) * step_bytes; }
    static const uint8_t* step(const uint8_t* block, int64_t step) { return block + head_bytes + step * step_bytes; }
};

struct Place {
    int64_t block, step;
};

inline void fetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
}

inline Scratch& local_tiles() {
    static thread_local Scratch mine;
    return mine;
}

// Blocks [begin, end) times the pairs of rows' strips [low, low + pairs), in this thread. While a stretch is multiplied
// the next one is expanded, because the tiles leave the vector units idle, and the one after that is fetched. Sums of
// several blocks wait for the next stretch of their terms, so that the rows' part of it is used while it is near, and
// the blocks' results are written together: a line here and a line there takes long. `Op` says what a product is:
//   steps, rows, SUPER_PAIRS
//   expand(block, step, to): a step's two tiles, the second STRETCH tiles after the first
//   fetch(block, step): bring its bytes nearer
//   multiply(pair, tiles, step, length, sums, meanwhile): add a stretch; meanwhile() between its steps
//   finish(pair, begin, end, sums, apart): all is summed; a block's sums are `apart` numbers from the one's before
template <class Op>
void run_pairs(const Op& op, int64_t begin, int64_t end, int64_t low, int64_t pairs) {
    const int64_t steps = op.steps;
    char* const tiles = local_tiles().take(2 * 2 * STRETCH * TILE_BYTES);
    float* const sums = reinterpret_cast<float*>(local().take(pairs * BLOCKS_AT_ONCE * CELL * sizeof(float)));
    auto length_at = [&](Place place) { return std::min(STRETCH, steps - place.step); };
    auto first_of = [&](Place place) { return begin + (place.block - begin) / BLOCKS_AT_ONCE * BLOCKS_AT_ONCE; };
    // From block to block, then on to the next stretch, then to the next blocks.
    auto next = [&](Place place) {
        const int64_t first = first_of(place), last = std::min(first + BLOCKS_AT_ONCE, end);
        if (++place.block < last) return place;
        place.step += STRETCH;
        return place.step < steps ? Place{first, place.step} : Place{last, 0};
    };
    Place here{begin, 0};
    for (int64_t s = 0; s < length_at(here); ++s) op.expand(begin, s, tiles + s * TILE_BYTES);
    for (int64_t side = 0; here.block < end; side ^= 1) {
        const Place there = next(here), far = there.block < end ? next(there) : there;
        const int64_t length = length_at(here), slots = pairs * length, first = first_of(here);
        const int64_t coming = there.block < end ? length_at(there) : 0;
        const int64_t fetching = far.block < end ? length_at(far) : 0;
        char* const to = tiles + (side ^ 1) * 2 * STRETCH * TILE_BYTES;
        int64_t slot = 0, expanded = 0, fetched = 0;
        auto meanwhile = [&] {
            ++slot;
            for (; fetched * slots < slot * fetching; ++fetched) op.fetch(far.block, far.step + fetched);
            for (; expanded * slots < slot * coming; ++expanded)
                op.expand(there.block, there.step + expanded, to + expanded * TILE_BYTES);
        };
        float* const cells = sums + (here.block - first) * pairs * CELL;
        for (int64_t pair = 0; pair < pairs; ++pair)
            op.multiply(low + pair, tiles + side * 2 * STRETCH * TILE_BYTES, here.step, length, cells + pair * CELL,
                        meanwhile);
        if (here.step + length == steps && here.block + 1 == std::min(first + BLOCKS_AT_ONCE, end))
            for (int64_t pair = 0; pair < pairs; ++pair)
                op.finish(low + pair, first, here.block + 1, sums + pair * CELL, pairs * CELL);
        here = there;
    }
}

template <class Op>
void run_blocks(const Op& op, int64_t begin, int64_t end) {
    const TileRegisters registers;
    const int64_t pairs = divide_up(op.rows, PAIR);
    for (int64_t low = 0; low < pairs; low += Op::SUPER_PAIRS)
        run_pairs(op, begin, end, low, std::min(Op::SUPER_PAIRS, pairs - low));
}

// All blocks, by whichever thread is free.
template <class Op>
void run_all(const Op& op, int64_t blocks) {
    const int64_t group = std::clamp<int64_t>(blocks / (2 * omp_get_max_threads()), 1, LARGEST_GROUP);
    parallel_tasks(divide_up(blocks, group), [&](int64_t task) {
        run_blocks(op, task * group, std::min(blocks, (task + 1) * group));
    });
}

// Up to a pair of strips of rows: all blocks one after the other, as they come from memory. `multiply(index, cell)`
// makes a block's sums.
template <class Op, class Multiply>
void run_stream(const Op& op, int64_t blocks, const Multiply& multiply) {
    parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
        const TileRegisters registers;
        alignas(64) float sums[BLOCKS_AT_ONCE * CELL];
        for (int64_t first = begin; first < end; first += BLOCKS_AT_ONCE) {
            const int64_t last = std::min(first + BLOCKS_AT_ONCE, end);
            for (int64_t index = first; index < last; ++index) multiply(index, sums + (index - first) * CELL);
            op.finish(0, first, last, sums, CELL);
        }
    });
}

// `L` left strips times `R` right ones, STRETCH tiles apart, in bfloat16; sums are a cell's. `rows`: how many of the
// left strips' rows count.
template <int L, int R, class Meanwhile>
TANDEM_INLINE void multiply_strips(const bf16* left, int64_t rows, const bf16* right, int64_t steps, bool adds,
                                   float* sums, const Meanwhile& meanwhile) {
#if defined(TANDEM_AMX)
    (void)rows;
    constexpr int used[4] = {1, R == 2, L == 2, L == 2 && R == 2};
    unrolled<4>([&](auto i) {
        if constexpr (!used[i]) return;
        else if (adds) tile_load<i>(sums + i * TILE_OUT);
        else tile_zero<i>();
    });
    for (int64_t s = 0; s < steps; ++s, left += TILE, right += TILE) {
        tile_load<4>(left);
        tile_load<6>(right);
        tile_multiply<0, 4, 6>();
        if constexpr (R == 2) {
            tile_load<7>(right + STRETCH * TILE);
            tile_multiply<1, 4, 7>();
        }
        if constexpr (L == 2) {
            tile_load<5>(left + STRETCH * TILE);
            tile_multiply<2, 5, 6>();
            if constexpr (R == 2) tile_multiply<3, 5, 7>();
        }
        meanwhile();
    }
    unrolled<4>([&](auto i) {
        if constexpr (used[i]) tile_store<i>(sums + i * TILE_OUT);
    });
#else
    for (int64_t s = 0; s < steps; ++s) meanwhile();
    for (int64_t i = 0; i < L; ++i)
        for (int64_t j = 0; j < R; ++j)
            multiply_tiles<1, 1>(left + i * STRETCH * TILE, 0, right + j * STRETCH * TILE, 0, steps,
                                 sums + (2 * i + j) * TILE_OUT, adds, rows - i * TILE_ROWS, {});
#endif
}

// The largest magnitude of numbers, NaN if there is one: magnitudes order like their bits, and NaN's are above all.
inline float largest(const bf16* x, int64_t count) {
    uint16_t found = 0;
    for (int64_t i = 0; i < count; ++i) found = std::max<uint16_t>(found, x[i].bits & 0x7fff);
    return to_float(bf16{found});
}

// A group's 32 scales in the order that a tile's rows take them: each twice, for the two terms of a pair.
struct Scales {
#if defined(TANDEM_AVX512)
    __m512 twice[4];

    template <class T>
    TANDEM_INLINE explicit Scales(const T* scales) {
        const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (int half = 0; half < 2; ++half) {
            const __m512 of_half = load(scales + 16 * half).v;
            twice[2 * half] = _mm512_permutexvar_ps(low, of_half);
            twice[2 * half + 1] = _mm512_permutexvar_ps(high, of_half);
        }
    }
#else
    float once[OUTPUTS];

    template <class T>
    explicit Scales(const T* scales) {
        for (int64_t o = 0; o < OUTPUTS; ++o) once[o] = to_float(scales[o]);
    }
#endif
};

#if defined(TANDEM_AVX512)
// A row of a right tile: 32 codes, their outputs' scales.
TANDEM_INLINE void widen_row(__m128i first, __m128i second, const __m512* twice, bf16* to) {
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second));
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(b, twice[1]), _mm512_mul_ps(a, twice[0]));
    _mm512_storeu_si512(to, (__m512i)both);
}
#endif

#if defined(TANDEM_AVX512)
// Where the codes of two rows go: a float32 of exponent 15 whose second byte is a code is 32768 + code.
struct CodeLanes {
    alignas(64) uint8_t at[4][64];

    constexpr CodeLanes() : at() {
        for (int part = 0; part < 4; ++part)
            for (int lane = 0; lane < 16; ++lane) at[part][4 * lane + 1] = static_cast<uint8_t>(16 * part + lane);
    }
};
#endif

#if defined(TANDEM_AVX512)
// Two rows of a right tile from 64 int8 codes, times the scales of a half's outputs.
struct Widen8 {
    const __m512* scale;
    __m512 zero[2];

    TANDEM_INLINE explicit Widen8(const __m512* scale) : scale(scale) {
        const __m512 bias = _mm512_set1_ps(-(32768.0f + 128.0f));
        for (int part = 0; part < 2; ++part) zero[part] = _mm512_mul_ps(scale[part], bias);
    }

    TANDEM_INLINE void rows(const uint8_t* codes, __m512i* found) const {
        static constexpr CodeLanes lanes;
        const __m512i exponent = _mm512_set1_epi32(0x47000000), two = _mm512_loadu_si512(codes);
        __m512 values[4];
        for (int part = 0; part < 4; ++part) {
            const __m512i placed = _mm512_mask_permutexvar_epi8(exponent, 0x2222222222222222ull,
                                                                _mm512_load_si512(lanes.at[part]), two);
            // Exact: a product of 17 and 8 bits, of which the same is taken away.
            values[part] = _mm512_fmadd_ps(_mm512_castsi512_ps(placed), scale[part % 2], zero[part % 2]);
        }
        for (int r = 0; r < 2; ++r) found[r] = (__m512i)_mm512_cvtne2ps_pbh(values[2 * r + 1], values[2 * r]);
    }
};
#endif

// One step of int8 codes as two right tiles, `apart` bytes from each other. With FAR, the codes so many bytes further
// on are brought nearer, line by line: more than a few at once would hold up the loads after them.
template <int64_t FAR = 0>
TANDEM_INLINE void expand_int8(const uint8_t* codes, const Scales& scales, char* to, int64_t apart) {
    for (int half = 0; half < 2; ++half) {
        bf16* tile = reinterpret_cast<bf16*>(to + half * apart);
#if defined(TANDEM_AVX512)
        const Widen8 widen(scales.twice + 2 * half);
#pragma GCC unroll 8
        for (int64_t p = 0; p < 16; p += 2) {
            const uint8_t* row = codes + half * 512 + p * 32;
            if (FAR) _mm_prefetch(reinterpret_cast<const char*>(row) + FAR, _MM_HINT_T1);
            __m512i found[2];
            widen.rows(row, found);
            for (int r = 0; r < 2; ++r) _mm512_storeu_si512(tile + (p + r) * 32, found[r]);
        }
#else
        for (int64_t p = 0; p < 16; ++p)
            for (int64_t i = 0; i < 32; ++i) {
                const int code = codes[half * 512 + p * 32 + i] - 128;
                tile[p * 32 + i] = to_bf16(static_cast<float>(code) * scales.once[half * 16 + i / 2]);
            }
#endif
    }
}

inline Scratch& activations() {
    static thread_local Scratch mine;
    return mine;
}

// The gradient of x from that of y, [rows, outputs], through one packed weight. `Format` expands a step of 32 inputs of
// a block to two right tiles; turned they are left tiles whose rows are inputs, so that sums come out transposed.
// A "block" of the loop is such a step, its "steps" are the weight's blocks.
template <class Format>
struct Backward {
    static constexpr int64_t SUPER_PAIRS = 8;
    const uint8_t* weight;
    Strips strips;  // the gradient of y as right strips
    bf16* gx;
    int64_t rows, inputs, steps, stride;
    LoraBackward lora;

    const uint8_t* block(int64_t index) const { return weight + index * Format::block_bytes(inputs); }

    void expand(int64_t unit, int64_t index, char* to) const {
        alignas(64) char tiles[2 * TILE_BYTES];
        Format::expand(block(index), unit, tiles);
        turn(reinterpret_cast<bf16*>(tiles), reinterpret_cast<bf16*>(tiles + TILE_BYTES), reinterpret_cast<bf16*>(to),
             reinterpret_cast<bf16*>(to + STRETCH * TILE_BYTES));
    }

    void fetch(int64_t unit, int64_t index) const { Format::fetch(block(index), unit); }

    template <class Meanwhile>
    void multiply(int64_t pair, const char* tiles, int64_t step, int64_t length, float* sums,
                  const Meanwhile& meanwhile) const {
        const bf16 *left = reinterpret_cast<const bf16*>(tiles), *right = strips.at(2 * pair, step);
        if (rows - pair * PAIR > TILE_COLUMNS) {
            multiply_strips<2, 2>(left, PAIR, right, length, step > 0, sums, meanwhile);
        } else {
            multiply_strips<2, 1>(left, PAIR, right, length, step > 0, sums, meanwhile);
        }
    }

    void finish(int64_t pair, int64_t begin, int64_t end, float* sums, int64_t apart) const {
        const int64_t row = pair * PAIR, strips_here = divide_up(std::min(PAIR, rows - row), TILE_COLUMNS);
        for (int64_t unit = begin; unit < end; ++unit)
            lora.add(unit, 2 * pair, strips_here, sums + (unit - begin) * apart, 2 * TILE_OUT);
        for (int64_t j = 0; j < strips_here; ++j) {
            alignas(64) float turned[BLOCKS_AT_ONCE][2][TILE_OUT];
            for (int64_t unit = begin; unit < end; ++unit)
                for (int64_t i = 0; i < 2; ++i)
                    transpose_lanes(sums + (unit - begin) * apart + (2 * i + j) * TILE_OUT, turned[unit - begin][i]);
            const int64_t first = row + j * TILE_COLUMNS;
            for (int64_t r = 0; r < std::min(TILE_COLUMNS, rows - first); ++r)
                for (int64_t unit = begin; unit < end; ++unit) {
                    const float(*of_unit)[TILE_OUT] = turned[unit - begin];
                    const int64_t input = unit * TILE_TERMS;
                    store_rows(gx + (first + r) * stride + input, of_unit[0] + 16 * r, of_unit[1] + 16 * r,
                               inputs - input);
                }
        }
    }
};

template <class Format>
void run_backward(const bf16* gy, int64_t gy_stride, int64_t m, int64_t n, const uint8_t* weight, int64_t k, bf16* gx,
                  int64_t gx_stride, const Lora& lora, bf16* gh) {
    if (m == 0) return;
    Strips strips{nullptr, m, divide_up(n, OUTPUTS), STRETCH};
    bf16* packed = reinterpret_cast<bf16*>(activations().take(strips.bytes()));
    strips.tiles = packed;
    pack_rows<true>(gy, gy_stride, n, strips, packed);
    const Backward<Format> op{weight, strips, gx, m, k, strips.steps, gx_stride, LoraBackward(lora, strips, k, gh)};
    run_all(op, divide_up(k, TILE_TERMS));
}

// Sums of up to BLOCKS_AT_ONCE blocks for a pair of rows' strips, plus what LoRA adds, plus bias (may be null), to y.
inline void store_outputs(float* sums, int64_t apart, int64_t pair, int64_t begin, int64_t end, int64_t rows,
                          int64_t outputs, const LoraForward& lora, const bf16* bias, bf16* y, int64_t stride) {
    const int64_t first = pair * PAIR, count = std::min(PAIR, rows - first);
    const Terms* added[2 * BLOCKS_AT_ONCE];
    lora.terms(2 * begin, 2 * end, added);
    for (int64_t block = begin; block < end; ++block) {
        float* cell = sums + (block - begin) * apart;
        for (int64_t j = 0; j < 2; ++j)
            lora.add(added[2 * (block - begin) + j], 2 * pair, divide_up(count, TILE_ROWS), cell + j * TILE_OUT,
                     2 * TILE_OUT);
        if (!bias) continue;
        for (int64_t c = 0; c < std::min(OUTPUTS, outputs - block * OUTPUTS); ++c) {
            const float value = to_float(bias[block * OUTPUTS + c]);
            float* at = cell + c / TILE_COLUMNS * TILE_OUT + c % TILE_COLUMNS;
            for (int64_t r = 0; r < count; ++r) at[r / TILE_ROWS * 2 * TILE_OUT + r % TILE_ROWS * 16] += value;
        }
    }
    for (int64_t r = 0; r < count; ++r)
        for (int64_t block = begin; block < end; ++block) {
            const float* from = sums + (block - begin) * apart + r / TILE_ROWS * 2 * TILE_OUT + r % TILE_ROWS * 16;
            bf16* to = y + (first + r) * stride + block * OUTPUTS;
            store_rows(to, from, from + TILE_OUT, outputs - block * OUTPUTS, rows * outputs > STAYING);
        }
    finish_stores();
}

// A packed weight as rows of bfloat16.
template <class Format>
void unpack_tiles(const uint8_t* packed, int64_t n, int64_t k, bf16* weight, int64_t stride) {
    const int64_t steps = divide_up(k, TILE_TERMS);
    parallel_ranges(divide_up(n, OUTPUTS) * steps, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            alignas(64) bf16 tiles[2 * TILE];
            const int64_t first = i / steps * OUTPUTS, input = i % steps * TILE_TERMS;
            Format::expand(packed + i / steps * Format::block_bytes(k), i % steps, reinterpret_cast<char*>(tiles));
            for (int64_t o = 0; o < std::min(OUTPUTS, n - first); ++o)
                for (int64_t t = 0; t < std::min(TILE_TERMS, k - input); ++t)
                    weight[(first + o) * stride + input + t] = tiles[o / 16 * TILE + t / 2 * 32 + o % 16 * 2 + t % 2];
        }
    });
}

}  // namespace quant
}  // namespace tandem
