#include "augment.h"

#include <algorithm>
#include <cstring>
#include <vector>

// The loader picks the widest version that the processor has, so one binary serves every machine.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define STABLEKD_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define STABLEKD_MULTIVERSION
#endif

namespace stablekd {
namespace {

// mean and std hold one value per element, so that interleaved channels need no index arithmetic here.
STABLEKD_MULTIVERSION
void normalise(const std::uint8_t* pixels, const float* mean, const float* std, float* out, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = (static_cast<float>(pixels[i]) / 255.0f - mean[i]) / std[i];
    }
}

// Copies one row of a crop into `line` [width, channels]: zeros where it leaves the image, mirrored if asked.
void fetch_line(const AugmentBatch& job, std::int64_t sample, std::int64_t y, std::uint8_t* line) {
    const std::int64_t channels = job.channels;
    const std::int64_t source_y = job.offsets[2 * sample] + y - job.padding;
    std::memset(line, 0, job.width * channels);
    if (source_y < 0 || source_y >= job.height) return;

    const std::int64_t shift = job.offsets[2 * sample + 1] - job.padding;
    const std::int64_t first = std::max<std::int64_t>(0, -shift);
    const std::int64_t last = std::min(job.width, job.width - shift);
    const std::uint8_t* source = job.images + (job.rows[sample] * job.height + source_y) * job.width * channels;
    if (!job.flips[sample]) {
        if (first < last) {
            std::memcpy(line + first * channels, source + (first + shift) * channels, (last - first) * channels);
        }
        return;
    }
    for (std::int64_t x = first; x < last; ++x) {
        const std::uint8_t* from = source + (x + shift) * channels;
        std::copy(from, from + channels, line + (job.width - 1 - x) * channels);
    }
}

// [width, channels] to [channels, width].
void split_channels(const AugmentBatch& job, const std::uint8_t* line, std::uint8_t* planes) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
        for (std::int64_t x = 0; x < job.width; ++x) planes[c * job.width + x] = line[x * job.channels + c];
    }
}

// The per-channel values spread over one line of the output's layout.
std::vector<float> spread(const AugmentBatch& job, const float* values) {
    std::vector<float> line(job.width * job.channels);
    for (std::int64_t c = 0; c < job.channels; ++c) {
        for (std::int64_t x = 0; x < job.width; ++x) {
            line[job.channels_last ? x * job.channels + c : c * job.width + x] = values[c];
        }
    }
    return line;
}

}  // namespace

void augment_batch(const AugmentBatch& job, int threads) {
    const std::int64_t width = job.width, length = width * job.channels;
    const std::vector<float> mean = spread(job, job.mean), std = spread(job, job.std);
    // One scratch line per thread (and its transpose), made out here because nothing may throw inside the loop.
    std::vector<std::uint8_t> scratch(2 * length * threads);

#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        std::uint8_t* line = scratch.data() + 2 * length * thread;
        std::uint8_t* planes = line + length;
        const std::int64_t end = job.batch * (thread + 1) / threads;
        for (std::int64_t sample = job.batch * thread / threads; sample < end; ++sample) {
            float* image = job.out + sample * job.height * length;
            for (std::int64_t y = 0; y < job.height; ++y) {
                fetch_line(job, sample, y, line);
                if (job.channels_last) {
                    normalise(line, mean.data(), std.data(), image + y * length, length);
                    continue;
                }
                split_channels(job, line, planes);
                for (std::int64_t c = 0; c < job.channels; ++c) {
                    normalise(planes + c * width, mean.data() + c * width, std.data() + c * width,
                              image + (c * job.height + y) * width, width);
                }
            }
        }
    }
}

}  // namespace stablekd
