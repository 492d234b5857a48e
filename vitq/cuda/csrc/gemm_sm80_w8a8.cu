// Instances for 8-bit weights and inputs.
#include "gemm_sm80.cuh"

namespace vitq {
namespace sm80 {

int linear_w8a8(const VitqLinear& p, int tile, cudaStream_t stream) { return launch_plain<W8A8>(p, tile, stream); }

}  // namespace sm80
}  // namespace vitq
