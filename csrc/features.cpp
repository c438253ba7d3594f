// Losses on feature maps. Memory is walked in its own order; channels and samples follow from the layout.
//
// Work is cut into chunks whose size does not depend on the number of threads, and their sums are added up in order,
// so results do not depend on it either.

#include <cmath>

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr std::int64_t kChunk = 32768;  // elements
constexpr double kPowerFloor = 1e-12, kChannelEpsilon = 1e-5, kLengthEpsilon = 1e-12;

// A factor for each element of a stretch of memory: none, one for all, or one per element.
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

// A factor for each element of the whole map, by its channel (and sample); elements are asked for in order.
// Vectors within one run cost a comparison; one that straddles two runs of a channels-first map costs a choice between
// their factors, others are put together lane by lane.
template <bool kChannelsLast>
class ByChannel {
public:
    ByChannel(const float* values, std::int64_t sample_stride, const Runs& runs, std::int64_t first)
        : values_(values), sample_stride_(sample_stride), runs_(runs), first_(first) {
        enter(first / runs.length);
    }

    STABLEKD_INLINE Vec operator()(Vec x, std::int64_t i, int count) {
        const std::int64_t element = first_ + i;
        if (element + count > end_) return x * leaving(element, count);
        return x * within(element, count);
    }

private:
    void enter(std::int64_t run) {
        start_ = run * runs_.length, end_ = start_ + runs_.length;
        run_ = run, run_values_ = values_of(run);
    }

    STABLEKD_INLINE Vec within(std::int64_t element, int count) const {
        if constexpr (kChannelsLast) return load(run_values_ + (element - start_), count);
        return splat(*run_values_);
    }

    // The factors of a vector that ends beyond the run, in whose last run the next one begins.
    __attribute__((noinline)) Vec leaving(std::int64_t element, int count) {
        const std::int64_t left = end_ - element;
        if (left == 0) enter(run_ + 1);
        if (element + count <= end_) return within(element, count);
        if (kChannelsLast || left == 0 || runs_.length < count - left) return straddling(element, count);
        const Vec own = splat(*run_values_);
        enter(run_ + 1);
        return lanes_below(static_cast<int>(left)) ? own : splat(*run_values_);
    }

    const float* values_of(std::int64_t run) const {
        return values_ + runs_.sample(run) * sample_stride_ + runs_.channel(run);
    }

    Vec straddling(std::int64_t element, int count) {
        Vec out{};
        for (int lane = 0; lane < count; ++lane) {
            if (element + lane >= end_) enter(run_ + 1);
            out[lane] = run_values_[kChannelsLast ? element + lane - start_ : 0];
        }
        return out;
    }

    const float* values_;
    std::int64_t sample_stride_;
    const Runs& runs_;
    std::int64_t first_, start_, end_, run_;
    const float* run_values_;
};

double in_order(const double* values, std::int64_t count) {
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

// Sum of (s - t) * pull * (s - t); the gradient is (s - t) * pull * factor.
template <class S, class T, class Scale, class Pull>
double pull_run(const S* s, const T* t, S* gradient, std::int64_t n, Scale scale, Pull pull, float factor, bool past) {
    return sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec apart = load(s + i, count) - scale(load(t + i, count), i, count);
        const Vec pulled = pull(apart, i, count);
        if (gradient != nullptr) write(gradient + i, pulled * factor, count, past);
        return apart * pulled;
    });
}

template <class T, class Scale>
double squares(const T* t, std::int64_t n, Scale scale) {
    return sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec x = scale(load(t + i, count), i, count);
        return x * x;
    });
}

// Squared lengths of s and t and their inner product.
template <class Number>
struct ProductsOf {
    Number ss{}, tt{}, st{};

    STABLEKD_INLINE ProductsOf& operator+=(const ProductsOf& more) {
        ss += more.ss, tt += more.tt, st += more.st;
        return *this;
    }
};
using Products = ProductsOf<double>;
using LaneProducts = ProductsOf<Vec>;

Products sum(const LaneProducts& lanes) { return {sum(lanes.ss), sum(lanes.tt), sum(lanes.st)}; }

STABLEKD_INLINE LaneProducts products(Vec a, Vec b) { return {a * a, b * b, a * b}; }

template <class S, class T, class Scale>
Products products_of(const S* s, const T* t, std::int64_t n, Scale scale) {
    return sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        return products(load(s + i, count), scale(load(t + i, count), i, count));
    });
}

// With u = s / |s|, v = t / |t| and ratio = |s| / |t|: u - v is (s - t * ratio) / |s|, with fewer roundings than the
// difference of two quotients. The gradient is ((s - t * ratio) - s * along) * factor.
struct Units {
    float ratio, along, factor;
};

// Sum of (s - t * ratio)^2.
template <class S, class T, class Scale>
double unit_run(const S* s, const T* t, S* gradient, std::int64_t n, Scale scale, const Units& units, bool past) {
    return sum_over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec student = load(s + i, count);
        const Vec apart = student - scale(load(t + i, count), i, count) * units.ratio;
        if (gradient != nullptr) write(gradient + i, (apart - student * units.along) * units.factor, count, past);
        return apart * apart;
    });
}

// How a loss made of unit vectors weighs them: 1 - cosine, or the squared distance.
struct Angle {
    bool squared_distance;
    double factor;

    Units units(const Products& p) const {
        const double ss = p.ss + kLengthEpsilon, tt = p.tt + kLengthEpsilon;
        const double cosine = p.st / std::sqrt(ss * tt), own = squared_distance ? p.ss / ss : 1;
        const double weight = factor * (squared_distance ? 2 : 1);
        return {static_cast<float>(std::sqrt(ss / tt)), static_cast<float>(own - cosine), static_cast<float>(weight / ss)};
    }

    // From the sum of (s - t * ratio)^2: it does not cancel where u is close to v, as 1 - u.v would.
    double loss(double apart, const Products& p) const {
        const double ss = p.ss + kLengthEpsilon, distance = apart / ss;
        return squared_distance ? distance : (distance + kLengthEpsilon / ss + kLengthEpsilon / (p.tt + kLengthEpsilon)) / 2;
    }
};

template <class S, class T>
class FeatureLoss {
public:
    FeatureLoss(const Features& job, int threads)
        : job_(job), student_(static_cast<const S*>(job.student)), target_(static_cast<const T*>(job.target)),
          gradient_(static_cast<S*>(job.gradient)), runs_(runs_of(job.layout)), threads_(threads),
          elements_(runs_.count * runs_.length), past_(goes_past_caches(gradient_, elements_, kChunk)) {}

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
    static constexpr bool kCodes = std::is_same_v<T, std::int8_t> || std::is_same_v<T, Float8>;

    // The scale of a run's codes; channels-last: of its first channel, those of the others after it.
    const float* scales_of(std::int64_t run) const {
        return job_.scales + runs_.sample(run) * job_.scales_sample_stride + runs_.channel(run);
    }

    // Calls body(scale) with what turns the codes of one run into values.
    template <class Body>
    auto with_scale_of_run(std::int64_t run, Body&& body) const {
        if constexpr (kCodes) {
            return runs_.channels_last ? body(Each{scales_of(run)}) : body(Same{*scales_of(run)});
        } else {
            return body(One{});
        }
    }

    // Calls body(scale) with what turns the codes from element `first` on into values.
    template <class Body>
    auto with_scale_from(std::int64_t first, Body&& body) const {
        if constexpr (kCodes) {
            if (runs_.channels_last) return body(ByChannel<true>(job_.scales, job_.scales_sample_stride, runs_, first));
            return body(ByChannel<false>(job_.scales, job_.scales_sample_stride, runs_, first));
        } else {
            return body(One{});
        }
    }

    // Sum of body(first, last) over chunks of elements.
    template <class Body>
    double sum_over_chunks(Body&& body) const {
        const std::int64_t chunks = (elements_ + kChunk - 1) / kChunk;
        Scratch<double> sums(chunks);
        in_parallel(elements_, kChunk, threads_, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
            sums.get()[chunk] = body(first, last);
        });
        return in_order(sums.get(), chunks);
    }

    // Writes past the caches need aligned vectors: stretches of `length` must all begin at one.
    bool past_aligned(std::int64_t length) const { return past_ && length % kWidth == 0; }

    S* gradient_at(std::int64_t element) const { return gradient_ == nullptr ? nullptr : gradient_ + element; }

    double pulled(double factor) const {
        return sum_over_chunks([&](std::int64_t first, std::int64_t last) {
            return with_scale_from(first, [&](auto scale) {
                return pull_run(student_ + first, target_ + first, gradient_at(first), last - first, scale, One{}, factor,
                                past_);
            });
        });
    }

    double target_power() const {
        return sum_over_chunks([&](std::int64_t first, std::int64_t last) {
                   return with_scale_from(first, [&](auto scale) { return squares(target_ + first, last - first, scale); });
               }) /
               elements_;
    }

    double pulled_by_channel(double factor) const {
        Scratch<float> pulls(job_.layout.channels);
        inverse_variances(pulls.get());
        return runs_.channels_last ? pulled_by<true>(pulls.get(), factor) : pulled_by<false>(pulls.get(), factor);
    }

    template <bool kChannelsLast>
    double pulled_by(const float* pulls, double factor) const {
        return sum_over_chunks([&](std::int64_t first, std::int64_t last) {
            return with_scale_from(first, [&](auto scale) {
                return pull_run(student_ + first, target_ + first, gradient_at(first), last - first, scale,
                                ByChannel<kChannelsLast>(pulls, 0, runs_, first), factor, past_);
            });
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
        Scratch<double> mean(channels), deviation(channels);
        for (std::int64_t channel = 0; channel < channels; ++channel) mean.get()[channel] = deviation.get()[channel] = 0;
        double count = 0;
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            const double added = elements_per_channel(chunk), all = count + added;
            merge_moments(means.get() + chunk * channels, deviations.get() + chunk * channels, added / all,
                          count * added / all, mean.get(), deviation.get());
            count = all;
        }
        for (std::int64_t channel = 0; channel < channels; ++channel) {
            out[channel] = 1 / (deviation.get()[channel] / count + kChannelEpsilon);
        }
    }

    void merge_moments(const double* means, const double* deviations, double share, double apart_share, double* mean,
                       double* deviation) const {
        for (std::int64_t channel = 0; channel < job_.layout.channels; ++channel) {
            const double apart = means[channel] - mean[channel];
            mean[channel] += apart * share;
            deviation[channel] += deviations[channel] + apart * apart * apart_share;
        }
    }

    double elements_per_channel(std::int64_t chunk) const {
        if (!runs_.channels_last) return runs_.length;
        const std::int64_t left = runs_.count - chunk * runs_.per_chunk;
        return left < runs_.per_chunk ? left : runs_.per_chunk;
    }

    void moments_of_run(std::int64_t run, double& mean, double& deviation) const {
        const T* t = target_ + run * runs_.length;
        with_scale_of_run(run, [&](auto scale) {
            const double total = sum_over(runs_.length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                return scale(load(t + i, count), i, count);
            });
            const float centre = total / runs_.length;
            deviation = sum_over(runs_.length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                const Vec apart = scale(load(t + i, count), i, count) - centre;
                return lanes_below(count) ? apart * apart : Vec{};
            });
            // Squares about the centre, the rounded mean, are too large by the square of that rounding for each element.
            mean = total / runs_.length;
            deviation -= runs_.length * (mean - centre) * (mean - centre);
        });
    }

    // Few enough positions for single precision: a chunk holds kChunk elements of all channels. They are walked in the
    // order of memory, with the sums of all channels in the nearest cache.
    void moments_of_positions(std::int64_t first, std::int64_t last, double* means, double* deviations) const {
        const std::int64_t channels = runs_.length;
        Scratch<float> sums(2 * (channels + kWidth));
        float *total = sums.get(), *squared = total + channels + kWidth;
        std::memset(total, 0, 2 * (channels + kWidth) * sizeof(float));
        over_positions(first, last, total, [](Vec x, std::int64_t, int) STABLEKD_LAMBDA { return x; });
        const float count = last - first;
        for (std::int64_t c = 0; c < channels; ++c) means[c] = total[c] /= count;
        over_positions(first, last, squared, [=](Vec x, std::int64_t c, int lanes) STABLEKD_LAMBDA {
            const Vec apart = x - load(total + c, lanes);
            return apart * apart;
        });
        for (std::int64_t c = 0; c < channels; ++c) deviations[c] = squared[c];
    }

    // Adds term(value, channel, count) of each position to `sums`, four positions at a time.
    template <class Term>
    STABLEKD_INLINE void over_positions(std::int64_t first, std::int64_t last, float* sums, Term&& term) const {
        std::int64_t run = first;
        for (; run + 4 <= last; run += 4) {
            over(runs_.length, [&](std::int64_t c, int lanes) STABLEKD_LAMBDA {
                const Vec a = term(value(run, c, lanes), c, lanes), b = term(value(run + 1, c, lanes), c, lanes);
                const Vec d = term(value(run + 2, c, lanes), c, lanes), e = term(value(run + 3, c, lanes), c, lanes);
                store(sums + c, load(sums + c, lanes) + ((a + b) + (d + e)), lanes);
            });
        }
        for (; run < last; ++run) {
            over(runs_.length, [&](std::int64_t c, int lanes) STABLEKD_LAMBDA {
                store(sums + c, load(sums + c, lanes) + term(value(run, c, lanes), c, lanes), lanes);
            });
        }
    }

    STABLEKD_INLINE Vec value(std::int64_t run, std::int64_t i, int count) const {
        const Vec code = load(target_ + run * runs_.length + i, count);
        if constexpr (kCodes) return code * load(scales_of(run) + i, count);
        return code;
    }

    // Both sweeps over a sample by one thread, so that the second finds it in the cache.
    double per_sample(const Angle& angle) const {
        Scratch<double> losses(job_.layout.samples);
        in_parallel(job_.layout.samples, 1, threads_, [&](std::int64_t sample, std::int64_t, std::int64_t) {
            const std::int64_t n = elements_ / job_.layout.samples, first = sample * n;
            const S* s = student_ + first;
            const T* t = target_ + first;
            const Products products = with_scale_from(first, [&](auto scale) { return products_of(s, t, n, scale); });
            const Units units = angle.units(products);
            const double apart = with_scale_from(
                first, [&](auto scale) { return unit_run(s, t, gradient_at(first), n, scale, units, past_aligned(n)); });
            losses.get()[sample] = angle.loss(apart, products);
        });
        return in_order(losses.get(), job_.layout.samples);
    }

    double positions_as_runs(const Angle& angle) const {
        Scratch<double> losses(runs_.chunks());
        in_parallel(runs_.count, runs_.per_chunk, threads_, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
            double total = 0;
            for (std::int64_t run = first; run < last; ++run) total += position(angle, run);
            losses.get()[chunk] = total;
        });
        return in_order(losses.get(), runs_.chunks());
    }

    double position(const Angle& angle, std::int64_t run) const {
        const std::int64_t at = run * runs_.length;
        return with_scale_of_run(run, [&](auto scale) {
            const Products products = products_of(student_ + at, target_ + at, runs_.length, scale);
            const double apart =
                unit_run(student_ + at, target_ + at, gradient_at(at), runs_.length, scale, angle.units(products),
                         past_aligned(runs_.length));
            return angle.loss(apart, products);
        });
    }

    // Channels-first: some neighbouring positions at a time, all their channels in turn.
    double positions_across_runs(const Angle& angle) const {
        constexpr int wide = 4;  // vectors, as many as there are registers for their sums
        Scratch<double> losses(job_.layout.outer);
        in_parallel(job_.layout.outer, 1, threads_, [&](std::int64_t outer, std::int64_t, std::int64_t) {
            const std::int64_t first_run = outer * job_.layout.channels, inner = job_.layout.inner;
            double total = 0;
            std::int64_t at = 0;
            for (; at + wide * kWidth <= inner; at += wide * kWidth) total += strip<wide>(angle, first_run, at, kWidth);
            over(inner - at, [&](std::int64_t i, int count) { total += strip<1>(angle, first_run, at + i, count); });
            losses.get()[outer] = total;
        });
        return in_order(losses.get(), job_.layout.outer);
    }

    // `kVectors` vectors of positions from `start` on; `count` < kWidth lanes only of a single vector.
    template <int kVectors>
    double strip(const Angle& angle, std::int64_t first_run, std::int64_t start, int count) const {
        const std::int64_t end_run = first_run + job_.layout.channels;
        LaneProducts sums[kVectors] = {};
        for (std::int64_t run = first_run; run < end_run; ++run) {
            const std::int64_t at = run * runs_.length + start;
            const float scale = kCodes ? *scales_of(run) : 1.0f;
            for (int v = 0; v < kVectors; ++v) {
                const std::int64_t here = at + v * kWidth;
                sums[v] += products(load(student_ + here, count), load(target_ + here, count) * scale);
            }
        }
        Vec ratio[kVectors], along[kVectors], factor[kVectors], apart[kVectors] = {};
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < kWidth; ++lane) {
                const Units units = angle.units(lane_of(sums[v], lane));
                ratio[v][lane] = units.ratio, along[v][lane] = units.along, factor[v][lane] = units.factor;
            }
        }
        for (std::int64_t run = first_run; run < end_run; ++run) {
            const std::int64_t at = run * runs_.length + start;
            const float scale = kCodes ? *scales_of(run) : 1.0f;
            for (int v = 0; v < kVectors; ++v) {
                const std::int64_t here = at + v * kWidth;
                const Vec student = load(student_ + here, count);
                const Vec difference = student - load(target_ + here, count) * scale * ratio[v];
                apart[v] += difference * difference;
                if (gradient_ != nullptr) store(gradient_ + here, (difference - student * along[v]) * factor[v], count);
            }
        }
        double loss = 0;
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < count; ++lane) loss += angle.loss(apart[v][lane], lane_of(sums[v], lane));
        }
        return loss;
    }

    static Products lane_of(const LaneProducts& sums, int lane) { return {sums.ss[lane], sums.tt[lane], sums.st[lane]}; }

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
