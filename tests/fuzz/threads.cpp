// Threads that use the core at once, in many random orders, under ThreadSanitizer: they begin readings, wait for their own
// and each other's, leave some, make checksums and codes, and make and destroy readers. What they get is checked.
//
//     threads SECONDS SEED

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "codecs.h"
#include "levels.h"
#include "shards.h"

namespace {

using namespace stablekd;
using namespace fuzz;

class Random {
public:
    explicit Random(std::uint32_t seed) : engine_(seed) {}
    // 0..last
    std::int64_t operator()(std::int64_t last) { return std::uniform_int_distribution<std::int64_t>(0, last)(engine_); }

private:
    std::mt19937 engine_;
};

// Rows of two parts in two files. Row numbers that the remainder by 7 makes 3 are absent, and 5 damaged.
struct Store {
    static constexpr std::int64_t kRows = 50, kParts = 2;
    std::int64_t bytes[kParts];
    std::vector<MemoryFile> files;
    Tables tables;

    explicit Store(Random& random) : bytes{random(3) ? random(300) : 90000, random(20)} {
        for (std::uint32_t file = 0; file < 2; ++file) {
            files.emplace_back(noise(kRows * (bytes[0] + bytes[1]), file));
            for (const std::int64_t number : {std::int64_t{files[file].number}, std::int64_t{0}, kRows * bytes[0]}) {
                tables.shards.push_back(number);
            }
        }
        for (std::int64_t row = 0; row < kRows; ++row) {
            tables.places.push_back(row % 7 == 3 ? -1 : place_of(row % 2, kRows - 1 - row));
            std::uint32_t crc = reference::checksum_of_number(row);
            for (int part = 0; part < kParts; ++part) crc = crc32c(crc, content(row, part), bytes[part]);
            tables.checksums.push_back(row % 7 == 5 ? ~crc : crc);
            tables.seen.push_back(0);
        }
    }
    const std::uint8_t* content(std::int64_t row, int part) const {
        return files[row % 2].bytes.data() + (part == 0 ? 0 : kRows * bytes[0]) + (kRows - 1 - row) * bytes[part];
    }
};

// A reading under way, and where it goes.
struct Reading {
    std::vector<std::int64_t> rows;
    std::vector<std::uint8_t> memory[Store::kParts];
    std::int64_t ticket = -1;

    Reading(Store& store, RowReader& reader, Random& random) {
        for (std::int64_t left = random(30); left > 0; --left) rows.push_back(random(Store::kRows - 1));
        std::vector<Part> parts;
        for (int part = 0; part < Store::kParts; ++part) {
            memory[part].resize(rows.size() * static_cast<std::size_t>(store.bytes[part]));
            parts.push_back({store.bytes[part], memory[part].data()});
        }
        ticket = reader.submit(rows.data(), static_cast<std::int64_t>(rows.size()), store.tables.rows(), parts, random(1));
    }

    void finish(const Store& store, RowReader& reader) {
        const Outcome outcome = reader.wait(ticket);
        bool absent = false, damaged = false;
        for (std::size_t place = 0; place < rows.size(); ++place) {
            absent = absent || rows[place] % 7 == 3;
            damaged = damaged || rows[place] % 7 == 5;
            for (int part = 0; part < Store::kParts && rows[place] % 7 != 3; ++part) {
                const std::uint8_t* got = memory[part].data() + place * static_cast<std::size_t>(store.bytes[part]);
                check(std::equal(got, got + store.bytes[part], store.content(rows[place], part)), "rows are read as they are");
            }
        }
        const bool fits = outcome.fault == Fault::none       ? !absent && !damaged
                          : outcome.fault == Fault::absent   ? absent && outcome.row % 7 == 3
                          : outcome.fault == Fault::checksum ? damaged && outcome.row % 7 == 5
                                                             : false;
        check(fits, "a reading ends as one of its rows does");
    }
};

// What the threads of a round share: a reader, and readings that any of them may finish.
struct Round {
    explicit Round(std::uint32_t seed) : random(seed), store(random), reader(static_cast<int>(random(4))) {}

    Random random;
    Store store;
    std::mutex mutex;
    std::vector<std::unique_ptr<Reading>> handed;
    RowReader reader;  // destroyed first, with readings that nobody waited for
};

void code(Random& random) {
    const Layout layout{random(3) + 1, 0, random(70) + 1, random(1) ? 1 : random(70) + 1};
    const Layout whole{layout.samples, layout.samples * (random(3) + 1), layout.channels, layout.inner};
    const Type type = random(1) ? Type::int8 : Type::float8_e4m3;
    const int threads = static_cast<int>(random(3)) + 1;
    const auto elements = static_cast<std::size_t>(whole.outer * whole.channels * whole.inner);
    std::vector<float> rows(elements), scales(static_cast<std::size_t>(whole.samples * whole.channels)), values(elements);
    for (float& value : rows) value = static_cast<float>(random(2000) - 1000) / 64;
    std::vector<std::uint8_t> codes(elements);
    kernels().quantize_rows(rows.data(), Type::float32, codes.data(), type, scales.data(), whole, threads);
    check_codes(rows.data(), Type::float32, codes.data(), type, scales.data(), whole);
    kernels().dequantize_rows(codes.data(), type, scales.data(), whole.channels, values.data(), Type::float32, whole, threads);
    check_values(codes.data(), type, scales.data(), whole.channels, values.data(), Type::float32, whole);
}

void sum(Round& round, Random& random) {
    const std::int64_t count = random(40), bytes = random(5000);
    std::vector<std::uint8_t> memory = noise(count * bytes, static_cast<std::uint32_t>(random(1000)));
    std::vector<std::int64_t> rows(static_cast<std::size_t>(count), random(1000));
    std::vector<std::uint32_t> sums(rows.size());
    round.reader.checksum(rows.data(), count, {{bytes, memory.data()}}, sums.data());
    for (std::int64_t place = 0; place < count; ++place) {
        const std::uint32_t wanted = crc32c(reference::checksum_of_number(rows[0]), memory.data() + place * bytes, bytes);
        check(sums[static_cast<std::size_t>(place)] == wanted, "checksums are those of the rows");
    }
}

// Readings that are begun, partly waited for, and left to the destructor of their reader.
void leave(Round& round, Random& random) {
    std::vector<std::unique_ptr<Reading>> readings;
    RowReader own(static_cast<int>(random(3)));
    for (std::int64_t left = random(4); left >= 0; --left) {
        readings.push_back(std::make_unique<Reading>(round.store, own, random));
    }
    if (random(1)) readings.back()->finish(round.store, own);
}

std::unique_ptr<Reading> take(Round& round) {
    const std::lock_guard lock(round.mutex);
    if (round.handed.empty()) return nullptr;
    auto taken = std::move(round.handed.back());
    round.handed.pop_back();
    return taken;
}

void act(Round& round, Random random) {
    for (std::int64_t left = random(20); left >= 0; --left) {
        switch (random(5)) {
            case 0: code(random); break;
            case 1: sum(round, random); break;
            case 2: leave(round, random); break;
            case 3: Reading(round.store, round.reader, random).finish(round.store, round.reader); break;
            case 4: {
                auto begun = std::make_unique<Reading>(round.store, round.reader, random);
                const std::lock_guard lock(round.mutex);
                round.handed.push_back(std::move(begun));
                break;
            }
            default:
                if (auto taken = take(round)) taken->finish(round.store, round.reader);
        }
    }
}

void run(std::uint32_t seed, const std::vector<std::string>& names) {
    use_level(names[seed % names.size()]);
    Round round(seed);
    std::vector<std::thread> threads;
    for (std::int64_t number = round.random(3) + 1; number >= 0; --number) {
        threads.emplace_back(act, std::ref(round), Random(seed * 10 + static_cast<std::uint32_t>(number)));
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) {
        std::fprintf(stderr, "threads SECONDS SEED\n");
        return 2;
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::stoi(arguments[1]));
    const auto first = static_cast<std::uint32_t>(std::stoul(arguments[2]));
    std::uint32_t seed = first;
    for (; std::chrono::steady_clock::now() < end; ++seed) run(seed, levels());
    std::printf("%u rounds, seeds %u to %u\n", seed - first, first, seed - 1);
}
