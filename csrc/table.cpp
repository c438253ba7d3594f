// The kernels of one level, gathered.

#include "level.h"

#define STABLEKD_QUOTE(name) #name
#define STABLEKD_NAME(name) STABLEKD_QUOTE(name)

namespace stablekd {
namespace STABLEKD_LEVEL {

extern const Kernels table;
const Kernels table{STABLEKD_NAME(STABLEKD_LEVEL), kd_loss,        decoupled_kl,       grouped_kl,
                    feature_mse,                   feature_cosine, attention_transfer, batch_norm,
                    batch_norm_gradient,           quantize_rows,  dequantize_rows,    augment_batch,
                    stream};

}  // namespace STABLEKD_LEVEL
}  // namespace stablekd
