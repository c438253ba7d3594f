// The speed of memory, for benches.

#include "level.h"
#include "simd.h"

namespace stablekd {
namespace STABLEKD_LEVEL {

void stream(const float* a, const float* b, float* out, std::int64_t count, bool nontemporal, int threads) {
    constexpr std::int64_t chunk = 32768;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t start = 0; start < count; start += chunk) {
        const std::int64_t n = count - start < chunk ? count - start : chunk;
        over(n, [&](std::int64_t i, int lanes) STABLEKD_LAMBDA {
            const Vec value = load(a + start + i, lanes) + load(b + start + i, lanes);
            if (nontemporal && lanes == kWidth) return store_past_caches(out + start + i, value);
            store(out + start + i, value, lanes);
        });
    }
}

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
