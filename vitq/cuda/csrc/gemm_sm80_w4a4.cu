// Instances for 4-bit weights and inputs.
#include "gemm_sm80.cuh"

namespace vitq {
namespace sm80 {

template <int FORMAT>
int launch_int4(const VitqLinear& p, int tile, cudaStream_t stream) {
  return with_tile(tile, [&](auto config) -> int {
    return launch<decltype(config)::value, FORMAT, ANY_EPILOGUE, false>(p, stream);
  });
}

int linear_w4a4(const VitqLinear& p, int tile, bool native, cudaStream_t stream) {
  return native ? launch_int4<W4A4_NATIVE>(p, tile, stream) : launch_int4<W4A4_WIDE>(p, tile, stream);
}

int linear_segments_w4a4(const VitqLinear& p, int tile, bool native, cudaStream_t stream) {
  return native ? launch_segments<W4A4_NATIVE>(p, tile, stream) : launch_segments<W4A4_WIDE>(p, tile, stream);
}

}  // namespace sm80
}  // namespace vitq
