#include "levels.h"

#include <stdexcept>

namespace stablekd {

#define STABLEKD_DECLARE(level) \
    namespace level {           \
    extern const Kernels table; \
    }
STABLEKD_DECLARE(baseline)
#ifdef STABLEKD_X86
STABLEKD_DECLARE(avx2)
STABLEKD_DECLARE(avx512)
#endif

namespace {

std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found{&baseline::table};
#ifdef STABLEKD_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::table);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512::table);
    }
#endif
    return found;
}

const Kernels*& chosen() {
    static const Kernels* table = runnable().back();
    return table;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const Kernels* table : runnable()) names.push_back(table->level);
    return names;
}

void use_level(const std::string& name) {
    for (const Kernels* table : runnable()) {
        if (name == table->level) {
            chosen() = table;
            return;
        }
    }
    std::string known;
    for (const std::string& level : levels()) known += (known.empty() ? "" : ", ") + level;
    throw std::invalid_argument("there is no level " + name + " on this processor; it has " + known);
}

}  // namespace stablekd
