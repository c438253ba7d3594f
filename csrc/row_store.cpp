#include "row_store.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#ifdef STABLEKD_X86
#include <nmmintrin.h>
#endif

namespace stablekd {
namespace {

constexpr std::int64_t kBytesPerTurn = 256 * 1024;
constexpr std::uint32_t kPolynomial = 0x82F63B78;  // Castagnoli, bits reversed

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: the checksum of the byte b followed by k zero bytes.
Tables make_tables() {
    Tables tables{};
    for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
        tables[0][b] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k) {
        for (std::size_t b = 0; b < 256; ++b) {
            const std::uint32_t crc = tables[k - 1][b];
            tables[k][b] = (crc >> 8) ^ tables[0][crc & 0xFF];
        }
    }
    return tables;
}

#ifdef STABLEKD_X86
__attribute__((target("sse4.2"))) std::uint32_t crc32c_by_instruction(std::uint32_t crc, const void* data,
                                                                      std::int64_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(data);
    std::uint64_t state = ~crc;
    for (; bytes >= 8; bytes -= 8, at += 8) {
        std::uint64_t word;
        std::memcpy(&word, at, 8);
        state = _mm_crc32_u64(state, word);
    }
    auto last = static_cast<std::uint32_t>(state);
    for (; bytes > 0; --bytes) last = _mm_crc32_u8(last, *at++);
    return ~last;
}
#endif

std::uint32_t row_checksum(std::int64_t row, const std::vector<Part>& parts, std::int64_t place) {
    std::uint8_t number[8];
    for (int byte = 0; byte < 8; ++byte) number[byte] = static_cast<std::uint8_t>(row >> (8 * byte));
    std::uint32_t crc = crc32c(0, number, sizeof number);
    for (const Part& part : parts) crc = crc32c(crc, part.memory + place * part.bytes, part.bytes);
    return crc;
}

Outcome read_part(int file, std::int64_t offset, std::uint8_t* to, std::int64_t bytes, std::int64_t row) {
    while (bytes > 0) {
        const ssize_t got = ::pread(file, to, static_cast<std::size_t>(bytes), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return {Fault::read, row, got < 0 ? errno : 0};
        to += got;
        offset += got;
        bytes -= got;
    }
    return {};
}

Outcome read_row(std::int64_t row, std::int64_t place, const Rows& tables, const std::vector<Part>& parts, bool always) {
    const std::int64_t where = tables.places[row];
    if (where < 0) return {Fault::absent, row, 0};
    const std::int64_t slot = where & 0xFFFFFFFF;
    const std::int64_t* shard = tables.shards + (where >> 32) * static_cast<std::int64_t>(1 + parts.size());
    for (std::size_t p = 0; p < parts.size(); ++p) {
        const Part& part = parts[p];
        const Outcome outcome = read_part(static_cast<int>(shard[0]), shard[1 + p] + slot * part.bytes,
                                          part.memory + place * part.bytes, part.bytes, row);
        if (outcome.fault != Fault::none) return outcome;
    }
    // Several threads may read the same row, and each may be the one that checks it.
    if (always || !__atomic_load_n(tables.seen + row, __ATOMIC_RELAXED)) {
        if (row_checksum(row, parts, place) != tables.checksums[row]) return {Fault::checksum, row, 0};
        __atomic_store_n(tables.seen + row, std::uint8_t{1}, __ATOMIC_RELAXED);
    }
    return {};
}

std::int64_t bytes_of(const std::vector<Part>& parts) {
    std::int64_t bytes = 0;
    for (const Part& part : parts) bytes += part.bytes;
    return bytes;
}

}  // namespace

std::uint32_t crc32c_by_tables(std::uint32_t crc, const void* data, std::int64_t bytes) {
    static const Tables tables = make_tables();
    const auto* at = static_cast<const std::uint8_t*>(data);
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, at += 8) {
        std::uint32_t next = 0;
        for (std::size_t k = 0; k < 8; ++k) {
            const std::uint32_t before = k < 4 ? (crc >> (8 * k)) & 0xFF : 0;
            next ^= tables[7 - k][before ^ at[k]];
        }
        crc = next;
    }
    for (; bytes > 0; --bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *at++) & 0xFF];
    return ~crc;
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::int64_t bytes) {
#ifdef STABLEKD_X86
    static const bool instruction = __builtin_cpu_supports("sse4.2");
    if (instruction) return crc32c_by_instruction(crc, data, bytes);
#endif
    return crc32c_by_tables(crc, data, bytes);
}

struct RowReader::Job {
    std::function<Outcome(std::int64_t)> each;
    std::int64_t count, per_turn;
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> done{0};
    std::mutex mutex;
    std::condition_variable finished;
    Outcome outcome;
};

RowReader::RowReader(int threads) {
    try {
        for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (const std::system_error& error) {
        const std::string number = std::to_string(threads_.size() + 1);
        stop();
        throw std::runtime_error("The system refused thread " + number + " of the " + std::to_string(threads) +
                                 " that read rows (" + error.code().message() + "): the number of processes or the memory "
                                 "allowed is used up. End other processes, or raise the limit (`ulimit -u`).");
    } catch (...) {
        stop();
        throw;
    }
}

RowReader::~RowReader() { stop(); }

// A thread that is not joined before it is destroyed ends the process.
void RowReader::stop() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

std::int64_t RowReader::submit(const std::int64_t* rows, std::int64_t count, const Rows& tables, std::vector<Part> parts,
                               bool always) {
    const std::int64_t bytes = bytes_of(parts);
    return start(count, bytes, [rows, tables, parts = std::move(parts), always](std::int64_t place) {
        return read_row(rows[place], place, tables, parts, always);
    });
}

std::int64_t RowReader::gather(std::int64_t count, std::vector<Lying> parts) {
    std::int64_t bytes = 0;
    for (const Lying& part : parts) bytes += part.bytes;
    return start(count, bytes, [parts = std::move(parts)](std::int64_t place) {
        for (const Lying& part : parts) {
            if (part.slots[place] < 0) return Outcome{Fault::absent, place, 0};
            std::memcpy(part.to + place * part.bytes, part.first + part.slots[place] * part.stride,
                        static_cast<std::size_t>(part.bytes));
        }
        return Outcome{};
    });
}

void RowReader::checksum(const std::int64_t* rows, std::int64_t count, std::vector<Part> parts, std::uint32_t* out) {
    const std::int64_t bytes = bytes_of(parts);
    wait(start(count, bytes, [rows, parts = std::move(parts), out](std::int64_t place) {
        out[place] = row_checksum(rows[place], parts, place);
        return Outcome{};
    }));
}

std::int64_t RowReader::start(std::int64_t count, std::int64_t bytes_per_row, std::function<Outcome(std::int64_t)> each) {
    auto job = std::make_shared<Job>();
    job->each = std::move(each);
    job->count = count;
    job->per_turn = std::max<std::int64_t>(1, kBytesPerTurn / std::max<std::int64_t>(1, bytes_per_row));
    std::int64_t ticket;
    {
        const std::lock_guard lock(mutex_);
        ticket = next_ticket_++;
        jobs_.emplace(ticket, job);
        // Without threads nobody would take it out again: `wait` does all of it.
        if (count > 0 && !threads_.empty()) queue_.push_back(job);
    }
    work_.notify_all();
    return ticket;
}

Outcome RowReader::wait(std::int64_t ticket) {
    std::shared_ptr<Job> job;
    {
        const std::lock_guard lock(mutex_);
        const auto found = jobs_.find(ticket);
        if (found == jobs_.end()) throw std::invalid_argument("this ticket was waited for before");
        job = found->second;
        jobs_.erase(found);
    }
    while (help(*job)) {
    }
    std::unique_lock lock(job->mutex);
    job->finished.wait(lock, [&] { return job->done.load() == job->count; });
    return job->outcome;
}

void RowReader::serve() {
    for (;;) {
        std::shared_ptr<Job> job;
        {
            std::unique_lock lock(mutex_);
            work_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
            if (stopping_) return;
            job = queue_.front();
            if (job->next.load() >= job->count) {
                queue_.pop_front();
                continue;
            }
        }
        help(*job);
    }
}

// One turn at the job; false if nothing is left to begin.
bool RowReader::help(Job& job) {
    const std::int64_t first = job.next.fetch_add(job.per_turn);
    if (first >= job.count) return false;
    const std::int64_t last = std::min(first + job.per_turn, job.count);
    Outcome worst;
    for (std::int64_t place = first; place < last; ++place) {
        const Outcome outcome = job.each(place);
        if (worst.fault == Fault::none) worst = outcome;
    }
    const std::lock_guard lock(job.mutex);
    if (job.outcome.fault == Fault::none) job.outcome = worst;
    if (job.done.fetch_add(last - first) + (last - first) == job.count) job.finished.notify_all();
    return true;
}

}  // namespace stablekd
