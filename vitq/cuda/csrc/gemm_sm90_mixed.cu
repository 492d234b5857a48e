// One integer segment with fp16 columns beside it, or shifted rows (QUIK). Few tiles keep their weights: K is large where these are used.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {
namespace {
template <int EPILOGUE>
int launch_tile(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 1: return launch<Config1, EPILOGUE, MIXED>(p, stream);
    case 8: return launch<Config8, EPILOGUE, MIXED>(p, stream);
    case 10: return launch<Config10, EPILOGUE, MIXED>(p, stream);
    case 11: return launch<Config11, EPILOGUE, MIXED>(p, stream);
    case 12: return launch<Config12, EPILOGUE, MIXED>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}
}  // namespace

int launch_mixed(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (epilogue_of(p)) {
    case FLOAT_OUT: return launch_tile<FLOAT_OUT>(p, config, stream);
    case CODES_OUT: return launch_tile<CODES_OUT>(p, config, stream);
    case ACT_CODES_OUT: return launch_tile<ACT_CODES_OUT>(p, config, stream);
    default: return launch_tile<ACT_FLOAT_OUT>(p, config, stream);
  }
}
}  // namespace vitq::sm90
