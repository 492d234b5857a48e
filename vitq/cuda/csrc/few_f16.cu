// vitq_weight_only and its instances for float16 inputs; the kernel is in few.cuh. And vitq_dequantize, for more rows.
#include "few.cuh"

namespace vitq {
namespace few {

int weight_only_f16(const Operands& o, const VitqWeightOnly& p, cudaStream_t stream) { return launch_weight_only<W8F16, W4F16>(o, p, stream); }

namespace {

int check(const VitqWeightOnly& p) {
  if (p.n < 1 || p.x_columns < 1 || p.x_columns > p.k || (p.weight_bits != 8 && p.weight_bits != 4)) return VITQ_BAD_ARGUMENT;
  if (p.k % (p.weight_bits == 4 ? 64 : 32) != 0 || p.group_columns < 32 || p.group_columns % 32 != 0) return VITQ_BAD_ARGUMENT;
  if (p.weight == nullptr || p.scale == nullptr || p.out == nullptr || !aligned16(p.weight) || !aligned16(p.scale)) return VITQ_BAD_ARGUMENT;
  if (uintptr_t(p.zero) % 4 != 0 || p.scale_stride % 4 != 0 || !aligned16(p.bias)) return VITQ_BAD_ARGUMENT;
  if (p.out_dtype < VITQ_F32 || p.out_dtype > VITQ_BF16) return VITQ_BAD_ARGUMENT;
  return p.k >= 1 << 25 || p.n > INT32_MAX - 256 ? VITQ_UNSUPPORTED : 0;
}

template <class T>
__device__ __forceinline__ T cast(float v) {
  if constexpr (std::is_same_v<T, float>) return v;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  else return __float2bfloat16_rn(v);
}

// Eight columns of a row, from the bytes of `codes`, or from their nibbles that start at bit `shift`. They share a group.
template <class T, bool WIDE>
__device__ __forceinline__ void write8(const VitqWeightOnly& p, uint2 codes, int shift, int column, int row, int physical, bool vectors) {
  if (column >= p.x_columns) return;
  const int64_t at = column / p.group_columns * p.scale_stride + (physical & ~31) + physical % 8 * 4 + physical % 32 / 8;
  const float scale = __ldg(p.scale + at), zero = p.zero == nullptr ? 0.0f : static_cast<float>(__ldg(p.zero + at));
  T* const to = static_cast<T*>(p.out) + row * p.out_stride + column;
  alignas(16) T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int byte = static_cast<int>((i < 4 ? codes.x : codes.y) >> (i % 4 * 8) >> (WIDE ? 0 : shift));
    const int code = WIDE ? static_cast<int8_t>(byte) : ((byte & 15) ^ 8) - 8;
    values[i] = cast<T>((static_cast<float>(code) - zero) * scale);
  }
  if (vectors && column + 8 <= p.x_columns) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < p.x_columns) to[i] = values[i];
  }
}

template <class T, bool WIDE>
__global__ void __launch_bounds__(THREADS) dequantize_kernel(const __grid_constant__ VitqWeightOnly p, const unsigned pieces, const bool vectors) {
  const unsigned row_pieces = p.k / (WIDE ? 8 : 16), i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= pieces) return;
  const int physical = static_cast<int>(i / row_pieces), piece = static_cast<int>(i - physical * row_pieces);
  const int row = (physical & ~31) + physical % 8 / 2 * 8 + physical % 32 / 8 * 2 + physical % 2;
  if (row >= p.n) return;
  const uint2 codes = __ldg(static_cast<const uint2*>(p.weight) + i);
  if constexpr (WIDE) {
    write8<T, true>(p, codes, 0, piece * 8, row, physical, vectors);
  } else {
    const uint2 in_order = make_uint2(__byte_perm(codes.x, 0, 0x3120), __byte_perm(codes.y, 0, 0x3120));
    const int column = piece / 4 * 64 + piece % 4 * 8;
    write8<T, false>(p, in_order, 0, column, row, physical, vectors);
    write8<T, false>(p, in_order, 4, column + 32, row, physical, vectors);
  }
}

template <class T>
int dequantize(const VitqWeightOnly& p, cudaStream_t stream) {
  const int64_t pieces = int64_t((p.n + 31) / 32 * 32) * (p.k / (p.weight_bits == 8 ? 8 : 16)), blocks = (pieces + THREADS - 1) / THREADS;
  if (pieces > UINT32_MAX - THREADS) return VITQ_UNSUPPORTED;
  const bool vectors = aligned16(p.out) && p.out_stride * sizeof(T) % 16 == 0;
  const auto kernel = p.weight_bits == 8 ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(p, static_cast<unsigned>(pieces), vectors);
  return cudaGetLastError();
}

}  // namespace
}  // namespace few
}  // namespace vitq

extern "C" int vitq_weight_only(const VitqWeightOnly* args, void* stream_) {
  using namespace vitq::few;
  if (args == nullptr) return VITQ_BAD_ARGUMENT;
  const VitqWeightOnly& p = *args;
  if (p.m <= 0) return p.m < 0 ? VITQ_BAD_ARGUMENT : 0;
  if (int error = check(p)) return error;
  if (p.x == nullptr || !vitq::aligned16(p.x) || p.ldx % 8 != 0 || (p.x_dtype != VITQ_F16 && p.x_dtype != VITQ_BF16)) return VITQ_BAD_ARGUMENT;
  if (p.m > VITQ_FEW_ROWS) return VITQ_UNSUPPORTED;
  Operands o = {};
  o.x = static_cast<const char*>(p.x), o.ldx = 2 * p.ldx, o.x_bytes = 2 * p.x_columns;
  o.weight = static_cast<const char*>(p.weight), o.row_bytes = p.k / 8 * p.weight_bits, o.rows = (p.n + 31) / 32 * 32;
  o.m = p.m, o.steps = (p.x_columns + 31) / 32;
  o.multiplier = reinterpret_cast<const char*>(p.scale), o.zero = reinterpret_cast<const char*>(p.zero);
  o.group_stride = p.scale_stride, o.group_steps = p.group_columns / 32, o.group_inverse = 1.0f / o.group_steps;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  return p.x_dtype == VITQ_F16 ? weight_only_f16(o, p, stream) : weight_only_bf16(o, p, stream);
}

extern "C" int vitq_dequantize(const VitqWeightOnly* args, void* stream_) {
  using namespace vitq::few;
  if (args == nullptr) return VITQ_BAD_ARGUMENT;
  const VitqWeightOnly& p = *args;
  if (int error = check(p)) return error;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  switch (p.out_dtype) {
    case VITQ_F16: return dequantize<__half>(p, stream);
    case VITQ_BF16: return dequantize<__nv_bfloat16>(p, stream);
    default: return dequantize<float>(p, stream);
  }
}
