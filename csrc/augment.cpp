// Crops of resident images. Bitwise equal to (float(pixel) / 255 - mean) / std in IEEE single precision, rounded once
// to the type of the output: this file is compiled without fused multiply-add.

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace {

// mean and std hold one value per element, so that interleaved channels need no index arithmetic here.
template <class V>
void normalise(const std::uint8_t* pixels, const float* mean, const float* std, V* out, std::int64_t n) {
    over(n, [&](std::int64_t i, int count) STABLEKD_LAMBDA {
        const Vec apart = load(pixels + i, count) / 255.0f - load(mean + i, count);
        store(out + i, apart / load(std + i, count, 1.0f), count);
    });
}

// Copies one row of a crop into `line` [width, channels]: zeros where it leaves the image, mirrored if asked.
void fetch_line(const AugmentBatch& job, std::int64_t sample, std::int64_t y, std::uint8_t* line) {
    const std::int64_t channels = job.channels;
    const std::int64_t source_y = job.offsets[2 * sample] + y - job.padding;
    std::memset(line, 0, job.width * channels);
    if (source_y < 0 || source_y >= job.height) return;

    const std::int64_t shift = job.offsets[2 * sample + 1] - job.padding;
    const std::int64_t first = shift < 0 ? -shift : 0;
    const std::int64_t last = shift > 0 ? job.width - shift : job.width;
    const std::uint8_t* source = job.images + (job.rows[sample] * job.height + source_y) * job.width * channels;
    if (!job.flips[sample]) {
        if (first < last) {
            std::memcpy(line + first * channels, source + (first + shift) * channels, (last - first) * channels);
        }
        return;
    }
    for (std::int64_t x = first; x < last; ++x) {
        const std::uint8_t* from = source + (x + shift) * channels;
        std::uint8_t* to = line + (job.width - 1 - x) * channels;
        for (std::int64_t c = 0; c < channels; ++c) to[c] = from[c];
    }
}

// [width, channels] to [channels, width].
void split_channels(const AugmentBatch& job, const std::uint8_t* line, std::uint8_t* planes) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
        for (std::int64_t x = 0; x < job.width; ++x) planes[c * job.width + x] = line[x * job.channels + c];
    }
}

// The per-channel values spread over one line of the output's layout.
void spread(const AugmentBatch& job, const float* values, float* line) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
        for (std::int64_t x = 0; x < job.width; ++x) {
            line[job.channels_last ? x * job.channels + c : c * job.width + x] = values[c];
        }
    }
}

template <class V>
void augment(const AugmentBatch& job, int threads) {
    const std::int64_t width = job.width, length = width * job.channels;
    Scratch<float> mean(length), std(length);
    spread(job, job.mean, mean.get());
    spread(job, job.std, std.get());
    // One scratch line per thread, and its transpose.
    Scratch<std::uint8_t> scratch(2 * length * threads);

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        std::uint8_t* line = scratch.get() + 2 * length * thread;
        std::uint8_t* planes = line + length;
        const std::int64_t end = job.batch * (thread + 1) / threads;
        for (std::int64_t sample = job.batch * thread / threads; sample < end; ++sample) {
            V* image = static_cast<V*>(job.out) + sample * job.height * length;
            for (std::int64_t y = 0; y < job.height; ++y) {
                fetch_line(job, sample, y, line);
                if (job.channels_last) {
                    normalise(line, mean.get(), std.get(), image + y * length, length);
                    continue;
                }
                split_channels(job, line, planes);
                for (std::int64_t c = 0; c < job.channels; ++c) {
                    normalise(planes + c * width, mean.get() + c * width, std.get() + c * width,
                              image + (c * job.height + y) * width, width);
                }
            }
        }
    }
}

}  // namespace

namespace STABLEKD_LEVEL {

void augment_batch(const AugmentBatch& job, int threads) {
    with_float_type(job.out_type, [&](auto* out) { augment<Element<decltype(out)>>(job, threads); });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
