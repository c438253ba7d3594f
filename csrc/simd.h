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
typedef std::int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t HalfBits __attribute__((vector_size(kWidth * 2)));
typedef std::int16_t ShortVec __attribute__((vector_size(kWidth * 2)));
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

// Zero is subtracted: added to, it would lose the sign of a negative zero.
inline Vec splat(float value) { return value - Vec{}; }
#if defined(__FMA__)
constexpr bool kFuses = true;
#else
constexpr bool kFuses = false;
#endif
// a * b + c, rounded once where the level has an instruction for that.
inline Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return reinterpret<Vec>(_mm512_fmadd_ps(reinterpret<__m512>(a), reinterpret<__m512>(b), reinterpret<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret<Vec>(_mm256_fmadd_ps(reinterpret<__m256>(a), reinterpret<__m256>(b), reinterpret<__m256>(c)));
#else
    return a * b + c;
#endif
}
// The larger; b where a is NaN.
inline Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
    return reinterpret<Vec>(_mm512_max_ps(reinterpret<__m512>(a), reinterpret<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret<Vec>(_mm256_max_ps(reinterpret<__m256>(a), reinterpret<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}
// The smaller; b where a is NaN.
inline Vec vmin(Vec a, Vec b) {
#if defined(__AVX512F__)
    return reinterpret<Vec>(_mm512_min_ps(reinterpret<__m512>(a), reinterpret<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret<Vec>(_mm256_min_ps(reinterpret<__m256>(a), reinterpret<__m256>(b)));
#else
    return a < b ? a : b;
#endif
}
inline IntVec vmax(IntVec a, IntVec b) {
#if defined(__AVX512F__)
    return reinterpret<IntVec>(_mm512_max_epi32(reinterpret<__m512i>(a), reinterpret<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret<IntVec>(_mm256_max_epi32(reinterpret<__m256i>(a), reinterpret<__m256i>(b)));
#else
    return a > b ? a : b;
#endif
}
inline Vec vabs(Vec a) { return reinterpret<Vec>(reinterpret<Bits>(a) & 0x7fffffffu); }

template <class V, class T>
inline V raw_load(const T* from) {
    V out;
    static_assert(sizeof(V) == sizeof(T) * kWidth, "one element per lane");
    std::memcpy(&out, from, sizeof(out));
    return out;
}

// Integers of 8 and 16 bits widened to 32, and 32 narrowed to 16. The compiler's own conversions go by halves.
#if defined(__AVX512F__)
inline Bits widen(HalfBits x) { return reinterpret<Bits>(_mm512_cvtepu16_epi32(reinterpret<__m256i>(x))); }
inline Bits widen(ByteBits x) { return reinterpret<Bits>(_mm512_cvtepu8_epi32(reinterpret<__m128i>(x))); }
inline IntVec widen(ByteVec x) { return reinterpret<IntVec>(_mm512_cvtepi8_epi32(reinterpret<__m128i>(x))); }
inline HalfBits narrow(Bits x) { return reinterpret<HalfBits>(_mm512_cvtepi32_epi16(reinterpret<__m512i>(x))); }
inline ByteBits low_bytes(Bits x) { return reinterpret<ByteBits>(_mm512_cvtepi32_epi8(reinterpret<__m512i>(x))); }
#elif defined(__AVX2__)
inline __m128i low_half(std::uint64_t bytes) { return _mm_cvtsi64_si128(static_cast<long long>(bytes)); }
inline Bits widen(HalfBits x) { return reinterpret<Bits>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(x))); }
inline Bits widen(ByteBits x) {
    return reinterpret<Bits>(_mm256_cvtepu8_epi32(low_half(reinterpret<std::uint64_t>(x))));
}
inline IntVec widen(ByteVec x) {
    return reinterpret<IntVec>(_mm256_cvtepi8_epi32(low_half(reinterpret<std::uint64_t>(x))));
}
inline HalfBits narrow(Bits x) {
    const __m256i packed = _mm256_packus_epi32(reinterpret<__m256i>(x), reinterpret<__m256i>(x));
    return reinterpret<HalfBits>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
// The low byte of each lane.
inline ByteBits low_bytes(Bits x) {
    const __m256i bytes = reinterpret<__m256i>(x & 0xffu);
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(bytes, bytes), bytes);  // 4 lanes of each half
    const std::uint32_t low = static_cast<std::uint32_t>(_mm256_extract_epi32(packed, 0));
    const std::uint32_t high = static_cast<std::uint32_t>(_mm256_extract_epi32(packed, 4));
    return reinterpret<ByteBits>(low | static_cast<std::uint64_t>(high) << 32);
}
#else
inline ByteBits low_bytes(Bits x) {
    return __builtin_convertvector(__builtin_convertvector(x, HalfBits), ByteBits);
}
inline Bits widen(HalfBits x) { return __builtin_convertvector(x, Bits); }
inline Bits widen(ByteBits x) { return __builtin_convertvector(x, Bits); }
inline IntVec widen(ByteVec x) { return __builtin_convertvector(x, IntVec); }
inline HalfBits narrow(Bits x) { return __builtin_convertvector(x, HalfBits); }
#endif

inline Vec load(const float* from) { return raw_load<Vec>(from); }

inline Vec load(const BFloat16* from) { return reinterpret<Vec>(widen(raw_load<HalfBits>(from)) << 16); }

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
    return reinterpret<Vec>(_mm512_cvtph_ps(reinterpret<__m256i>(raw_load<HalfBits>(from))));
#elif defined(__F16C__)
    return reinterpret<Vec>(_mm256_cvtph_ps(reinterpret<__m128i>(raw_load<HalfBits>(from))));
#else
    const Bits half = widen(raw_load<HalfBits>(from));
    const Bits sign = (half & 0x8000u) << 16, exponent = half & 0x7c00u;
    const Vec normal = reinterpret<Vec>(((half & 0x7fffu) << 13) + (112u << 23));
    const Vec subnormal = __builtin_convertvector(reinterpret<IntVec>(half & 0x3ffu), Vec) * 0x1p-24f;
    const Vec special = reinterpret<Vec>(((half & 0x7fffu) << 13) | 0x7f800000u);
    const Vec finite = exponent == 0u ? subnormal : normal;
    return reinterpret<Vec>(reinterpret<Bits>(exponent == 0x7c00u ? special : finite) | sign);
#endif
}

inline Vec load(const std::int8_t* from) {
    return __builtin_convertvector(widen(raw_load<ByteVec>(from)), Vec);
}

inline Vec load(const std::uint8_t* from) {
    return __builtin_convertvector(reinterpret<IntVec>(widen(raw_load<ByteBits>(from))), Vec);
}

// e4m3 without infinities: 1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones is NaN.
inline Vec load(const Float8* from) {
    const Bits code = widen(raw_load<ByteBits>(from));
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
    const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    // The NaN that GPUs make has all bits of the mantissa set: rounding would carry it over to zero.
    const HalfBits out = narrow((value == value ? rounded : Bits{} + 0x7fc00000u) >> 16);
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
    const HalfBits out = narrow((magnitude >= 0x477ff000u ? overflow : finite) | sign);
#endif
    std::memcpy(to, &out, sizeof(out));
}

// Past the caches: the line is not read before it is written. `to` must be aligned to a vector of its elements.
inline void store_past_caches(float* to, Vec value) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, reinterpret<__m512>(value));
#elif defined(__AVX2__)
    _mm256_stream_ps(to, reinterpret<__m256>(value));
#else
    store(to, value);
#endif
}
template <class Half>
inline void store_past_caches(Half* to, Vec value) {
    static_assert(sizeof(Half) == 2, "BFloat16 or Float16");
#if defined(__AVX2__)
    Half elements[kWidth];
    store(elements, value);
    const auto halves = raw_load<HalfBits>(elements);
#endif
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret<__m256i>(halves));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret<__m128i>(halves));
#else
    store(to, value);
#endif
}

constexpr std::int64_t kBlock = 2048;  // elements, a multiple of four vectors

// Horizontal sum, in double precision.
inline double sum(Vec value) {
#if defined(__AVX512F__)
    const __m512 lanes = reinterpret<__m512>(value);
    const __m512d halves = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(lanes)),
                                         _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1)));
    return _mm512_reduce_add_pd(halves);
#elif defined(__AVX2__)
    const __m256 lanes = reinterpret<__m256>(value);
    const __m256d halves = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)),
                                         _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1)));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(halves), _mm256_extractf128_pd(halves, 1));
    return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
#else
    double even = 0, odd = 0;
    for (int lane = 0; lane < kWidth; lane += 2) even += value[lane], odd += value[lane + 1];
    return even + odd;
#endif
}

// Calls body(i, count) for each vector of n elements: count is kWidth, but for the last one the rest, and for the first
// one `head` where that is not 0.
template <class Body>
STABLEKD_INLINE void over(std::int64_t n, int head, Body&& body) {
    std::int64_t i = head < n ? head : n;
    if (i > 0) body(0, static_cast<int>(i));
    for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
    if (i < n) body(i, static_cast<int>(n - i));
}
template <class Body>
STABLEKD_INLINE void over(std::int64_t n, Body&& body) {
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
    if (i < n) body(i, static_cast<int>(n - i));
}

// Sum of term(i, count) over n elements: in single precision within a block, by four chains of additions that do not
// wait for each other, and in double precision across blocks. A term is a Vec or a struct of them with +=.
template <class Term>
STABLEKD_INLINE auto sum_over(std::int64_t n, Term&& term) {
    decltype(sum(term(0, kWidth))) total{};
    for (std::int64_t start = 0; start < n; start += kBlock) {
        const std::int64_t end = n - start < kBlock ? n : start + kBlock;
        decltype(term(0, kWidth)) a{}, b{}, c{}, d{};
        std::int64_t i = start;
        for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
            a += term(i, kWidth);
            b += term(i + kWidth, kWidth);
            c += term(i + 2 * kWidth, kWidth);
            d += term(i + 3 * kWidth, kWidth);
        }
        for (; i + kWidth <= end; i += kWidth) a += term(i, kWidth);
        if (i < end) b += term(i, static_cast<int>(end - i));
        a += b, c += d, a += c;
        total += sum(a);
    }
    return total;
}

// The same by one chain and shorter blocks, for terms of several vectors that cost more than an addition takes. The
// first vector has `head` elements where that is not 0.
template <class Term>
STABLEKD_INLINE auto sum_over_costly(std::int64_t n, int head, Term&& term) {
    constexpr std::int64_t block = 1024;
    decltype(sum(term(0, kWidth))) total{};
    std::int64_t i = head < n ? head : n;
    if (i > 0) total += sum(term(0, static_cast<int>(i)));
    while (i < n) {
        const std::int64_t end = n - i < block ? n : i + block;
        decltype(term(0, kWidth)) part{};
        for (; i + kWidth <= end; i += kWidth) part += term(i, kWidth);
        if (i < end) part += term(i, static_cast<int>(end - i)), i = end;
        total += sum(part);
    }
    return total;
}

// 0, 1, 2, ...
inline IntVec lane_numbers() {
    IntVec lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return lane;
}

// Lane i of the result is lane i ^ kStep.
template <int kStep>
inline Vec swapped(Vec value) {
#if defined(__AVX512F__)
    const __m512i from = reinterpret<__m512i>(lane_numbers() ^ kStep);
    return reinterpret<Vec>(_mm512_permutexvar_ps(from, reinterpret<__m512>(value)));
#elif defined(__AVX2__)
    const __m256i from = reinterpret<__m256i>(lane_numbers() ^ kStep);
    return reinterpret<Vec>(_mm256_permutevar8x32_ps(reinterpret<__m256>(value), from));
#else
    Vec out;
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = value[lane ^ kStep];
    return out;
#endif
}

// True in the first `count` lanes.
inline IntVec lanes_below(int count) { return lane_numbers() < count; }

// Copies the first `count` elements of a vector, none of which lies beyond them in memory: to registers, where the others
// become 0, or from them.
#if defined(__AVX512F__)
template <class T>
STABLEKD_INLINE void copy_in(T* elements, const T* from, int count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) _mm512_storeu_si512(elements, _mm512_maskz_loadu_epi32(mask, from));
    if constexpr (sizeof(T) == 2) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(elements), _mm256_maskz_loadu_epi16(mask, from));
    }
    if constexpr (sizeof(T) == 1) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(elements), _mm_maskz_loadu_epi8(mask, from));
    }
}

template <class T>
STABLEKD_INLINE void copy_out(T* to, const T* elements, int count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, mask, _mm512_loadu_si512(elements));
    if constexpr (sizeof(T) == 2) {
        _mm256_mask_storeu_epi16(to, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements)));
    }
    if constexpr (sizeof(T) == 1) {
        _mm_mask_storeu_epi8(to, mask, _mm_loadu_si128(reinterpret_cast<const __m128i*>(elements)));
    }
}
#else
template <class T>
STABLEKD_INLINE void copy_in(T* elements, const T* from, int count) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const __m256i mask = reinterpret<__m256i>(lanes_below(count));
        const auto* words = reinterpret_cast<const int*>(from);
        return _mm256_storeu_si256(reinterpret_cast<__m256i*>(elements), _mm256_maskload_epi32(words, mask));
    }
#endif
    std::memset(elements, 0, kWidth * sizeof(T));
    for (int i = 0; i < count; ++i) elements[i] = from[i];
}

template <class T>
STABLEKD_INLINE void copy_out(T* to, const T* elements, int count) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const __m256i mask = reinterpret<__m256i>(lanes_below(count));
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements));
        return _mm256_maskstore_epi32(reinterpret_cast<int*>(to), mask, words);
    }
#endif
    for (int i = 0; i < count; ++i) to[i] = elements[i];
}
#endif

// The first `count` elements; the other lanes are `fill`.
template <class T>
STABLEKD_INLINE Vec load(const T* from, int count, float fill = 0.0f) {
    if (count == kWidth) return load(from);
    if (count < 1 || count > kWidth) __builtin_unreachable();
    T elements[kWidth];
    copy_in(elements, from, count);
    const Vec out = load(elements);
    return fill == 0.0f ? out : lanes_below(count) ? out : splat(fill);
}

template <class T>
STABLEKD_INLINE void store(T* to, Vec value, int count) {
    if (count == kWidth) return store(to, value);
    if (count < 1 || count > kWidth) __builtin_unreachable();
    T elements[kWidth];
    store(elements, value);
    copy_out(to, elements, count);
}

// The low byte of each of the first `count` lanes.
template <class T>
STABLEKD_INLINE void store_bytes(T* to, Bits value, int count) {
    static_assert(sizeof(T) == 1, "a byte for each lane");
    const ByteBits bytes = low_bytes(value);
    if (count == kWidth) return void(std::memcpy(to, &bytes, sizeof(bytes)));
    T elements[kWidth];
    std::memcpy(elements, &bytes, sizeof(bytes));
    copy_out(to, elements, count);
}

// A gradient of at least this size does not stay in the caches anyway, and is written past them.
constexpr std::int64_t kPastCaches = std::int64_t{16} << 20;  // bytes

template <class T>
STABLEKD_INLINE void write(T* to, Vec value, int count, bool past_caches) {
    if (past_caches && count == kWidth) return store_past_caches(to, value);
    store(to, value, count);
}

template <class T>
bool too_large_for_caches(std::int64_t elements) {
    return elements * static_cast<std::int64_t>(sizeof(T)) >= kPastCaches;
}

// How many elements from `to` on precede the first that a vector may be written to past the caches.
template <class T>
int before_aligned(const T* to) {
    constexpr std::uintptr_t bytes = kWidth * sizeof(T);
    return static_cast<int>((bytes - reinterpret_cast<std::uintptr_t>(to) % bytes) % bytes / sizeof(T));
}

// Whether `elements` written from `to` on, in stretches of `length`, are to go past the caches.
template <class T>
bool goes_past_caches(const T* to, std::int64_t elements, std::int64_t length) {
    return before_aligned(to) == 0 && length % kWidth == 0 && too_large_for_caches<T>(elements);
}

template <class T>
inline float load_one(const T* from) {
    return load(from, 1)[0];
}

inline float largest(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret<__m512>(value));
#else
    float top = value[0];
    for (int lane = 1; lane < kWidth; ++lane) top = value[lane] > top ? value[lane] : top;
    return top;
#endif
}

inline std::int32_t largest(IntVec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(reinterpret<__m512i>(value));
#else
    std::int32_t top = value[0];
    for (int lane = 1; lane < kWidth; ++lane) top = value[lane] > top ? value[lane] : top;
    return top;
#endif
}

// Coefficients of 2^r for |r| <= 1/2, with a relative error below 2e-8 in single precision.
constexpr float kExp2[] = {1.0f, 0.693147182f, 0.240226477f, 0.0555033237f, 0.00961843692f, 0.0013398875f, 0.00015353362f};
constexpr float kLog2E = 1.44269504f;

// 2^(x * rate) for x <= 0, within a unit in the last place; 0 where that is below 2^-126, for NaN too. The power of two
// is added to the exponent's bits.
class Exp2 {
public:
    explicit Exp2(float rate) : rate_(rate), lowest_(-126.0f / rate) {}

    STABLEKD_INLINE IntVec counts(Vec x) const { return x > lowest_; }

    STABLEKD_INLINE Vec operator()(Vec x) const {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        const Vec shifted = x * rate_ + 12582912.0f;
        const Vec r = x * rate_ - (shifted - 12582912.0f);
        Vec p = r * kExp2[6] + kExp2[5];
        for (int k = 4; k >= 0; --k) p = p * r + kExp2[k];
        const Bits scaled = reinterpret<Bits>(p) + (reinterpret<Bits>(shifted) << 23);
        return counts(x) ? reinterpret<Vec>(scaled) : Vec{};
    }

private:
    float rate_, lowest_;
};

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
