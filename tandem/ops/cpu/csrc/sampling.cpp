// From logits to tokens: the likeliest of each row, and a draw from its distribution. Meaning: ops/sampling.py.
//
// A row's token depends on that row alone: neither the number of rows nor of threads changes it.

#include <cmath>
#include <vector>

#include "vector.h"

namespace tandem {
namespace {

// Columns summed together, and how many such sums a row has at most (longer rows have longer pieces).
constexpr int64_t PIECE = 512, PIECES = 1024;
// Columns for which a second thread is worth waking.
constexpr int64_t GRAIN = 8192;

#if defined(TANDEM_AVX512)
inline unsigned lanes_of(Mask mask) { return mask; }
#else
inline unsigned lanes_of(Mask mask) { return static_cast<unsigned>(_mm256_movemask_ps(mask.m)); }
#endif

// NaN counts as -inf.
template <class T>
float highest(const T* x, int64_t width) {
    const Vec lowest = set(-INFINITY);
    Vec a = lowest, b = lowest;
    int64_t i = 0;
    for (; i + 2 * Vec::width <= width; i += 2 * Vec::width) {
        a = max(load(x + i), a);
        b = max(load(x + i + Vec::width), b);
    }
    float found = largest(max(a, b));
    for (; i < width; i++) found = std::max(found, to_float(x[i]) > found ? to_float(x[i]) : found);
    return found;
}

// The first place of a value; 0 if it is nowhere.
template <class T>
int64_t place_of(const T* x, int64_t width, float value) {
    const Vec wanted = set(value);
    int64_t i = 0;
    for (; i + Vec::width <= width; i += Vec::width)
        if (const unsigned lanes = lanes_of(equal(load(x + i), wanted))) return i + __builtin_ctz(lanes);
    for (; i < width; i++)
        if (to_float(x[i]) == value) return i;
    return 0;
}

template <class T>
void argmax(const T* logits, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width) {
    parallel_ranges(rows, (GRAIN + width - 1) / width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const T* x = logits + row * row_stride;
            tokens[row] = place_of(x, width, highest(x, width));
        }
    });
}

// exp((x - from) * scale) of n logits; their sum.
template <class T>
float weights(const T* x, float* out, int64_t n, float from, float scale) {
    const Vec base = set(from), factor = set(scale);
    return sum_vectors(n, [&](int64_t i, auto lanes) {
        const Vec w = exp((load(x + i, lanes) - base) * factor);
        store(out + i, w, lanes);
        return load(out + i, lanes);  // lanes beyond n as 0
    });
}

template <class T>
int64_t draw(const T* x, int64_t width, float temperature, double u) {
    const int64_t piece = std::max(PIECE, (width + PIECES - 1) / PIECES);
    const float top = highest(x, width), scale = 1.0f / temperature;
    float sums[PIECES], buffer[PIECE];
    double total = 0;
    const int64_t pieces = (width + piece - 1) / piece;
    for (int64_t p = 0; p < pieces; p++) {
        sums[p] = 0;
        const int64_t stop = std::min(width, (p + 1) * piece);
        for (int64_t i = p * piece; i < stop; i += PIECE)
            sums[p] += weights(x + i, buffer, std::min(PIECE, stop - i), top, scale);
        total += sums[p];
    }
    if (!(total > 0) || !std::isfinite(total)) return place_of(x, width, top);
    const double target = u * total;
    double before = 0;
    int64_t p = 0, last = 0;
    // The last piece with any weight takes what rounding may leave over.
    for (int64_t q = 0; q < pieces; q++)
        if (sums[q] > 0) last = q;
    while (p < last && before + sums[p] <= target) before += sums[p++];
    int64_t found = -1;
    const int64_t stop = std::min(width, (p + 1) * piece);
    for (int64_t i = p * piece; i < stop; i += PIECE) {
        const int64_t n = std::min(PIECE, stop - i);
        weights(x + i, buffer, n, top, scale);
        for (int64_t j = 0; j < n; j++) {
            if (!(buffer[j] > 0)) continue;
            found = i + j;
            before += buffer[j];
            if (before > target) return found;
        }
    }
    return found;
}

struct Candidate {
    float value;
    int32_t id;
};

// All logits of at least `threshold`, in the order of their ids.
template <class T>
void collect(const T* x, int64_t width, float threshold, std::vector<Candidate>& found) {
    found.clear();
    const Vec limit = set(threshold);
    auto keep = [&](int64_t i, unsigned lanes) {
        for (; lanes; lanes &= lanes - 1) {
            const int64_t id = i + __builtin_ctz(lanes);
            found.push_back({to_float(x[id]), static_cast<int32_t>(id)});
        }
    };
    int64_t i = 0;
    constexpr unsigned all = (1u << Vec::width) - 1;
    for (; i + Vec::width <= width; i += Vec::width) {
        const Vec v = load(x + i);
        // Not less and not NaN.
        keep(i, all & ~lanes_of(less(v, limit)) & lanes_of(equal(v, v)));
    }
    for (; i < width; i++)
        if (to_float(x[i]) >= threshold) found.push_back({to_float(x[i]), static_cast<int32_t>(i)});
}

// The likeliest tokens are collected above a threshold that sinks until what the filters keep is among them for sure.
template <class T>
int64_t draw_filtered(
    const T* x, int64_t width, float temperature, int64_t top_k, float top_p, float min_p, double u,
    std::vector<Candidate>& found
) {
    const float top = highest(x, width), scale = 1.0f / temperature;
    if (!std::isfinite(top)) return place_of(x, width, top);
    auto weight = [&](const Candidate& c) { return std::exp(static_cast<double>((c.value - top) * scale)); };
    const bool cuts = top_k < width;
    double total = 0;
    if (!cuts && top_p < 1) {
        float buffer[PIECE];
        for (int64_t i = 0; i < width; i += PIECE) total += weights(x + i, buffer, std::min(PIECE, width - i), top, scale);
        if (!std::isfinite(total)) return place_of(x, width, top);
    }
    // Beyond a reach of 100 temperatures weights are below exp(-100) of the likeliest's: nothing, in any sum here.
    for (float reach = 6.0f; reach < 200; reach *= 2) {
        collect(x, width, top - reach * temperature, found);
        if (cuts ? static_cast<int64_t>(found.size()) >= top_k : std::exp(-reach) < 0.99f * min_p) break;
        if (!cuts && top_p < 1) {
            double mass = 0;
            for (const Candidate& c : found) mass += weight(c);
            if (mass >= top_p * total * (1 + 1e-6)) break;
        }
    }
    std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
        return a.value != b.value ? a.value > b.value : a.id < b.id;
    });
    if (cuts && static_cast<int64_t>(found.size()) > top_k) found.resize(top_k);
    if (cuts || total == 0) {
        total = 0;
        for (const Candidate& c : found) total += weight(c);
    }
    size_t kept = 0;
    double before = 0;
    for (; kept < found.size(); kept++) {
        const double w = weight(found[kept]);
        if (kept > 0 && (before >= top_p * total || w < min_p || w <= 0)) break;
        before += w;
    }
    const double target = u * before;
    double sum = 0;
    for (size_t i = 0; i + 1 < kept; i++) {
        sum += weight(found[i]);
        if (sum > target) return found[i].id;
    }
    return found[kept - 1].id;
}

template <class T>
void draw_filtered_rows(
    const T* logits, const float* temperatures, const float* top_p, const float* min_p, const double* u,
    const int64_t* top_k, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width
) {
    parallel_ranges(rows, (GRAIN + width - 1) / width, [&](int64_t begin, int64_t end) {
        std::vector<Candidate> found;
        for (int64_t row = begin; row < end; row++)
            tokens[row] = draw_filtered(
                logits + row * row_stride, width, temperatures[row], top_k[row], top_p[row], min_p[row], u[row], found
            );
    });
}

template <class T>
void draw_rows(
    const T* logits, const float* temperatures, const double* u, int64_t* tokens, int64_t rows, int64_t row_stride,
    int64_t width
) {
    parallel_ranges(rows, (GRAIN + width - 1) / width, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++)
            tokens[row] = draw(logits + row * row_stride, width, temperatures[row], u[row]);
    });
}

}  // namespace
}  // namespace tandem

using tandem::bf16;

TANDEM_EXPORT void tandem_argmax_f32(
    const float* logits, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::argmax(logits, tokens, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_argmax_bf16(
    const bf16* logits, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::argmax(logits, tokens, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_draw_f32(
    const float* logits, const float* temperatures, const double* u, int64_t* tokens, int64_t rows,
    int64_t row_stride, int64_t width
) {
    tandem::draw_rows(logits, temperatures, u, tokens, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_draw_bf16(
    const bf16* logits, const float* temperatures, const double* u, int64_t* tokens, int64_t rows, int64_t row_stride,
    int64_t width
) {
    tandem::draw_rows(logits, temperatures, u, tokens, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_draw_filtered_f32(
    const float* logits, const float* temperatures, const float* top_p, const float* min_p, const double* u,
    const int64_t* top_k, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::draw_filtered_rows(logits, temperatures, top_p, min_p, u, top_k, tokens, rows, row_stride, width);
}
TANDEM_EXPORT void tandem_draw_filtered_bf16(
    const bf16* logits, const float* temperatures, const float* top_p, const float* min_p, const double* u,
    const int64_t* top_k, int64_t* tokens, int64_t rows, int64_t row_stride, int64_t width
) {
    tandem::draw_filtered_rows(logits, temperatures, top_p, min_p, u, top_k, tokens, rows, row_stride, width);
}
