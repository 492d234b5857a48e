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
  return with_epilogue(p, [&](auto epilogue) { return launch_tile<decltype(epilogue)::value>(p, config, stream); });
}
}  // namespace vitq::sm90
