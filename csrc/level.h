#pragma once

// The kernels of the level that is being compiled: CMake defines STABLEKD_LEVEL as its name for each compilation.

#include "kernels.h"

namespace stablekd {
namespace STABLEKD_LEVEL {

double kd_loss(const Logits&, double alpha, double smoothing, double factor, std::int64_t* bad_row, int threads);
double decoupled_kl(const Logits&, double alpha, double beta, double factor, std::int64_t* bad_row, int threads);
double grouped_kl(const Logits&, double threshold, double primary, double binary, double factor, int threads);
double feature_mse(const Features&, Normalize, const double* power, double factor, int threads);
double feature_cosine(const Features&, bool per_position, double factor, int threads);
double attention_transfer(const Attention&, double factor, int threads);
void batch_norm(const BatchNorm&, int threads);
void batch_norm_gradient(const BatchNormGradient&, int threads);
void quantize_rows(const void* rows, Type, void* codes, Type code, float* scales, const Layout&, int threads);
void dequantize_rows(const void* codes, Type code, const float* scales, std::int64_t scales_sample_stride, void* values,
                     Type, const Layout&, int threads);
bool augment_batch(const AugmentBatch&, int threads);
void stream(const float* a, const float* b, float* out, std::int64_t count, bool nontemporal, int threads);

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
