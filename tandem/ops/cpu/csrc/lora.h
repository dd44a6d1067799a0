// What products of rows with packed weights share, whatever the weights' format: rows as strips of tiles, and LoRA
// inside the product and inside its input gradient. Not here: the products themselves (`matmul.cpp`, `quant_*.cpp`).
//
// LoRA comes as parts: part p adds h b to the columns offset .. offset + width, with h = x a^T, zero where the rank row
// is foreign to the row; a is [R, K] and b is [R, width], the scaling in b.
//
// Shape letters as in ops/linear.py: M rows, K input and N output features, R rank rows of one part.
#pragma once

#include <new>

#include "tiles.h"

namespace tandem {

struct LoraPart {
    const bf16* a;
    const bf16* b;
    int64_t offset, width;
};

struct Lora {
    const LoraPart* parts;
    int64_t num_parts, rank;
    const uint8_t* foreign;  // [M, R], may be null: nothing is foreign
    int64_t foreign_stride;

    int64_t panels() const { return divide_up(rank, TILE_COLUMNS); }
    int64_t steps() const { return divide_up(rank, TILE_TERMS); }
    bool is_foreign(int64_t row, int64_t r) const { return foreign && foreign[row * foreign_stride + r]; }
};

// Rows of a matrix as strips of `steps` tiles, left or right ones. They lie stretch by stretch: `stretch` steps of the
// first strip, of the second and so on, then the next steps of all.
struct Strips {
    const bf16* tiles;
    int64_t rows, steps, stretch;

    int64_t count() const { return divide_up(rows, TILE_ROWS); }
    int64_t bytes() const { return divide_up(steps, stretch) * count() * stretch * TILE * 2; }
    TANDEM_INLINE int64_t place(int64_t strip, int64_t step) const {
        return ((step / stretch * count() + strip) * stretch + step % stretch) * TILE;
    }
    TANDEM_INLINE const bf16* at(int64_t strip, int64_t step) const { return tiles + place(strip, step); }
};

// What LoRA leaves between its two products, used again by the next call of this thread.
struct LoraScratch {
    Scratch factors, hidden, added;
};

inline LoraScratch& lora_scratch() {
    static thread_local LoraScratch mine;
    return mine;
}

// A thread's own, for a piece of a product.
inline Scratch& local() {
    static thread_local Scratch mine;
    return mine;
}

// One or two left strips by one or two right strips.
template <Side PASSING = Side::NONE>
TANDEM_INLINE void multiply_block(int64_t lefts, int64_t rights, const bf16* left, int64_t left_stride,
                                  const bf16* right, int64_t right_stride, int64_t steps, float* out, bool adds,
                                  int64_t rows, Ahead ahead) {
    if (lefts == 2 && rights == 2) {
        multiply_tiles<2, 2, PASSING>(left, left_stride, right, right_stride, steps, out, adds, rows, ahead);
    } else if (rights == 2) {
        multiply_tiles<1, 2, PASSING>(left, left_stride, right, right_stride, steps, out, adds, rows, ahead);
    } else if (lefts == 2) {
        multiply_tiles<2, 1, PASSING>(left, left_stride, right, right_stride, steps, out, adds, rows, ahead);
    } else {
        multiply_tiles<1, 1, PASSING>(left, left_stride, right, right_stride, steps, out, adds, rows, ahead);
    }
}

// Fill `to`, which lies as `strips` says, with rows of `terms` numbers: left strips, or right ones for the way back.
template <bool RIGHT>
void pack_rows(const bf16* x, int64_t stride, int64_t terms, const Strips& strips, bf16* to) {
    const int64_t steps = strips.steps;
    parallel_ranges(strips.count() * steps, 512, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / steps * TILE_ROWS, step = i % steps, term = step * TILE_TERMS;
            const bf16* from = x + row * stride + term;
            bf16* tile = to + strips.place(i / steps, step);
            if (RIGHT) pack_right(from, stride, strips.rows - row, terms - term, tile);
            else pack_left(from, stride, strips.rows - row, terms - term, tile);
        }
    });
}

// The factors a of all parts as `panels` panels each, of 16 rank rows along K.
inline const bf16* pack_factors(const Lora& lora, int64_t panels, int64_t terms) {
    const int64_t steps = divide_up(terms, TILE_TERMS);
    bf16* to = reinterpret_cast<bf16*>(lora_scratch().factors.take(lora.num_parts * panels * steps * TILE * 2));
    parallel_ranges(lora.num_parts * panels * steps, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t part = i / (panels * steps), r = i / steps % panels * TILE_COLUMNS;
            const int64_t k = i % steps * TILE_TERMS;
            pack_right(lora.parts[part].a + r * terms + k, terms, lora.rank - r, terms - k, to + i * TILE);
        }
    });
    return to;
}

// ---------------------------------------------------------------- forward

// h as left strips, part by part, and to `h` [parts, M, R] (may be null), given x as left strips.
class LoraForward {
public:
    LoraForward() = default;
    LoraForward(const Lora& lora, const Strips& x, int64_t terms, bf16* h) : lora_(lora), strips_(x.count()) {
        if (!lora.num_parts) return;
        const int64_t panels = lora.panels(), pairs = divide_up(strips_, 2);
        const bf16* factors = pack_factors(lora, panels, terms);
        bf16* hidden =
            reinterpret_cast<bf16*>(lora_scratch().hidden.take(lora.num_parts * strips_ * lora.steps() * TILE * 2));
        parallel_ranges(lora.num_parts * panels * pairs, 1, [&](int64_t begin, int64_t end) {
            const TileRegisters registers;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t first = i % pairs * 2;
                hide(i / (panels * pairs), i / pairs % panels, first, std::min<int64_t>(2, strips_ - first), x, factors,
                     hidden, h);
            }
        });
        hidden_ = hidden;
    }

    // What LoRA adds in panels [begin, end) of 16 columns, as further terms of their products: a list for each, valid
    // until this thread's next call.
    void terms(int64_t begin, int64_t end, const Terms** added) const {
        const int64_t steps = lora_.num_parts ? lora_.steps() : 0, bytes = LINE + steps * TILE * 2;
        char* room = lora_scratch().added.take((end - begin) * lora_.num_parts * bytes);
        std::fill(added, added + (end - begin), nullptr);
        // The parts in the order of their addition.
        for (int64_t p = lora_.num_parts - 1; p >= 0; --p) {
            const LoraPart& part = lora_.parts[p];
            const int64_t first = std::max(begin * TILE_COLUMNS - part.offset, int64_t{0});
            const int64_t last = std::min(end * TILE_COLUMNS - part.offset, part.width);
            for (int64_t r = 0; r < lora_.rank; ++r)
                for (int64_t column = first; column < last; column += LINE / 2)
                    _mm_prefetch(reinterpret_cast<const char*>(part.b + r * part.width + column), _MM_HINT_T0);
            for (int64_t panel = begin; panel < end; ++panel) {
                const int64_t column = panel * TILE_COLUMNS;
                const int64_t low = std::max<int64_t>(part.offset - column, 0);
                const int64_t high = std::min<int64_t>(part.offset + part.width - column, TILE_COLUMNS);
                if (low >= high) continue;
                bf16* factors = reinterpret_cast<bf16*>(room + LINE);
                for (int64_t step = 0; step < steps; ++step) {
                    const int64_t r = step * TILE_TERMS;
                    pack_right_rows(part.b + r * part.width + (column - part.offset), part.width, lora_.rank - r, low,
                                    high, factors + step * TILE);
                }
                const Terms*& list = added[panel - begin];
                list = new (room) Terms{hidden_ + p * strips_ * steps * TILE, factors, steps * TILE, steps, list};
                room += bytes;
            }
        }
    }

    // Add the terms of a panel to products of the strips `first` on, `count` of them; strip i's is at out + i * apart.
    void add(const Terms* list, int64_t first, int64_t count, float* out, int64_t apart) const {
        for (; list; list = list->next)
            for (int64_t i = 0; i < count; ++i)
                multiply_tiles<1, 1>(list->left + (first + i) * list->left_stride, 0, list->right, 0, list->steps,
                                     out + i * apart, true, TILE_ROWS, {});
    }

private:
    // h of part p, rank rows 16 * panel on, strips first and (count 2) first + 1.
    void hide(int64_t p, int64_t panel, int64_t first, int64_t count, const Strips& x, const bf16* factors,
              bf16* hidden, bf16* h) const {
        alignas(64) float out[2 * TILE_OUT];
        for (int64_t at = 0; at < x.steps; at += x.stretch)
            multiply_block(count, 1, x.at(first, at), x.stretch * TILE,
                           factors + ((p * lora_.panels() + panel) * x.steps + at) * TILE, 0,
                           std::min(x.stretch, x.steps - at), out, at > 0, count * TILE_ROWS, {});
        for (int64_t i = 0; i < count; ++i) {
            bf16* tile = hidden + (((p * strips_ + first + i) * lora_.steps()) + panel / 2) * TILE;
            for (int64_t m = 0; m < TILE_ROWS; ++m) {
                const int64_t row = (first + i) * TILE_ROWS + m;
                for (int64_t c = 0; c < TILE_COLUMNS; ++c) {
                    const int64_t r = panel * TILE_COLUMNS + c;
                    const bool counts = row < x.rows && r < lora_.rank && !lora_.is_foreign(row, r);
                    const bf16 value = counts ? to_bf16(out[i * TILE_OUT + 16 * m + c]) : bf16{0};
                    tile[32 * m + panel % 2 * TILE_COLUMNS + c] = value;
                    if (h && row < x.rows && r < lora_.rank) h[(p * x.rows + row) * lora_.rank + r] = value;
                }
                // Half a tile that no panel fills.
                if (panel % 2 == 0 && panel + 1 == lora_.panels()) std::memset(tile + 32 * m + 16, 0, 32);
            }
        }
    }

    Lora lora_{};
    int64_t strips_ = 0;
    const bf16* hidden_ = nullptr;
};

// ---------------------------------------------------------------- backward

// The gradient of h as right strips, part by part, and to `gh` [parts, M, R] (may be null), given that of y as right
// strips.
class LoraBackward {
public:
    LoraBackward() = default;
    LoraBackward(const Lora& lora, const Strips& gy, int64_t terms, bf16* gh)
        : lora_(lora), strips_(gy.count()), weight_steps_(divide_up(terms, TILE_TERMS)) {
        if (!lora.num_parts) return;
        factors_ = pack_factors(lora, 2 * lora.steps(), terms);
        bf16* hidden =
            reinterpret_cast<bf16*>(lora_scratch().hidden.take(lora.num_parts * strips_ * lora.steps() * TILE * 2));
        const int64_t panels = 2 * lora.steps();
        parallel_tasks(lora.num_parts * panels, [&](int64_t task) {
            const TileRegisters registers;
            const int64_t p = task / panels, panel = task % panels, r = panel * TILE_ROWS;
            const LoraPart& part = lora.parts[p];
            const int64_t at = part.offset / TILE_TERMS, end = divide_up(part.offset + part.width, TILE_TERMS);
            bf16* factor = reinterpret_cast<bf16*>(local().take((end - at) * TILE * 2));
            for (int64_t step = at; step < end; ++step) pack_b(part, r, step, factor + (step - at) * TILE);
            for (int64_t strip = 0; strip < strips_; ++strip) hide(p, panel, strip, gy, factor, at, end, hidden, gh);
        });
        hidden_ = hidden;
    }

    // Add what LoRA adds to the transposed products of 32 terms, those of `unit`, with the strips `first` on, `rights`
    // of them: two tiles of 16 terms, `apart` numbers apart, for each strip one after the other.
    void add(int64_t unit, int64_t first, int64_t rights, float* out, int64_t apart) const {
        const int64_t rank_steps = lora_.num_parts ? lora_.steps() : 0;
        alignas(64) bf16 both[2 * TILE];
        for (int64_t p = 0; p < lora_.num_parts; ++p) {
            for (int64_t step = 0; step < rank_steps; ++step) {
                const bf16* panel = factors_ + ((p * rank_steps + step) * 2 * weight_steps_ + unit) * TILE;
                turn(panel, panel + weight_steps_ * TILE, both, both + TILE);
                for (int64_t i = 0; i < 2; ++i)
                    for (int64_t j = 0; j < rights; ++j) {
                        const bf16* right = hidden_ + ((p * strips_ + first + j) * rank_steps + step) * TILE;
                        multiply_tiles<1, 1>(both + i * TILE, 0, right, 0, 1, out + i * apart + j * TILE_OUT, true,
                                             TILE_ROWS, {});
                    }
            }
        }
    }

private:
    // The gradient of h for part p, rank rows 16 * panel on, of one strip; `factor`: steps at .. end of b as left tiles.
    void hide(int64_t p, int64_t panel, int64_t strip, const Strips& gy, const bf16* factor, int64_t at, int64_t end,
              bf16* hidden, bf16* gh) const {
        alignas(64) float out[TILE_OUT];
        for (int64_t step = at; step < end;) {
            const int64_t length = std::min(gy.stretch - step % gy.stretch, end - step);
            multiply_tiles<1, 1>(factor + (step - at) * TILE, 0, gy.at(strip, step), 0, length, out, step > at,
                                 TILE_ROWS, {});
            step += length;
        }
        bf16* tile = hidden + ((p * strips_ + strip) * lora_.steps() + panel / 2) * TILE;
        for (int64_t i = 0; i < TILE_ROWS; ++i) {
            const int64_t r = panel * TILE_ROWS + i, term = panel % 2 * TILE_ROWS + i;
            for (int64_t m = 0; m < TILE_COLUMNS; ++m) {
                const int64_t row = strip * TILE_COLUMNS + m;
                const bool counts = row < gy.rows && r < lora_.rank && !lora_.is_foreign(row, r);
                const bf16 value = counts ? to_bf16(out[16 * i + m]) : bf16{0};
                tile[term / 2 * 32 + 2 * m + term % 2] = value;
                if (gh && row < gy.rows && r < lora_.rank) gh[(p * gy.rows + row) * lora_.rank + r] = value;
            }
        }
    }

    // Rank rows r on of b at columns 32 * step on, zero where the part has none.
    void pack_b(const LoraPart& part, int64_t r, int64_t step, bf16* to) const {
        const int64_t low = step * TILE_TERMS - part.offset;
        if (low >= 0) {
            pack_left(part.b + r * part.width + low, part.width, lora_.rank - r, part.width - low, to);
            return;
        }
        for (int64_t i = 0; i < TILE_ROWS; ++i)
            for (int64_t c = 0; c < TILE_TERMS; ++c) {
                const bool counts = r + i < lora_.rank && low + c >= 0 && low + c < part.width;
                to[32 * i + c] = counts ? part.b[(r + i) * part.width + low + c] : bf16{0};
            }
    }

    Lora lora_{};
    int64_t strips_ = 0, weight_steps_ = 0;
    const bf16* factors_ = nullptr;
    const bf16* hidden_ = nullptr;
};

}  // namespace tandem
