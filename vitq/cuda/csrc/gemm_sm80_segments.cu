// Instances with segments of k, shifted rows or an fp16 segment.
#include "gemm_sm80.cuh"

namespace vitq {
namespace sm80 {

int linear_segments(const VitqLinear& p, int tile, cudaStream_t stream) {
  return p.weight_bits == 4 ? launch_segments<W4A8>(p, tile, stream) : launch_segments<W8A8>(p, tile, stream);
}

}  // namespace sm80
}  // namespace vitq
