#pragma once

// Files of rows in memory, made up, and the tables by which the core finds rows in them.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <vector>

#include "check.h"
#include "reference.h"
#include "row_store.h"

namespace fuzz {

// A file in memory, as long as `bytes`.
class MemoryFile {
public:
    explicit MemoryFile(std::vector<std::uint8_t> content) : bytes(std::move(content)) {
        number = memfd_create("rows", MFD_CLOEXEC);
        check(number >= 0, "the system gives a file in memory");
        const auto size = static_cast<ssize_t>(bytes.size());
        check(size == 0 || pwrite(number, bytes.data(), bytes.size(), 0) == size, "a file in memory takes what is written");
    }
    MemoryFile(MemoryFile&& other) noexcept : bytes(std::move(other.bytes)), number(other.number) { other.number = -1; }
    MemoryFile(const MemoryFile&) = delete;
    ~MemoryFile() {
        if (number >= 0) close(number);
    }

    std::vector<std::uint8_t> bytes;
    int number;
};

// Bytes that look like none before them.
inline std::vector<std::uint8_t> noise(std::int64_t count, std::uint32_t seed) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>((seed = seed * 1664525u + 1013904223u) >> 24);
    return bytes;
}

// Everything that `stablekd::Rows` points to.
struct Tables {
    std::vector<std::int64_t> places;
    std::vector<std::uint32_t> checksums;
    std::vector<std::uint8_t> seen;
    std::vector<std::int64_t> shards;

    stablekd::Rows rows() { return {places.data(), checksums.data(), seen.data(), shards.data()}; }
};

inline std::int64_t place_of(std::int64_t shard, std::int64_t slot) { return shard << 32 | slot; }

}  // namespace fuzz
