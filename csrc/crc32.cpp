#include "crc32.h"

#ifdef STABLEKD_X86
#include <immintrin.h>
#endif

// After Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ instruction" (Intel, 2009): four
// lanes of 16 bytes are moved on by a product with x^512 modulo the polynomial, then folded into one, and that is reduced.

namespace stablekd {
namespace {

constexpr std::uint32_t kPolynomial = 0xEDB88320;  // bits reversed

std::uint32_t by_bits(std::uint32_t state, const std::uint8_t* at, std::int64_t bytes) {
    for (; bytes > 0; --bytes) {
        state ^= *at++;
        for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ (state & 1 ? kPolynomial : 0);
    }
    return state;
}

#ifdef STABLEKD_X86
#define STABLEKD_FOLDING __attribute__((target("pclmul,sse4.1")))

STABLEKD_FOLDING __m128i load(const std::uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// `lane`, moved on as the constants say, and what lies there.
STABLEKD_FOLDING __m128i folded(__m128i lane, __m128i constants, __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(lane, constants, 0x00), high = _mm_clmulepi64_si128(lane, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// The state after `bytes` bytes, a multiple of 16 and at least 64.
STABLEKD_FOLDING std::uint32_t by_folding(std::uint32_t state, const std::uint8_t* at, std::int64_t bytes) {
    const __m128i by_512 = _mm_set_epi64x(0x01C6E41596, 0x0154442BD4), by_128 = _mm_set_epi64x(0x00CCAA009E, 0x01751997D0);
    const __m128i low_half = _mm_set_epi32(0, -1, 0, -1);
    __m128i lanes[4];
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = load(at + 16 * lane);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    for (at += 64, bytes -= 64; bytes >= 64; at += 64, bytes -= 64) {
        for (int lane = 0; lane < 4; ++lane) lanes[lane] = folded(lanes[lane], by_512, load(at + 16 * lane));
    }
    __m128i one = lanes[0];
    for (int lane = 1; lane < 4; ++lane) one = folded(one, by_128, lanes[lane]);
    for (; bytes >= 16; at += 16, bytes -= 16) one = folded(one, by_128, load(at));
    // From 128 bits to 64, and from 64 to 32 (Barrett).
    one = _mm_xor_si128(_mm_srli_si128(one, 8), _mm_clmulepi64_si128(one, by_128, 0x10));
    const __m128i by_64 = _mm_set_epi64x(0, 0x0163CD6124), barrett = _mm_set_epi64x(0x01F7011641, 0x01DB710641);
    one = _mm_xor_si128(_mm_srli_si128(one, 4), _mm_clmulepi64_si128(_mm_and_si128(one, low_half), by_64, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(one, low_half), barrett, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_half), barrett, 0x00);
    return static_cast<std::uint32_t>(_mm_extract_epi32(_mm_xor_si128(one, quotient), 1));
}
#endif

}  // namespace

bool has_crc32() {
#ifdef STABLEKD_X86
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#else
    return false;
#endif
}

std::uint32_t crc32(const void* data, std::int64_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(data);
    std::uint32_t state = ~std::uint32_t{0};
#ifdef STABLEKD_X86
    if (bytes >= 64) {
        const std::int64_t whole = bytes / 16 * 16;
        state = by_folding(state, at, whole);
        at += whole, bytes -= whole;
    }
#endif
    return ~by_bits(state, at, bytes);
}

}  // namespace stablekd
