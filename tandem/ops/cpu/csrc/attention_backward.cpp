// Gradients of attention over plain rows, for training: scores are computed again from queries, keys and the log-sum-exp
// that the forward kept (FlashAttention-2, arXiv 2307.08691).
//
// Everything is transposed, keys as rows and queries as columns, so that what the exponentials give is a left operand as
// it stands. One task is one sequence and one key/value head: it adds in a fixed order and shares nothing.
#include "attention.h"

namespace tandem {
namespace attention {
namespace {

constexpr int64_t KEYS = 64, QUERIES = 64;  // a tile of scores

template <class Source>
struct Backward {
    const Source *q, *k, *v, *out, *grad_out;
    const float* lse;
    Source *grad_q, *grad_k, *grad_v;
    int64_t q_stride, k_stride, v_stride;  // of a row; all others lie densely
    int64_t num_heads, num_kv_heads, dim;
    int64_t window;                        // 0: none
    float scale, softcap;                  // softcap 0: none

    int64_t groups() const { return num_heads / num_kv_heads; }
};

// Rows of `panels` [width / W][units][W] as rows of a left operand [width][units].
inline void turn(const float* panels, int64_t width, int64_t units, float* out) {
    for (int64_t c = 0; c < width; c += W) {
        for (int64_t u = 0; u < units; u += W) {
            Vec tile[W];
            for (int64_t j = 0; j < W; ++j) tile[j] = load(panels + (c * units) + (u + j) * W);
            transpose(tile);
            for (int64_t j = 0; j < W; ++j) store(out + (c + j) * units + u, tile[j]);
        }
    }
}

// Two rows of W columns, as they lie in a panel that is summed over the rows.
template <class Unit>
TANDEM_INLINE void store_summed(float* panel, int64_t row, Vec even, Vec odd) {
#if defined(TANDEM_AVX512)
    if constexpr (Unit::pack == 2) {
        store(panel + row / 2 * W, pair(narrow(even), narrow(odd)));
        return;
    }
#endif
    store(panel + row * W, even), store(panel + (row + 1) * W, odd);
}

// What a tile of scores becomes: probabilities and gradients of the scores, without the factor `scale`.
struct Tile {
    const float *scores, *grad_weights;  // [KEYS][QUERIES]
    float *weights, *grads;              // left operands [KEYS][QUERIES units]
    float* grads_summed;                 // panels [QUERIES / W][KEYS units][W]
    const float *lse, *delta;            // of the columns; lse times log2 e
    const float *first, *stop;           // the keys that each column sees, counted from the tile's first
    bool masked;
};

template <class Unit, bool capped>
void differentiate(const Tile& t, float scale, float softcap) {
    const Vec by = set(scale * LOG2_E), inner = set(scale / softcap), outer = set(softcap * LOG2_E), one = set(1.0f);
    constexpr int64_t row_stride = QUERIES / Unit::pack;
    for (int64_t key = 0; key < KEYS; key += 2) {
        for (int64_t column = 0; column < QUERIES; column += 2 * W) {
            Vec weights[2][2], grads[2][2];
            for (int row = 0; row < 2; ++row) {
                for (int half = 0; half < 2; ++half) {
                    const int64_t c = column + half * W, at = (key + row) * QUERIES + c;
                    const Vec x = load(t.scores + at), lse = load(t.lse + c);
                    Vec p, slope = one;
                    if constexpr (capped) {
                        const Vec y = tanh(x * inner);
                        slope = fnma(y, y, one);
                        p = exp2<Unit>(fma(y, outer, zero() - lse));
                    } else {
                        p = exp2<Unit>(fma(x, by, zero() - lse));
                    }
                    Vec g = p * (load(t.grad_weights + at) - load(t.delta + c));
                    if constexpr (capped) g = g * slope;
                    if (t.masked) {
                        const Vec place = set(static_cast<float>(key + row));
                        const Mask early = less(place, load(t.first + c)), seen = less(place, load(t.stop + c));
                        p = select(seen, select(early, zero(), p), zero());
                        g = select(seen, select(early, zero(), g), zero());
                    }
                    weights[row][half] = p, grads[row][half] = g;
                }
                store_row<Unit>(t.weights + (key + row) * row_stride, column, weights[row][0], weights[row][1]);
                store_row<Unit>(t.grads + (key + row) * row_stride, column, grads[row][0], grads[row][1]);
            }
            float* panel = t.grads_summed + column / W * (KEYS / Unit::pack) * W;
            store_summed<Unit>(panel, key, grads[0][0], grads[1][0]);
            store_summed<Unit>(panel + KEYS / Unit::pack * W, key, grads[0][1], grads[1][1]);
        }
    }
}

template <class Source>
void write_row(Source* out, const float* row, int64_t dim, float scale) {
    const Vec by = set(scale);
    for (int64_t c = 0; c < dim; c += W) {
        if (dim - c >= W) store(out + c, load(row + c) * by);
        else store(out + c, load(row + c, dim - c) * by, dim - c);
    }
}

// The keys first:stop and the queries begin:end of one sequence, one key/value head.
template <class Source>
void differentiate_head(
    const Backward<Source>& call, int64_t begin, int64_t end, int64_t first_key, int64_t stop_key, int64_t kv_head,
    Scratch& scratch
) {
    using Unit = UnitOf<Source>;
    const int64_t dim = call.dim, groups = call.groups(), rows = (end - begin) * groups, num_keys = stop_key - first_key;
    const int64_t padded = round_up(rows, QUERIES), width = units<Unit>(dim), columns = round_up(dim, 16);
    constexpr int64_t query_units = QUERIES / Unit::pack, key_units = KEYS / Unit::pack;
    const int64_t column_size = QUERIES * width, summed_size = query_units * columns;
    scratch.reserve(
        2 * padded / QUERIES * (column_size + summed_size) + padded * (columns + 4) + 2 * KEYS * width +
        2 * columns * key_units + 2 * KEYS * QUERIES + 3 * KEYS * QUERIES + 2 * KEYS * columns + QUERIES * columns + 512
    );
    float* q_columns = scratch.take(padded / QUERIES * column_size);
    float* o_columns = scratch.take(padded / QUERIES * column_size);
    float* q_summed = scratch.take(padded / QUERIES * summed_size);
    float* o_summed = scratch.take(padded / QUERIES * summed_size);
    float* grad_q = scratch.take(padded * columns);  // [tile][columns][QUERIES]
    float* lse = scratch.take(padded);
    float* delta = scratch.take(padded);
    float* first = scratch.take(padded);  // per row: the keys it sees, counted from the first
    float* stop = scratch.take(padded);
    float* k_rows = scratch.take(KEYS * width);
    float* v_rows = scratch.take(KEYS * width);
    float* k_panels = scratch.take(columns * key_units);
    float* k_turned = scratch.take(columns * key_units);
    float* scores = scratch.take(KEYS * QUERIES);
    float* grad_weights = scratch.take(KEYS * QUERIES);
    float* weights = scratch.take(KEYS * query_units);
    float* grads = scratch.take(KEYS * query_units);
    float* grads_summed = scratch.take(KEYS * query_units);
    float* grad_k = scratch.take(KEYS * columns);
    float* grad_v = scratch.take(KEYS * columns);
    float* turned = scratch.take(QUERIES * columns);

    alignas(64) static const char nothing[256 * sizeof(float)] = {};
    const auto* zeros = reinterpret_cast<const Source*>(nothing);
    const int64_t past = num_keys - (end - begin);
    for (int64_t tile = 0; tile < padded; tile += QUERIES) {
        const Source *q[QUERIES], *o[QUERIES];
        for (int64_t i = 0; i < QUERIES; ++i) {
            const int64_t row = tile + i, token = begin + row / groups, head = kv_head * groups + row % groups;
            if (row >= rows) {
                q[i] = o[i] = zeros;
                lse[row] = 200.0f, delta[row] = first[row] = stop[row] = 0.0f;
                continue;
            }
            const int64_t dense = (token * call.num_heads + head) * dim;
            q[i] = call.q + token * call.q_stride + head * dim;
            o[i] = call.grad_out + dense;
            Vec sums = zero();
            for (int64_t c = 0; c < dim; c += W) {
                const int64_t n = std::min(W, dim - c);
                sums = fma(load(o[i] + c, n), load(call.out + dense + c, n), sums);
            }
            delta[row] = sum(sums);
            lse[row] = call.lse[token * call.num_heads + head] * LOG2_E;
            const int64_t sees = past + row / groups + 1;
            stop[row] = static_cast<float>(sees);
            first[row] = call.window > 0 ? static_cast<float>(std::max<int64_t>(0, sees - call.window)) : 0.0f;
        }
        const int64_t at = tile / QUERIES;
        pack_columns<Unit>(q, QUERIES, dim, q_columns + at * column_size, width);
        pack_columns<Unit>(o, QUERIES, dim, o_columns + at * column_size, width);
        std::memset(q_summed + at * summed_size, 0, summed_size * sizeof(float));
        std::memset(o_summed + at * summed_size, 0, summed_size * sizeof(float));
        pack_summed<Unit>(q, QUERIES, dim, q_summed + at * summed_size, 0, query_units);
        pack_summed<Unit>(o, QUERIES, dim, o_summed + at * summed_size, 0, query_units);
    }
    std::memset(grad_q, 0, padded * columns * sizeof(float));

    for (int64_t key = 0; key < num_keys; key += KEYS) {
        const Source *k[KEYS], *v[KEYS];
        const int64_t count = std::min(KEYS, num_keys - key);
        for (int64_t i = 0; i < KEYS; ++i) {
            const int64_t row = first_key + key + i;
            k[i] = i < count ? call.k + row * call.k_stride + kv_head * dim : zeros;
            v[i] = i < count ? call.v + row * call.v_stride + kv_head * dim : zeros;
        }
        pack_rows<Unit>(k, KEYS, dim, k_rows, width);
        pack_rows<Unit>(v, KEYS, dim, v_rows, width);
        std::memset(k_panels, 0, columns * key_units * sizeof(float));
        pack_summed<Unit>(k, KEYS, dim, k_panels, 0, key_units);
        turn(k_panels, columns, key_units, k_turned);
        std::memset(grad_k, 0, KEYS * columns * sizeof(float));
        std::memset(grad_v, 0, KEYS * columns * sizeof(float));
        for (int64_t tile = 0; tile < padded; tile += QUERIES) {
            const int64_t last = std::min(tile + QUERIES, rows) - 1, at = tile / QUERIES;
            const float low = static_cast<float>(key), high = static_cast<float>(key + KEYS);
            if (stop[last] <= low || first[tile] >= high) continue;  // nobody here sees any of these keys
            multiply<Unit>(
                k_rows, width, q_columns + at * column_size, width * W, scores, QUERIES, KEYS, QUERIES, width, false);
            multiply<Unit>(
                v_rows, width, o_columns + at * column_size, width * W, grad_weights, QUERIES, KEYS, QUERIES, width,
                false);
            float seen_first[QUERIES], seen_stop[QUERIES];
            for (int64_t i = 0; i < QUERIES; ++i) seen_first[i] = first[tile + i] - low, seen_stop[i] = stop[tile + i] - low;
            const bool masked = stop[tile] < high || first[last] > low || tile + QUERIES > rows;
            const Tile t = {scores, grad_weights, weights, grads, grads_summed, lse + tile, delta + tile, seen_first,
                            seen_stop, masked};
            if (call.softcap > 0) differentiate<Unit, true>(t, call.scale, call.softcap);
            else differentiate<Unit, false>(t, call.scale, 1.0f);
            multiply<Unit>(
                weights, query_units, o_summed + at * summed_size, query_units * W, grad_v, columns, KEYS, columns,
                query_units, true);
            multiply<Unit>(
                grads, query_units, q_summed + at * summed_size, query_units * W, grad_k, columns, KEYS, columns,
                query_units, true);
            multiply<Unit>(
                k_turned, key_units, grads_summed, key_units * W, grad_q + tile * columns, QUERIES, columns, QUERIES,
                key_units, true);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t to = ((first_key + key + i) * call.num_kv_heads + kv_head) * dim;
            write_row(call.grad_k + to, grad_k + i * columns, dim, call.scale);
            write_row(call.grad_v + to, grad_v + i * columns, dim, 1.0f);
        }
    }
    for (int64_t tile = 0; tile < padded; tile += QUERIES) {
        const float* from = grad_q + tile * columns;
        for (int64_t c = 0; c < columns; c += W) {
            for (int64_t i = 0; i < QUERIES; i += W) {
                Vec block[W];
                for (int64_t j = 0; j < W; ++j) block[j] = load(from + (c + j) * QUERIES + i);
                transpose(block);
                for (int64_t j = 0; j < W; ++j) store(turned + (i + j) * columns + c, block[j]);
            }
        }
        for (int64_t i = 0; i < std::min(QUERIES, rows - tile); ++i) {
            const int64_t row = tile + i, token = begin + row / groups, head = kv_head * groups + row % groups;
            write_row(call.grad_q + (token * call.num_heads + head) * dim, turned + i * columns, dim, call.scale);
        }
    }
}

template <class Source>
void spread(const Backward<Source>& call, const int64_t* spans, int64_t num_spans) {
    const int64_t num_tasks = num_spans * call.num_kv_heads;
    int64_t next = 0;
    parallel_ranges(std::min<int64_t>(num_tasks, omp_get_max_threads()), 1, [&](int64_t, int64_t) {
        static thread_local Scratch scratch;
        [[maybe_unused]] const Tiles tiles;
        for (;;) {
            const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= num_tasks) return;
            const int64_t* s = spans + task / call.num_kv_heads * 4;
            differentiate_head(call, s[0], s[1], s[2], s[3], task % call.num_kv_heads, scratch);
        }
    });
}

template <class Source>
void run(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride, const void* out,
    const float* lse, const void* grad_out, void* grad_q, void* grad_k, void* grad_v, const int64_t* spans,
    int64_t num_spans, int64_t num_heads, int64_t num_kv_heads, int64_t dim, int64_t window, float scale, float softcap
) {
    const Backward<Source> call = {
        static_cast<const Source*>(q), static_cast<const Source*>(k), static_cast<const Source*>(v),
        static_cast<const Source*>(out), static_cast<const Source*>(grad_out), lse, static_cast<Source*>(grad_q),
        static_cast<Source*>(grad_k), static_cast<Source*>(grad_v), q_stride, k_stride, v_stride, num_heads,
        num_kv_heads, dim, window, scale, softcap};
    spread(call, spans, num_spans);
}

}  // namespace
}  // namespace attention
}  // namespace tandem

// Gradients of `tandem_attention_rows`: out, grad_out, grad_q [rows, heads, dim], lse [rows, heads], grad_k, grad_v
// [keys, kv heads, dim], all dense. `spans` has the first and the last + 1 query row and key row of every sequence; no
// two share a row.
TANDEM_EXPORT void tandem_attention_backward(
    const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride, const void* out,
    const float* lse, const void* grad_out, void* grad_q, void* grad_k, void* grad_v, const int64_t* spans,
    int64_t num_spans, int64_t num_heads, int64_t num_kv_heads, int64_t dim, int64_t window, float scale, float softcap,
    int64_t is_bf16
) {
    using namespace tandem;
    auto run = is_bf16 ? attention::run<bf16> : attention::run<float>;
    run(q, q_stride, k, k_stride, v, v_stride, out, lse, grad_out, grad_q, grad_k, grad_v, spans, num_spans, num_heads,
        num_kv_heads, dim, window, scale, softcap);
}
