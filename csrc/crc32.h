#pragma once

#include <cstdint>

namespace stablekd {

// Whether this processor multiplies polynomials, which `crc32` needs.
bool has_crc32();

// The CRC-32 of zlib of `bytes` bytes.
std::uint32_t crc32(const void* data, std::int64_t bytes);

}  // namespace stablekd
