// What every kernel source needs: the export macro, the instruction set it is compiled for, bfloat16, and loops over
// all threads. Vectors are in vector.h.
//
// Exactly one of TANDEM_AMX, TANDEM_AVX512 and TANDEM_AVX2 comes from the compiler's command line; AMX implies AVX512
// (with BW, VL, DQ, VNNI, BF16 and VBMI).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(TANDEM_AMX) && !defined(TANDEM_AVX512)
#define TANDEM_AVX512 1
#endif

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))
#define TANDEM_INLINE inline __attribute__((always_inline))

// The OpenMP runtime's own entry points (libgomp's, which Intel's and LLVM's runtimes have too): found at load in the
// runtime that torch uses, so that kernels and torch share one pool of threads.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);
int omp_in_parallel(void);
}

namespace tandem {

// The upper half of a float32.
struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
T from_float(float x) {
    if constexpr (sizeof(T) == 2) {
        return to_bf16(x);
    } else {
        return x;
    }
}

// body(begin, end) for consecutive ranges that together are [0, n), one per thread and none shorter than `grain`
// (the last one may be): cut by position only, so what a range's elements become must not depend on the cut.
// From inside a parallel region, and for n <= grain, it is one call in this thread.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    int64_t ranges = (n + grain - 1) / grain;
    if (ranges > 1 && !omp_in_parallel()) ranges = std::min<int64_t>(ranges, omp_get_max_threads());
    else ranges = 1;
    if (ranges == 1) {
        body(static_cast<int64_t>(0), n);
        return;
    }
    struct Shared {
        const Body* body;
        int64_t n;
    } shared{&body, n};
    auto run = [](void* data) {
        const Shared* shared = static_cast<const Shared*>(data);
        // The runtime may grant fewer threads than were asked for.
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t begin = shared->n * thread / threads, end = shared->n * (thread + 1) / threads;
        if (begin < end) (*shared->body)(begin, end);
    };
    GOMP_parallel(run, &shared, static_cast<unsigned>(ranges), 0);
}

// body(index) for every index in [0, n), handed out one at a time to whichever thread is free: for pieces of unequal
// size. Order and thread are unspecified.
template <class Body>
void parallel_tasks(int64_t n, const Body& body) {
    int64_t next = 0;
    auto drain = [&](int64_t, int64_t) {
        for (;;) {
            const int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (index >= n) return;
            body(index);
        }
    };
    if (n <= 0) return;
    parallel_ranges(std::min<int64_t>(n, omp_get_max_threads()), 1, drain);
}

}  // namespace tandem
