#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace stablekd {

// The kernels in use: those of the highest level that the processor has, unless `use_level` chose others.
const Kernels& kernels();

// Names of the levels that this processor can run, lowest first.
std::vector<std::string> levels();

// Throws std::invalid_argument for a level that is not among them. Not to be called while kernels run.
void use_level(const std::string& name);

}  // namespace stablekd
