#pragma once

#include <cstdint>

// The operators' CPU kernels as plain functions over addresses. They are compiled once per instruction set level
// (see CMakeLists.txt); `levels.h` chooses among them at run time. Callers have checked shapes and own all memory.

namespace stablekd {

enum class Type : int { float32, bfloat16, float16, int8, float8_e4m3 };

// A feature map's memory as a contiguous [outer, channels, inner]; `samples` divides `outer`.
// Channels-first maps have inner = positions, channels-last maps inner = 1.
struct Layout {
    std::int64_t samples, outer, channels, inner;
};

// Student, target and gradient of a feature loss. `scales` [samples or 1, channels] turns codes into values;
// null for targets in floating point. `gradient` has the student's type and may be null.
struct Features {
    const void* student;
    Type student_type;
    const void* target;
    Type target_type;
    const float* scales;
    std::int64_t scales_sample_stride;  // channels, or 0 where all samples share their scales
    void* gradient;
    Layout layout;
};

enum class Normalize : int { none, power, channel, l2 };

// Maps of attention transfer, [samples, channels, places] in memory or channels-last: [samples, places, channels].
// `gradient` has the student's type and layout and may be null.
struct Attention {
    const void* student;
    Type student_type;
    std::int64_t student_channels;
    bool student_channels_last;
    const void* target;
    Type target_type;
    std::int64_t target_channels;
    bool target_channels_last;
    void* gradient;
    std::int64_t samples, places;
};

struct Logits {
    const void* student;  // [samples, classes], rows `student_stride` elements apart
    Type student_type;
    std::int64_t student_stride;
    const void* teacher;  // likewise; or probabilities [samples, kept]
    Type teacher_type;
    std::int64_t teacher_stride;
    const std::int64_t* indices;  // [samples, kept] or null
    std::int64_t kept;
    const std::int64_t* labels;  // [samples] or null
    const float* weight;         // [samples] or null
    void* gradient;              // contiguous [samples, classes] of the student's type, or null
    std::int64_t samples, classes;
    float temperature;
};

// Batch normalisation of a channels-last map [rows, channels] by its own statistics, then a residual added to it, then
// ReLU. All maps have one type.
struct BatchNorm {
    const void* x;
    const void* residual;  // or null
    void* y;
    Type type;
    const float* weight;  // [channels]
    const float* bias;    // [channels]
    float* mean;          // [channels], written
    float* variance;      // [channels], written: biased
    std::int64_t rows, channels;
    double epsilon;
    bool relu;
};

struct BatchNormGradient {
    const void* gradient;  // with respect to y
    const void* x;
    const void* y;  // null without ReLU
    Type type;
    const float* weight;
    const float* mean;
    const float* variance;
    void* x_gradient;
    void* residual_gradient;  // or null
    float* weight_gradient;
    float* bias_gradient;
    std::int64_t rows, channels;
    double epsilon;
};

struct AugmentBatch {
    const std::uint8_t* images;   // [count, height, width, channels]
    std::int64_t count;
    const std::int64_t* rows;     // [batch], each in 0..count-1
    const std::int64_t* offsets;  // [batch, 2]: top, left in the padded image, each in 0..2*padding
    const bool* flips;            // [batch]
    void* out;                    // [batch, height, width, channels] or [batch, channels, height, width]
    Type out_type;
    std::int64_t batch, height, width, channels, padding;
    const float* mean;   // [channels]
    const float* std;    // [channels]
    bool channels_last;  // which of the two layouts `out` has
};

// Losses return the mean loss, before any factor; the gradient is that of the mean loss times `factor`.
struct Kernels {
    const char* level;

    // `bad_row` is set to the first row whose label or index is out of range, and left alone if there is none.
    double (*kd_loss)(const Logits&, double alpha, double smoothing, double factor, std::int64_t* bad_row, int threads);
    double (*decoupled_kl)(const Logits&, double alpha, double beta, double factor, std::int64_t* bad_row, int threads);
    // `threshold`: the teacher's probability that the primary group reaches; `primary`, `binary`: weights.
    double (*grouped_kl)(const Logits&, double threshold, double primary, double binary, double factor, int threads);

    double (*feature_mse)(const Features&, Normalize, const double* power, double factor, int threads);
    double (*feature_cosine)(const Features&, bool per_position, double factor, int threads);
    double (*attention_transfer)(const Attention&, double factor, int threads);

    void (*batch_norm)(const BatchNorm&, int threads);
    void (*batch_norm_gradient)(const BatchNormGradient&, int threads);

    // Bitwise equal to the Python references.
    void (*quantize_rows)(const void* rows, Type, void* codes, Type code, float* scales, const Layout&, int threads);
    void (*dequantize_rows)(const void* codes, Type code, const float* scales, std::int64_t scales_sample_stride,
                            void* values, Type, const Layout&, int threads);
    // False, and nothing is written, if a row or an offset is out of range.
    bool (*augment_batch)(const AugmentBatch&, int threads);

    // out[i] = a[i] + b[i]: the speed of memory, for benches.
    void (*stream)(const float* a, const float* b, float* out, std::int64_t count, bool nontemporal, int threads);
};

}  // namespace stablekd
