// Linear layers in bfloat16: y = x W^T + bias, its input gradient from the same packed bytes, and LoRA inside both.
//
// A packed weight [N, K] is panels of 16 output columns, an even number of them, each a strip of right tiles along K
// (`tiles.h`); what pads it is zero. LoRA is in `lora.h`.
//
// Shape letters as in ops/linear.py: M rows, K input and N output features, R rank rows of one part.

#include <memory>

#include "lora.h"

namespace tandem {
namespace {

// Rows whose activations stay in the second-level cache while the weights pass by, and how much of them: more than half
// a megabyte and they leave it again, beside the weights and the sums of a group.
constexpr int64_t SUPER_STRIPS = 32;
constexpr int64_t CACHED_BYTES = 1 << 19;
constexpr int64_t LARGEST_GROUP = 16;
constexpr int64_t BLOCK_OUT = 4 * TILE_OUT;  // numbers of two strips by two
// Tiles of two weight strips that stay in the first-level cache while the activations pass by. Up to FEW_BLOCKS blocks of
// two strips of rows, reading the weights takes as long as multiplying: fewer at once, so that both go on all the time.
constexpr int64_t NEAR_STEPS = 16;
constexpr int64_t FEW_BLOCKS = 6, FEW_NEAR_STEPS = 4;
// Mostly within the page that is being read: a line in another one makes the processor read ahead there as well. For up
// to FEW_BLOCKS blocks, and for at most NARROW strips of rows.
constexpr int64_t FEW_BYTES = 3072, PREFETCH_BYTES = 2560;

// Strips of rows up to which weights come from memory no faster than they are used.
#if defined(TANDEM_AMX)
constexpr int64_t NARROW = 2;
#else
constexpr int64_t NARROW = 1;
#endif

struct Buffers {
    Scratch activations, factors;
};

Buffers& buffers() {
    static thread_local Buffers mine;
    return mine;
}

int64_t group_size(int64_t units) {
    return std::clamp<int64_t>(units / (2 * omp_get_max_threads()), 1, LARGEST_GROUP);
}

// ---------------------------------------------------------------- forward

struct Forward {
    const bf16* strips;  // x as left strips
    int64_t rows, steps;
    const bf16* weight;
    int64_t columns;
    const bf16* bias;
    bf16* y;
    int64_t y_stride;
    LoraForward lora;

    int64_t num_strips() const { return divide_up(rows, TILE_ROWS); }

    // A panel's bias, to products of `count` strips that are `apart` from each other.
    void add_bias(int64_t panel, int64_t count, float* out, int64_t apart) const {
        const int64_t column = panel * TILE_COLUMNS;
        for (int64_t c = 0; c < std::min(TILE_COLUMNS, columns - column); ++c)
            for (int64_t r = 0; r < count * TILE_ROWS; ++r)
                out[r / TILE_ROWS * apart + r % TILE_ROWS * 16 + c] += to_float(bias[column + c]);
    }

    // `rights` panels' sums to y.
    void finish(int64_t rights, int64_t panel, float* out) const {
        const int64_t column = panel * TILE_COLUMNS;
        for (int64_t j = 0; bias && j < rights; ++j)
            add_bias(panel + j, num_strips(), out + j * TILE_OUT, rights * TILE_OUT);
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = out + r / TILE_ROWS * rights * TILE_OUT + r % TILE_ROWS * 16;
            bf16* to = y + r * y_stride + column;
            if (rights == 2) store_rows(to, from, from + TILE_OUT, columns - column);
            else store_row(to, from, columns - column);
        }
    }

    // At most NARROW strips of rows, L of them: R panels after the others, as they come from memory.
    template <int L, int R>
    void narrow(int64_t begin, int64_t end) const {
        const TileRegisters registers;
        alignas(64) float out[L * R * TILE_OUT];
        // Together, because each reads a little of many rows.
        const Terms* added[LARGEST_GROUP];
        lora.terms(begin, end, added);
        int64_t panel = begin;
        for (; panel + R <= end; panel += R) {
            multiply_stream<L, R>(strips, steps * TILE, weight + panel * steps * TILE, steps * TILE, steps, out, rows,
                                  PREFETCH_BYTES, added + (panel - begin));
            finish(R, panel, out);
        }
        if constexpr (R == 2)
            if (panel < end) narrow<L, 1>(panel, end);
    }

    void narrow(int64_t begin, int64_t end) const {
        switch (num_strips()) {
            case 1: return narrow<1, 1>(begin, end);
#if defined(TANDEM_AMX)
            case 2: return narrow<2, 2>(begin, end);
#endif
        }
    }

    // Many rows: pairs of panels [begin, end) by as many rows as stay in the cache, those in blocks of two strips. All
    // sums wait in the cache for the last terms.
    void wide(int64_t begin, int64_t end) const {
        const TileRegisters registers;
        for (int64_t low = 0; low < num_strips(); low += SUPER_STRIPS) {
            const int64_t count = std::min(SUPER_STRIPS, num_strips() - low), blocks = divide_up(count, 2);
            const int64_t chunks = divide_up(count * steps * TILE * 2, CACHED_BYTES), per = divide_up(steps, chunks);
            const bool few = blocks <= FEW_BLOCKS;
            const int64_t most = few ? FEW_NEAR_STEPS : NEAR_STEPS;
            float* sums = reinterpret_cast<float*>(local().take((end - begin) * blocks * BLOCK_OUT * 4));
            for (int64_t at = 0; at < steps; at += per) {
                const int64_t length = std::min(per, steps - at);
                for (int64_t pair = begin; pair < end; ++pair) {
                    const int64_t next = low == 0 && pair + 1 < end ? 4 * steps * TILE : 0;
                    for (int64_t near = at; near < at + length; near += most)
                        multiply_pair(pair, near, std::min(most, at + length - near), low, count,
                                      sums + (pair - begin) * blocks * BLOCK_OUT, few ? FEW_BYTES : next);
                }
            }
            finish_pairs(begin, end, low, count, sums);
        }
    }

    // The tiles [at, at + length) of a pair of panels by `count` strips of rows. Those that lie `far` bytes further on
    // (0: none) come into the cache meanwhile: the first half of the blocks reads one panel's, the second the other's.
    void multiply_pair(int64_t pair, int64_t at, int64_t length, int64_t low, int64_t count, float* sums,
                       int64_t far) const {
        const int64_t blocks = divide_up(count, 2);
        const int64_t half = divide_up(blocks, 2), lines = far ? divide_up(16, half) : 0;
        const bf16* right = weight + (2 * pair * steps + at) * TILE;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = low + 2 * block, lefts = std::min<int64_t>(2, low + count - first);
            const char* panel = reinterpret_cast<const char*>(right + block / half * steps * TILE);
            multiply_block<Side::LEFT>(lefts, 2, strips + (first * steps + at) * TILE, steps * TILE, right,
                                       steps * TILE, length, sums + block * BLOCK_OUT, at > 0, lefts * TILE_ROWS,
                                       {panel + far + block % half * lines * LINE * length, lines});
        }
    }

    // Add what LoRA adds, then to y: a row's numbers of all pairs together, because rows lie on different pages.
    void finish_pairs(int64_t begin, int64_t end, int64_t low, int64_t count, float* sums) const {
        const Terms* added[2 * LARGEST_GROUP];
        lora.terms(2 * begin, std::min(2 * end, divide_up(columns, TILE_COLUMNS)), added);
        const int64_t apart = divide_up(count, 2) * BLOCK_OUT;
        for (int64_t first = low; first < low + count; first += 2, sums += BLOCK_OUT) {
            const int64_t lefts = std::min<int64_t>(2, low + count - first);
            for (int64_t pair = begin; pair < end; ++pair) {
                float* out = sums + (pair - begin) * apart;
                for (int64_t j = 0; j < 2 && (2 * pair + j) * TILE_COLUMNS < columns; ++j) {
                    lora.add(added[2 * (pair - begin) + j], first, lefts, out + j * TILE_OUT, 2 * TILE_OUT);
                    if (bias) add_bias(2 * pair + j, lefts, out + j * TILE_OUT, 2 * TILE_OUT);
                }
            }
            for (int64_t r = 0; r < std::min(rows - first * TILE_ROWS, 2 * TILE_ROWS); ++r) {
                const float* from = sums + r / TILE_ROWS * 2 * TILE_OUT + r % TILE_ROWS * 16;
                bf16* to = y + (first * TILE_ROWS + r) * y_stride;
                for (int64_t pair = begin; pair < end; ++pair, from += apart) {
                    const int64_t column = 2 * pair * TILE_COLUMNS;
                    store_rows(to + column, from, from + TILE_OUT, columns - column, rows * columns > STAYING);
                }
            }
        }
        finish_stores();
    }

    void run() const {
        const int64_t panels = divide_up(columns, TILE_COLUMNS);
        if (num_strips() <= NARROW) {
            const int64_t group = 2 * divide_up(group_size(panels), 2);
            parallel_tasks(divide_up(panels, group), [&](int64_t task) {
                narrow(task * group, std::min(panels, (task + 1) * group));
            });
        } else {
            const int64_t pairs = divide_up(panels, 2), group = group_size(pairs);
            parallel_tasks(divide_up(pairs, group), [&](int64_t task) {
                wide(task * group, std::min(pairs, (task + 1) * group));
            });
        }
    }
};

// ---------------------------------------------------------------- backward

struct Backward {
    const bf16* strips;  // the gradient of y as right strips along the columns
    int64_t rows, steps; // steps along the columns
    const bf16* weight;
    int64_t terms;       // K
    bf16* gx;
    int64_t gx_stride;
    LoraBackward lora;

    int64_t num_strips() const { return divide_up(rows, TILE_COLUMNS); }
    int64_t weight_steps() const { return divide_up(terms, TILE_TERMS); }

    // Units [begin, end): 32 terms of the weight each.
    void run_units(int64_t begin, int64_t end) const {
        const TileRegisters registers;
        for (int64_t low = 0; low < num_strips(); low += SUPER_STRIPS) {
            const int64_t count = std::min(SUPER_STRIPS, num_strips() - low), blocks = divide_up(count, 2);
            const int64_t chunks = divide_up(count * steps * TILE * 2, CACHED_BYTES), per = divide_up(steps, chunks);
            const int64_t out_bytes = (end - begin) * blocks * BLOCK_OUT * 4;
            char* memory = local().take(out_bytes + 2 * NEAR_STEPS * TILE * 2);
            float* sums = reinterpret_cast<float*>(memory);
            bf16* turned = reinterpret_cast<bf16*>(memory + out_bytes);
            for (int64_t at = 0; at < steps; at += per) {
                const int64_t length = std::min(per, steps - at);
                for (int64_t unit = begin; unit < end; ++unit)
                    for (int64_t near = at; near < at + length; near += NEAR_STEPS) {
                        const int64_t some = std::min(NEAR_STEPS, at + length - near);
                        turn_unit(unit, near, some, turned);
                        multiply_unit(near, some, low, count, turned, sums + (unit - begin) * blocks * BLOCK_OUT);
                    }
            }
            finish_units(begin, end, low, count, sums);
        }
    }

    // The tiles [at, at + length) of a unit, turned, by `count` strips of rows.
    void multiply_unit(int64_t at, int64_t length, int64_t low, int64_t count, const bf16* turned, float* sums) const {
        for (int64_t first = low; first < low + count; first += 2) {
            const int64_t rights = std::min<int64_t>(2, low + count - first);
            float* out = sums + (first - low) / 2 * BLOCK_OUT;
            multiply_block<Side::RIGHT>(2, rights, turned, length * TILE, strips + (first * steps + at) * TILE,
                                        steps * TILE, length, out, at > 0, 2 * TILE_ROWS, {});
        }
    }

    void turn_unit(int64_t unit, int64_t at, int64_t length, bf16* turned) const {
        const int64_t panel_stride = weight_steps() * TILE;
        for (int64_t step = 0; step < length; ++step) {
            const bf16* right = weight + 2 * (at + step) * panel_stride + unit * TILE;
            // Tiles of one unit are far apart: nothing but this reads them ahead.
            if (step + 2 < length)
                for (int64_t line = 0; line < 16; ++line) {
                    _mm_prefetch(reinterpret_cast<const char*>(right + 4 * panel_stride) + 64 * line, _MM_HINT_T0);
                    _mm_prefetch(reinterpret_cast<const char*>(right + 5 * panel_stride) + 64 * line, _MM_HINT_T0);
                }
            turn(right, right + panel_stride, turned + step * TILE, turned + (length + step) * TILE);
        }
    }

    // Add what LoRA adds, then to gx: a row's numbers of all units together, as on the way up.
    void finish_units(int64_t begin, int64_t end, int64_t low, int64_t count, float* sums) const {
        const int64_t apart = divide_up(count, 2) * BLOCK_OUT;
        alignas(64) float turned[LARGEST_GROUP][2][TILE_OUT];
        for (int64_t strip = low; strip < low + count; ++strip) {
            const int64_t j = (strip - low) % 2, rights = std::min<int64_t>(2, low + count - (strip - j));
            float* const of_block = sums + (strip - low) / 2 * BLOCK_OUT;
            for (int64_t unit = begin; unit < end; ++unit) {
                float* out = of_block + (unit - begin) * apart;
                if (j == 0) lora.add(unit, strip, rights, out, rights * TILE_OUT);
                for (int64_t i = 0; i < 2; ++i)
                    transpose_lanes(out + (i * rights + j) * TILE_OUT, turned[unit - begin][i]);
            }
            for (int64_t r = 0; r < std::min(rows - strip * TILE_COLUMNS, TILE_COLUMNS); ++r) {
                bf16* to = gx + (strip * TILE_COLUMNS + r) * gx_stride;
                for (int64_t unit = begin; unit < end; ++unit) {
                    const float(*of_unit)[TILE_OUT] = turned[unit - begin];
                    const int64_t term = unit * TILE_TERMS;
                    store_rows(to + term, of_unit[0] + 16 * r, of_unit[1] + 16 * r, terms - term);
                }
            }
        }
    }
};

}  // namespace
}  // namespace tandem

using namespace tandem;

// Bytes of a packed [n, k] weight are 1024 * 2 * ceil(n / 32) * ceil(k / 32).
TANDEM_EXPORT void tandem_matmul_pack(const bf16* weight, int64_t stride, int64_t n, int64_t k, bf16* packed) {
    const int64_t steps = divide_up(k, TILE_TERMS), panels = 2 * divide_up(n, 2 * TILE_COLUMNS);
    parallel_ranges(panels * steps, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t column = i / steps * TILE_COLUMNS, term = i % steps * TILE_TERMS;
            pack_right(weight + column * stride + term, stride, n - column, k - term, packed + i * TILE);
        }
    });
}

TANDEM_EXPORT void tandem_matmul_unpack(const bf16* packed, int64_t n, int64_t k, bf16* weight, int64_t stride) {
    const int64_t steps = divide_up(k, TILE_TERMS);
    parallel_ranges(n, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            for (int64_t term = 0; term < k; ++term) {
                const bf16* tile = packed + (row / TILE_COLUMNS * steps + term / TILE_TERMS) * TILE;
                weight[row * stride + term] = tile[term % 32 / 2 * 32 + 2 * (row % 16) + term % 2];
            }
    });
}

// Rows `ids` of the packed [n, k] weight, one after the other: an embedding that shares its bytes with the head.
TANDEM_EXPORT void tandem_matmul_rows(const bf16* packed, int64_t k, const int64_t* ids, int64_t count, bf16* rows) {
    const int64_t steps = divide_up(k, TILE_TERMS);
    parallel_ranges(count, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const bf16* from = packed + ids[i] / TILE_COLUMNS * steps * TILE + 2 * (ids[i] % TILE_COLUMNS);
            for (int64_t term = 0; term < k; term += 2)
                std::memcpy(rows + i * k + term, from + term / 2 * 32, term + 1 < k ? 4 : 2);
        }
    });
}

// y = x w^T + bias + what the parts add. `bias`, `foreign` and `h` ([parts, m, r], receives x a^T) may be null.
TANDEM_EXPORT void tandem_matmul_forward(const bf16* x, int64_t x_stride, int64_t m, int64_t k, const bf16* weight,
                                         int64_t n, const bf16* bias, bf16* y, int64_t y_stride, const void* parts,
                                         int64_t num_parts, int64_t rank, const uint8_t* foreign,
                                         int64_t foreign_stride, bf16* h) {
    Forward forward{};
    forward.rows = m, forward.steps = divide_up(k, TILE_TERMS), forward.weight = weight, forward.columns = n;
    forward.bias = bias, forward.y = y, forward.y_stride = y_stride;
    const Strips strips{nullptr, m, forward.steps, forward.steps};
    bf16* packed = reinterpret_cast<bf16*>(buffers().activations.take(strips.bytes()));
    pack_rows<false>(x, x_stride, k, strips, packed);
    forward.strips = packed;
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    forward.lora = LoraForward(lora, {packed, m, forward.steps, forward.steps}, k, h);
    forward.run();
}

// gx = gy w + what the parts add; `gh` ([parts, m, r], may be null) receives the gradient of h = x a^T.
TANDEM_EXPORT void tandem_matmul_backward(const bf16* gy, int64_t gy_stride, int64_t m, int64_t n, const bf16* weight,
                                          int64_t k, bf16* gx, int64_t gx_stride, const void* parts,
                                          int64_t num_parts, int64_t rank, const uint8_t* foreign,
                                          int64_t foreign_stride, bf16* gh) {
    Backward backward{};
    backward.rows = m, backward.steps = divide_up(n, TILE_TERMS), backward.weight = weight, backward.terms = k;
    backward.gx = gx, backward.gx_stride = gx_stride;
    const Strips strips{nullptr, m, backward.steps, backward.steps};
    bf16* packed = reinterpret_cast<bf16*>(buffers().activations.take(strips.bytes()));
    pack_rows<true>(gy, gy_stride, n, strips, packed);
    backward.strips = packed;
    const Lora lora{static_cast<const LoraPart*>(parts), rank > 0 ? num_parts : 0, rank, foreign, foreign_stride};
    backward.lora = LoraBackward(lora, {packed, m, backward.steps, backward.steps}, k, gh);
    const int64_t units = backward.weight_steps(), group = group_size(units);
    parallel_tasks(divide_up(units, group), [&](int64_t task) {
        backward.run_units(task * group, std::min(units, (task + 1) * group));
    });
}

// out[r, o] += scale * sum over rows of h[row, r] * g[row, o]: the gradient of a factor, in float32.
TANDEM_EXPORT void tandem_matmul_outer(const bf16* h, int64_t h_stride, const bf16* g, int64_t g_stride, int64_t m,
                                       int64_t r, int64_t n, float scale, float* out, int64_t out_stride) {
    constexpr int64_t UNIT = 4;  // strips of columns at once: neighbouring cache lines
    const int64_t steps = divide_up(m, TILE_TERMS), lefts = divide_up(r, TILE_ROWS);
    bf16* left = reinterpret_cast<bf16*>(buffers().factors.take(lefts * steps * TILE * 2));
    parallel_ranges(lefts * steps, 64, [&](int64_t begin, int64_t end) {
        alignas(64) bf16 columns[TILE];
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i % steps * TILE_TERMS, low = i / steps * TILE_ROWS;
            // A right tile's lanes are (column, pair of terms); transposed they are a left tile's.
            pack_right_rows(h + row * h_stride + low, h_stride, m - row, 0, std::min(r - low, TILE_ROWS), columns);
            transpose_lanes(columns, left + i * TILE);
        }
    });
    const int64_t strips = divide_up(n, TILE_COLUMNS);
    parallel_tasks(divide_up(strips, UNIT), [&](int64_t task) {
        const TileRegisters registers;
        const int64_t first = task * UNIT, count = std::min(UNIT, strips - first);
        bf16* right = reinterpret_cast<bf16*>(local().take(UNIT * steps * TILE * 2));
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t j = 0; j < count; ++j) {
                const int64_t column = (first + j) * TILE_COLUMNS;
                pack_right_rows(g + step * TILE_TERMS * g_stride + column, g_stride, m - step * TILE_TERMS, 0,
                                std::min(n - column, TILE_COLUMNS), right + (j * steps + step) * TILE);
            }
        alignas(64) float sums[TILE_OUT];
        for (int64_t i = 0; i < lefts; ++i)
            for (int64_t j = 0; j < count; ++j) {
                multiply_tiles<1, 1>(left + i * steps * TILE, 0, right + j * steps * TILE, 0, steps, sums, false,
                                     TILE_ROWS, {});
                const int64_t column = (first + j) * TILE_COLUMNS, wide = std::min(n - column, TILE_COLUMNS);
                for (int64_t row = 0; row < std::min(r - i * TILE_ROWS, TILE_ROWS); ++row)
                    for (int64_t c = 0; c < wide; ++c)
                        out[(i * TILE_ROWS + row) * out_stride + column + c] += scale * sums[16 * row + c];
            }
    });
}
