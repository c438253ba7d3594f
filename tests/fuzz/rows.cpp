// libFuzzer's target for the reader of rows, the 8-bit codes and the crops: bytes become made-up files, tables, requests and
// arrays, bad ones included, and what the core gives must be what the plain arithmetic of reference.h gives.

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "codecs.h"
#include "levels.h"
#include "shards.h"

namespace {

using namespace stablekd;
using namespace fuzz;

constexpr std::uint8_t kUntouched = 0xA5;
constexpr Type kFloats[] = {Type::float32, Type::bfloat16, Type::float16};
constexpr Type kCodes[] = {Type::int8, Type::float8_e4m3};

// An array of exactly `bytes` bytes, so that an access behind it is noticed.
std::unique_ptr<std::uint8_t[]> array(std::int64_t bytes) {
    auto memory = std::make_unique<std::uint8_t[]>(static_cast<std::size_t>(bytes));
    std::fill_n(memory.get(), bytes, kUntouched);
    return memory;
}

// The same, filled from the input as far as it reaches.
std::unique_ptr<std::uint8_t[]> filled(FuzzedDataProvider& input, std::int64_t bytes) {
    auto memory = array(bytes);
    const auto given = input.ConsumeBytes<std::uint8_t>(static_cast<std::size_t>(bytes));
    std::copy(given.begin(), given.end(), memory.get());
    return memory;
}

// Once in `times`, and never where the input is used up.
bool rarely(FuzzedDataProvider& input, int times) { return input.ConsumeIntegralInRange(1, times) == times; }

// What arithmetic stumbles over: zeros, subnormals, ties, the ends of the formats, and NaN as processors and GPUs make it.
constexpr std::uint32_t kSpecial[] = {0u,          0x80000000u, 1u,          0x00800000u, 0x3f000000u, 0x3f008000u, 0x33000000u,
                                      0x38800000u, 0x477ff000u, 0x43e00000u, 0x7f7fffffu, 0x7f800000u, 0xff800000u, 0x7fc00000u,
                                      0xffc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800001u};

// Numbers in single precision, some of them special.
std::unique_ptr<std::uint8_t[]> floats(FuzzedDataProvider& input, std::int64_t count) {
    auto memory = filled(input, 4 * count);
    for (std::int64_t i = 0; i < count && !rarely(input, 4); ++i) {
        const std::uint32_t bits = input.PickValueInArray(kSpecial);
        std::copy_n(reinterpret_cast<const std::uint8_t*>(&bits), 4, memory.get() + 4 * i);
    }
    return memory;
}

// Reading rows.

struct Store {
    std::vector<std::int64_t> part_bytes;
    std::vector<MemoryFile> files;
    int pipe_ends[2];
    Tables tables;
    std::vector<bool> fits;  // whether the table has the row's own checksum

    ~Store() {
        close(pipe_ends[0]);
        close(pipe_ends[1]);
    }
    std::int64_t rows() const { return static_cast<std::int64_t>(tables.places.size()); }
    const std::int64_t* shard_of(std::int64_t row) const {
        return &tables.shards[(tables.places[row] >> 32) * (1 + part_bytes.size())];
    }
    std::int64_t start(std::int64_t row, std::size_t part) const {
        return shard_of(row)[1 + part] + (tables.places[row] & 0xFFFFFFFF) * part_bytes[part];
    }
    // The bytes of a file, or null for what is none.
    const std::vector<std::uint8_t>* content(std::int64_t row) const {
        for (const MemoryFile& file : files) {
            if (file.number == shard_of(row)[0]) return &file.bytes;
        }
        return nullptr;
    }
};

using Expected = std::tuple<Fault, std::int64_t, int>;
constexpr Expected kRead{Fault::none, -1, 0};

// What reading a row must give before its checksum is compared.
Expected access_of(const Store& store, std::int64_t row) {
    if (store.tables.places[row] < 0) return {Fault::absent, row, 0};
    const auto* content = store.content(row);
    for (std::size_t part = 0; part < store.part_bytes.size(); ++part) {
        const std::int64_t bytes = store.part_bytes[part], start = store.start(row, part);
        if (bytes == 0) continue;
        if (start < 0) return {Fault::read, row, EINVAL};
        if (content == nullptr) return {Fault::read, row, store.shard_of(row)[0] < 0 ? EBADF : ESPIPE};
        if (start + bytes > static_cast<std::int64_t>(content->size())) return {Fault::read, row, 0};
    }
    return kRead;
}

// The checksum of a row that can be read.
std::uint32_t checksum_of(const Store& store, std::int64_t row) {
    std::uint32_t crc = reference::checksum_of_number(row);
    for (std::size_t part = 0; part < store.part_bytes.size(); ++part) {
        const std::int64_t bytes = store.part_bytes[part];
        if (bytes > 0) crc = reference::crc32c(crc, store.content(row)->data() + store.start(row, part), bytes);
    }
    return crc;
}

// What reading a row must give.
Expected expected_of(const Store& store, std::int64_t row, bool always) {
    const Expected access = access_of(store, row);
    const bool compared = always || !store.tables.seen[row];
    return access == kRead && compared && !store.fits[row] ? Expected{Fault::checksum, row, 0} : access;
}

void make_store(FuzzedDataProvider& input, Store& store) {
    const int parts = input.ConsumeIntegralInRange(0, 3), shards = input.ConsumeIntegralInRange(1, 3);
    for (int part = 0; part < parts; ++part) {
        store.part_bytes.push_back(rarely(input, 8) ? 70000 : input.ConsumeIntegralInRange(0, 40));
    }
    check(pipe(store.pipe_ends) == 0, "the system gives a pipe");
    for (int shard = 0; shard < shards; ++shard) {
        const int kind = input.ConsumeIntegralInRange(0, 7);
        const int size = kind < 2 ? 200000 : input.ConsumeIntegralInRange(0, 2000);
        store.files.emplace_back(noise(size, static_cast<std::uint32_t>(shard)));
        store.tables.shards.push_back(kind == 7 ? -1 : kind == 6 ? store.pipe_ends[0] : store.files.back().number);
        for (int part = 0; part < parts; ++part) {
            const std::int64_t far = std::int64_t{1} << 61;
            store.tables.shards.push_back(rarely(input, 8) ? input.ConsumeIntegralInRange(-far, far)
                                                           : input.ConsumeIntegralInRange(0, size / 2));
        }
    }
    const int rows = input.ConsumeIntegralInRange(1, 24);
    for (int row = 0; row < rows; ++row) {
        const std::uint32_t last = rarely(input, 16) ? 0xFFFFFFFF : 20;
        const auto slot = input.ConsumeIntegralInRange<std::uint32_t>(0, last);
        const bool absent = rarely(input, 16);
        store.tables.places.push_back(absent ? -1 : place_of(input.ConsumeIntegralInRange(0, shards - 1), slot));
        const bool fits = !rarely(input, 16);
        const std::uint32_t own = access_of(store, row) == kRead ? checksum_of(store, row) : 0;
        store.tables.checksums.push_back(fits ? own : ~own);
        store.fits.push_back(fits);
        store.tables.seen.push_back(input.ConsumeBool());
    }
}

// A request for rows: where they go, and what must come of each.
struct Request {
    std::vector<std::int64_t> rows;
    std::vector<Expected> expected;
    std::vector<std::unique_ptr<std::uint8_t[]>> memory;
    std::vector<Part> parts;
    bool always;
    std::int64_t ticket = -1;

    Request(FuzzedDataProvider& input, const Store& store) : always(input.ConsumeBool()) {
        const int count = input.ConsumeIntegralInRange(0, 12);
        for (int i = 0; i < count; ++i) {
            rows.push_back(input.ConsumeIntegralInRange<std::int64_t>(0, store.rows() - 1));
            expected.push_back(expected_of(store, rows.back(), always));
        }
        for (const std::int64_t bytes : store.part_bytes) {
            memory.push_back(array(count * bytes));
            parts.push_back({bytes, memory.back().get()});
        }
    }

    void compare(const Store& store, const Outcome& outcome) const {
        std::set<Expected> faults;
        for (std::size_t place = 0; place < rows.size(); ++place) {
            if (expected[place] != kRead) faults.insert(expected[place]);
            for (std::size_t part = 0; part < parts.size(); ++part) compare_part(store, place, part);
        }
        if (faults.empty()) faults.insert(kRead);
        check(faults.count({outcome.fault, outcome.row, outcome.error}), "a reading ends as one of its rows does");
    }

private:
    void compare_part(const Store& store, std::size_t place, std::size_t part) const {
        const std::int64_t bytes = parts[part].bytes;
        const std::uint8_t* got = parts[part].memory + place * bytes;
        if (std::get<0>(expected[place]) == Fault::absent) {
            check(std::count(got, got + bytes, kUntouched) == bytes, "the place of an absent row is left alone");
        } else if (std::get<0>(expected[place]) != Fault::read && bytes > 0) {
            const std::uint8_t* wanted = store.content(rows[place])->data() + store.start(rows[place], part);
            check(std::equal(got, got + bytes, wanted), "a row is read as it lies in its file");
        }
    }
};

// A ticket that is known no more, or never was, is refused.
void check_refused(RowReader& reader, std::int64_t ticket) {
    try {
        reader.wait(ticket);
    } catch (const std::invalid_argument&) {
        return;
    }
    check(false, "a ticket is waited for once");
}

void check_seen(const std::vector<Request>& requests, const Store& store, const std::vector<std::uint8_t>& before) {
    for (std::int64_t row = 0; row < store.rows(); ++row) {
        if (before[row] == store.tables.seen[row]) continue;
        const auto has = [&](const Request& request) { return std::count(request.rows.begin(), request.rows.end(), row) > 0; };
        check(std::any_of(requests.begin(), requests.end(), has), "only rows that were read are marked as checked");
        check(expected_of(store, row, true) == kRead, "only rows that fit their checksum are marked as checked");
    }
}

// Readings begun one after the other are waited for in any order. With `leave`, some are left to the reader's destructor.
void serve(FuzzedDataProvider& input, RowReader& reader, std::vector<Request>& requests, Store& store, bool leave) {
    std::vector<Request*> open;
    for (Request& request : requests) {
        request.ticket = reader.submit(request.rows.data(), static_cast<std::int64_t>(request.rows.size()),
                                       store.tables.rows(), request.parts, request.always);
        open.push_back(&request);
    }
    while (!open.empty()) {
        const auto next = input.ConsumeIntegralInRange<std::size_t>(0, open.size() - 1);
        if (!leave || input.ConsumeBool()) {
            open[next]->compare(store, reader.wait(open[next]->ticket));
            check_refused(reader, open[next]->ticket);
        }
        open.erase(open.begin() + static_cast<std::ptrdiff_t>(next));
    }
    check_refused(reader, input.ConsumeBool() ? -1 : std::int64_t{1} << 40);
}

void try_reading(FuzzedDataProvider& input) {
    Store store;
    make_store(input, store);
    const std::vector<std::uint8_t> before = store.tables.seen;
    std::vector<Request> requests;
    const int count = input.ConsumeIntegralInRange(1, 4);
    for (int i = 0; i < count; ++i) requests.emplace_back(input, store);
    static RowReader readers[3] = {RowReader(0), RowReader(1), RowReader(2)};
    const int which = input.ConsumeIntegralInRange(0, 7);
    if (which == 7) {
        RowReader own(2);
        serve(input, own, requests, store, true);
    } else {
        serve(input, readers[which % 3], requests, store, false);
    }
    check_seen(requests, store, before);
}

void try_checksums(FuzzedDataProvider& input) {
    std::vector<std::int64_t> rows(input.ConsumeIntegralInRange<std::size_t>(0, 6));
    for (auto& row : rows) row = input.ConsumeIntegral<std::int64_t>();
    std::vector<std::unique_ptr<std::uint8_t[]>> memory;
    std::vector<Part> parts;
    const int count = input.ConsumeIntegralInRange(0, 3);
    for (int part = 0; part < count; ++part) {
        const std::int64_t bytes = input.ConsumeIntegralInRange(0, 70);
        memory.push_back(filled(input, bytes * static_cast<std::int64_t>(rows.size())));
        parts.push_back({bytes, memory.back().get()});
    }
    static RowReader reader(2);
    std::vector<std::uint32_t> sums(rows.size());
    reader.checksum(rows.data(), static_cast<std::int64_t>(rows.size()), parts, sums.data());
    for (std::size_t place = 0; place < rows.size(); ++place) {
        std::uint32_t crc = reference::checksum_of_number(rows[place]);
        for (const Part& part : parts) crc = reference::crc32c(crc, part.memory + place * part.bytes, part.bytes);
        check(sums[place] == crc, "a row's checksum is that of its number and its parts");
        for (const Part& part : parts) {
            const std::uint8_t* at = part.memory + place * part.bytes;
            check(crc32c_by_tables(crc, at, part.bytes) == reference::crc32c(crc, at, part.bytes),
                  "tables give the checksum that bits give");
        }
    }
}

// Arrays.

Layout layout_of(FuzzedDataProvider& input) {
    const std::int64_t samples = input.ConsumeIntegralInRange(1, 3), repeats = input.ConsumeIntegralInRange(1, 3);
    return {samples, samples * repeats, input.ConsumeIntegralInRange(1, 40), input.ConsumeIntegralInRange(1, 40)};
}

void try_quantizing(FuzzedDataProvider& input) {
    const Layout layout = layout_of(input);
    const Type type = input.PickValueInArray(kFloats), code = input.PickValueInArray(kCodes);
    const std::int64_t elements = layout.outer * layout.channels * layout.inner;
    const int threads = input.ConsumeIntegralInRange(1, 5);
    const auto rows = type == Type::float32 ? floats(input, elements) : filled(input, elements * 2);
    const auto codes = array(elements), scales = array(layout.samples * layout.channels * 4);
    kernels().quantize_rows(rows.get(), type, codes.get(), code, reinterpret_cast<float*>(scales.get()), layout, threads);
    check_codes(rows.get(), type, codes.get(), code, reinterpret_cast<const float*>(scales.get()), layout);
}

void try_dequantizing(FuzzedDataProvider& input) {
    const Layout layout = layout_of(input);
    const Type type = input.PickValueInArray(kFloats), code = input.PickValueInArray(kCodes);
    const std::int64_t elements = layout.outer * layout.channels * layout.inner;
    const int threads = input.ConsumeIntegralInRange(1, 5);
    const bool shared = input.ConsumeBool();
    const auto scales = floats(input, (shared ? 1 : layout.samples) * layout.channels);
    const auto codes = filled(input, elements), values = array(elements * reference::bytes_of(type));
    const std::int64_t stride = shared ? 0 : layout.channels;
    const auto* by = reinterpret_cast<const float*>(scales.get());
    kernels().dequantize_rows(codes.get(), code, by, stride, values.get(), type, layout, threads);
    check_values(codes.get(), code, by, stride, values.get(), type, layout);
}

// The pixel of a crop, 0 beside the image.
std::uint8_t pixel_of(const AugmentBatch& job, std::int64_t sample, std::int64_t y, std::int64_t x, std::int64_t channel) {
    const std::int64_t across = job.flips[sample] ? job.width - 1 - x : x;
    const std::int64_t down = job.offsets[2 * sample] + y - job.padding;
    const std::int64_t right = job.offsets[2 * sample + 1] + across - job.padding;
    if (down < 0 || down >= job.height || right < 0 || right >= job.width) return 0;
    return job.images[((job.rows[sample] * job.height + down) * job.width + right) * job.channels + channel];
}

void check_crops(const AugmentBatch& job) {
    const std::int64_t pixels = job.height * job.width;
    for (std::int64_t i = 0; i < job.batch * pixels * job.channels; ++i) {
        const std::int64_t sample = i / (pixels * job.channels), rest = i % (pixels * job.channels);
        const std::int64_t channel = job.channels_last ? rest % job.channels : rest / pixels;
        const std::int64_t pixel = job.channels_last ? rest / job.channels : rest % pixels;
        const float shade = pixel_of(job, sample, pixel / job.width, pixel % job.width, channel);
        const float wanted = reference::rounded((shade / 255.0f - job.mean[channel]) / job.std[channel], job.out_type);
        check(reference::same(reference::read(job.out, i, job.out_type), wanted), "a crop has the pixels of its image");
    }
}

void try_cropping(FuzzedDataProvider& input) {
    AugmentBatch job{};
    job.batch = input.ConsumeIntegralInRange(0, 4), job.count = input.ConsumeIntegralInRange(1, 3);
    job.height = input.ConsumeIntegralInRange(1, 9), job.width = input.ConsumeIntegralInRange(1, 9);
    job.channels = input.ConsumeIntegralInRange(1, 4), job.padding = input.ConsumeIntegralInRange(0, 12);
    job.out_type = input.PickValueInArray(kFloats), job.channels_last = input.ConsumeBool();
    std::vector<std::int64_t> rows, offsets;
    const auto flips = std::make_unique<bool[]>(static_cast<std::size_t>(job.batch));
    bool fits = true;
    const auto number = [&](std::int64_t last) {
        const bool beside = rarely(input, 32), wild = rarely(input, 64);
        const auto drawn = wild ? input.ConsumeIntegral<std::int64_t>()
                                : input.ConsumeIntegralInRange<std::int64_t>(beside ? -1 : 0, beside ? last + 1 : last);
        fits = fits && drawn >= 0 && drawn <= last;
        return drawn;
    };
    for (std::int64_t sample = 0; sample < job.batch; ++sample) {
        rows.push_back(number(job.count - 1));
        for (int axis = 0; axis < 2; ++axis) offsets.push_back(number(2 * job.padding));
        flips[static_cast<std::size_t>(sample)] = input.ConsumeBool();
    }
    const auto mean = floats(input, job.channels), deviation = floats(input, job.channels);
    const auto images = filled(input, job.count * job.height * job.width * job.channels);
    const std::int64_t bytes = job.batch * job.height * job.width * job.channels * reference::bytes_of(job.out_type);
    const auto out = array(bytes);
    job.rows = rows.data(), job.offsets = offsets.data(), job.flips = flips.get(), job.images = images.get();
    job.mean = reinterpret_cast<const float*>(mean.get()), job.std = reinterpret_cast<const float*>(deviation.get());
    job.out = out.get();
    check(kernels().augment_batch(job, input.ConsumeIntegralInRange(1, 3)) == fits, "numbers out of range are refused");
    if (fits) return check_crops(job);
    check(std::count(out.get(), out.get() + bytes, kUntouched) == bytes, "nothing is written where numbers are refused");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    FuzzedDataProvider input(data, size);
    static const std::vector<std::string> names = levels();
    use_level(names[input.ConsumeIntegralInRange<std::size_t>(0, names.size() - 1)]);
    switch (input.ConsumeIntegralInRange(0, 4)) {
        case 0: try_checksums(input); break;
        case 1: try_quantizing(input); break;
        case 2: try_dequantizing(input); break;
        case 3: try_cropping(input); break;
        default: try_reading(input);
    }
    return 0;
}
