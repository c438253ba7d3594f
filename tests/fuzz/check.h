#pragma once

#include <cstdio>
#include <cstdlib>

namespace fuzz {

// Ends the process with a finding unless `kept`, which `rule` says in words.
inline void check(bool kept, const char* rule) {
    if (kept) return;
    std::fprintf(stderr, "FINDING: it does not hold that %s\n", rule);
    std::abort();
}

}  // namespace fuzz
