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
  return with_epilogue(p, [&](auto epilogue) { return launch_tile<decltype(epilogue)::value>(p, config, stream); });
}
}  // namespace vitq::sm90
