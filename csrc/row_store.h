#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

// Rows of fixed size in open files or in memory, read in any order into the caller's memory and checked. The files' format,
// who writes them and which row lies where is decided in stablekd_fast/cache/store.py.

namespace stablekd {

// CRC-32C (Castagnoli) of `bytes` bytes, continuing from `crc`; 0 to begin.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::int64_t bytes);

// The same by tables, as on processors without an instruction for it.
std::uint32_t crc32c_by_tables(std::uint32_t crc, const void* data, std::int64_t bytes);

// One of the parts that a row consists of, packed [rows, bytes] in the caller's memory.
struct Part {
    std::int64_t bytes;
    std::uint8_t* memory;
};

// One of the parts of rows that lie in memory, and where it goes, packed [rows, bytes].
struct Lying {
    const std::uint8_t* first;  // the part in slot 0
    std::int64_t stride;        // bytes from one slot to the next
    std::int64_t bytes;
    const std::int64_t* slots;  // the slot of each row wanted
    std::uint8_t* to;
};

// Tables over all row numbers, and over shards. They outlive the reading.
struct Rows {
    const std::int64_t* places;      // shard << 32 | slot, or -1 for a row that is not there
    const std::uint32_t* checksums;  // of row number (8 bytes, little endian) and parts
    std::uint8_t* seen;              // 1 for a row that was checked before
    const std::int64_t* shards;      // [shards, 1 + parts]: file descriptor, where each part begins in the file
};

enum class Fault : int { none, absent, read, checksum };

struct Outcome {
    Fault fault = Fault::none;
    std::int64_t row = -1;  // the row number at fault
    int error = 0;          // errno; 0 where the file ended too early
};

// Threads that read rows side by side. Jobs are served in the order in which they come.
class RowReader {
  public:
    // Throws std::runtime_error, and leaves no thread, where the system refuses one.
    explicit RowReader(int threads);
    ~RowReader();
    RowReader(const RowReader&) = delete;
    RowReader& operator=(const RowReader&) = delete;

    // Begins to read `rows` into `parts`; `always` checks rows that were checked before, too. Gives a ticket.
    std::int64_t submit(const std::int64_t* rows, std::int64_t count, const Rows& tables, std::vector<Part> parts,
                        bool always);
    // Begins to gather `count` rows in memory; a negative slot is a row that is absent. Gives a ticket.
    std::int64_t gather(std::int64_t count, std::vector<Lying> parts);
    // Helps with the job and waits for its end. Throws std::invalid_argument for a ticket that was waited for before.
    Outcome wait(std::int64_t ticket);

    // Checksums of `count` rows in memory.
    void checksum(const std::int64_t* rows, std::int64_t count, std::vector<Part> parts, std::uint32_t* out);

  private:
    struct Job;
    std::int64_t start(std::int64_t count, std::int64_t bytes_per_row, std::function<Outcome(std::int64_t)> each);
    void serve();
    void stop();
    static bool help(Job& job);

    std::mutex mutex_;
    std::condition_variable work_;
    std::deque<std::shared_ptr<Job>> queue_;
    std::unordered_map<std::int64_t, std::shared_ptr<Job>> jobs_;
    std::int64_t next_ticket_ = 0;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace stablekd
