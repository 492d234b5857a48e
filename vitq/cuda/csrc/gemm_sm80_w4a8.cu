// Instances for 4-bit weights and 8-bit inputs.
#include "gemm_sm80.cuh"

namespace vitq {
namespace sm80 {

int linear_w4a8(const VitqLinear& p, int tile, cudaStream_t stream) { return launch_plain<W4A8>(p, tile, stream); }

}  // namespace sm80
}  // namespace vitq
