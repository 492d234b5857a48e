// Several segments, with fp16 columns or shifted rows or without. Two sets of accumulators leave registers for 192 columns; float sums beside one, and what
// they are made of, for 128: there a call that was to have 192 takes those.
#include <type_traits>

#include "gemm_sm90.cuh"

namespace vitq::sm90 {
namespace {
template <int EPILOGUE, Segments SEGMENTS>
int launch_config(const VitqLinear& p, int config, cudaStream_t stream) {
  switch (config) {
    case 0: return launch<std::conditional_t<SEGMENTS == PAIR, Config0, Config1>, EPILOGUE, SEGMENTS>(p, stream);
    case 1: return launch<Config1, EPILOGUE, SEGMENTS>(p, stream);
    case 3: return launch<Config3, EPILOGUE, SEGMENTS>(p, stream);
    case 9: return launch<std::conditional_t<SEGMENTS == PAIR, Config9, Config11>, EPILOGUE, SEGMENTS>(p, stream);
    case 11: return launch<Config11, EPILOGUE, SEGMENTS>(p, stream);
    default: return VITQ_UNSUPPORTED;
  }
}
}  // namespace

int launch_segments(const VitqLinear& p, int config, cudaStream_t stream) {
  const bool pair = p.segments == 2 && p.column_sums == nullptr && p.a_fp == nullptr && plain_epilogue(p);
  return with_epilogue(p, [&](auto epilogue) {
    constexpr int EPILOGUE = decltype(epilogue)::value;
    if constexpr (EPILOGUE != ACT_FLOAT_OUT) {  // which is never plain
      if (pair) return launch_config<EPILOGUE, PAIR>(p, config, stream);
    }
    return launch_config<EPILOGUE, ANY>(p, config, stream);
  });
}
}  // namespace vitq::sm90
