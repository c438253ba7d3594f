// Losses on feature maps. Memory is walked in its own order; channels and samples follow from the layout.
//
// Work is cut into chunks whose size does not depend on the number of threads, and their sums are added up in order,
// so results do not depend on it either.

#include <cmath>

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr std::int64_t kChunk = 32768;  // elements
constexpr double kPowerFloor = 1e-12, kChannelEpsilon = 1e-5, kLengthEpsilon = 1e-12;
// From this size on a gradient does not stay in the caches anyway, and is written past them.
constexpr std::int64_t kPastCaches = std::int64_t{16} << 20;  // bytes

// A factor for each element of a run: none, one for all, or one per element (channels-last).
struct One {
    Vec operator()(Vec x, std::int64_t, int) const { return x; }
};
struct Same {
    float value;
    Vec operator()(Vec x, std::int64_t, int) const { return x * value; }
};
struct Each {
    const float* values;
    Vec operator()(Vec x, std::int64_t i, int count) const { return x * load(values + i, count); }
};

// A stretch of memory within one channel (channels-first) or one position (channels-last), or of no structure at all.
struct Runs {
    std::int64_t count, length, per_chunk, per_sample, channels;
    bool channels_last;

    std::int64_t chunks() const { return (count + per_chunk - 1) / per_chunk; }
    std::int64_t sample(std::int64_t run) const { return run / per_sample; }
    std::int64_t channel(std::int64_t run) const { return channels_last ? 0 : run % channels; }
};

Runs runs_of(const Layout& layout) {
    const bool last = layout.inner == 1;
    const std::int64_t count = last ? layout.outer : layout.outer * layout.channels;
    const std::int64_t length = last ? layout.channels : layout.inner;
    return {count, length, length < kChunk ? kChunk / length : 1, count / layout.samples, layout.channels, last};
}

// Calls body(chunk, first, last) for each chunk of `total` units, threads taking chunks in order.
template <class Body>
void in_parallel(std::int64_t total, std::int64_t per_chunk, int threads, Body&& body) {
    const std::int64_t chunks = (total + per_chunk - 1) / per_chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t first = chunk * per_chunk, last = first + per_chunk;
        body(chunk, first, last < total ? last : total);
    }
}

double in_order(const double* values, std::int64_t count) {
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

template <class S>
STABLEKD_INLINE void write(S* to, Vec value, int count, bool) {
    store(to, value, count);
}
STABLEKD_INLINE void write(float* to, Vec value, int count, bool past_caches) {
    if (past_caches && count == kWidth) return store_past_caches(to, value);
    store(to, value, count);
}

template <class S>
bool past_caches(const S* gradient, std::int64_t elements) {
    return elements * static_cast<std::int64_t>(sizeof(S)) >= kPastCaches &&
           reinterpret_cast<std::uintptr_t>(gradient) % (kWidth * sizeof(float)) == 0;
}

// Sum of (s - t) * pull * (s - t); the gradient is (s - t) * pull * factor.
template <class S, class T, class Scale, class Pull>
double pull_run(const S* s, const T* t, S* gradient, std::int64_t n, Scale scale, Pull pull, float factor, bool past) {
    Wide total{};
    const auto body = [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec apart = load(s + i, count) - scale(load(t + i, count), i, count);
        const Vec pulled = pull(apart, i, count);
        total += widen(apart * pulled);
        if (gradient != nullptr) write(gradient + i, pulled * factor, count, past);
    };
    over(n, body);
    return sum(total);
}

template <class T, class Scale>
double squares(const T* t, std::int64_t n, Scale scale) {
    Wide total{};
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec x = scale(load(t + i, count), i, count);
        total += widen(x * x);
    });
    return sum(total);
}

// Squared lengths of s and t and their inner product.
struct Products {
    double ss = 0, tt = 0, st = 0;
};

template <class S, class T, class Scale>
void add_products(const S* s, const T* t, std::int64_t n, Scale scale, Products& products) {
    Wide ss{}, tt{}, st{};
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec a = load(s + i, count), b = scale(load(t + i, count), i, count);
        ss += widen(a * a), tt += widen(b * b), st += widen(a * b);
    });
    products.ss += sum(ss), products.tt += sum(tt), products.st += sum(st);
}

// u = s / |s| and v = t / |t|; the gradient is ((u - v) - u * along) * factor.
struct Units {
    float student, target, along, factor;
};

// Sum of (u - v)^2.
template <class S, class T, class Scale>
double unit_run(const S* s, const T* t, S* gradient, std::int64_t n, Scale scale, const Units& units) {
    Wide total{};
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec u = load(s + i, count) * units.student;
        const Vec apart = u - scale(load(t + i, count), i, count) * units.target;
        total += widen(apart * apart);
        if (gradient != nullptr) store(gradient + i, (apart - u * units.along) * units.factor, count);
    });
    return sum(total);
}

// How a loss made of unit vectors weighs them: 1 - cosine, or the squared distance.
struct Angle {
    bool squared_distance;
    double factor;

    Units units(const Products& p) const {
        const double s = 1 / std::sqrt(p.ss + kLengthEpsilon), t = 1 / std::sqrt(p.tt + kLengthEpsilon);
        const double cosine = p.st * s * t;
        const double along = (squared_distance ? p.ss * s * s : 1) - cosine;
        const double weight = factor * (squared_distance ? 2 : 1);
        return {static_cast<float>(s), static_cast<float>(t), static_cast<float>(along), static_cast<float>(weight * s)};
    }

    // From the sum of (u - v)^2: it does not cancel where u is close to v, as 1 - u.v would.
    double loss(double apart, const Products& p) const {
        if (squared_distance) return apart;
        return (apart + kLengthEpsilon / (p.ss + kLengthEpsilon) + kLengthEpsilon / (p.tt + kLengthEpsilon)) / 2;
    }
};

template <class S, class T>
class FeatureLoss {
public:
    FeatureLoss(const Features& job, int threads)
        : job_(job), student_(static_cast<const S*>(job.student)), target_(static_cast<const T*>(job.target)),
          gradient_(static_cast<S*>(job.gradient)), runs_(runs_of(job.layout)), threads_(threads),
          elements_(runs_.count * runs_.length), past_(past_caches(gradient_, elements_)) {}

    double mse(Normalize normalize, const double* given_power, double factor) const {
        if (normalize == Normalize::l2) return per_sample({true, factor / job_.layout.samples}) / job_.layout.samples;
        const double step = 2 * factor / elements_;
        if (normalize == Normalize::channel) return pulled_by_channel(step) / elements_;
        double power = 1;
        if (normalize == Normalize::power) {
            power = given_power != nullptr ? *given_power : target_power();
            if (power < kPowerFloor) power = kPowerFloor;
        }
        return pulled(step / power) / elements_ / power;
    }

    double cosine(bool per_position, double factor) const {
        if (!per_position) return per_sample({false, factor / job_.layout.samples}) / job_.layout.samples;
        const std::int64_t positions = elements_ / job_.layout.channels;
        const Angle angle{false, factor / positions};
        return (runs_.channels_last ? positions_as_runs(angle) : positions_across_runs(angle)) / positions;
    }

private:
    // Calls body(run, scale), with what turns the run's codes into values.
    template <class Body>
    void with_scale(std::int64_t run, Body&& body) const {
        if constexpr (std::is_same_v<T, std::int8_t> || std::is_same_v<T, Float8>) {
            const float* scales = job_.scales + runs_.sample(run) * job_.scales_sample_stride + runs_.channel(run);
            runs_.channels_last ? body(Each{scales}) : body(Same{*scales});
        } else {
            body(One{});
        }
    }

    // Sum over all runs of body(run, first element), added up chunk by chunk.
    template <class Body>
    double sum_over_runs(Body&& body) const {
        Scratch<double> sums(runs_.chunks());
        in_parallel(runs_.count, runs_.per_chunk, threads_, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
            double total = 0;
            for (std::int64_t run = first; run < last; ++run) total += body(run, run * runs_.length);
            sums.get()[chunk] = total;
        });
        return in_order(sums.get(), runs_.chunks());
    }

    S* gradient_at(std::int64_t element) const { return gradient_ == nullptr ? nullptr : gradient_ + element; }

    double pulled(double factor) const {
        if constexpr (std::is_same_v<T, std::int8_t> || std::is_same_v<T, Float8>) {
            return sum_over_runs([&](std::int64_t run, std::int64_t at) {
                double total = 0;
                with_scale(run, [&](auto scale) {
                    total = pull_run(student_ + at, target_ + at, gradient_at(at), runs_.length, scale, One{}, factor,
                                     past_aligned());
                });
                return total;
            });
        } else {
            // No channel matters: one long run, in chunks.
            Scratch<double> sums(elements_ / kChunk + 1);
            in_parallel(elements_, kChunk, threads_, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
                sums.get()[chunk] = pull_run(student_ + first, target_ + first, gradient_at(first), last - first, One{},
                                             One{}, factor, past_);
            });
            return in_order(sums.get(), (elements_ + kChunk - 1) / kChunk);
        }
    }

    // Vectors of a run are aligned only if every run begins at one.
    bool past_aligned() const { return past_ && runs_.length % kWidth == 0; }

    double target_power() const {
        const double total = sum_over_runs([&](std::int64_t run, std::int64_t at) {
            double part = 0;
            with_scale(run, [&](auto scale) { part = squares(target_ + at, runs_.length, scale); });
            return part;
        });
        return total / elements_;
    }

    double pulled_by_channel(double factor) const {
        Scratch<float> pulls(job_.layout.channels);
        inverse_variances(pulls.get());
        return sum_over_runs([&](std::int64_t run, std::int64_t at) {
            double total = 0;
            with_scale(run, [&](auto scale) {
                const auto pull = [&](auto by) {
                    total = pull_run(student_ + at, target_ + at, gradient_at(at), runs_.length, scale, by, factor,
                                     past_aligned());
                };
                runs_.channels_last ? pull(Each{pulls.get()}) : pull(Same{pulls.get()[runs_.channel(run)]});
            });
            return total;
        });
    }

    // 1 / (variance + epsilon) of each channel of the target, by means and squared deviations of chunks, merged in
    // order (Chan, Golub, LeVeque 1979).
    void inverse_variances(float* out) const {
        const std::int64_t channels = job_.layout.channels, chunks = runs_.channels_last ? runs_.chunks() : job_.layout.outer;
        Scratch<double> means(chunks * channels), deviations(chunks * channels);
        if (runs_.channels_last) {
            in_parallel(runs_.count, runs_.per_chunk, threads_, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
                moments_of_positions(first, last, means.get() + chunk * channels, deviations.get() + chunk * channels);
            });
        } else {
            in_parallel(runs_.count, runs_.per_chunk, threads_, [&](std::int64_t, std::int64_t first, std::int64_t last) {
                for (std::int64_t run = first; run < last; ++run) moments_of_run(run, means.get()[run], deviations.get()[run]);
            });
        }
        for (std::int64_t channel = 0; channel < channels; ++channel) {
            double count = 0, mean = 0, deviation = 0;
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
                const double added = elements_per_channel(chunk), all = count + added;
                const double apart = means.get()[chunk * channels + channel] - mean;
                mean += apart * added / all;
                deviation += deviations.get()[chunk * channels + channel] + apart * apart * count * added / all;
                count = all;
            }
            out[channel] = 1 / (deviation / count + kChannelEpsilon);
        }
    }

    double elements_per_channel(std::int64_t chunk) const {
        if (!runs_.channels_last) return runs_.length;
        const std::int64_t left = runs_.count - chunk * runs_.per_chunk;
        return left < runs_.per_chunk ? left : runs_.per_chunk;
    }

    void moments_of_run(std::int64_t run, double& mean, double& deviation) const {
        with_scale(run, [&](auto scale) {
            const T* t = target_ + run * runs_.length;
            Wide total{}, squared{};
            over(runs_.length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                total += widen(scale(load(t + i, count), i, count));
            });
            mean = sum(total) / runs_.length;
            const float centre = mean;
            over(runs_.length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                const Vec apart = scale(load(t + i, count, 0.0f), i, count) - centre;
                squared += widen(lanes_below(count) ? apart * apart : Vec{});
            });
            // The centre is the mean rounded to single precision.
            const double off = mean - centre;
            deviation = sum(squared) - runs_.length * off * off;
        });
    }

    void moments_of_positions(std::int64_t first, std::int64_t last, double* means, double* deviations) const {
        const double count = last - first;
        over(runs_.length, [&](std::int64_t c, int lanes) STABLEKD_LAMBDA {
            Wide total{}, squared{};
            for (std::int64_t run = first; run < last; ++run) total += widen(value(run, c, lanes));
            const Wide mean = total / count;
            const Vec centre = __builtin_convertvector(mean, Vec);
            for (std::int64_t run = first; run < last; ++run) {
                const Vec apart = value(run, c, lanes) - centre;
                squared += widen(apart * apart);
            }
            const Wide off = mean - widen(centre), deviation = squared - count * off * off;
            for (int lane = 0; lane < lanes; ++lane) means[c + lane] = mean[lane], deviations[c + lane] = deviation[lane];
        });
    }

    STABLEKD_INLINE Vec value(std::int64_t run, std::int64_t i, int count) const {
        const Vec code = load(target_ + run * runs_.length + i, count);
        if constexpr (std::is_same_v<T, std::int8_t> || std::is_same_v<T, Float8>) {
            const float* scales = job_.scales + runs_.sample(run) * job_.scales_sample_stride;
            return code * load(scales + i, count);
        }
        return code;
    }

    // Both sweeps over a sample by one thread, so that the second finds it in the cache.
    double per_sample(const Angle& angle) const {
        Scratch<double> losses(job_.layout.samples);
        in_parallel(job_.layout.samples, 1, threads_, [&](std::int64_t sample, std::int64_t, std::int64_t) {
            const std::int64_t first = sample * runs_.per_sample, last = first + runs_.per_sample;
            Products products;
            for (std::int64_t run = first; run < last; ++run) {
                const std::int64_t at = run * runs_.length;
                with_scale(run, [&](auto scale) {
                    add_products(student_ + at, target_ + at, runs_.length, scale, products);
                });
            }
            const Units units = angle.units(products);
            double apart = 0;
            for (std::int64_t run = first; run < last; ++run) {
                const std::int64_t at = run * runs_.length;
                with_scale(run, [&](auto scale) {
                    apart += unit_run(student_ + at, target_ + at, gradient_at(at), runs_.length, scale, units);
                });
            }
            losses.get()[sample] = angle.loss(apart, products);
        });
        return in_order(losses.get(), job_.layout.samples);
    }

    double positions_as_runs(const Angle& angle) const {
        return sum_over_runs([&](std::int64_t run, std::int64_t at) {
            double loss = 0;
            with_scale(run, [&](auto scale) {
                Products products;
                add_products(student_ + at, target_ + at, runs_.length, scale, products);
                const double apart = unit_run(student_ + at, target_ + at, gradient_at(at), runs_.length, scale,
                                              angle.units(products));
                loss = angle.loss(apart, products);
            });
            return loss;
        });
    }

    // Channels-first: as many neighbouring positions at a time as one vector holds, all their channels in turn.
    double positions_across_runs(const Angle& angle) const {
        const std::int64_t channels = job_.layout.channels, inner = job_.layout.inner;
        Scratch<double> losses(job_.layout.outer);
        in_parallel(job_.layout.outer, 1, threads_, [&](std::int64_t outer, std::int64_t, std::int64_t) {
            Wide total{};
            over(inner, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                total += positions(angle, outer * channels, i, count);
            });
            losses.get()[outer] = sum(total);
        });
        return in_order(losses.get(), job_.layout.outer);
    }

    STABLEKD_INLINE Vec value_in_run(std::int64_t run, std::int64_t i, int count) const {
        Vec out = load(target_ + run * runs_.length + i, count);
        with_scale(run, [&](auto scale) { out = scale(out, 0, kWidth); });
        return out;
    }

    Wide positions(const Angle& angle, std::int64_t first_run, std::int64_t i, int count) const {
        const std::int64_t channels = job_.layout.channels;
        Wide ss{}, tt{}, st{}, apart{};
        for (std::int64_t run = first_run; run < first_run + channels; ++run) {
            const Vec a = load(student_ + run * runs_.length + i, count), b = value_in_run(run, i, count);
            ss += widen(a * a), tt += widen(b * b), st += widen(a * b);
        }
        Vec student, target, along, factor;
        for (int lane = 0; lane < kWidth; ++lane) {
            const Units units = angle.units({ss[lane], tt[lane], st[lane]});
            student[lane] = units.student, target[lane] = units.target;
            along[lane] = units.along, factor[lane] = units.factor;
        }
        for (std::int64_t run = first_run; run < first_run + channels; ++run) {
            const Vec u = load(student_ + run * runs_.length + i, count) * student;
            const Vec difference = u - value_in_run(run, i, count) * target;
            apart += widen(difference * difference);
            if (gradient_ != nullptr) {
                store(gradient_ + run * runs_.length + i, (difference - u * along) * factor, count);
            }
        }
        Wide loss{};
        for (int lane = 0; lane < count; ++lane) loss[lane] = angle.loss(apart[lane], {ss[lane], tt[lane], st[lane]});
        return loss;
    }

    const Features& job_;
    const S* student_;
    const T* target_;
    S* gradient_;
    Runs runs_;
    int threads_;
    std::int64_t elements_;
    bool past_;
};

template <class Use>
double with_loss(const Features& job, int threads, Use&& use) {
    return with_float_type(job.student_type, [&](auto* s) {
        return with_any_type(job.target_type, [&](auto* t) {
            return use(FeatureLoss<Element<decltype(s)>, Element<decltype(t)>>(job, threads));
        });
    });
}

}  // namespace

namespace STABLEKD_LEVEL {

double feature_mse(const Features& job, Normalize normalize, const double* power, double factor, int threads) {
    return with_loss(job, threads, [&](const auto& loss) { return loss.mse(normalize, power, factor); });
}

double feature_cosine(const Features& job, bool per_position, double factor, int threads) {
    return with_loss(job, threads, [&](const auto& loss) { return loss.cosine(per_position, factor); });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
