// Instances of vitq_weight_only for bfloat16 inputs.
#include "few.cuh"

namespace vitq {
namespace few {

int weight_only_bf16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream) { return launch_weight_only<W8BF16, W4BF16>(o, p, stream); }

}  // namespace few
}  // namespace vitq
