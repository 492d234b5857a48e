// Several segments: two sets of accumulators, or float sums beside one, leave registers for 192 columns at most.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {
namespace {
template <int EPILOGUE, Segments SEGMENTS>
int launch_config(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 0: return launch<Config0, EPILOGUE, SEGMENTS>(p, stream);
    case 1: return launch<Config1, EPILOGUE, SEGMENTS>(p, stream);
    case 3: return launch<Config3, EPILOGUE, SEGMENTS>(p, stream);
    case 11: return launch<Config11, EPILOGUE, SEGMENTS>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}

}  // namespace

int launch_segments(const VitqLinear& p, int config, cudaStream_t stream) {
  const int epilogue = epilogue_of(p);
  if (p.segments == 2 && p.zero == nullptr && p.a_fp == nullptr && plain_epilogue(p)) {
    switch (epilogue) {
      case FLOAT_OUT: return launch_config<FLOAT_OUT, PAIR>(p, config, stream);
      case CODES_OUT: return launch_config<CODES_OUT, PAIR>(p, config, stream);
      default: return launch_config<ACT_CODES_OUT, PAIR>(p, config, stream);
    }
  }
  switch (epilogue) {
    case FLOAT_OUT: return launch_config<FLOAT_OUT, ANY>(p, config, stream);
    case CODES_OUT: return launch_config<CODES_OUT, ANY>(p, config, stream);
    case ACT_CODES_OUT: return launch_config<ACT_CODES_OUT, ANY>(p, config, stream);
    default: return launch_config<ACT_FLOAT_OUT, ANY>(p, config, stream);
  }
}
}  // namespace vitq::sm90
