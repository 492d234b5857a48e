// vitq_linear_few: integers; the kernel is in few.cuh.
#include <algorithm>

#include "few.cuh"

namespace vitq {
namespace few {
namespace {

template <int FORMAT, bool GROUPED>
int launch_linear(const Operands& o, const VitqLinear& p, cudaStream_t stream) {
  const bool vectors = vectors_fit(p.out, p.n) && vectors_fit(p.residual, p.n), fp = p.a_fp != nullptr;
  return with_traits<FORMAT, GROUPED>(o, [&](auto traits) {
    using T = decltype(traits);
    return launch<T>(linear_kernel<T>, p.config, fp, stream, o, p, vectors);
  });
}

}  // namespace
}  // namespace few
}  // namespace vitq

extern "C" int vitq_linear_few_configs(void) { return vitq::few::CONFIGS; }

extern "C" int vitq_linear_few(const VitqLinear* args, void* stream_) {
  using namespace vitq::few;
  if (args == nullptr) return VITQ_BAD_ARGUMENT;
  const VitqLinear& p = *args;
  if (p.m <= 0) return p.m < 0 ? VITQ_BAD_ARGUMENT : 0;  // first: without rows there may be no pointers either
  if (int error = vitq::check_linear(p)) return error;
  if (p.multiplier != nullptr && (p.group_columns < 32 || p.group_columns % 32 != 0)) return VITQ_BAD_ARGUMENT;
  if (p.m > VITQ_FEW_ROWS || p.segments > 1) return VITQ_UNSUPPORTED;
  if (p.multiplier != nullptr && (p.weight_bits != 4 || p.a_bits != 8)) return VITQ_UNSUPPORTED;
  Operands o = {};
  o.x = static_cast<const char*>(p.a), o.ldx = p.lda, o.x_bytes = (p.a_columns * p.a_bits + 7) / 8;
  o.weight = static_cast<const char*>(p.weight), o.row_bytes = p.k / 8 * p.weight_bits, o.rows = (p.n + 31) / 32 * 32;
  o.m = p.m, o.steps = (p.a_columns + 31) / 32;
  o.multiplier = reinterpret_cast<const char*>(p.multiplier), o.zero = reinterpret_cast<const char*>(p.group_zero);
  o.group_stride = o.rows, o.group_steps = std::max(p.group_columns / 32, 1), o.group_inverse = 1.0f / o.group_steps;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.multiplier != nullptr) return launch_linear<W4A8, true>(o, p, stream);
  if (p.a_bits == 4) return launch_linear<W4A4, false>(o, p, stream);
  return p.weight_bits == 4 ? launch_linear<W4A8, false>(o, p, stream) : launch_linear<W8A8, false>(o, p, stream);
}
