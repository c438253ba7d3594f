#pragma once

// Vectors of the width that the level being compiled has. Everything here has internal linkage: the same source is
// compiled for several instruction sets, and the linker must never mix their functions.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "kernels.h"

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace stablekd {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define STABLEKD_INLINE __attribute__((always_inline)) inline
#define STABLEKD_LAMBDA __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef double Wide __attribute__((vector_size(kWidth * 8)));
typedef std::int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t HalfBits __attribute__((vector_size(kWidth * 2)));
typedef std::int8_t ByteVec __attribute__((vector_size(kWidth)));
typedef std::uint8_t ByteBits __attribute__((vector_size(kWidth)));

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};
struct Float8 {
    std::uint8_t bits;
};

template <class To, class From>
inline To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To out;
    std::memcpy(&out, &value, sizeof(out));
    return out;
}

inline Vec splat(float value) { return Vec{} + value; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vabs(Vec a) { return reinterpret<Vec>(reinterpret<Bits>(a) & 0x7fffffffu); }

template <class V, class T>
inline V raw_load(const T* from) {
    V out;
    static_assert(sizeof(V) == sizeof(T) * kWidth, "one element per lane");
    std::memcpy(&out, from, sizeof(out));
    return out;
}

inline Vec load(const float* from) { return raw_load<Vec>(from); }

inline Vec load(const BFloat16* from) {
    return reinterpret<Vec>(__builtin_convertvector(raw_load<HalfBits>(from), Bits) << 16);
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
    return reinterpret<Vec>(_mm512_cvtph_ps(reinterpret<__m256i>(raw_load<HalfBits>(from))));
#elif defined(__F16C__)
    return reinterpret<Vec>(_mm256_cvtph_ps(reinterpret<__m128i>(raw_load<HalfBits>(from))));
#else
    const Bits half = __builtin_convertvector(raw_load<HalfBits>(from), Bits);
    const Bits sign = (half & 0x8000u) << 16, exponent = half & 0x7c00u;
    const Vec normal = reinterpret<Vec>(((half & 0x7fffu) << 13) + (112u << 23));
    const Vec subnormal = __builtin_convertvector(reinterpret<IntVec>(half & 0x3ffu), Vec) * 0x1p-24f;
    const Vec special = reinterpret<Vec>(((half & 0x7fffu) << 13) | 0x7f800000u);
    const Vec finite = exponent == 0u ? subnormal : normal;
    return reinterpret<Vec>(reinterpret<Bits>(exponent == 0x7c00u ? special : finite) | sign);
#endif
}

inline Vec load(const std::int8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(raw_load<ByteVec>(from), IntVec), Vec);
}

inline Vec load(const std::uint8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(raw_load<ByteBits>(from), IntVec), Vec);
}

// e4m3 without infinities: 1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones is NaN.
inline Vec load(const Float8* from) {
    const Bits code = __builtin_convertvector(raw_load<ByteBits>(from), Bits);
    const Bits magnitude = code & 0x7fu;
    const Vec normal = reinterpret<Vec>((magnitude << 20) + (120u << 23));
    const Vec subnormal = __builtin_convertvector(reinterpret<IntVec>(magnitude), Vec) * 0x1p-9f;
    const Vec value = magnitude < 8u ? subnormal : normal;
    const Vec known = magnitude == 0x7fu ? splat(__builtin_nanf("")) : value;
    return reinterpret<Vec>(reinterpret<Bits>(known) | ((code & 0x80u) << 24));
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(BFloat16* to, Vec value) {
    const Bits bits = reinterpret<Bits>(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40u;
    const HalfBits out = __builtin_convertvector(value == value ? rounded : quiet, HalfBits);
    std::memcpy(to, &out, sizeof(out));
}

inline void store(Float16* to, Vec value) {
#if defined(__AVX512F__)
    const __m256i out = _mm512_cvtps_ph(reinterpret<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    const __m128i out = _mm256_cvtps_ph(reinterpret<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Bits bits = reinterpret<Bits>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 2^-1 puts the rounding position of a subnormal at the end of the mantissa.
    const Bits subnormal = reinterpret<Bits>(reinterpret<Vec>(magnitude) + 0.5f) - 0x3f000000u;
    const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
    const Bits overflow = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    const HalfBits out = __builtin_convertvector((magnitude >= 0x477ff000u ? overflow : finite) | sign, HalfBits);
#endif
    std::memcpy(to, &out, sizeof(out));
}

// Past the caches: the line is not read before it is written. `to` must be aligned to a vector.
inline void store_past_caches(float* to, Vec value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, reinterpret<__m512>(value));
#elif defined(__AVX2__)
    _mm256_stream_ps(to, reinterpret<__m256>(value));
#else
    store(to, value);
#endif
}

// Calls body(i, count) for each vector of n elements: count is kWidth, but for the last one the rest.
template <class Body>
STABLEKD_INLINE void over(std::int64_t n, Body&& body) {
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
    if (i < n) body(i, static_cast<int>(n - i));
}

// The first `count` elements; the other lanes are `fill`.
template <class T>
STABLEKD_INLINE Vec load(const T* from, int count, float fill = 0.0f) {
    if (count == kWidth) return load(from);
    if (count < 1 || count > kWidth) __builtin_unreachable();
    T elements[kWidth] = {};
    std::memcpy(elements, from, count * sizeof(T));
    Vec out = load(elements);
    for (int lane = count; lane < kWidth; ++lane) out[lane] = fill;
    return out;
}

template <class T>
STABLEKD_INLINE void store(T* to, Vec value, int count) {
    if (count == kWidth) return store(to, value);
    if (count < 1 || count > kWidth) __builtin_unreachable();
    T elements[kWidth];
    store(elements, value);
    std::memcpy(to, elements, count * sizeof(T));
}

// True in the first `count` lanes.
inline IntVec lanes_below(int count) {
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return lane < count;
}

template <class T>
inline float load_one(const T* from) {
    return load(from, 1)[0];
}

inline double sum(Wide value) {
    double total = 0;
    for (int lane = 0; lane < kWidth; ++lane) total += value[lane];
    return total;
}

inline Wide widen(Vec value) { return __builtin_convertvector(value, Wide); }

inline float largest(Vec value) {
    float top = value[0];
    for (int lane = 1; lane < kWidth; ++lane) top = value[lane] > top ? value[lane] : top;
    return top;
}

// e^x for x <= 0, within two units in the last place; 0 below -87.3, where the result leaves the normal range.
inline Vec exp_negative(Vec x) {
    const Vec lowest = splat(-87.3f);
    const Vec bounded = x < lowest ? lowest : x;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const Vec shifted = bounded * 1.44269504f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    const Vec r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = r * 1.98756915e-4f + 1.39819995e-3f;
    p = p * r + 8.33345182e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    const Vec power = reinterpret<Vec>((reinterpret<Bits>(shifted) + 127u) << 23);
    return x < lowest ? Vec{} : p * power;
}

// Calls `run` with a null pointer of the element type that `type` names.
template <class Run>
inline auto with_float_type(Type type, Run&& run) {
    switch (type) {
        case Type::bfloat16: return run(static_cast<BFloat16*>(nullptr));
        case Type::float16: return run(static_cast<Float16*>(nullptr));
        default: return run(static_cast<float*>(nullptr));
    }
}

template <class Run>
inline auto with_code_type(Type type, Run&& run) {
    if (type == Type::int8) return run(static_cast<std::int8_t*>(nullptr));
    return run(static_cast<Float8*>(nullptr));
}

template <class Run>
inline auto with_any_type(Type type, Run&& run) {
    if (type == Type::int8 || type == Type::float8_e4m3) return with_code_type(type, run);
    return with_float_type(type, run);
}

template <class Pointer>
using Element = std::remove_pointer_t<Pointer>;

// Memory for intermediate values, aligned to a cache line.
template <class T>
class Scratch {
public:
    explicit Scratch(std::int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

private:
    T* data_;
};

}  // namespace
}  // namespace stablekd
