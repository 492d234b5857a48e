// Packed int4 weights, with one scale a row or with multipliers of groups of a multiple of 128 columns, beside fp16 columns or not.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {
namespace {
template <int EPILOGUE>
int launch_tile(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 10: return launch<Packed10, EPILOGUE, MIXED>(p, stream);
    case 11: return launch<Packed11, EPILOGUE, MIXED>(p, stream);
    case 12: return launch<Packed12, EPILOGUE, MIXED>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}
}  // namespace

int launch_packed(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (epilogue_of(p)) {
    case FLOAT_OUT: return launch_tile<FLOAT_OUT>(p, config, stream);
    case CODES_OUT: return launch_tile<CODES_OUT>(p, config, stream);
    case ACT_CODES_OUT: return launch_tile<ACT_CODES_OUT>(p, config, stream);
    default: return launch_tile<ACT_FLOAT_OUT>(p, config, stream);
  }
}
}  // namespace vitq::sm90
