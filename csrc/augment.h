#pragma once

#include <cstdint>

namespace stablekd {

// One call's images, choices and output. All pointers are dense and row-major unless said otherwise.
struct AugmentBatch {
    const std::uint8_t* images;   // [M, height, width, channels]
    const std::int64_t* rows;     // [batch], each in 0..M-1
    const std::int64_t* offsets;  // [batch, 2]: top, left in the padded image, each in 0..2*padding
    const bool* flips;            // [batch]
    float* out;                   // [batch, height, width, channels] or [batch, channels, height, width]
    std::int64_t batch, height, width, channels, padding;
    const float* mean;            // [channels]
    const float* std;             // [channels]
    bool channels_last;           // which of the two layouts `out` has
};

// Crop, flip and normalise a batch. The caller has checked rows and offsets.
// Bitwise equal to (float(pixel) / 255 - mean) / std in IEEE single precision.
void augment_batch(const AugmentBatch& job, int threads);

}  // namespace stablekd
