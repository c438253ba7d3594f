// Losses on logits: a row is read once from memory, its exponentials stay in the nearest cache until the gradient
// has been written from them.

#include "logits.h"

namespace stablekd {
namespace {

template <class Number>
struct PairSums {
    Number student{}, teacher{}, plain{}, cross{};

    STABLEKD_INLINE PairSums& operator+=(const PairSums& more) {
        student += more.student, teacher += more.teacher, plain += more.plain, cross += more.cross;
        return *this;
    }
};

inline PairSums<double> sum(const PairSums<Vec>& lanes) {
    return {sum(lanes.student), sum(lanes.teacher), sum(lanes.plain), sum(lanes.cross)};
}

struct Pair {
    Softmax student, teacher, plain;  // plain: the student at temperature 1
    double divergence;                // KL(teacher || student)
};

// How the student's exponentials at temperature 1 are made: not at all, by themselves, or from those at the
// temperature 2^k by squaring k times.
enum class Plain { none, own, squared };

// Both rows' exponentials at the temperature, those of the student at 1 as `kPlain` says, and what their sums say.
template <Plain kPlain, int kSquarings = 0, class S, class T, class Classes = All>
Pair compare(const S* student, const T* teacher, std::int64_t n, float temperature, const RowScratch& out,
             const Classes& classes = {}) {
    const float student_top = largest(student, n, classes), teacher_top = largest(teacher, n, classes);
    const float rate = kLog2E / temperature;
    const Exp2 exp(rate), exp_plain(kLog2E);
    // A copy, as the compiler must think that stores through `out` may change it.
    const RowScratch to = out;
    const auto sums = sum_over_costly(n, to.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
        // The next row, while this one is worked on: a row is about a page, where the processor's own guesses end.
        __builtin_prefetch(student + n + i);
        __builtin_prefetch(teacher + n + i);
        const Vec s = classes(load(student + i, count, -kInfinity), i, count) - student_top;
        const Vec t = classes(load(teacher + i, count, -kInfinity), i, count) - teacher_top;
        PairSums<Vec> terms;
        terms.student = exp(s);
        terms.teacher = exp(t);
        store(to.student + i, terms.student, count);
        store(to.teacher + i, terms.teacher, count);
        if constexpr (kPlain != Plain::none) {
            terms.plain = kPlain == Plain::own ? exp_plain(s) : terms.student;
            for (int k = 0; k < kSquarings; ++k) terms.plain *= terms.plain;
            store(to.plain + i, terms.plain, count);
        }
        // Where the teacher's share is 0 the difference may be infinite or undefined, and counts nothing.
        terms.cross = exp.counts(t) ? terms.teacher * (t - s) : Vec{};
        return terms;
    });
    // With the temperature that the rounded rate stands for: its error would not cancel against the exponentials'.
    const double inverse_temperature = static_cast<double>(rate) * kLn2;
    const double divergence = sums.cross * inverse_temperature / sums.teacher + std::log(sums.student / sums.teacher);
    return {{student_top, sums.student}, {teacher_top, sums.teacher}, {student_top, sums.plain}, divergence};
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
    std::int64_t open_count = 0;
    const double logits = sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const IntVec open = open_lanes(student, teacher, i, count);
        for (int lane = 0; lane < kWidth; ++lane) open_count -= open[lane];
        return open ? load(student + i, count) : Vec{};
    });
    return {logits, open_count};
}

template <class S, class T>
Pair compare_with_plain(const S* student, const T* teacher, std::int64_t n, float temperature, const RowScratch& out) {
    if (temperature == 1) return compare<Plain::squared, 0>(student, teacher, n, temperature, out);
    if (temperature == 2) return compare<Plain::squared, 1>(student, teacher, n, temperature, out);
    if (temperature == 4) return compare<Plain::squared, 2>(student, teacher, n, temperature, out);
    if (temperature == 8) return compare<Plain::squared, 3>(student, teacher, n, temperature, out);
    return compare<Plain::own>(student, teacher, n, temperature, out);
}

// What a row's loss and gradient take from its rows' exponentials, which lie in scratch.
struct Divergence {
    double value;
    double student_total, teacher_total;  // exponentials / these = q and p
    double mass;                          // sum of p, 1 but for rounded probabilities
};

// A teacher known by its largest probabilities: they are written over the whole row, what they lack to 1 spread
// over the other open classes.
template <class S>
Divergence from_kept(const S* student, std::int64_t n, double temperature, const Softmax& q,
                     const std::int64_t* indices, const float* kept, std::int64_t kept_count, float* p) {
    const auto no_teacher = static_cast<const float*>(nullptr);
    const Open open = open_classes(student, no_teacher, n);
    // a = (logit - top) / temperature; log q = a - log(q.total).
    double others_a = (open.logits - open.count * static_cast<double>(q.top)) / temperature;
    double mass = 0, sum_p_log_p = 0, sum_p_a = 0;
    std::int64_t others = open.count;
    for (std::int64_t k = 0; k < kept_count; ++k) {
        const float logit = load_one(student + indices[k]);
        const double a = (static_cast<double>(logit) - q.top) / temperature, probability = kept[k];
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
    return {sum_p_log_p - sum_p_a + mass * std::log(q.total), q.total, 1, mass};
}

struct KdSettings {
    double alpha, smoothing, gradient_factor;
};

// The loss of one row; its gradient goes to `gradient` unless that is null.
template <class S, class T>
double kd_row(const Logits& job, const KdSettings& settings, std::int64_t row, const RowScratch& memory, S* gradient) {
    const RowScratch scratch = memory.for_gradient(gradient, gradient_past_caches<S>(job));
    const std::int64_t n = job.classes;
    const S* student = static_cast<const S*>(job.student) + row * job.student_stride;
    const T* teacher = static_cast<const T*>(job.teacher) + row * job.teacher_stride;
    const double temperature = job.temperature, alpha = job.labels == nullptr ? 1 : settings.alpha;

    Softmax plain{};
    Divergence kl;
    if (job.indices == nullptr) {
        const Pair pair = job.labels == nullptr ? compare<Plain::none>(student, teacher, n, job.temperature, scratch)
                                                : compare_with_plain(student, teacher, n, job.temperature, scratch);
        plain = pair.plain;
        kl = {pair.divergence, pair.student.total, pair.teacher.total, 1};
    } else {
        for (std::int64_t k = 0; k < job.kept; ++k) scratch.kept[k] = load_one(teacher + k);
        const Softmax q = exponentials(student, n, job.temperature, scratch.student);
        kl = from_kept(student, n, temperature, q, job.indices + row * job.kept, scratch.kept, job.kept, scratch.teacher);
        if (job.labels != nullptr) plain = exponentials(student, n, 1.0f, scratch.plain);
    }
    double loss = alpha * temperature * temperature * kl.value;
    const double weight = job.weight == nullptr ? 1 : job.weight[row];
    const double factor = settings.gradient_factor * weight;
    const float from_student = factor * alpha * temperature * kl.mass / kl.student_total;
    const float from_teacher = factor * alpha * temperature / kl.teacher_total;

    if (job.labels == nullptr) {
        if (gradient != nullptr) {
            over(n, scratch.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
                write(gradient + i, load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher,
                      count, scratch.past_caches);
            });
        }
        return weight * loss;
    }

    const std::int64_t label = job.labels[row];
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
        over(n, scratch.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            Vec g = load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher;
            g += load(scratch.plain + i) * from_plain;
            if (smooth) g -= open_lanes(student, open_teacher, i, count) ? splat(everywhere) : Vec{};
            write(gradient + i, g, count, scratch.past_caches);
        });
    }
    return weight * loss;
}

struct DkdSettings {
    double alpha, beta, gradient_factor;
};

template <class S, class T>
double decoupled_row(const Logits& job, const DkdSettings& settings, std::int64_t row, const RowScratch& memory,
                     S* gradient) {
    const std::int64_t n = job.classes, label = job.labels[row];
    const S* student = static_cast<const S*>(job.student) + row * job.student_stride;
    const T* teacher = static_cast<const T*>(job.teacher) + row * job.teacher_stride;
    const double temperature = job.temperature;

    const RowScratch scratch = memory.for_gradient(gradient, gradient_past_caches<S>(job));
    const Pair others = compare<Plain::none>(student, teacher, n, job.temperature, scratch, AllBut{label});
    const Halves q = halves(load_one(student + label) / temperature, log_mass(others.student, temperature));
    const Halves p = halves(load_one(teacher + label) / temperature, log_mass(others.teacher, temperature));
    const double target = between(p, q);

    if (gradient != nullptr) {
        const double factor = settings.gradient_factor * temperature, ahead = q.first - p.first;
        const float from_student = factor * (settings.beta - settings.alpha * ahead) / others.student.total;
        const float from_teacher = factor * settings.beta / others.teacher.total;
        const float at_label = factor * settings.alpha * ahead;
        over(n, scratch.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            Vec g = load(scratch.student + i) * from_student - load(scratch.teacher + i) * from_teacher;
            if (label >= i && label < i + count) g[label - i] = at_label;
            write(gradient + i, g, count, scratch.past_caches);
        });
    }
    return temperature * temperature * (settings.alpha * target + settings.beta * others.divergence);
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
