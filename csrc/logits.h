#pragma once

// What the losses on logits share: a row's largest logit, its exponentials, and the mean over rows.

#include <cmath>
#include <limits>

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The classes of a row that take part.
struct All {
    STABLEKD_INLINE Vec operator()(Vec x, std::int64_t, int) const { return x; }
};
struct AllBut {
    std::int64_t label;

    STABLEKD_INLINE Vec operator()(Vec x, std::int64_t i, int count) const {
        if (label >= i && label < i + count) x[label - i] = -kInfinity;
        return x;
    }
};

template <class Classes = All, class T>
float largest(const T* row, std::int64_t n, const Classes& classes = {}) {
    const auto at = [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        return classes(load(row + i, count, -kInfinity), i, count);
    };
    Vec a = splat(-kInfinity), b = a, c = a, d = a;
    std::int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
        a = vmax(at(i, kWidth), a);
        b = vmax(at(i + kWidth, kWidth), b);
        c = vmax(at(i + 2 * kWidth, kWidth), c);
        d = vmax(at(i + 3 * kWidth, kWidth), d);
    }
    over(n - i, [&](std::int64_t j, int count) STABLEKD_LAMBDA { a = vmax(at(i + j, count), a); });
    return largest(vmax(vmax(a, b), vmax(c, d)));
}

// One thread's memory for a row: exponentials of the student's logits at the temperature and at 1, those of the
// teacher's (or its probabilities), and the kept probabilities of a cached teacher. The first vector of a row has `head`
// elements where that is not 0: the gradient's others are then aligned, and so are those of the scratch.
struct RowScratch {
    float *student, *plain, *teacher, *kept;
    int head = 0;
    bool past_caches = false;

    template <class S>
    RowScratch for_gradient(const S* gradient, bool past) const {
        if (!past) return *this;
        const int before = before_aligned(gradient), skipped = before == 0 ? 0 : kWidth - before;
        return {student + skipped, plain + skipped, teacher + skipped, kept, before, true};
    }
};

// Elements of one line of scratch: room for whole vectors of any level, and for one that is not.
std::int64_t row_width(std::int64_t classes) { return (classes + 15) / 16 * 16 + 32; }

struct Softmax {
    float top;     // largest logit
    double total;  // sum of exp((logit - top) / temperature)
};

template <class T>
Softmax exponentials(const T* row, std::int64_t n, float temperature, float* out) {
    const float top = largest(row, n);
    const Exp2 exp(kLog2E / temperature);
    const double total = sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec e = exp(load(row + i, count, -kInfinity) - top);
        store(out + i, e, count);
        return e;
    });
    return {top, total};
}

template <class S>
bool gradient_past_caches(const Logits& job) {
    return job.gradient != nullptr && too_large_for_caches<S>(job.samples * job.classes);
}

// The probabilities of two halves of the classes (the label and all others, or two groups), and their logarithms.
struct Halves {
    double first, second, log_first, log_second;
};

// From the logarithms of their masses.
Halves halves(double first, double second) {
    const bool ahead = first > second;
    const double odds = std::exp(ahead ? second - first : first - second), total = std::log1p(odds), larger = 1 / (1 + odds);
    if (ahead) return {larger, odds * larger, -total, second - first - total};
    return {odds * larger, larger, first - second - total, -total};
}

double log_mass(const Softmax& group, double temperature) { return group.top / temperature + std::log(group.total); }

// KL(p || q) between halves.
double between(const Halves& p, const Halves& q) {
    return (p.first > 0 ? p.first * (p.log_first - q.log_first) : 0) +
           (p.second > 0 ? p.second * (p.log_second - q.log_second) : 0);
}

bool in_range(const Logits& job, std::int64_t row) {
    const auto exists = [&](std::int64_t index) { return index >= 0 && index < job.classes; };
    if (job.labels != nullptr && !exists(job.labels[row])) return false;
    for (std::int64_t k = 0; job.indices != nullptr && k < job.kept; ++k) {
        if (!exists(job.indices[row * job.kept + k])) return false;
    }
    return true;
}

// The mean of per_row(row, scratch) over the rows, added up in their order whatever the number of threads.
template <class PerRow>
double mean_over_rows(const Logits& job, std::int64_t* bad_row, int threads, PerRow&& per_row) {
    for (std::int64_t row = 0; row < job.samples; ++row) {
        if (!in_range(job, row)) {
            *bad_row = row;
            return 0;
        }
    }
    const std::int64_t width = row_width(job.classes);
    Scratch<float> memory(threads * 4 * width);
    Scratch<double> losses(job.samples);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        float* own = memory.get() + thread * 4 * width;
        const RowScratch scratch{own, own + width, own + 2 * width, own + 3 * width, 0, false};
        const std::int64_t end = job.samples * (thread + 1) / threads;
        for (std::int64_t row = job.samples * thread / threads; row < end; ++row) {
            losses.get()[row] = per_row(row, scratch);
        }
    }
    double total = 0;
    for (std::int64_t row = 0; row < job.samples; ++row) total += losses.get()[row];
    return total / job.samples;
}

template <class S>
S* gradient_row(const Logits& job, std::int64_t row) {
    return job.gradient == nullptr ? nullptr : static_cast<S*>(job.gradient) + row * job.classes;
}

}  // namespace
}  // namespace stablekd
