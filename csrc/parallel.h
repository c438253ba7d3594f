#pragma once

#include <cstdint>

namespace stablekd {
namespace {

// Where the system refuses a thread, GCC's OpenMP runtime says so and exits, here as in torch's own operators: no exception
// can be made of it.

// Calls body(chunk, first, last) for each chunk of `total` units, threads taking chunks in order.
template <class Body>
void in_parallel(std::int64_t total, std::int64_t per_chunk, int threads, Body&& body) {
    const std::int64_t chunks = (total + per_chunk - 1) / per_chunk;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t first = chunk * per_chunk, last = first + per_chunk;
        body(chunk, first, last < total ? last : total);
    }
}

}  // namespace
}  // namespace stablekd
