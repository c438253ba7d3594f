// Batch normalisation with the residual and the ReLU behind it, on channels-last maps: forward reads the map twice and
// writes once, backward likewise. Sums are taken over chunks of rows in single precision and added in order in double,
// so that the number of threads changes nothing.

#include <cmath>
#include <vector>

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace stablekd {
namespace {

constexpr std::int64_t kChunk = 32768;  // elements
constexpr std::int64_t kShiftRows = 64;
constexpr std::int64_t kRows = 32;

std::int64_t rows_per_chunk(std::int64_t channels) { return channels < kChunk ? kChunk / channels : 1; }

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls body(Count<vectors>, first channel, lanes) for tiles of four, two and one vectors of channels; the last tile may
// have fewer lanes than a vector.
template <class Body>
STABLEKD_INLINE void over_tiles(std::int64_t channels, Body&& body) {
    std::int64_t c = 0;
    for (; c + 4 * kWidth <= channels; c += 4 * kWidth) body(Count<4>{}, c, kWidth);
    for (; c + 2 * kWidth <= channels; c += 2 * kWidth) body(Count<2>{}, c, kWidth);
    for (; c + kWidth <= channels; c += kWidth) body(Count<1>{}, c, kWidth);
    if (c < channels) body(Count<1>{}, c, static_cast<int>(channels - c));
}

// Two sums per channel over `rows` rows: pair(row, vector, lanes, first, second) gives their terms. Four chains of
// additions do not wait for each other; each is taken over a few rows first, so that roundings do not pile up.
template <int V, class Pair>
STABLEKD_INLINE void two_sums(std::int64_t rows, int lanes, double* first, double* second, Pair&& pair) {
    constexpr int chains = 4 / V;
    Vec total[2][V] = {};
    for (std::int64_t start = 0; start < rows; start += kRows * chains) {
        const std::int64_t end = rows - start < kRows * chains ? rows : start + kRows * chains;
        Vec a[chains][V] = {}, b[chains][V] = {}, one, other;
        std::int64_t row = start;
        for (; row + chains <= end; row += chains)
            for (int k = 0; k < chains; ++k)
                for (int v = 0; v < V; ++v) {
                    pair(row + k, v, lanes, one, other);
                    a[k][v] += one, b[k][v] += other;
                }
        for (; row < end; ++row)
            for (int v = 0; v < V; ++v) {
                pair(row, v, lanes, one, other);
                a[0][v] += one, b[0][v] += other;
            }
        for (int k = 0; k < chains; ++k)
            for (int v = 0; v < V; ++v) total[0][v] += a[k][v], total[1][v] += b[k][v];
    }
    for (int v = 0; v < V; ++v)
        for (int lane = 0; lane < lanes; ++lane) {
            first[v * kWidth + lane] = total[0][v][lane], second[v * kWidth + lane] = total[1][v][lane];
        }
}

// Sums of both kinds over all chunks: [2, channels], from [chunks, 2, channels].
std::vector<double> added(const std::vector<double>& partial, std::int64_t channels) {
    std::vector<double> total(2 * channels);
    for (std::size_t start = 0; start < partial.size(); start += total.size())
        for (std::size_t c = 0; c < total.size(); ++c) total[c] += partial[start + c];
    return total;
}

// A value near each channel's mean, about which squares are summed.
template <class T>
std::vector<float> shifts(const T* x, std::int64_t rows, std::int64_t channels) {
    const std::int64_t used = rows < kShiftRows ? rows : kShiftRows;
    std::vector<float> out(channels);
    for (std::int64_t row = 0; row < used; ++row)
        over(channels, [&](std::int64_t c, int lanes) {
            store(&out[c], load(&out[c], lanes) + load(x + row * channels + c, lanes), lanes);
        });
    for (float& value : out) value /= static_cast<float>(used);
    return out;
}

template <class T>
void statistics(const BatchNorm& job, int threads) {
    const T* x = static_cast<const T*>(job.x);
    const std::int64_t channels = job.channels, per_chunk = rows_per_chunk(channels);
    const std::vector<float> shift = shifts(x, job.rows, channels);
    std::vector<double> partial((job.rows + per_chunk - 1) / per_chunk * 2 * channels);
    in_parallel(job.rows, per_chunk, threads, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
        double* sums = &partial[chunk * 2 * channels];
        over_tiles(channels, [&](auto tile, std::int64_t c, int lanes) STABLEKD_LAMBDA {
            constexpr int V = decltype(tile)::value;
            Vec about[V];
            for (int v = 0; v < V; ++v) about[v] = load(&shift[c + v * kWidth], lanes);
            const T* from = x + first * channels + c;
            two_sums<V>(last - first, lanes, sums + c, sums + channels + c,
                        [&](std::int64_t row, int v, int count, Vec& one, Vec& other) STABLEKD_LAMBDA {
                            one = load(from + row * channels + v * kWidth, count) - about[v];
                            other = one * one;
                        });
        });
    });
    const std::vector<double> total = added(partial, channels);
    const double n = static_cast<double>(job.rows);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double apart = total[c] / n, spread = total[channels + c] / n - apart * apart;
        job.mean[c] = static_cast<float>(shift[c] + apart);
        job.variance[c] = static_cast<float>(spread < 0 ? 0 : spread);
    }
}

template <bool kResidual, bool kRelu, class T>
void normalised(const BatchNorm& job, int threads) {
    const T *x = static_cast<const T*>(job.x), *residual = static_cast<const T*>(job.residual);
    T* y = static_cast<T*>(job.y);
    const std::int64_t channels = job.channels;
    std::vector<float> slope(channels);
    for (std::int64_t c = 0; c < channels; ++c)
        slope[c] = static_cast<float>(job.weight[c] / std::sqrt(job.variance[c] + job.epsilon));
    in_parallel(job.rows, rows_per_chunk(channels), threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
        over_tiles(channels, [&](auto tile, std::int64_t c, int lanes) STABLEKD_LAMBDA {
            constexpr int V = decltype(tile)::value;
            Vec a[V], mean[V], bias[V];
            for (int v = 0; v < V; ++v) {
                const std::int64_t at = c + v * kWidth;
                a[v] = load(&slope[at], lanes), mean[v] = load(job.mean + at, lanes), bias[v] = load(job.bias + at, lanes);
            }
            for (std::int64_t row = first; row < last; ++row)
                for (int v = 0; v < V; ++v) {
                    const std::int64_t at = row * channels + c + v * kWidth;
                    Vec value = (load(x + at, lanes) - mean[v]) * a[v] + bias[v];
                    if (kResidual) value += load(residual + at, lanes);
                    // A NaN stays one, as in torch.
                    if (kRelu) value = value < 0.0f ? Vec{} : value;
                    store(y + at, value, lanes);
                }
        });
    });
}

// The gradient behind the ReLU.
template <bool kRelu, class T>
STABLEKD_INLINE Vec passed(const T* gradient, const T* y, std::int64_t at, int lanes) {
    const Vec g = load(gradient + at, lanes);
    if (!kRelu) return g;
    return load(y + at, lanes) > 0.0f ? g : Vec{};
}

// Per channel the sum of the passed gradient, and of its product with x - mean: [2, channels].
template <bool kResidual, bool kRelu, class T>
std::vector<double> gradient_sums(const BatchNormGradient& job, int threads) {
    const T *g = static_cast<const T*>(job.gradient), *x = static_cast<const T*>(job.x), *y = static_cast<const T*>(job.y);
    T* kept = static_cast<T*>(job.residual_gradient);
    const std::int64_t channels = job.channels, per_chunk = rows_per_chunk(channels);
    std::vector<double> partial((job.rows + per_chunk - 1) / per_chunk * 2 * channels);
    in_parallel(job.rows, per_chunk, threads, [&](std::int64_t chunk, std::int64_t first, std::int64_t last) {
        double* sums = &partial[chunk * 2 * channels];
        over_tiles(channels, [&](auto tile, std::int64_t c, int lanes) STABLEKD_LAMBDA {
            constexpr int V = decltype(tile)::value;
            Vec mean[V];
            for (int v = 0; v < V; ++v) mean[v] = load(job.mean + c + v * kWidth, lanes);
            two_sums<V>(last - first, lanes, sums + c, sums + channels + c,
                        [&](std::int64_t row, int v, int count, Vec& one, Vec& other) STABLEKD_LAMBDA {
                            const std::int64_t at = (first + row) * channels + c + v * kWidth;
                            one = passed<kRelu>(g, y, at, count);
                            if (kResidual) store(kept + at, one, count);
                            other = one * (load(x + at, count) - mean[v]);
                        });
        });
    });
    return added(partial, channels);
}

// With G the passed gradient and n rows: x_gradient = w / s * (G - mean of G - (x - mean) / s^2 * mean of G (x - mean)).
template <bool kResidual, bool kRelu, class T>
void gradients(const BatchNormGradient& job, int threads) {
    const std::vector<double> sums = gradient_sums<kResidual, kRelu, T>(job, threads);
    const std::int64_t channels = job.channels;
    const double n = static_cast<double>(job.rows);
    std::vector<float> slope(channels), constant(channels), pull(channels);
    for (std::int64_t c = 0; c < channels; ++c) {
        const double inverse = 1 / std::sqrt(job.variance[c] + job.epsilon), a = job.weight[c] * inverse;
        slope[c] = static_cast<float>(a);
        constant[c] = static_cast<float>(-a * sums[c] / n);
        pull[c] = static_cast<float>(-a * inverse * inverse * sums[channels + c] / n);
        job.bias_gradient[c] = static_cast<float>(sums[c]);
        job.weight_gradient[c] = static_cast<float>(sums[channels + c] * inverse);
    }
    // What was kept for the residual has passed the ReLU already.
    const T* g = static_cast<const T*>(kResidual ? job.residual_gradient : job.gradient);
    const T *x = static_cast<const T*>(job.x), *y = static_cast<const T*>(job.y);
    T* out = static_cast<T*>(job.x_gradient);
    in_parallel(job.rows, rows_per_chunk(channels), threads, [&](std::int64_t, std::int64_t first, std::int64_t last) {
        over_tiles(channels, [&](auto tile, std::int64_t c, int lanes) STABLEKD_LAMBDA {
            constexpr int V = decltype(tile)::value;
            Vec a[V], b[V], d[V], mean[V];
            for (int v = 0; v < V; ++v) {
                const std::int64_t at = c + v * kWidth;
                a[v] = load(&slope[at], lanes), b[v] = load(&pull[at], lanes);
                d[v] = load(&constant[at], lanes), mean[v] = load(job.mean + at, lanes);
            }
            for (std::int64_t row = first; row < last; ++row)
                for (int v = 0; v < V; ++v) {
                    const std::int64_t at = row * channels + c + v * kWidth;
                    const Vec G = passed<kRelu && !kResidual>(g, y, at, lanes);
                    store(out + at, G * a[v] + ((load(x + at, lanes) - mean[v]) * b[v] + d[v]), lanes);
                }
        });
    });
}

// Calls run(Count<residual>, Count<relu>).
template <class Run>
void with_options(bool residual, bool relu, Run&& run) {
    if (residual && relu) return run(Count<1>{}, Count<1>{});
    if (residual) return run(Count<1>{}, Count<0>{});
    if (relu) return run(Count<0>{}, Count<1>{});
    run(Count<0>{}, Count<0>{});
}

}  // namespace

namespace STABLEKD_LEVEL {

void batch_norm(const BatchNorm& job, int threads) {
    with_float_type(job.type, [&](auto* element) {
        using T = Element<decltype(element)>;
        statistics<T>(job, threads);
        with_options(job.residual != nullptr, job.relu, [&](auto residual, auto relu) {
            normalised<decltype(residual)::value == 1, decltype(relu)::value == 1, T>(job, threads);
        });
    });
}

void batch_norm_gradient(const BatchNormGradient& job, int threads) {
    with_float_type(job.type, [&](auto* element) {
        using T = Element<decltype(element)>;
        with_options(job.residual_gradient != nullptr, job.y != nullptr, [&](auto residual, auto relu) {
            gradients<decltype(residual)::value == 1, decltype(relu)::value == 1, T>(job, threads);
        });
    });
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
