// The grouped divergence: the classes most probable for the teacher and all others, told apart row by row.

#include "logits.h"

namespace stablekd {
namespace {

// The primary group of a row: the classes most probable for the teacher. Of those with the last of its logits it holds
// the first ones.
struct Primary {
    float lowest;
    std::int32_t last;  // place of the last class whose logit is `lowest`

    STABLEKD_INLINE IntVec operator()(Vec teacher, std::int64_t i) const {
        const IntVec place = lane_numbers() + static_cast<std::int32_t>(i);
        return (teacher > lowest) | ((teacher == lowest) & (place <= last));
    }
};

// Mass and number of the classes above a logit.
template <class Number>
struct Above {
    Number mass{}, count{};

    STABLEKD_INLINE Above& operator+=(const Above& more) {
        mass += more.mass, count += more.count;
        return *this;
    }
};

inline Above<double> sum(const Above<Vec>& lanes) { return {sum(lanes.mass), sum(lanes.count)}; }

// A class whose logit lies where the group ends.
struct Candidate {
    float logit, mass;
    std::int64_t place;
};

// As few of the most probable classes as reach `needed` together; `mass` are their exponentials relative to `top`. The
// logit at which they end is halved in until a few classes are left, or equal ones.
template <class T>
Primary primary_group(const T* teacher, const float* mass, std::int64_t n, float top, float rate, double needed) {
    constexpr int few = 24;
    const auto above = [=](float logit) STABLEKD_LAMBDA {
        return sum_over(n, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            const IntVec higher = load(teacher + i, count, -kInfinity) > logit;
            return Above<Vec>{higher ? load(mass + i, count) : Vec{}, higher ? splat(1.0f) : Vec{}};
        });
    };
    // The group ends above `low`, under which classes have no mass, and not above `high`.
    float low = top - 127.0f / rate, high = top;
    double before = 0;  // mass above `high`
    Above<double> least{0, static_cast<double>(n)}, most{};
    while (least.count - most.count > few) {
        const float middle = static_cast<float>(0.5 * (static_cast<double>(low) + high));
        if (!(middle > low && middle < high)) break;
        const Above<double> found = above(middle);
        if (found.mass < needed) high = middle, most = found, before = found.mass;
        else low = middle, least = found;
    }
    const bool equal = least.count - most.count > few;
    Candidate found[few];
    int count_found = 0;
    Primary group{high, -1};
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec logits = load(teacher + i, count, -kInfinity);
        const IntVec within = (logits > low) & (logits <= high);
        if (largest(-within) == 0) return;
        for (int lane = 0; lane < count; ++lane) {
            if (!within[lane]) continue;
            if (equal) {
                if (before < needed) before += mass[i + lane], group.last = static_cast<std::int32_t>(i + lane);
                continue;
            }
            int place = count_found++;  // sorted in, behind those that are as large
            for (; place > 0 && found[place - 1].logit < logits[lane]; --place) found[place] = found[place - 1];
            found[place] = {logits[lane], mass[i + lane], i + lane};
        }
    });
    for (int k = 0; k < count_found && before < needed; ++k) {
        before += found[k].mass;
        group = {found[k].logit, static_cast<std::int32_t>(found[k].place)};
    }
    return group;
}

template <class Number>
struct GroupSums {
    Number student_in{}, student_out{}, teacher_in{}, teacher_out{}, cross{};

    STABLEKD_INLINE GroupSums& operator+=(const GroupSums& more) {
        student_in += more.student_in, student_out += more.student_out, teacher_in += more.teacher_in;
        teacher_out += more.teacher_out, cross += more.cross;
        return *this;
    }
};

inline GroupSums<double> sum(const GroupSums<Vec>& lanes) {
    return {sum(lanes.student_in), sum(lanes.student_out), sum(lanes.teacher_in), sum(lanes.teacher_out),
            sum(lanes.cross)};
}

struct GkdSettings {
    double threshold, primary, binary, gradient_factor;
};

template <class S, class T>
double grouped_row(const Logits& job, const GkdSettings& settings, std::int64_t row, const RowScratch& memory,
                   S* gradient) {
    const std::int64_t n = job.classes;
    const S* student = static_cast<const S*>(job.student) + row * job.student_stride;
    const T* teacher = static_cast<const T*>(job.teacher) + row * job.teacher_stride;
    const double temperature = job.temperature;
    const float rate = kLog2E / job.temperature;
    const RowScratch scratch = memory.for_gradient(gradient, gradient_past_caches<S>(job));

    const Softmax whole = exponentials(teacher, n, job.temperature, scratch.teacher);
    const Primary group = primary_group(teacher, scratch.teacher, n, whole.top, rate, settings.threshold * whole.total);
    // Each group's exponentials of the student are relative to its own largest logit.
    Vec tops_in = splat(-kInfinity), tops_out = tops_in;
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const IntVec inside = group(load(teacher + i, count, -kInfinity), i);
        const Vec s = load(student + i, count, -kInfinity);
        tops_in = vmax(inside ? s : splat(-kInfinity), tops_in);
        tops_out = vmax(inside ? splat(-kInfinity) : s, tops_out);
    });
    const float top_in = largest(tops_in), top_out = largest(tops_out), top = whole.top;
    const Exp2 exp(rate);
    const auto sums = sum_over_costly(n, scratch.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
        __builtin_prefetch(student + n + i);
        __builtin_prefetch(teacher + n + i);
        const Vec logits = load(teacher + i, count, -kInfinity), t = logits - top;
        const IntVec inside = group(logits, i);
        const Vec s = load(student + i, count, -kInfinity) - (inside ? splat(top_in) : splat(top_out));
        const Vec q = exp(s), p = load(scratch.teacher + i, count);
        store(scratch.student + i, q, count);
        GroupSums<Vec> terms;
        terms.student_in = inside ? q : Vec{}, terms.student_out = inside ? Vec{} : q;
        terms.teacher_in = inside ? p : Vec{}, terms.teacher_out = inside ? Vec{} : p;
        terms.cross = (inside & exp.counts(t)) ? p * (t - s) : Vec{};
        return terms;
    });
    const Halves q = halves(log_mass({top_in, sums.student_in}, temperature),
                            log_mass({top_out, sums.student_out}, temperature));
    const Halves p = halves(std::log(sums.teacher_in), std::log(sums.teacher_out));
    const double inverse_temperature = static_cast<double>(rate) * kLn2;
    // Where the student excludes the whole group its share of it is 0, and so is every class's share inside.
    const bool reached = sums.student_in > 0;
    const double inner = reached ? sums.cross * inverse_temperature / sums.teacher_in + std::log(sums.student_in / sums.teacher_in)
                                 : kInfinity;

    if (gradient != nullptr) {
        const double factor = settings.gradient_factor * temperature, ahead = q.first - p.first;
        const float in = reached ? factor * (settings.binary * ahead + settings.primary * p.first) / sums.student_in : 0;
        const float out = sums.student_out > 0 ? -factor * settings.binary * ahead / sums.student_out : 0;
        const float from_teacher = factor * settings.primary * p.first / sums.teacher_in;
        over(n, scratch.head, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            const IntVec inside = group(load(teacher + i, count, -kInfinity), i);
            const Vec s = load(scratch.student + i), t = load(scratch.teacher + i);
            write(gradient + i, inside ? s * in - t * from_teacher : s * out, count, scratch.past_caches);
        });
    }
    return temperature * temperature * (settings.binary * between(p, q) + settings.primary * p.first * inner);
}

}  // namespace

namespace STABLEKD_LEVEL {

double grouped_kl(const Logits& job, double threshold, double primary, double binary, double factor, int threads) {
    const GkdSettings settings{threshold, primary, binary, factor / job.samples};
    return with_float_type(job.student_type, [&](auto* s) {
        return with_float_type(job.teacher_type, [&](auto* t) {
            using S = Element<decltype(s)>;
            using T = Element<decltype(t)>;
            return mean_over_rows(job, nullptr, threads, [&](std::int64_t row, const RowScratch& scratch) {
                return grouped_row<S, T>(job, settings, row, scratch, gradient_row<S>(job, row));
            });
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
