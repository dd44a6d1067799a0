// The small operations between the matrix products, one pass over memory each. What they mean: ops/pointwise.py.
//
// All arithmetic is float32; what is stored is rounded once. A row's result depends on that row alone: neither the
// number of rows nor of threads changes a bit. Strides count elements; the last axis is always dense.

#include <cmath>

#include "vector.h"

namespace tandem {
namespace {

// Elements for which a second thread is worth waking.
constexpr int64_t GRAIN = 8192;
// Columns of one piece of an elementwise operation.
constexpr int64_t PIECE = 512;
// The longest head whose features fit the scratch of the rotary kernels.
constexpr int64_t MAX_HEAD = 1024;

template <class Body>
void for_rows(int64_t rows, int64_t width, const Body& body) {
    parallel_ranges(rows, (GRAIN + width - 1) / std::max<int64_t>(width, 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) body(row);
    });
}

// body(row, first column, columns) for pieces of a [rows, width] matrix.
template <class Body>
void for_pieces(int64_t rows, int64_t width, const Body& body) {
    const int64_t per_row = (width + PIECE - 1) / PIECE;
    parallel_ranges(rows * per_row, GRAIN / PIECE, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; piece++) {
            const int64_t column = piece % per_row * PIECE;
            body(piece / per_row, column, std::min(PIECE, width - column));
        }
    });
}

// ---------------------------------------------------------------- norms

template <class T>
TANDEM_INLINE float inverse_rms(const T* x, int64_t width, float eps) {
    const float squares = sum_vectors(width, [&](int64_t i, auto lanes) {
        const Vec v = load(x + i, lanes);
        return v * v;
    });
    return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

// `offset` is 0, or 1 where 1 + weight multiplies.
template <class T, class Y>
TANDEM_INLINE void norm_row(const T* x, const T* weight, Y* y, int64_t width, float eps, float offset) {
    const Vec inverse = set(inverse_rms(x, width, eps)), plus = set(offset);
    for_vectors(width, [&](int64_t i, auto lanes) {
        store(y + i, load(x + i, lanes) * inverse * (load(weight + i, lanes) + plus), lanes);
    });
}

// Of the gradient `grad` of a norm's output: inverse * (g w - x * mean(g w x) * inverse^2).
template <class T, class G, class Y>
TANDEM_INLINE void norm_row_backward(
    const G* grad, const T* x, const T* weight, Y* y, int64_t width, float eps, float offset
) {
    const float inverse = inverse_rms(x, width, eps);
    const Vec plus = set(offset);
    const float along = sum_vectors(width, [&](int64_t i, auto lanes) {
        return load(grad + i, lanes) * (load(weight + i, lanes) + plus) * load(x + i, lanes);
    });
    const Vec back = set(along / static_cast<float>(width) * inverse * inverse), scale = set(inverse);
    for_vectors(width, [&](int64_t i, auto lanes) {
        const Vec scaled = load(grad + i, lanes) * (load(weight + i, lanes) + plus);
        store(y + i, fnma(load(x + i, lanes), back, scaled) * scale, lanes);
    });
}

// x [rows, heads, width] with strides; y dense.
template <class T>
void rms_norm(
    const T* x, const T* weight, T* y, int64_t rows, int64_t heads, int64_t row_stride, int64_t head_stride,
    int64_t width, float eps, float offset
) {
    for_rows(rows * heads, width, [&](int64_t i) {
        norm_row(x + i / heads * row_stride + i % heads * head_stride, weight, y + i * width, width, eps, offset);
    });
}

template <class T>
void rms_norm_backward(
    const T* grad, const T* x, const T* weight, T* y, int64_t rows, int64_t heads, int64_t grad_row_stride,
    int64_t grad_head_stride, int64_t row_stride, int64_t head_stride, int64_t width, float eps, float offset
) {
    for_rows(rows * heads, width, [&](int64_t i) {
        const int64_t row = i / heads, head = i % heads;
        norm_row_backward(
            grad + row * grad_row_stride + head * grad_head_stride, x + row * row_stride + head * head_stride, weight,
            y + i * width, width, eps, offset
        );
    });
}

// sum = x + residual, rounded as stored; y = norm of what is stored. All [rows, width].
template <class T>
void add_rms_norm(
    const T* x, const T* residual, const T* weight, T* total, T* y, int64_t rows, int64_t x_stride,
    int64_t residual_stride, int64_t width, float eps, float offset
) {
    for_rows(rows, width, [&](int64_t row) {
        const T *a = x + row * x_stride, *b = residual + row * residual_stride;
        T* out = total + row * width;
        for_vectors(width, [&](int64_t i, auto lanes) { store(out + i, load(a + i, lanes) + load(b + i, lanes), lanes); });
        norm_row(out, weight, y + row * width, width, eps, offset);
    });
}

// ---------------------------------------------------------------- rotary positions

// Where heads lie and what happens to each. Heads below `num_queries` are normed with the first weight, the others
// with the second; null weights: no norm.
template <class T>
struct Heads {
    const T *cos, *sin;  // [rows, rotated]: each angle twice, the first half of sin negated
    const T *query_weight, *key_weight;
    int64_t rows, heads, num_queries, width, rotated;
    float eps, offset;

    const T* weight(int64_t head) const { return head < num_queries ? query_weight : key_weight; }
};

template <class T>
void rope(const T* x, T* y, int64_t row_stride, int64_t head_stride, int64_t y_row_stride, int64_t y_head_stride,
          const Heads<T>& h) {
    const int64_t half = h.rotated / 2;
    for_rows(h.rows * h.heads, h.width, [&](int64_t index) {
        const int64_t row = index / h.heads, head = index % h.heads;
        const T* from = x + row * row_stride + head * head_stride;
        T* to = y + row * y_row_stride + head * y_head_stride;
        const T *cos = h.cos + row * h.rotated, *sin = h.sin + row * h.rotated;
        auto rotate = [&](const auto* in) {
            for_vectors(half, [&](int64_t i, auto lanes) {
                const Vec a = load(in + i, lanes), b = load(in + half + i, lanes);
                const Vec c = load(cos + i, lanes), d = load(cos + half + i, lanes);
                const Vec s = load(sin + i, lanes), t = load(sin + half + i, lanes);
                store(to + i, fma(b, s, a * c), lanes);
                store(to + half + i, fma(a, t, b * d), lanes);
            });
            if (static_cast<const void*>(in) != static_cast<const void*>(to))
                for_vectors(h.width - h.rotated, [&](int64_t i, auto lanes) {
                    store(to + h.rotated + i, load(in + h.rotated + i, lanes), lanes);
                });
        };
        if (h.weight(head) != nullptr) {
            float normed[MAX_HEAD];
            norm_row(from, h.weight(head), normed, h.width, h.eps, h.offset);
            rotate(normed);
        } else {
            rotate(from);
        }
    });
}

// The transposed rotation of `grad`, then the norm's backward, for which `x` are the heads before the norm.
template <class T>
void rope_backward(
    const T* grad, int64_t grad_row_stride, int64_t grad_head_stride, const T* x, int64_t row_stride,
    int64_t head_stride, T* y, const Heads<T>& h
) {
    const int64_t half = h.rotated / 2;
    for_rows(h.rows * h.heads, h.width, [&](int64_t index) {
        const int64_t row = index / h.heads, head = index % h.heads;
        const T* in = grad + row * grad_row_stride + head * grad_head_stride;
        T* to = y + index * h.width;
        const T *cos = h.cos + row * h.rotated, *sin = h.sin + row * h.rotated;
        auto rotate = [&](auto* out) {
            for_vectors(half, [&](int64_t i, auto lanes) {
                const Vec a = load(in + i, lanes), b = load(in + half + i, lanes);
                const Vec c = load(cos + i, lanes), d = load(cos + half + i, lanes);
                const Vec s = load(sin + i, lanes), t = load(sin + half + i, lanes);
                store(out + i, fma(b, t, a * c), lanes);
                store(out + half + i, fma(a, s, b * d), lanes);
            });
            for_vectors(h.width - h.rotated, [&](int64_t i, auto lanes) {
                store(out + h.rotated + i, load(in + h.rotated + i, lanes), lanes);
            });
        };
        if (h.weight(head) != nullptr) {
            float turned[MAX_HEAD];
            rotate(turned);
            const T* original = x + row * row_stride + head * head_stride;
            norm_row_backward(turned, original, h.weight(head), to, h.width, h.eps, h.offset);
        } else {
            rotate(to);
        }
    });
}

// ---------------------------------------------------------------- gated activations

struct Silu {
    static TANDEM_INLINE Vec value(Vec x) { return x * sigmoid(x); }
    // The value and the slope.
    static TANDEM_INLINE void both(Vec x, Vec& value, Vec& slope) {
        const Vec s = sigmoid(x);
        value = x * s;
        slope = fma(value, set(1.0f) - s, s);
    }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
struct GeluTanh {
    static constexpr float FACTOR = 0.79788456080286535588f, CUBIC = 0.044715f;
    static TANDEM_INLINE Vec inner(Vec x) { return set(FACTOR) * fma(x * x * x, set(CUBIC), x); }
    static TANDEM_INLINE Vec value(Vec x) { return set(0.5f) * x * (set(1.0f) + tanh(inner(x))); }
    static TANDEM_INLINE void both(Vec x, Vec& value, Vec& slope) {
        const Vec t = tanh(inner(x)), half = set(0.5f) * (set(1.0f) + t);
        const Vec inner_slope = set(FACTOR) * fma(x * x, set(3.0f * CUBIC), set(1.0f));
        value = x * half;
        slope = fma(set(0.5f) * x * fnma(t, t, set(1.0f)), inner_slope, half);
    }
};

// gate_up [rows, 2 width], gates first; y [rows, width].
template <class Activation, class T>
void gated(const T* gate_up, T* y, int64_t rows, int64_t row_stride, int64_t width) {
    for_pieces(rows, width, [&](int64_t row, int64_t column, int64_t columns) {
        const T *gate = gate_up + row * row_stride + column, *up = gate + width;
        T* out = y + row * width + column;
        for_vectors(columns, [&](int64_t i, auto lanes) {
            store(out + i, Activation::value(load(gate + i, lanes)) * load(up + i, lanes), lanes);
        });
    });
}

template <class Activation, class T>
void gated_backward(
    const T* grad, const T* gate_up, T* y, int64_t rows, int64_t grad_stride, int64_t row_stride, int64_t width
) {
    for_pieces(rows, width, [&](int64_t row, int64_t column, int64_t columns) {
        const T *g = grad + row * grad_stride + column, *gate = gate_up + row * row_stride + column, *up = gate + width;
        T* out = y + row * 2 * width + column;
        for_vectors(columns, [&](int64_t i, auto lanes) {
            Vec value, slope;
            Activation::both(load(gate + i, lanes), value, slope);
            const Vec incoming = load(g + i, lanes);
            store(out + i, incoming * load(up + i, lanes) * slope, lanes);
            store(out + width + i, incoming * value, lanes);
        });
    });
}

// ---------------------------------------------------------------- the loss

// Softcapped where cap > 0: cap * tanh(x / cap).
template <class T, class Lanes>
TANDEM_INLINE Vec capped(const T* x, Lanes lanes, float cap) {
    const Vec v = load(x, lanes);
    return cap > 0 ? set(cap) * tanh(v * set(1.0f / cap)) : v;
}

TANDEM_INLINE Vec only(Vec x, Vec, Whole) { return x; }
TANDEM_INLINE Vec only(Vec x, Vec otherwise, Part part) { return select(first_lanes(part.n), x, otherwise); }

// Largest logit and sum(exp(logit - largest)) of a row. NaN is in the sum, never in the largest.
template <class T>
void statistics(const T* x, int64_t width, float cap, float& largest_found, float& sum_found) {
    constexpr int64_t BLOCK = 1024;
    const Vec lowest = set(-INFINITY);
    float buffer[BLOCK], highest = -INFINITY, total = 0;
    for (int64_t start = 0; start < width; start += BLOCK) {
        const int64_t columns = std::min(BLOCK, width - start);
        Vec best = lowest;
        for_vectors(columns, [&](int64_t i, auto lanes) {
            const Vec v = capped(x + start + i, lanes, cap);
            store(buffer + i, v, lanes);
            best = max(only(v, lowest, lanes), best);
        });
        const float here = std::max(highest, largest(best));
        // Nothing but -inf and NaN so far: compare with 0, so that exp(-inf) is 0 and not NaN.
        const Vec from = set(here == -INFINITY ? 0.0f : here);
        const float part = sum_vectors(columns, [&](int64_t i, auto lanes) {
            return only(exp(load(buffer + i, lanes) - from), zero(), lanes);
        });
        total = (here == highest ? total : total * std::exp(highest - here)) + part;
        highest = here;
    }
    largest_found = highest;
    sum_found = total;
}

// Whether `target` is the first of the likeliest, soft-capped or not.
template <class T>
bool is_first_of_largest(const T* x, int64_t width, int64_t target) {
    const Vec own = set(to_float(x[target])), one = set(1.0f);
    auto larger = [&](int64_t i, auto lanes) {
        return only(select(less(own, load(x + i, lanes)), one, zero()), zero(), lanes);
    };
    auto as_large = [&](int64_t i, auto lanes) {
        return only(select(equal(own, load(x + i, lanes)), one, zero()), zero(), lanes);
    };
    return sum_vectors(width, larger) == 0 && sum_vectors(target, as_large) == 0;
}

// -log p of each row's target and whether the target is the first of the likeliest; with `weights`, logits become the
// gradient of sum(weight * nll) with respect to them.
template <class T>
void cross_entropy(
    T* logits, const int64_t* targets, const float* weights, float* nll, uint8_t* is_best, int64_t rows,
    int64_t row_stride, int64_t width, float cap
) {
    for_rows(rows, 4 * width, [&](int64_t row) {
        T* x = logits + row * row_stride;
        const int64_t target = targets[row];
        float highest, total;
        statistics(x, width, cap, highest, total);
        const float own = sum(capped(x + target, Part{1}, cap));
        nll[row] = std::log(total) + highest - own;
        is_best[row] = own == highest && is_first_of_largest(x, width, target);
        if (weights == nullptr) return;
        const Vec from = set(highest), scale = set(weights[row] / total), inverse_cap = set(1.0f / cap);
        const float own_slope = cap > 0 ? 1.0f - (own / cap) * (own / cap) : 1.0f;
        const float own_grad = (std::exp(own - highest) / total - 1.0f) * weights[row] * own_slope;
        if (cap > 0) {
            for_vectors(width, [&](int64_t i, auto lanes) {
                const Vec v = capped(x + i, lanes, cap), relative = v * inverse_cap;
                store(x + i, exp(v - from) * scale * fnma(relative, relative, set(1.0f)), lanes);
            });
        } else {
            for_vectors(width, [&](int64_t i, auto lanes) {
                store(x + i, exp(load(x + i, lanes) - from) * scale, lanes);
            });
        }
        x[target] = from_float<T>(own_grad);
    });
}

}  // namespace
}  // namespace tandem

using tandem::bf16;

TANDEM_EXPORT void tandem_rms_norm_f32(
    const float* x, const float* weight, float* y, int64_t rows, int64_t heads, int64_t row_stride,
    int64_t head_stride, int64_t width, float eps, float offset
) {
    tandem::rms_norm(x, weight, y, rows, heads, row_stride, head_stride, width, eps, offset);
}
TANDEM_EXPORT void tandem_rms_norm_bf16(
    const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t heads, int64_t row_stride, int64_t head_stride,
    int64_t width, float eps, float offset
) {
    tandem::rms_norm(x, weight, y, rows, heads, row_stride, head_stride, width, eps, offset);
}

TANDEM_EXPORT void tandem_rms_norm_backward_f32(
    const float* grad, const float* x, const float* weight, float* y, int64_t rows, int64_t heads,
    int64_t grad_row_stride, int64_t grad_head_stride, int64_t row_stride, int64_t head_stride, int64_t width,
    float eps, float offset
) {
    tandem::rms_norm_backward(
        grad, x, weight, y, rows, heads, grad_row_stride, grad_head_stride, row_stride, head_stride, width, eps, offset
    );
}
TANDEM_EXPORT void tandem_rms_norm_backward_bf16(
    const bf16* grad, const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t heads,
    int64_t grad_row_stride, int64_t grad_head_stride, int64_t row_stride, int64_t head_stride, int64_t width,
    float eps, float offset
) {
    tandem::rms_norm_backward(
        grad, x, weight, y, rows, heads, grad_row_stride, grad_head_stride, row_stride, head_stride, width, eps, offset
    );
}

TANDEM_EXPORT void tandem_add_rms_norm_f32(
    const float* x, const float* residual, const float* weight, float* total, float* y, int64_t rows,
    int64_t x_stride, int64_t residual_stride, int64_t width, float eps, float offset
) {
    tandem::add_rms_norm(x, residual, weight, total, y, rows, x_stride, residual_stride, width, eps, offset);
}
TANDEM_EXPORT void tandem_add_rms_norm_bf16(
    const bf16* x, const bf16* residual, const bf16* weight, bf16* total, bf16* y, int64_t rows, int64_t x_stride,
    int64_t residual_stride, int64_t width, float eps, float offset
) {
    tandem::add_rms_norm(x, residual, weight, total, y, rows, x_stride, residual_stride, width, eps, offset);
}

TANDEM_EXPORT void tandem_rope_f32(
    const float* x, float* y, const float* cos, const float* sin, const float* query_weight, const float* key_weight,
    int64_t rows, int64_t heads, int64_t num_queries, int64_t width, int64_t rotated, int64_t row_stride,
    int64_t head_stride, int64_t y_row_stride, int64_t y_head_stride, float eps, float offset
) {
    tandem::rope<float>(
        x, y, row_stride, head_stride, y_row_stride, y_head_stride,
        {cos, sin, query_weight, key_weight, rows, heads, num_queries, width, rotated, eps, offset}
    );
}
TANDEM_EXPORT void tandem_rope_bf16(
    const bf16* x, bf16* y, const bf16* cos, const bf16* sin, const bf16* query_weight, const bf16* key_weight,
    int64_t rows, int64_t heads, int64_t num_queries, int64_t width, int64_t rotated, int64_t row_stride,
    int64_t head_stride, int64_t y_row_stride, int64_t y_head_stride, float eps, float offset
) {
    tandem::rope<bf16>(
        x, y, row_stride, head_stride, y_row_stride, y_head_stride,
        {cos, sin, query_weight, key_weight, rows, heads, num_queries, width, rotated, eps, offset}
    );
}

TANDEM_EXPORT void tandem_rope_backward_f32(
    const float* grad, const float* x, float* y, const float* cos, const float* sin, const float* query_weight,
    const float* key_weight, int64_t rows, int64_t heads, int64_t num_queries, int64_t width, int64_t rotated,
    int64_t grad_row_stride, int64_t grad_head_stride, int64_t row_stride, int64_t head_stride, float eps, float offset
) {
    tandem::rope_backward<float>(
        grad, grad_row_stride, grad_head_stride, x, row_stride, head_stride, y,
        {cos, sin, query_weight, key_weight, rows, heads, num_queries, width, rotated, eps, offset}
    );
}
TANDEM_EXPORT void tandem_rope_backward_bf16(
    const bf16* grad, const bf16* x, bf16* y, const bf16* cos, const bf16* sin, const bf16* query_weight,
    const bf16* key_weight, int64_t rows, int64_t heads, int64_t num_queries, int64_t width, int64_t rotated,
    int64_t grad_row_stride, int64_t grad_head_stride, int64_t row_stride, int64_t head_stride, float eps, float offset
) {
    tandem::rope_backward<bf16>(
        grad, grad_row_stride, grad_head_stride, x, row_stride, head_stride, y,
        {cos, sin, query_weight, key_weight, rows, heads, num_queries, width, rotated, eps, offset}
    );
}

TANDEM_EXPORT void tandem_silu_mul_f32(
    const float* gate_up, float* y, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::gated<tandem::Silu>(gate_up, y, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_silu_mul_bf16(const bf16* gate_up, bf16* y, int64_t rows, int64_t row_stride, int64_t width) {
    tandem::gated<tandem::Silu>(gate_up, y, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_gelu_tanh_mul_f32(
    const float* gate_up, float* y, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::gated<tandem::GeluTanh>(gate_up, y, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_gelu_tanh_mul_bf16(
    const bf16* gate_up, bf16* y, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::gated<tandem::GeluTanh>(gate_up, y, rows, row_stride, width);
}

TANDEM_EXPORT void tandem_silu_mul_backward_f32(
    const float* grad, const float* gate_up, float* y, int64_t rows, int64_t grad_stride, int64_t row_stride,
    int64_t width
) {
    tandem::gated_backward<tandem::Silu>(grad, gate_up, y, rows, grad_stride, row_stride, width);
}
TANDEM_EXPORT void tandem_silu_mul_backward_bf16(
    const bf16* grad, const bf16* gate_up, bf16* y, int64_t rows, int64_t grad_stride, int64_t row_stride,
    int64_t width
) {
    tandem::gated_backward<tandem::Silu>(grad, gate_up, y, rows, grad_stride, row_stride, width);
}
TANDEM_EXPORT void tandem_gelu_tanh_mul_backward_f32(
    const float* grad, const float* gate_up, float* y, int64_t rows, int64_t grad_stride, int64_t row_stride,
    int64_t width
) {
    tandem::gated_backward<tandem::GeluTanh>(grad, gate_up, y, rows, grad_stride, row_stride, width);
}
TANDEM_EXPORT void tandem_gelu_tanh_mul_backward_bf16(
    const bf16* grad, const bf16* gate_up, bf16* y, int64_t rows, int64_t grad_stride, int64_t row_stride,
    int64_t width
) {
    tandem::gated_backward<tandem::GeluTanh>(grad, gate_up, y, rows, grad_stride, row_stride, width);
}

TANDEM_EXPORT void tandem_cross_entropy_f32(
    float* logits, const int64_t* targets, const float* weights, float* nll, uint8_t* is_best, int64_t rows,
    int64_t row_stride, int64_t width, float cap
) {
    tandem::cross_entropy(logits, targets, weights, nll, is_best, rows, row_stride, width, cap);
}
TANDEM_EXPORT void tandem_cross_entropy_bf16(
    bf16* logits, const int64_t* targets, const float* weights, float* nll, uint8_t* is_best, int64_t rows,
    int64_t row_stride, int64_t width, float cap
) {
    tandem::cross_entropy(logits, targets, weights, nll, is_best, rows, row_stride, width, cap);
}
