// Several segments: float totals beside the accumulators leave registers for 128 columns.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {
namespace {
template <int EPILOGUE>
int launch_one(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 1: return launch<Config1, EPILOGUE, true>(p, stream);
    case 3: return launch<Config3, EPILOGUE, true>(p, stream);
    case 11: return launch<Config11, EPILOGUE, true>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}
}  // namespace

int launch_segments(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (epilogue_of(p)) {
    case FLOAT_OUT: return launch_one<FLOAT_OUT>(p, config, stream);
    case CODES_OUT: return launch_one<CODES_OUT>(p, config, stream);
    case ACT_CODES_OUT: return launch_one<ACT_CODES_OUT>(p, config, stream);
    default: return launch_one<ACT_FLOAT_OUT>(p, config, stream);
  }
}
}  // namespace vitq::sm90
