#include "gemm_sm90.cuh"

namespace vitq::sm90 {
int launch_codes(const VitqLinear& p, int config, cudaStream_t stream) { return launch_config<CODES_OUT>(p, config, stream); }
}  // namespace vitq::sm90
