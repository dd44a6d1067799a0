// Attention's forward over block tables and over plain rows: decode, chunked prefill, training.
//
// The keys of a row are cut at multiples of SPLIT positions. Each split is a softmax of its own, and a row's splits are
// folded from the first to the last: so a row's bits depend on its own query, keys and values only, not on the rows it
// is computed with, nor on threads. Rows whose tables name the same blocks in a split share the reading of it.
// Keys outside a row's range have score -inf and add exact zeros.
#include <cstdlib>
#include <vector>

#include "attention.h"
#include "kv_format.h"

namespace tandem {
namespace attention {
namespace {

constexpr int64_t SPLIT = 256;   // keys of one softmax
constexpr int64_t STEP = 32;     // keys are taken in so many at once
constexpr int64_t TILE = 32;     // rows multiplied at once
constexpr int64_t MAX_ROWS = 256;  // rows of a unit, so that they stay in the cache beside keys and values
constexpr int64_t AHEAD = 64;      // rows fetched before they are read
constexpr int64_t MAX_DIM = 256;

// One query token: its row of the batch, the keys it sees, its splits, where their partial results start (-1: none,
// one unit has all its splits).
struct Token {
    int64_t row, first, stop, first_split, num_splits, partial;
};

// Query tokens against a range of splits of one table of blocks. `table` is the address of the table, or, where keys
// are plain rows, the first one's index.
struct Unit {
    int64_t members, num_members, table, first_split, stop_split, cost;
};

// A plan as it lies in memory, all int64: this, tokens, units, members (indices of tokens).
struct Header {
    int64_t num_tokens, num_units, num_members, num_partials;
};

struct Plan {
    std::vector<Token> tokens;
    std::vector<Unit> units;
    std::vector<int64_t> members;
    int64_t num_partials = 0;

    int64_t size() const {
        return 4 + 6 * static_cast<int64_t>(tokens.size() + units.size()) + static_cast<int64_t>(members.size());
    }

    void write(int64_t* out) {
        // Long units first: whoever is free takes the next.
        std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
        const Header header = {
            static_cast<int64_t>(tokens.size()), static_cast<int64_t>(units.size()),
            static_cast<int64_t>(members.size()), num_partials};
        auto* bytes = reinterpret_cast<char*>(out);
        auto append = [&](const void* from, size_t size) {
            if (size) std::memcpy(bytes, from, size);
            bytes += size;
        };
        append(&header, sizeof header);
        append(tokens.data(), tokens.size() * sizeof(Token));
        append(units.data(), units.size() * sizeof(Unit));
        append(members.data(), members.size() * sizeof(int64_t));
    }
};

Token token_of(int64_t row, int64_t stop, int64_t window) {
    const int64_t first = window > 0 ? std::max<int64_t>(0, stop - window) : 0;
    const int64_t first_split = first / SPLIT;
    return {row, first, stop, first_split, (stop + SPLIT - 1) / SPLIT - first_split, -1};
}

int64_t cost_of(int64_t keys, int64_t rows) { return keys * (16 + rows); }

// Tokens start:stop of one sequence, the last of which sees `context` keys.
void add_chunk(Plan& plan, int64_t start, int64_t stop, int64_t context, int64_t table, int64_t window, int64_t groups) {
    const int64_t at_once = std::max<int64_t>(1, MAX_ROWS / groups);
    for (int64_t low = start; low < stop; low += at_once) {
        const int64_t high = std::min(stop, low + at_once);
        Unit unit = {static_cast<int64_t>(plan.members.size()), high - low, table, INT64_MAX, 0, 0};
        for (int64_t row = low; row < high; ++row) {
            const Token token = token_of(row, context - (stop - 1 - row), window);
            plan.members.push_back(static_cast<int64_t>(plan.tokens.size()));
            plan.tokens.push_back(token);
            unit.first_split = std::min(unit.first_split, token.first_split);
            unit.stop_split = std::max(unit.stop_split, token.first_split + token.num_splits);
            unit.cost += (token.stop - token.first) * groups;
        }
        plan.units.push_back(unit);
    }
}

// Rows of one token each: for every split, those whose blocks in it are the same go together.
void add_singles(
    Plan& plan, const int64_t* tables, int64_t num_rows, int64_t table_width, const int64_t* contexts,
    int64_t block_size, int64_t window, int64_t groups
) {
    const int64_t base = static_cast<int64_t>(plan.tokens.size());
    int64_t last_split = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
        Token token = token_of(row, contexts[row], window);
        if (token.num_splits > 1) {
            token.partial = plan.num_partials;
            plan.num_partials += token.num_splits;
        }
        last_split = std::max(last_split, token.first_split + token.num_splits);
        plan.tokens.push_back(token);
    }
    const int64_t at_once = std::max<int64_t>(1, MAX_ROWS / groups);
    std::vector<int64_t> order;
    for (int64_t split = 0; split < last_split; ++split) {
        const int64_t from = split * SPLIT / block_size;
        auto blocks_of = [&](int64_t row) {
            const int64_t stop = std::min((split + 1) * SPLIT, contexts[row]);
            return (stop + block_size - 1) / block_size - from;
        };
        // -1, 0 or 1: the order of two rows by the blocks they have in this split.
        auto compare = [&](int64_t a, int64_t b) {
            const int64_t size_a = blocks_of(a), size_b = blocks_of(b);
            const int64_t *at_a = tables + a * table_width + from, *at_b = tables + b * table_width + from;
            for (int64_t i = 0; i < std::min(size_a, size_b); ++i) {
                if (at_a[i] != at_b[i]) return at_a[i] < at_b[i] ? -1 : 1;
            }
            return size_a == size_b ? 0 : size_a < size_b ? -1 : 1;
        };
        order.clear();
        for (int64_t row = 0; row < num_rows; ++row) {
            const Token& token = plan.tokens[base + row];
            if (token.first_split <= split && split < token.first_split + token.num_splits) order.push_back(row);
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return compare(a, b) < 0; });
        for (size_t i = 0; i < order.size();) {
            size_t j = i + 1;
            while (j < order.size() && static_cast<int64_t>(j - i) < at_once && compare(order[i], order[j]) == 0) ++j;
            const int64_t members = static_cast<int64_t>(plan.members.size());
            int64_t low = INT64_MAX, high = 0;
            for (; i < j; ++i) {
                const Token& token = plan.tokens[base + order[i]];
                low = std::min(low, std::max(token.first, split * SPLIT));
                high = std::max(high, std::min(token.stop, (split + 1) * SPLIT));
                plan.members.push_back(base + order[i]);
            }
            const int64_t count = static_cast<int64_t>(plan.members.size()) - members;
            const int64_t table = reinterpret_cast<int64_t>(tables + order[j - 1] * table_width);
            plan.units.push_back({members, count, table, split, split + 1, cost_of(high - low, count * groups)});
        }
    }
}

int64_t deliver(Plan& plan, int64_t* out, int64_t capacity) {
    if (plan.size() <= capacity) plan.write(out);
    return plan.size();
}

// ------------------------------------------------------------ one unit

template <class Source>
struct Call {
    const Source *q, *k, *v;
    Source* out;
    float *lse, *partials;
    const Token* tokens;
    const Unit* units;
    const int64_t* members;
    int64_t q_stride, q_head_stride;                              // of a token, of a head
    int64_t k_stride, k_head_stride, v_stride, v_head_stride;     // of a key, of a head
    int64_t block_stride, block_size;                             // 0: keys are plain rows
    int64_t num_heads, groups, dim;
    float scale, softcap;                                         // softcap 0: none
    const uint8_t* bytes;                                         // a quantised cache; null: k and v are what they are
    QuantizedBlock form;

    // Where key `position` of a unit's table lies, beyond the head's start.
    int64_t offset(int64_t table, int64_t position, int64_t stride) const {
        if (block_size == 0) return (table + position) * stride;
        const int64_t block = reinterpret_cast<const int64_t*>(table)[position / block_size];
        return block * block_stride + position % block_size * stride;
    }
    int64_t partial_size() const { return dim + 2; }
    float* partial(int64_t index, int64_t head) const { return partials + (index * num_heads + head) * partial_size(); }
};

alignas(64) const char NOTHING[(MAX_DIM + 32) * sizeof(float)] = {};

// The columns low:high of a row of scores that count, of those in from:to. Steps that hold none of them are skipped.
struct Span {
    int64_t from, begin, low, high, end, to;

    Span(int64_t from, int64_t to, int64_t first, int64_t stop)
        : from(from), low(std::max(first, from)), high(std::min(stop, to)), to(to) {
        begin = low < high ? low / STEP * STEP : to;
        end = low < high ? round_up(high, STEP) : to;
    }
};

// The largest score, times log2 e. Scores that do not count become -inf; capped ones are written back times log2 e.
template <bool capped>
TANDEM_INLINE float find_largest(float* scores, const Span& span, float scale, float softcap) {
    const Vec never = set(-INFINITY);
    Vec most = never;
    for (int64_t j = span.begin; j < span.end; j += W) {
        Vec x = load(scores + j);
        if constexpr (capped) x = set(softcap * LOG2_E) * tanh(x * set(scale / softcap));
        if (j < span.low || j + W > span.high) {
            x = select(first_lanes(std::min(W, std::max<int64_t>(0, span.high - j))), x, never);
            x = select(first_lanes(std::min(W, std::max<int64_t>(0, span.low - j))), never, x);
            store(scores + j, x);
        } else if constexpr (capped) {
            store(scores + j, x);
        }
        most = max(most, x);
    }
    return std::max(largest(most) * (capped ? 1.0f : scale * LOG2_E), LOWEST);
}

// Scores as the left operand of the product with the values, 2^(factor * score - most); returns their sum.
template <class Unit>
TANDEM_INLINE float exponentiate(const float* scores, float* weights, const Span& span, float factor, float most) {
    for (int64_t j = span.from; j < span.begin; j += W * Unit::pack) store(weights + j / Unit::pack, zero());
    for (int64_t j = span.end; j < span.to; j += W * Unit::pack) store(weights + j / Unit::pack, zero());
    const Vec by = set(factor), minus = set(-most);
    Vec sums[2] = {zero(), zero()};
    for (int64_t j = span.begin; j < span.end; j += 2 * W) {
        const Vec a = exp2<Unit>(fma(load(scores + j), by, minus));
        const Vec b = exp2<Unit>(fma(load(scores + j + W), by, minus));
        sums[0] = sums[0] + a, sums[1] = sums[1] + b;
        store_row<Unit>(weights, j, a, b);
    }
    return sum(sums[0] + sums[1]);
}

// One row's softmax so far: largest score times log2 e, sum, weighted values. Folds another one, of later keys, in.
TANDEM_INLINE void fold(float* most, float* total, float* sums, float other_most, float other_total, const float* other, int64_t dim) {
    const float larger = std::max(*most, other_most);
    // In vectors, so that every lane and every instruction set computes what `exp2` is.
    Vec both = set(*most - larger);
    both = exp2<Float>(both);
    float lanes[W];
    store(lanes, both);
    const float mine = lanes[0];
    store(lanes, exp2<Float>(set(other_most - larger)));
    const float theirs = lanes[0];
    *most = larger;
    *total = *total * mine + other_total * theirs;
    const Vec a = set(mine), b = set(theirs);
    for (int64_t c = 0; c < dim; c += W) {
        const int64_t left = dim - c;
        if (left >= W) store(sums + c, fma(load(sums + c), a, load(other + c) * b));
        else store(sums + c, fma(load(sums + c, left), a, load(other + c, left) * b), left);
    }
}

template <class Source>
void finish(const Call<Source>& call, int64_t row, int64_t head, float most, float total, const float* sums) {
    Source* out = call.out + (row * call.num_heads + head) * call.dim;
    const Vec by = set(1.0f / total);
    for (int64_t c = 0; c < call.dim; c += W) {
        const int64_t left = call.dim - c;
        if (left >= W) store(out + c, load(sums + c) * by);
        else store(out + c, load(sums + c, left) * by, left);
    }
    if (call.lse != nullptr) call.lse[row * call.num_heads + head] = most * LN_2 + std::log(total);
}

// Keys and values of columns from:known of the split that begins at position `base`, row j at j * dim.
template <class Source>
void decode_split(
    const Call<Source>& call, const Unit& unit, int64_t kv_head, int64_t base, int64_t from, int64_t known,
    Source* keys, Source* values
) {
    const int64_t size = call.form.bytes(), num_kv_heads = call.num_heads / call.groups;
    const auto* table = reinterpret_cast<const int64_t*>(unit.table);
    auto block_at = [&](int64_t position) {
        return call.bytes + (table[position / call.block_size] * num_kv_heads + kv_head) * size;
    };
    for (int64_t j = from; j < known;) {
        const int64_t slot = (base + j) % call.block_size, count = std::min(call.block_size - slot, known - j);
        if (j + count < known) fetch(block_at(base + j + count), size);
        quantized::read_block(call.form, block_at(base + j), slot, slot + count, keys + j * call.dim, values + j * call.dim);
        j += count;
    }
}

template <class Source>
void attend(const Call<Source>& call, const Unit& unit, int64_t kv_head, Scratch& scratch) {
    using Product = UnitOf<Source>;
    const int64_t dim = call.dim, groups = call.groups, rows = unit.num_members * groups;
    const int64_t width = units<Product>(dim), columns = round_up(dim, W), padded = round_up(rows, TILE);
    const int64_t value_stride = SPLIT / Product::pack;
    const int64_t decoded = call.bytes == nullptr ? 0 : SPLIT * dim;
    scratch.reserve(
        2 * decoded + SPLIT * width + columns * value_stride + padded * (width + columns + 2) + TILE * (2 * SPLIT + columns + 2) + 256
    );
    float* keys = scratch.take(SPLIT * width);
    float* values = scratch.take(columns * value_stride);
    float* queries = scratch.take(padded * width);
    float* sums = scratch.take(padded * columns);
    float* most = scratch.take(padded);
    float* total = scratch.take(padded);
    float* scores = scratch.take(TILE * SPLIT);
    float* weights = Product::pack == 1 ? scores : scratch.take(TILE * SPLIT);
    const int64_t weight_stride = SPLIT / Product::pack;
    float* partial = scratch.take(TILE * columns);
    auto* decoded_keys = reinterpret_cast<Source*>(scratch.take(decoded));
    auto* decoded_values = reinterpret_cast<Source*>(scratch.take(decoded));

    const int64_t* members = call.members + unit.members;
    int64_t first = INT64_MAX, stop = 0;
    for (int64_t i = 0; i < unit.num_members; ++i) {
        const Token& token = call.tokens[members[i]];
        first = std::min(first, token.first), stop = std::max(stop, token.stop);
        for (int64_t g = 0; g < groups; ++g) {
            const Source* q = call.q + token.row * call.q_stride + (kv_head * groups + g) * call.q_head_stride;
            pack_rows<Product>(&q, 1, dim, queries + (i * groups + g) * width, width);
        }
    }
    const float factor = call.softcap > 0 ? 1.0f : call.scale * LOG2_E;  // capped scores have it already
    std::fill(most, most + rows, LOWEST);
    std::fill(total, total + rows, 0.0f);
    std::memset(sums, 0, rows * columns * sizeof(float));

    const Source* k = call.k + kv_head * call.k_head_stride;
    const Source* v = call.v + kv_head * call.v_head_stride;
    const Source *key_rows[SPLIT], *value_rows[SPLIT];
    const auto* nothing = reinterpret_cast<const Source*>(NOTHING);
    for (int64_t split = unit.first_split; split < unit.stop_split; ++split) {
        const int64_t base = split * SPLIT;
        const int64_t from = std::max<int64_t>(0, first - base) / STEP * STEP;
        const int64_t known = std::min(SPLIT, stop - base), to = round_up(known, STEP);
        if (call.bytes != nullptr) {
            decode_split(call, unit, kv_head, base, from, known, decoded_keys, decoded_values);
            for (int64_t j = from; j < known; ++j) key_rows[j] = decoded_keys + j * dim;
            for (int64_t j = from; j < known; ++j) value_rows[j] = decoded_values + j * dim;
        } else for (int64_t j = from; j < known; ++j) {
            key_rows[j] = k + call.offset(unit.table, base + j, call.k_stride);
            value_rows[j] = v + call.offset(unit.table, base + j, call.v_stride);
        }
        for (int64_t j = known; j < to; ++j) key_rows[j] = value_rows[j] = nothing;
        const int64_t row_bytes = dim * sizeof(Source);
        for (int64_t j = from; j < std::min(to, from + AHEAD); ++j) fetch(key_rows[j], row_bytes);
        for (int64_t j = from; j < to; j += 16) {
            for (int64_t i = j; i < j + 16; ++i) {
                if (i + AHEAD < to) fetch(key_rows[i + AHEAD], row_bytes);
                fetch(value_rows[i], row_bytes);
            }
            pack_columns<Product>(key_rows + j, 16, dim, keys + j * width, width);
        }
        pack_summed<Product>(value_rows + from, to - from, dim, values, from / Product::pack, value_stride);
        for (int64_t tile = 0; tile < rows; tile += TILE) {
            const int64_t count = std::min(TILE, rows - tile);
            int64_t low = SPLIT, high = 0;  // columns that some row of the tile sees
            for (int64_t i = tile / groups; i <= (tile + count - 1) / groups; ++i) {
                const Token& token = call.tokens[members[i]];
                low = std::min(low, std::max(token.first - base, from));
                high = std::max(high, std::min(token.stop - base, to));
            }
            low = low / STEP * STEP, high = round_up(high, STEP);
            if (low >= high) continue;
            multiply<Product>(
                queries + tile * width, width, keys + low * width, width * W, scores + low, SPLIT, count, high - low,
                width, false
            );
            float tile_most[TILE], tile_total[TILE];
            // All rows' maxima first: so one row's need not wait for another's exponentials.
            for (int64_t r = 0; r < count; ++r) {
                const Token& token = call.tokens[members[(tile + r) / groups]];
                const Span span(low, high, token.first - base, token.stop - base);
                tile_most[r] = call.softcap > 0 ? find_largest<true>(scores + r * SPLIT, span, call.scale, call.softcap)
                                                : find_largest<false>(scores + r * SPLIT, span, call.scale, 0.0f);
            }
            for (int64_t r = 0; r < count; ++r) {
                const Token& token = call.tokens[members[(tile + r) / groups]];
                const Span span(low, high, token.first - base, token.stop - base);
                tile_total[r] = exponentiate<Product>(
                    scores + r * SPLIT, weights + r * weight_stride, span, factor, tile_most[r]);
            }
            multiply<Product>(
                weights + low / Product::pack, weight_stride, values + low / Product::pack * W, value_stride * W,
                partial, columns, count, columns, (high - low) / Product::pack, false
            );
            for (int64_t r = 0; r < count; ++r) {
                fold(
                    most + tile + r, total + tile + r, sums + (tile + r) * columns, tile_most[r], tile_total[r],
                    partial + r * columns, columns
                );
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const Token& token = call.tokens[members[r / groups]];
        const int64_t head = kv_head * groups + r % groups;
        if (token.partial < 0) {
            finish(call, token.row, head, most[r], total[r], sums + r * columns);
        } else {
            float* kept = call.partial(token.partial + unit.first_split - token.first_split, head);
            kept[0] = most[r], kept[1] = total[r];
            std::memcpy(kept + 2, sums + r * columns, dim * sizeof(float));
        }
    }
}

template <class Source>
void merge(const Call<Source>& call, const Token& token) {
    float sums[MAX_DIM];
    for (int64_t head = 0; head < call.num_heads; ++head) {
        float most = LOWEST, total = 0.0f;
        std::memset(sums, 0, sizeof sums);
        for (int64_t i = 0; i < token.num_splits; ++i) {
            const float* part = call.partial(token.partial + i, head);
            fold(&most, &total, sums, part[0], part[1], part + 2, call.dim);
        }
        finish(call, token.row, head, most, total, sums);
    }
}

template <class Source>
void run(Call<Source> call, const int64_t* plan, int64_t num_kv_heads) {
    Header header;
    std::memcpy(&header, plan, sizeof header);
    call.tokens = reinterpret_cast<const Token*>(plan + 4);
    call.units = reinterpret_cast<const Unit*>(call.tokens + header.num_tokens);
    call.members = reinterpret_cast<const int64_t*>(call.units + header.num_units);
    const int64_t num_tasks = header.num_units * num_kv_heads;
    int64_t next = 0;
    parallel_ranges(std::min<int64_t>(num_tasks, omp_get_max_threads()), 1, [&](int64_t, int64_t) {
        static thread_local Scratch scratch;
        const Tiles tiles;
        for (;;) {
            const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= num_tasks) return;
            attend(call, call.units[task / num_kv_heads], task % num_kv_heads, scratch);
        }
    });
    if (header.num_partials == 0) return;
    parallel_ranges(header.num_tokens, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (call.tokens[i].partial >= 0) merge(call, call.tokens[i]);
        }
    });
}

template <class Source>
void write_rows(
    const Source* rows, int64_t stride, Source* half, const int64_t* slots, int64_t begin, int64_t end,
    int64_t num_kv_heads, int64_t block_size, int64_t dim
) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t block = slots[row] / block_size, slot = slots[row] % block_size;
        for (int64_t head = 0; head < num_kv_heads; ++head) {
            Source* to = half + ((block * num_kv_heads + head) * block_size + slot) * dim;
            std::memcpy(to, rows + row * stride + head * dim, dim * sizeof(Source));
        }
    }
}

// The same into a quantised cache: what goes into one block is one task.
template <class Source>
void quantize_rows(
    const Source* k, int64_t k_stride, const Source* v, int64_t v_stride, uint8_t* bytes, const QuantizedBlock& form,
    const int64_t* slots, int64_t num_rows, int64_t num_kv_heads
) {
    std::vector<int64_t> starts;
    for (int64_t row = 0; row < num_rows; ++row) {
        if (row == 0 || slots[row] % form.block_size == 0 || slots[row] != slots[row - 1] + 1) starts.push_back(row);
    }
    const int64_t num_pieces = static_cast<int64_t>(starts.size());
    starts.push_back(num_rows);
    parallel_ranges(num_pieces * num_kv_heads, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t piece = i / num_kv_heads, head = i % num_kv_heads, row = starts[piece];
            const int64_t count = starts[piece + 1] - row, slot = slots[row] % form.block_size;
            uint8_t* block = bytes + (slots[row] / form.block_size * num_kv_heads + head) * form.bytes();
            quantized::write_keys(form, block, slot, count, k + row * k_stride + head * form.dim, k_stride);
            quantized::write_values(form, block, slot, count, v + row * v_stride + head * form.dim, v_stride);
        }
    });
}

template <class Source>
void attend_cache(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* cache,
    int64_t num_blocks, int64_t block_size, int64_t bits, const int64_t* slots, int64_t num_rows, const int64_t* plan,
    float* partials, void* out, float* lse, int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale,
    float softcap
) {
    const auto* new_k = static_cast<const Source*>(k);
    const auto* new_v = static_cast<const Source*>(v);
    Call<Source> call = {};
    call.form = {bits, block_size, dim};
    if (bits != 0) {
        auto* bytes = static_cast<uint8_t*>(cache);
        quantize_rows(new_k, k_stride, new_v, v_stride, bytes, call.form, slots, num_rows, num_kv_heads);
        call.bytes = bytes;
    } else {
        auto* keys = static_cast<Source*>(cache);
        Source* values = keys + num_blocks * num_kv_heads * block_size * dim;
        const int64_t grain = std::max<int64_t>(1, 16384 / (num_kv_heads * dim));
        parallel_ranges(num_rows, grain, [&](int64_t begin, int64_t end) {
            write_rows(new_k, k_stride, keys, slots, begin, end, num_kv_heads, block_size, dim);
            write_rows(new_v, v_stride, values, slots, begin, end, num_kv_heads, block_size, dim);
        });
        call.k = keys, call.v = values;
    }
    call.q = static_cast<const Source*>(q), call.out = static_cast<Source*>(out);
    call.lse = lse, call.partials = partials;
    call.q_stride = q_stride, call.q_head_stride = dim;
    call.k_stride = call.v_stride = dim, call.k_head_stride = call.v_head_stride = block_size * dim;
    call.block_stride = num_kv_heads * block_size * dim, call.block_size = block_size;
    call.num_heads = num_heads, call.groups = num_heads / num_kv_heads, call.dim = dim;
    call.scale = scale, call.softcap = softcap;
    run(call, plan, num_kv_heads);
}

template <class Source>
void attend_rows(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
    const int64_t* plan, void* out, float* lse, int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale,
    float softcap
) {
    Call<Source> call = {};
    call.q = static_cast<const Source*>(q), call.k = static_cast<const Source*>(k);
    call.v = static_cast<const Source*>(v), call.out = static_cast<Source*>(out), call.lse = lse;
    call.q_stride = q_stride, call.q_head_stride = dim;
    call.k_stride = k_stride, call.v_stride = v_stride, call.k_head_stride = call.v_head_stride = dim;
    call.num_heads = num_heads, call.groups = num_heads / num_kv_heads, call.dim = dim;
    call.scale = scale, call.softcap = softcap;
    run(call, plan, num_kv_heads);
}

}  // namespace
}  // namespace attention
}  // namespace tandem

// Writes to `needed[0]` how many int64 the plan takes, and the plan to `out` if it has room. Rows 0..num_singles-1 have
// one query token each; `chunks` has start, stop, context and the address of the table for every chunk. All addresses
// in the plan must stay valid as long as it is used. needed[1]: how many partial results a call keeps.
TANDEM_EXPORT void tandem_attention_plan(
    const int64_t* tables, int64_t num_singles, int64_t table_width, const int64_t* contexts, const int64_t* chunks,
    int64_t num_chunks, int64_t block_size, int64_t window, int64_t groups, int64_t* out, int64_t capacity,
    int64_t* needed
) {
    using namespace tandem::attention;
    Plan plan;
    add_singles(plan, tables, num_singles, table_width, contexts, block_size, window, groups);
    for (int64_t i = 0; i < num_chunks; ++i) {
        const int64_t* c = chunks + 4 * i;
        add_chunk(plan, c[0], c[1], c[2], c[3], window, groups);
    }
    needed[0] = deliver(plan, out, capacity), needed[1] = plan.num_partials;
}

// The same for plain rows: `spans` has the first and the last + 1 query row and key row of every sequence.
TANDEM_EXPORT void tandem_attention_plan_rows(
    const int64_t* spans, int64_t num_spans, int64_t window, int64_t groups, int64_t* out, int64_t capacity,
    int64_t* needed
) {
    using namespace tandem::attention;
    Plan plan;
    for (int64_t i = 0; i < num_spans; ++i) {
        const int64_t* s = spans + 4 * i;
        add_chunk(plan, s[0], s[1], s[3] - s[2], s[2], window, groups);
    }
    needed[0] = deliver(plan, out, capacity), needed[1] = 0;
}

// Writes keys and values of `num_rows` rows at their slots, then attends: out [rows, heads, dim], lse [rows, heads] or
// null. cache: [2, num_blocks, kv heads, block_size, dim] where `bits` is 0; with 8 or 4 [num_blocks, kv heads, bytes] as
// kv_format.h has it. q, k, v: heads are neighbours, strides are of a row.
// softcap 0: none. partials: room for so many as the plan says, of heads * (dim + 2) floats each.
TANDEM_EXPORT void tandem_attention_cache(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* cache,
    int64_t num_blocks, int64_t block_size, int64_t bits, const int64_t* slots, int64_t num_rows, const int64_t* plan,
    float* partials, void* out, float* lse, int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale,
    float softcap, int64_t is_bf16
) {
    using namespace tandem;
    auto run = is_bf16 ? attention::attend_cache<bf16> : attention::attend_cache<float>;
    run(q, q_stride, k, k_stride, v, v_stride, cache, num_blocks, block_size, bits, slots, num_rows, plan, partials, out,
        lse, num_heads, num_kv_heads, dim, scale, softcap);
}

// Attention of plain rows, for training.
TANDEM_EXPORT void tandem_attention_rows(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
    const int64_t* plan, void* out, float* lse, int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale,
    float softcap, int64_t is_bf16
) {
    using namespace tandem;
    auto run = is_bf16 ? attention::attend_rows<bf16> : attention::attend_rows<float>;
    run(q, q_stride, k, k_stride, v, v_stride, plan, out, lse, num_heads, num_kv_heads, dim, scale, softcap);
}
