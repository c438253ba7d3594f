// 8-bit codes of activations. Every operation rounds as IEEE single precision says, so that all implementations
// agree to the last bit: this file is compiled without fused multiply-add.

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

inline void store_code(std::int8_t* to, Vec value, int count) {
    const Vec limited = vmin(vmax(value, splat(-127.0f)), splat(127.0f));
    store_bytes(to, reinterpret<Bits>(limited + kRound), count);  // the integer is in the low bits
}

inline void store_code(Float8* to, Vec value, int count) {
    const Bits bits = reinterpret<Bits>(value), magnitude = bits & 0x7fffffffu;
    const Bits limited = magnitude > 0x43e00000u ? Bits{} + 0x43e00000u : magnitude;  // 448
    const Bits normal = ((limited + 0x7ffffu + ((limited >> 20) & 1u)) >> 20) - (120u << 3);
    const Vec steps = reinterpret<Vec>(limited) * 512.0f + kRound;
    const Bits subnormal = reinterpret<Bits>(steps) - reinterpret<Bits>(splat(kRound));
    const Bits code = (limited < 0x3c800000u ? subnormal : normal) | ((bits >> 24) & 0x80u);  // 2^-6
    store_bytes(to, code, count);
}

template <class C>
constexpr float kLargest = std::is_same_v<C, std::int8_t> ? 127.0f : 448.0f;

// The largest magnitude. Without their signs, numbers are ordered as the integers of the same bits; infinity and, above
// it, NaN come after them.
struct Magnitude {
    IntVec bits{};

    STABLEKD_INLINE void see(Vec x) { bits = vmax(reinterpret<IntVec>(vabs(x)), bits); }
    Vec scale(float largest) const {
        return bits < 0x7f800000 ? reinterpret<Vec>(bits) / largest : splat(__builtin_nanf(""));
    }
};

// Divides by the scales of one channel, or of a vector of channels.
class Divisor {
public:
    explicit Divisor(Vec scale) : by_(scale > 0.0f ? scale : splat(1.0f)), inverse_(1.0f / by_) {}

    // All lanes those of one.
    Divisor lane(int lane) const {
        Divisor out = *this;
        out.by_ = splat(by_[lane]), out.inverse_ = splat(inverse_[lane]);
        return out;
    }

    // Whether `by_inverse` serves: the level fuses, all scales are finite, and so large that no remainder that decides
    // about a code is rounded.
    static bool has_inverse(Vec scale) {
        return kFuses && largest((scale >= 0x1p-90f) & (scale < __builtin_inff())) < 0;
    }

    // x over the scale, rounded as a division rounds. A quotient that is no number has the code 0; its scale says what
    // it was.
    STABLEKD_INLINE Vec divide(Vec x) const {
        const Vec ratio = x / by_;
        return ratio == ratio ? ratio : Vec{};
    }

    // The same by the rounded inverse: one correction leaves the quotient within a unit in the last place, and from
    // there another gives the nearest (Markstein, IBM J. Res. Dev. 34, 1990). Zeros keep their sign.
    STABLEKD_INLINE Vec by_inverse(Vec x) const {
        const Vec guess = x * inverse_, better = fused(fused(-guess, by_, x), inverse_, guess);
        const Vec nearest = fused(fused(-better, by_, x), inverse_, better);
        return reinterpret<Vec>(reinterpret<Bits>(nearest) | (reinterpret<Bits>(x) & 0x80000000u));
    }

private:
    Vec by_, inverse_;
};

template <bool kInverse>
STABLEKD_INLINE Vec quotient(Vec x, const Divisor& by) {
    return kInverse ? by.by_inverse(x) : by.divide(x);
}

// One vector of channels: first their magnitudes are seen, then it divides by their scales.
struct Channels {
    Magnitude magnitude{};
    Divisor by{Vec{}};
};

template <class S, class C>
class Quantizer {
public:
    Quantizer(const S* rows, C* codes, float* scales, const Layout& layout)
        : rows_(rows), codes_(codes), scales_(scales), layout_(layout), repeats_(layout.outer / layout.samples) {}

    // Channels-first: channels of one sample, at most kWidth, each in `repeats_` runs. So few are in the cache when their
    // codes are made, and so many that no channel waits for the scale of its own.
    std::int64_t neighbours() const {
        constexpr std::int64_t cached = 32768;  // elements
        const std::int64_t fit = cached / (repeats_ * layout_.inner);
        return fit < 1 ? 1 : fit < kWidth ? fit : kWidth;
    }

    void channels(std::int64_t sample, std::int64_t first, int count) const {
        std::int32_t tops[kWidth] = {};
        for (int lane = 0; lane < count; ++lane) {
            Magnitude magnitude;
            for (std::int64_t repeat = 0; repeat < repeats_; ++repeat) {
                const S* run = rows_ + start(sample, repeat, first + lane);
                over(layout_.inner, [&](std::int64_t i, int n) STABLEKD_LAMBDA { magnitude.see(load(run + i, n)); });
            }
            tops[lane] = largest(magnitude.bits);
        }
        const Vec scale = Magnitude{raw_load<IntVec>(tops)}.scale(kLargest<C>);
        store(scales_ + sample * layout_.channels + first, scale, count);
        const Divisor by(scale);
        const bool inverse = Divisor::has_inverse(lanes_below(count) ? scale : splat(1.0f));
        for (int lane = 0; lane < count; ++lane) {
            const Divisor own = by.lane(lane);
            for (std::int64_t repeat = 0; repeat < repeats_; ++repeat) {
                const std::int64_t at = start(sample, repeat, first + lane);
                inverse ? encode_run<true>(at, own) : encode_run<false>(at, own);
            }
        }
    }

    // Channels-last: all channels of one sample, in the order of its memory. `vectors` has room for them.
    void sample(std::int64_t sample, Channels* vectors) const {
        const std::int64_t channels = layout_.channels;
        for (std::int64_t i = 0; i < channels; i += kWidth) vectors[i / kWidth] = {};
        for (std::int64_t position = 0; position < repeats_; ++position) {
            const S* at = rows_ + start(sample, position, 0);
            over(channels, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                vectors[i / kWidth].magnitude.see(load(at + i, count));
            });
        }
        float* scales = scales_ + sample * channels;
        bool inverse = true;
        over(channels, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            const Vec scale = vectors[i / kWidth].magnitude.scale(kLargest<C>);
            store(scales + i, scale, count);
            vectors[i / kWidth].by = Divisor(scale);
            inverse &= Divisor::has_inverse(lanes_below(count) ? scale : splat(1.0f));
        });
        for (std::int64_t position = 0; position < repeats_; ++position) {
            const std::int64_t at = start(sample, position, 0);
            inverse ? encode_position<true>(at, vectors) : encode_position<false>(at, vectors);
        }
    }

private:
    template <bool kInverse>
    void encode_run(std::int64_t at, const Divisor by) const {
        const S* rows = rows_ + at;
        C* codes = codes_ + at;
        const std::int64_t ahead = neighbours() * layout_.inner;
        over(layout_.inner, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            __builtin_prefetch(rows + i + ahead);  // the next channels, while the memory would wait
            store_code(codes + i, quotient<kInverse>(load(rows + i, count), by), count);
        });
    }

    template <bool kInverse>
    void encode_position(std::int64_t at, const Channels* vectors) const {
        const S* rows = rows_ + at;
        C* codes = codes_ + at;
        const std::int64_t ahead = repeats_ * layout_.channels;
        over(layout_.channels, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
            __builtin_prefetch(rows + i + ahead, 0, 2);  // the next sample, while the memory would wait
            store_code(codes + i, quotient<kInverse>(load(rows + i, count), vectors[i / kWidth].by), count);
        });
    }

    std::int64_t start(std::int64_t sample, std::int64_t repeat, std::int64_t channel) const {
        return ((sample * repeats_ + repeat) * layout_.channels + channel) * layout_.inner;
    }

    const S* rows_;
    C* codes_;
    float* scales_;
    Layout layout_;
    std::int64_t repeats_;
};

// Calls body(run, sample, channel) for each run of `samples` times `repeats` times `channels`, in the order of memory.
template <class Body>
void over_runs(std::int64_t samples, std::int64_t repeats, std::int64_t channels, int threads, Body&& body) {
    const std::int64_t per_sample = repeats * channels, runs = samples * per_sample;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        const std::int64_t first = runs * thread / threads, end = runs * (thread + 1) / threads;
        std::int64_t sample = first / per_sample, next_sample = (sample + 1) * per_sample, channel = first % channels;
        for (std::int64_t run = first; run < end; ++run) {
            if (run == next_sample) ++sample, next_sample += per_sample;
            body(run, sample, channel);
            if (++channel == channels) channel = 0;
        }
    }
}

template <class C, class V>
void dequantize_run(const C* codes, const float* scales, V* values, std::int64_t n, bool each) {
    const Vec same = splat(*scales);
    over(n, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
        store(values + i, load(codes + i, count) * (each ? load(scales + i, count) : same), count);
    });
}

}  // namespace

namespace STABLEKD_LEVEL {

void quantize_rows(const void* rows, Type type, void* codes, Type code, float* scales, const Layout& layout, int threads) {
    with_float_type(type, [&](auto* s) {
        with_code_type(code, [&](auto* c) {
            using S = Element<decltype(s)>;
            using C = Element<decltype(c)>;
            const Quantizer<S, C> quantizer(static_cast<const S*>(rows), static_cast<C*>(codes), scales, layout);
            if (layout.inner > 1) {
                const std::int64_t wide = quantizer.neighbours(), groups = (layout.channels + wide - 1) / wide;
                over_runs(layout.samples, 1, groups, threads, [&](std::int64_t, std::int64_t sample, std::int64_t group) {
                    const std::int64_t first = group * wide, left = layout.channels - first;
                    quantizer.channels(sample, first, static_cast<int>(left < wide ? left : wide));
                });
                return;
            }
            const std::int64_t vectors = (layout.channels + kWidth - 1) / kWidth;
            Scratch<Channels> channels(threads * vectors);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int thread = 0; thread < threads; ++thread) {
                const std::int64_t end = layout.samples * (thread + 1) / threads;
                for (std::int64_t sample = layout.samples * thread / threads; sample < end; ++sample) {
                    quantizer.sample(sample, channels.get() + thread * vectors);
                }
            }
        });
    });
}

void dequantize_rows(const void* codes, Type code, const float* scales, std::int64_t scales_sample_stride, void* values,
                     Type type, const Layout& layout, int threads) {
    const bool each = layout.inner == 1;
    const std::int64_t length = each ? layout.channels : layout.inner, channels = each ? 1 : layout.channels;
    const std::int64_t repeats = layout.outer / layout.samples;
    with_code_type(code, [&](auto* c) {
        with_float_type(type, [&](auto* v) {
            using C = Element<decltype(c)>;
            using V = Element<decltype(v)>;
            const auto decode = [&](std::int64_t run, std::int64_t sample, std::int64_t channel) {
                dequantize_run(static_cast<const C*>(codes) + run * length, scales + sample * scales_sample_stride + channel,
                               static_cast<V*>(values) + run * length, length, each);
            };
            over_runs(layout.samples, repeats, channels, threads, decode);
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
