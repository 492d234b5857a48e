// An activation before a float result is rare (a model whose next layer is dynamic or float): two tiles are enough.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {
int launch_act_float(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 1: return launch<Config1, ACT_FLOAT_OUT, ONE>(p, stream);
    case 8: return launch<Config8, ACT_FLOAT_OUT, ONE>(p, stream);
    case 11: return launch<Config11, ACT_FLOAT_OUT, ONE>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}
}  // namespace vitq::sm90
