#pragma once

// Whether codes, scales and values are those of the plain arithmetic.

#include "check.h"
#include "reference.h"

namespace fuzz {

// The place of an element of one channel of one sample: `i` counts the repeats, then the inner elements.
inline std::int64_t element_of(const stablekd::Layout& layout, std::int64_t sample, std::int64_t channel, std::int64_t i) {
    const std::int64_t repeats = layout.outer / layout.samples;
    const std::int64_t outer = sample * repeats + i / layout.inner;
    return (outer * layout.channels + channel) * layout.inner + i % layout.inner;
}

// `codes` and `scales` [samples, channels] are those of `rows`.
inline void check_codes(const void* rows, stablekd::Type type, const std::uint8_t* codes, stablekd::Type code,
                        const float* scales, const stablekd::Layout& layout) {
    const std::int64_t count = layout.outer / layout.samples * layout.inner;
    for (std::int64_t unit = 0; unit < layout.samples * layout.channels; ++unit) {
        std::vector<float> values;
        const std::int64_t sample = unit / layout.channels, channel = unit % layout.channels;
        for (std::int64_t i = 0; i < count; ++i) {
            values.push_back(reference::read(rows, element_of(layout, sample, channel, i), type));
        }
        const float scale = reference::scale_of(values, code);
        check(reference::same(scales[unit], scale), "a scale is the largest magnitude by the largest code");
        for (std::int64_t i = 0; i < count; ++i) {
            const std::uint8_t wanted = reference::code_of(values[i], scale, code);
            check(codes[element_of(layout, sample, channel, i)] == wanted, "a code is the nearest");
        }
    }
}

// `values` are codes times scales, which lie `stride` apart from sample to sample.
inline void check_values(const std::uint8_t* codes, stablekd::Type code, const float* scales, std::int64_t stride,
                         const void* values, stablekd::Type type, const stablekd::Layout& layout) {
    const std::int64_t elements = layout.outer * layout.channels * layout.inner;
    for (std::int64_t i = 0; i < elements; ++i) {
        const std::int64_t channel = i / layout.inner % layout.channels, sample = i / (elements / layout.samples);
        const float product = reference::read(codes, i, code) * scales[sample * stride + channel];
        const float wanted = reference::rounded(product, type);
        check(reference::same(reference::read(values, i, type), wanted), "a value is its code times its scale");
    }
}

}  // namespace fuzz
