// Attention transfer: a sample's maps of the mean square over channels, scaled to unit length and compared.
//
// A sample is the work of one thread, which writes its gradient while the sample is still in the caches. No sum depends
// on the number of threads.

#include <cmath>

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr double kLengthEpsilon = 1e-12;

// The sums over the lanes of kWidth vectors, that of vector i in lane i; the vectors are overwritten. Two vectors become
// one whose lanes are sums of two lanes, until one is left.
template <int kStep = kWidth / 2>
STABLEKD_INLINE Vec lane_sums(Vec* vectors) {
    if constexpr (kStep == 0) {
        return vectors[0];
    } else {
        const IntVec later = (lane_numbers() & kStep) != 0;
        for (int i = 0; i < kStep; ++i) {
            const Vec a = vectors[i], b = vectors[i + kStep];
            vectors[i] = (later ? b : a) + swapped<kStep>(later ? a : b);
        }
        return lane_sums<kStep / 2>(vectors);
    }
}

// The sums of x^2 over the channels of `count` places whose channels lie side by side.
template <class T>
STABLEKD_INLINE Vec squares_of_places(const T* x, std::int64_t channels, int count) {
    Vec sums[kWidth] = {};
    for (int i = 0; i < count; ++i) {
        const T* place = x + i * channels;
        Vec sum{};
        over(channels, [&](std::int64_t c, int lanes) STABLEKD_LAMBDA {
            const Vec value = load(place + c, lanes);
            sum += value * value;
        });
        sums[i] = sum;
    }
    return lane_sums(sums);
}

// Writes the mean of x^2 over the channels at each place of one sample.
template <class T>
void mean_squares(const T* x, std::int64_t channels, std::int64_t places, bool channels_last, float* map) {
    const float share = 1.0f / channels;
    if (channels_last) {
        over(places, [&](std::int64_t place, int count) STABLEKD_LAMBDA {
            store(map + place, squares_of_places(x + place * channels, channels, count) * share, count);
        });
        return;
    }
    const auto square = [=](std::int64_t channel, std::int64_t place, int count) STABLEKD_LAMBDA {
        const Vec value = load(x + channel * places + place, count);
        return value * value;
    };
    std::memset(map, 0, places * sizeof(float));
    std::int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {  // in the order of memory, with the sums in the nearest cache
        over(places, [&](std::int64_t place, int count) STABLEKD_LAMBDA {
            const Vec more = (square(c, place, count) + square(c + 1, place, count)) +
                             (square(c + 2, place, count) + square(c + 3, place, count));
            store(map + place, load(map + place, count) + more, count);
        });
    }
    for (; c < channels; ++c) {
        over(places, [&](std::int64_t place, int count) STABLEKD_LAMBDA {
            store(map + place, load(map + place, count) + square(c, place, count), count);
        });
    }
    over(places, [&](std::int64_t place, int count) STABLEKD_LAMBDA {
        store(map + place, load(map + place, count) * share, count);
    });
}

// The student times the pull of its place.
template <class T>
void pull_places(const T* x, const float* pulls, std::int64_t channels, std::int64_t places, bool channels_last, T* out,
                 bool past) {
    const std::int64_t runs = channels_last ? places : channels, length = channels_last ? channels : places;
    for (std::int64_t run = 0; run < runs; ++run) {
        const std::int64_t first = run * length;
        if (channels_last) {
            const float pull = pulls[run];
            over(length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                write(out + first + i, load(x + first + i, count) * pull, count, past);
            });
        } else {
            over(length, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                write(out + first + i, load(x + first + i, count) * load(pulls + i, count), count, past);
            });
        }
    }
}

// Squared lengths of both maps.
template <class Number>
struct SquaresOf {
    Number own{}, other{};

    STABLEKD_INLINE SquaresOf& operator+=(const SquaresOf& more) {
        own += more.own, other += more.other;
        return *this;
    }
};

SquaresOf<double> sum(const SquaresOf<Vec>& lanes) { return {sum(lanes.own), sum(lanes.other)}; }

// With u = a / |a|, v = b / |b| and ratio = |a| / |b|, u - v is (a - b * ratio) / |a|, with fewer roundings than the
// difference of two quotients. The pull of a place is ((a - b * ratio) - a * along) * slope, with along = u.(u - v).
// Returns |u - v|^2, and writes the pulls over a where they are wanted.
double compare(float* a, const float* b, std::int64_t places, bool with_pulls, double slope) {
    const auto squares = sum_over(places, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec own = load(a + i, count), other = load(b + i, count);
        return SquaresOf<Vec>{own * own, other * other};
    });
    const double length = squares.own + kLengthEpsilon;
    const float ratio = std::sqrt(length / (squares.other + kLengthEpsilon));
    const auto apart = sum_over(places, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec own = load(a + i, count), difference = own - load(b + i, count) * ratio;
        return SquaresOf<Vec>{difference * difference, own * difference};
    });
    if (with_pulls) {
        const float along = apart.other / length, inverse = 1 / length, step = slope;
        over(places, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            const Vec own = load(a + i, count);
            store(a + i, ((own - load(b + i, count) * ratio) - own * along) * inverse * step, count);
        });
    }
    return apart.own / length;
}

template <class S, class T>
double transfer(const Attention& job, double factor, int threads) {
    const std::int64_t samples = job.samples, places = job.places, channels = job.student_channels;
    const double slope = 4 * factor / (static_cast<double>(samples) * places * channels);
    const bool past = goes_past_caches(static_cast<const S*>(job.gradient), samples * places * channels,
                                       job.student_channels_last ? channels : places);
    Scratch<double> losses(samples);
    in_parallel(samples, 1, threads, [&](std::int64_t sample, std::int64_t, std::int64_t) {
        Scratch<float> maps(2 * places);
        float *own = maps.get(), *other = own + places;
        const S* student = static_cast<const S*>(job.student) + sample * places * channels;
        const T* target = static_cast<const T*>(job.target) + sample * places * job.target_channels;
        mean_squares(target, job.target_channels, places, job.target_channels_last, other);
        mean_squares(student, channels, places, job.student_channels_last, own);
        losses.get()[sample] = compare(own, other, places, job.gradient != nullptr, slope);
        if (job.gradient == nullptr) return;
        S* gradient = static_cast<S*>(job.gradient) + sample * places * channels;
        pull_places(student, own, channels, places, job.student_channels_last, gradient, past);
    });
    double total = 0;
    for (std::int64_t sample = 0; sample < samples; ++sample) total += losses.get()[sample];
    return total / (static_cast<double>(samples) * places);
}

}  // namespace

namespace STABLEKD_LEVEL {

double attention_transfer(const Attention& job, double factor, int threads) {
    return with_float_type(job.student_type, [&](auto* s) {
        return with_float_type(job.target_type, [&](auto* t) {
            return transfer<Element<decltype(s)>, Element<decltype(t)>>(job, factor, threads);
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
