// Losses on logits: a row is read once from memory, its exponentials stay in the nearest cache until the gradient
// has been written from them.

#include <cmath>
#include <limits>

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Within a block sums are single precision, across blocks double.
constexpr std::int64_t kBlock = 1024;

template <class Body>
STABLEKD_INLINE void over_blocks(std::int64_t n, Body&& body) {
    for (std::int64_t start = 0; start < n; start += kBlock) body(start, n - start < kBlock ? n - start : kBlock);
}

template <class T>
float largest(const T* row, std::int64_t n) {
    Vec top = splat(-kInfinity);
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA { top = vmax(load(row + i, count, -kInfinity), top); });
    return largest(top);
}

// One thread's memory for a row: exponentials of the student's logits at the temperature and at 1, those of the
// teacher's (or its probabilities), and the kept probabilities of a cached teacher. The decoupled loss keeps the rows
// without their labels in `plain` and `kept`.
struct RowScratch {
    float *student, *plain, *teacher, *kept;
};

// Elements of one line of scratch: room for whole vectors of any level.
std::int64_t row_width(std::int64_t classes) { return (classes + 15) / 16 * 16; }

struct Softmax {
    float top;     // largest logit
    double total;  // sum of exp((logit - top) / temperature)
};

template <class T>
Softmax exponentials(const T* row, std::int64_t n, float inverse_temperature, float* out) {
    Softmax result{largest(row, n), 0};
    over_blocks(n, [&](std::int64_t start, std::int64_t length) {
        Vec part{};
        over(length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            const Vec x = load(row + start + i, count, -kInfinity);
            const Vec e = exp_negative((x - result.top) * inverse_temperature);
            part += e;
            store(out + start + i, e);
        });
        result.total += sum(widen(part));
    });
    return result;
}

// Sum of p * (log p - log q) from exponentials of both, p = f / teacher.total, q likewise, over classes with f > 0.
template <class S, class T>
double divergence(const S* student, const T* teacher, std::int64_t n, float inverse_temperature, const Softmax& q,
                  const Softmax& p, const float* teacher_exponentials) {
    double cross = 0;
    over_blocks(n, [&](std::int64_t start, std::int64_t length) {
        Vec part{};
        over(length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            const Vec a = (load(student + start + i, count, -kInfinity) - q.top) * inverse_temperature;
            const Vec b = (load(teacher + start + i, count, -kInfinity) - p.top) * inverse_temperature;
            const Vec f = load(teacher_exponentials + start + i);
            // Where f is 0 the difference may be infinite or undefined, and counts nothing.
            part += f == 0.0f ? Vec{} : f * (b - a);
        });
        cross += sum(widen(part));
    });
    return cross / p.total + std::log(q.total) - std::log(p.total);
}

// Classes that take part (logit not -inf in both; teacher null: not -inf in the student) and the sum of their logits.
struct Open {
    double logits;
    std::int64_t count;
};

template <class S, class T>
STABLEKD_INLINE IntVec open_lanes(const S* student, const T* teacher, std::int64_t i, int count) {
    const IntVec in_student = load(student + i, count, -kInfinity) != -kInfinity;
    return teacher == nullptr ? in_student : in_student | (load(teacher + i, count, -kInfinity) != -kInfinity);
}

template <class S, class T>
Open open_classes(const S* student, const T* teacher, std::int64_t n) {
    Wide logits{};
    IntVec counts{};
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const IntVec open = open_lanes(student, teacher, i, count);
        logits += widen(open ? load(student + i, count) : Vec{});
        counts -= open;
    });
    Open result{sum(logits), 0};
    for (int lane = 0; lane < kWidth; ++lane) result.count += counts[lane];
    return result;
}

struct Divergence {
    double value;
    double teacher_total;  // teacher exponentials / this = p
    double mass;           // sum of p, 1 but for rounded probabilities
};

// A teacher known by its largest probabilities: they are written over the whole row, what they lack to 1 spread
// over the other open classes.
template <class S>
Divergence from_kept(const S* student, std::int64_t n, float inverse_temperature, const Softmax& q,
                     const std::int64_t* indices, const float* kept, std::int64_t kept_count, float* p) {
    const auto no_teacher = static_cast<const float*>(nullptr);
    const Open open = open_classes(student, no_teacher, n);
    // a = (logit - top) / temperature; log q = a - log(q.total).
    double others_a = (open.logits - open.count * static_cast<double>(q.top)) * inverse_temperature;
    double mass = 0, sum_p_log_p = 0, sum_p_a = 0;
    std::int64_t others = open.count;
    for (std::int64_t k = 0; k < kept_count; ++k) {
        const float logit = load_one(student + indices[k]);
        const double a = (static_cast<double>(logit) - q.top) * inverse_temperature, probability = kept[k];
        mass += probability;
        if (logit != -kInfinity) others_a -= a, --others;
        if (probability > 0) sum_p_log_p += probability * std::log(probability), sum_p_a += probability * a;
    }
    const double rest = mass < 1 && others > 0 ? (1 - mass) / others : 0;
    if (rest > 0) {
        mass += rest * others;
        sum_p_log_p += rest * others * std::log(rest);
        sum_p_a += rest * others_a;
    }
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        store(p + i, open_lanes(student, no_teacher, i, count) ? splat(static_cast<float>(rest)) : Vec{});
    });
    for (std::int64_t k = 0; k < kept_count; ++k) p[indices[k]] = kept[k];
    return {sum_p_log_p - sum_p_a + mass * std::log(q.total), 1, mass};
}

struct KdSettings {
    double alpha, smoothing, gradient_factor;
};

// The loss of one row; its gradient goes to `gradient` unless that is null.
template <class S, class T>
double kd_row(const Logits& job, const KdSettings& settings, std::int64_t row, const RowScratch& scratch, S* gradient) {
    const std::int64_t n = job.classes;
    const S* student = static_cast<const S*>(job.student) + row * job.student_stride;
    const T* teacher = static_cast<const T*>(job.teacher) + row * job.teacher_stride;
    const float inverse_temperature = 1.0f / job.temperature;
    const double temperature = job.temperature, alpha = job.labels == nullptr ? 1 : settings.alpha;

    const Softmax q = exponentials(student, n, inverse_temperature, scratch.student);
    Divergence kl;
    if (job.indices == nullptr) {
        const Softmax p = exponentials(teacher, n, inverse_temperature, scratch.teacher);
        kl = {divergence(student, teacher, n, inverse_temperature, q, p, scratch.teacher), p.total, 1};
    } else {
        for (std::int64_t k = 0; k < job.kept; ++k) scratch.kept[k] = load_one(teacher + k);
        kl = from_kept(student, n, inverse_temperature, q, job.indices + row * job.kept, scratch.kept, job.kept,
                       scratch.teacher);
    }
    double loss = alpha * temperature * temperature * kl.value;
    const double weight = job.weight == nullptr ? 1 : job.weight[row];
    const double factor = settings.gradient_factor * weight;
    const float from_student = factor * alpha * temperature * kl.mass / q.total;
    const float from_teacher = factor * alpha * temperature / kl.teacher_total;

    if (job.labels == nullptr) {
        if (gradient != nullptr) {
            over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                store(gradient + i, load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher,
                      count);
            });
        }
        return weight * loss;
    }

    const std::int64_t label = job.labels[row];
    const Softmax plain = exponentials(student, n, 1.0f, scratch.plain);
    const T* open_teacher = job.indices == nullptr ? teacher : nullptr;
    const bool smooth = settings.smoothing > 0;
    const Open open = smooth ? open_classes(student, open_teacher, n) : Open{0, 1};
    const double log_sum = plain.top + std::log(plain.total);
    const double hard = log_sum - load_one(student + label);
    const double uniform = smooth ? log_sum - open.logits / open.count : 0;
    loss += (1 - alpha) * ((1 - settings.smoothing) * hard + settings.smoothing * uniform);

    if (gradient != nullptr) {
        const float from_plain = factor * (1 - alpha) / plain.total;
        const float everywhere = factor * (1 - alpha) * settings.smoothing / open.count;
        scratch.plain[label] -= (1 - settings.smoothing) * plain.total;
        over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            Vec g = load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher;
            g += load(scratch.plain + i) * from_plain;
            if (smooth) g -= open_lanes(student, open_teacher, i, count) ? splat(everywhere) : Vec{};
            store(gradient + i, g, count);
        });
    }
    return weight * loss;
}

// A row without its label's class, as exponentials over the others, and log p and log(1 - p) of the label.
struct Decoupled {
    Softmax others;
    double log_label, log_rest;
};

template <class T>
Decoupled decouple(const T* row, std::int64_t n, std::int64_t label, float inverse_temperature, float* others,
                   float* out) {
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA { store(others + i, load(row + i, count, -kInfinity)); });
    others[label] = -kInfinity;
    const Softmax rest = exponentials(others, n, inverse_temperature, out);
    const double own = static_cast<double>(load_one(row + label)) * inverse_temperature;
    const double log_others = static_cast<double>(rest.top) * inverse_temperature + std::log(rest.total);
    const double top = own > log_others ? own : log_others;
    const double total = top + std::log(std::exp(own - top) + std::exp(log_others - top));
    return {rest, own - total, log_others - total};
}

struct DkdSettings {
    double alpha, beta, gradient_factor;
};

template <class S, class T>
double decoupled_row(const Logits& job, const DkdSettings& settings, std::int64_t row, const RowScratch& scratch,
                     S* gradient) {
    const std::int64_t n = job.classes, label = job.labels[row];
    const S* student = static_cast<const S*>(job.student) + row * job.student_stride;
    const T* teacher = static_cast<const T*>(job.teacher) + row * job.teacher_stride;
    const float inverse_temperature = 1.0f / job.temperature;
    const double temperature = job.temperature;

    const Decoupled q = decouple(student, n, label, inverse_temperature, scratch.plain, scratch.student);
    const Decoupled p = decouple(teacher, n, label, inverse_temperature, scratch.kept, scratch.teacher);
    const double p_label = std::exp(p.log_label), p_rest = std::exp(p.log_rest);
    const double target = (p_label > 0 ? p_label * (p.log_label - q.log_label) : 0) +
                          (p_rest > 0 ? p_rest * (p.log_rest - q.log_rest) : 0);
    const double others =
        divergence(scratch.plain, scratch.kept, n, inverse_temperature, q.others, p.others, scratch.teacher);

    if (gradient != nullptr) {
        const double factor = settings.gradient_factor * temperature, ahead = std::exp(q.log_label) - p_label;
        const float from_student = factor * (settings.beta - settings.alpha * ahead) / q.others.total;
        const float from_teacher = factor * settings.beta / p.others.total;
        over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            store(gradient + i, load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher,
                  count);
        });
        store(gradient + label, splat(factor * settings.alpha * ahead), 1);
    }
    return temperature * temperature * (settings.alpha * target + settings.beta * others);
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
        const RowScratch scratch{own, own + width, own + 2 * width, own + 3 * width};
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

namespace STABLEKD_LEVEL {

double kd_loss(const Logits& job, double alpha, double smoothing, double factor, std::int64_t* bad_row, int threads) {
    const KdSettings settings{alpha, smoothing, factor / job.samples};
    return with_float_type(job.student_type, [&](auto* s) {
        return with_float_type(job.teacher_type, [&](auto* t) {
            using S = Element<decltype(s)>;
            using T = Element<decltype(t)>;
            return mean_over_rows(job, bad_row, threads, [&](std::int64_t row, const RowScratch& scratch) {
                return kd_row<S, T>(job, settings, row, scratch, gradient_row<S>(job, row));
            });
        });
    });
}

double decoupled_kl(const Logits& job, double alpha, double beta, double factor, std::int64_t* bad_row, int threads) {
    const DkdSettings settings{alpha, beta, factor / job.samples};
    return with_float_type(job.student_type, [&](auto* s) {
        return with_float_type(job.teacher_type, [&](auto* t) {
            using S = Element<decltype(s)>;
            using T = Element<decltype(t)>;
            return mean_over_rows(job, bad_row, threads, [&](std::int64_t row, const RowScratch& scratch) {
                return decoupled_row<S, T>(job, settings, row, scratch, gradient_row<S>(job, row));
            });
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
