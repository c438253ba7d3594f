// Crops of resident images. Bitwise equal to (float(pixel) / 255 - mean) / std in IEEE single precision, rounded once
// to the type of the output: this file is compiled without fused multiply-add.

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr int kShades = 256;

// What each shade of each channel becomes, [channels, 256]: a pixel has too few values to be worth two divisions.
template <class V>
void fill_table(const AugmentBatch& job, V* table) {
    std::uint8_t shades[kShades];
    for (int i = 0; i < kShades; ++i) shades[i] = static_cast<std::uint8_t>(i);
    for (std::int64_t c = 0; c < job.channels; ++c) {
        over(kShades, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
            store(table + c * kShades + i, (load(shades + i, count) / 255.0f - job.mean[c]) / job.std[c], count);
        });
    }
}

// Where a line of a crop lies in its image: pixels first..last-1 of the output come from `source`, one every `step`
// bytes, which is negative for a mirrored line; the others are black.
struct Line {
    const std::uint8_t* source;
    std::int64_t first, last, step;
};

Line line_of(const AugmentBatch& job, std::int64_t sample, std::int64_t y) {
    const std::int64_t source_y = job.offsets[2 * sample] + y - job.padding;
    if (source_y < 0 || source_y >= job.height) return {nullptr, 0, 0, 0};
    const std::int64_t shift = job.offsets[2 * sample + 1] - job.padding;
    const std::int64_t first = shift < 0 ? -shift : 0, last = shift > 0 ? job.width - shift : job.width;
    if (first >= last) return {nullptr, 0, 0, 0};
    const std::uint8_t* row = job.images + (job.rows[sample] * job.height + source_y) * job.width * job.channels;
    if (!job.flips[sample]) return {row + (first + shift) * job.channels, first, last, job.channels};
    return {row + (last - 1 + shift) * job.channels, job.width - last, job.width - first, -job.channels};
}

// kChannels: how many there are, or 0 where that is known only now.
template <int kChannels, class V>
void write_interleaved(const AugmentBatch& job, const Line& line, const V* table, V* out) {
    const std::int64_t channels = kChannels > 0 ? kChannels : job.channels;
    const auto black = [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t x = from; x < to; ++x) {
            for (std::int64_t c = 0; c < channels; ++c) out[x * channels + c] = table[c * kShades];
        }
    };
    black(0, line.first);
    const std::uint8_t* pixel = line.source;
    for (std::int64_t x = line.first; x < line.last; ++x, pixel += line.step) {
        for (std::int64_t c = 0; c < channels; ++c) out[x * channels + c] = table[c * kShades + pixel[c]];
    }
    black(line.last, job.width);
}

// The line of one channel.
template <class V>
void write_plane(const AugmentBatch& job, const Line& line, std::int64_t channel, const V* table, V* out) {
    table += channel * kShades;
    for (std::int64_t x = 0; x < line.first; ++x) out[x] = table[0];
    const std::uint8_t* pixel = line.source + (line.source == nullptr ? 0 : channel);
    for (std::int64_t x = line.first; x < line.last; ++x, pixel += line.step) out[x] = table[*pixel];
    for (std::int64_t x = line.last; x < job.width; ++x) out[x] = table[0];
}

template <class V>
void write_image(const AugmentBatch& job, std::int64_t sample, const V* table, V* image) {
    for (std::int64_t y = 0; y < job.height; ++y) {
        const Line line = line_of(job, sample, y);
        if (job.channels_last) {
            V* out = image + y * job.width * job.channels;
            job.channels == 3 ? write_interleaved<3>(job, line, table, out) : write_interleaved<0>(job, line, table, out);
            continue;
        }
        for (std::int64_t c = 0; c < job.channels; ++c) {
            write_plane(job, line, c, table, image + (c * job.height + y) * job.width);
        }
    }
}

bool in_range(const AugmentBatch& job) {
    const auto within = [](std::int64_t value, std::int64_t last) { return value >= 0 && value <= last; };
    for (std::int64_t sample = 0; sample < job.batch; ++sample) {
        const std::int64_t* offset = job.offsets + 2 * sample;
        const bool crop = within(offset[0], 2 * job.padding) && within(offset[1], 2 * job.padding);
        if (!crop || !within(job.rows[sample], job.count - 1)) return false;
    }
    return true;
}

template <class V>
void augment(const AugmentBatch& job, int threads) {
    Scratch<V> table(job.channels * kShades);
    fill_table(job, table.get());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t sample = 0; sample < job.batch; ++sample) {
        V* images = static_cast<V*>(job.out);
        write_image(job, sample, table.get(), images + sample * job.height * job.width * job.channels);
    }
}

}  // namespace

namespace STABLEKD_LEVEL {

bool augment_batch(const AugmentBatch& job, int threads) {
    if (!in_range(job)) return false;
    with_float_type(job.out_type, [&](auto* out) { augment<Element<decltype(out)>>(job, threads); });
    return true;
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
