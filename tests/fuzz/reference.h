#pragma once

// What the core computes, said again one value at a time: number formats, 8-bit codes, crops, checksums. It shares no code
// with csrc/, and no trick.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace reference {

using stablekd::Type;

inline std::int64_t bytes_of(Type type) {
    if (type == Type::float32) return 4;
    return type == Type::bfloat16 || type == Type::float16 ? 2 : 1;
}

// A number format with a sign bit, `exponent` and `mantissa` bits. float8_e4m3 has no infinity: all ones is its NaN.
struct Format {
    int exponent, mantissa;
    bool infinite;
};

inline Format format_of(Type type) {
    if (type == Type::bfloat16) return {8, 7, true};
    if (type == Type::float16) return {5, 10, true};
    return {4, 3, false};
}

// The value of a code without its sign bit. That of infinity's code is what it stands for when numbers are rounded: the
// power of two behind the largest number.
inline double magnitude_of(std::uint32_t code, const Format& format) {
    const int bias = (1 << (format.exponent - 1)) - 1;
    const int exponent = static_cast<int>(code >> format.mantissa);
    const double fraction = std::ldexp(code & ((1u << format.mantissa) - 1), -format.mantissa);
    return exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
}

inline std::uint32_t code_of_infinity(const Format& format) { return ((1u << format.exponent) - 1) << format.mantissa; }

// The magnitudes of all codes, up to infinity's or to the largest number's.
inline const std::vector<double>& magnitudes_of(Type type) {
    static const auto make = [](Type of) {
        const Format format = format_of(of);
        const std::uint32_t last = format.infinite ? code_of_infinity(format) : 0x7e;
        std::vector<double> values;
        for (std::uint32_t code = 0; code <= last; ++code) values.push_back(magnitude_of(code, format));
        return values;
    };
    static const std::vector<double> brain = make(Type::bfloat16), half = make(Type::float16), eight = make(Type::float8_e4m3);
    if (type == Type::bfloat16) return brain;
    return type == Type::float16 ? half : eight;
}

// The code of the nearest value, sign included; the even one of two that are equally near; NaN is NaN.
inline std::uint32_t nearest(float value, Type type) {
    const Format format = format_of(type);
    const std::uint32_t sign = std::signbit(value) ? 1u << (format.exponent + format.mantissa) : 0;
    if (std::isnan(value)) return sign | ((1u << (format.exponent + format.mantissa)) - 1);
    const std::vector<double>& values = magnitudes_of(type);
    const double wanted = std::fabs(static_cast<double>(value));
    const auto above = std::lower_bound(values.begin(), values.end(), wanted);
    if (above == values.end()) return sign | static_cast<std::uint32_t>(values.size() - 1);
    auto code = static_cast<std::uint32_t>(above - values.begin());
    if (code > 0) {
        const double middle = (values[code - 1] + values[code]) / 2;
        if (wanted < middle || (wanted == middle && code % 2 == 1)) --code;
    }
    return sign | code;
}

// Element `index` of an array of any type.
inline float read(const void* array, std::int64_t index, Type type) {
    const auto* at = static_cast<const std::uint8_t*>(array) + index * bytes_of(type);
    if (type == Type::int8) return static_cast<float>(static_cast<std::int8_t>(*at));
    if (type == Type::float32) {
        float value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }
    const Format format = format_of(type);
    const int bits = format.exponent + format.mantissa;
    const std::uint32_t all = bytes_of(type) == 2 ? at[0] | std::uint32_t{at[1]} << 8 : at[0];
    const std::uint32_t code = all & ((1u << bits) - 1);
    float value = static_cast<float>(magnitude_of(code, format));
    if (format.infinite && code == code_of_infinity(format)) value = INFINITY;
    if (code > (format.infinite ? code_of_infinity(format) : 0x7eu)) value = NAN;
    return all >> bits ? -value : value;
}

// What `value` is once it is stored as a type in floating point.
inline float rounded(float value, Type type) {
    if (type == Type::float32) return value;
    const std::uint32_t code = nearest(value, type);
    const std::uint8_t bytes[2] = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(code >> 8)};
    return read(bytes, 0, type);
}

// The same number: the same bits, or both NaN.
inline bool same(float a, float b) {
    return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0;
}

// The scale of a channel whose values are these.
inline float scale_of(const std::vector<float>& values, Type code) {
    float largest = 0;
    for (const float value : values) {
        if (!std::isfinite(value)) return NAN;
        largest = std::max(largest, std::fabs(value));
    }
    return largest / (code == Type::int8 ? 127.0f : 448.0f);
}

// The code of a value by its channel's scale; NaN has the code 0.
inline std::uint8_t code_of(float value, float scale, Type code) {
    float quotient = value / (scale > 0 ? scale : 1.0f);
    if (std::isnan(quotient)) return 0;
    const float limit = code == Type::int8 ? 127.0f : 448.0f;
    quotient = std::min(std::max(quotient, -limit), limit);
    if (code == Type::int8) return static_cast<std::uint8_t>(static_cast<std::int8_t>(std::nearbyint(quotient)));
    return static_cast<std::uint8_t>(nearest(quotient, code));
}

// CRC-32C of `bytes` bytes, continuing from `crc`, bit by bit.
inline std::uint32_t crc32c(std::uint32_t crc, const std::uint8_t* data, std::int64_t bytes) {
    crc = ~crc;
    for (std::int64_t i = 0; i < bytes; ++i) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
    }
    return ~crc;
}

// Begins the checksum of a row by its number; the bytes of its parts follow.
inline std::uint32_t checksum_of_number(std::int64_t row) {
    std::uint8_t number[8];
    for (int i = 0; i < 8; ++i) number[i] = static_cast<std::uint8_t>(static_cast<std::uint64_t>(row) >> (8 * i));
    return crc32c(0, number, 8);
}

}  // namespace reference
