// 8-bit codes of activations. Every operation rounds as IEEE single precision says, so that all implementations
// agree to the last bit: this file is compiled without fused multiply-add.

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

inline void store_code(std::int8_t* to, Vec value, int count) {
    const Vec low = splat(-127.0f), high = splat(127.0f);
    value = vmin(vmax(value, low), high);
    const IntVec rounded = reinterpret<IntVec>(value + kRound) - reinterpret<IntVec>(splat(kRound));
    store_bytes(to, reinterpret<Bits>(rounded), count);
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

inline Vec divisor(Vec scale) { return scale > 0.0f ? scale : splat(1.0f); }

// A quotient that is no number has the code 0; its scale says what it was.
inline Vec quotient(Vec x, Vec by) {
    const Vec ratio = x / by;
    return ratio == ratio ? ratio : Vec{};
}

template <class S, class C>
class Quantizer {
public:
    Quantizer(const S* rows, C* codes, float* scales, const Layout& layout)
        : rows_(rows), codes_(codes), scales_(scales), layout_(layout), repeats_(layout.outer / layout.samples) {}

    // Channels-first: one channel of one sample, in `repeats_` runs.
    void channel(std::int64_t sample, std::int64_t channel) const {
        Magnitude magnitude;
        for (std::int64_t repeat = 0; repeat < repeats_; ++repeat) {
            const S* run = rows_ + start(sample, repeat, channel);
            over(layout_.inner, [&](std::int64_t i, int count) STABLEKD_LAMBDA { magnitude.see(load(run + i, count)); });
        }
        magnitude.bits = IntVec{} + largest(magnitude.bits);
        const float scale = magnitude.scale(kLargest<C>)[0];
        scales_[sample * layout_.channels + channel] = scale;
        const Vec by = divisor(splat(scale));
        for (std::int64_t repeat = 0; repeat < repeats_; ++repeat) {
            const std::int64_t at = start(sample, repeat, channel);
            over(layout_.inner, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                store_code(codes_ + at + i, quotient(load(rows_ + at + i, count), by), count);
            });
        }
    }

    // Channels-last: all channels of one sample, in the order of its memory. `magnitudes` has room for them.
    void sample(std::int64_t sample, Magnitude* magnitudes) const {
        const std::int64_t channels = layout_.channels, vectors = (channels + kWidth - 1) / kWidth;
        for (std::int64_t v = 0; v < vectors; ++v) magnitudes[v] = {};
        for (std::int64_t position = 0; position < repeats_; ++position) {
            const S* at = rows_ + start(sample, position, 0);
            over(channels, [&](std::int64_t i, int count) STABLEKD_LAMBDA { magnitudes[i / kWidth].see(load(at + i, count)); });
        }
        float* scales = scales_ + sample * channels;
        over(channels, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            Magnitude& magnitude = magnitudes[i / kWidth];
            const Vec scale = magnitude.scale(kLargest<C>);
            store(scales + i, scale, count);
            magnitude.bits = reinterpret<IntVec>(divisor(scale));
        });
        for (std::int64_t position = 0; position < repeats_; ++position) {
            const std::int64_t at = start(sample, position, 0);
            over(channels, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
                const Vec by = reinterpret<Vec>(magnitudes[i / kWidth].bits);
                store_code(codes_ + at + i, quotient(load(rows_ + at + i, count), by), count);
            });
        }
    }

private:
    std::int64_t start(std::int64_t sample, std::int64_t repeat, std::int64_t channel) const {
        return ((sample * repeats_ + repeat) * layout_.channels + channel) * layout_.inner;
    }

    const S* rows_;
    C* codes_;
    float* scales_;
    Layout layout_;
    std::int64_t repeats_;
};

template <class C, class V>
void dequantize_run(const C* codes, const float* scales, V* values, std::int64_t n, bool each, bool past_caches) {
    const Vec same = splat(*scales);
    over(n, past_caches ? before_aligned(values) : 0, [=](std::int64_t i, int count) STABLEKD_LAMBDA {
        write(values + i, load(codes + i, count) * (each ? load(scales + i, count) : same), count, past_caches);
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
#pragma omp parallel for num_threads(threads) schedule(static)
                for (std::int64_t unit = 0; unit < layout.samples * layout.channels; ++unit) {
                    quantizer.channel(unit / layout.channels, unit % layout.channels);
                }
                return;
            }
            const std::int64_t vectors = (layout.channels + kWidth - 1) / kWidth;
            Scratch<Magnitude> magnitudes(threads * vectors);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int thread = 0; thread < threads; ++thread) {
                const std::int64_t end = layout.samples * (thread + 1) / threads;
                for (std::int64_t sample = layout.samples * thread / threads; sample < end; ++sample) {
                    quantizer.sample(sample, magnitudes.get() + thread * vectors);
                }
            }
        });
    });
}

void dequantize_rows(const void* codes, Type code, const float* scales, std::int64_t scales_sample_stride, void* values,
                     Type type, const Layout& layout, int threads) {
    const bool each = layout.inner == 1;
    const std::int64_t length = each ? layout.channels : layout.inner, channels = each ? 1 : layout.channels;
    const std::int64_t runs_per_sample = layout.outer / layout.samples * channels;
    with_code_type(code, [&](auto* c) {
        with_float_type(type, [&](auto* v) {
            using C = Element<decltype(c)>;
            using V = Element<decltype(v)>;
            const std::int64_t runs = layout.samples * runs_per_sample;
            const bool past_caches = too_large_for_caches<V>(runs * length);
#pragma omp parallel for num_threads(threads) schedule(static)
            for (std::int64_t run = 0; run < runs; ++run) {
                const float* scale = scales + run / runs_per_sample * scales_sample_stride + run % channels;
                dequantize_run(static_cast<const C*>(codes) + run * length, scale, static_cast<V*>(values) + run * length,
                               length, each, past_caches);
            }
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
