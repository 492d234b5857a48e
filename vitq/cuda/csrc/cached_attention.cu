// vitq_cached_attention: its arguments, and what puts the parts of the sequence together.
#include "cached_attention.cuh"

namespace vitq {
namespace cached {
namespace {

constexpr int MOST_SPLITS = 512;

// A block has one head of one new token, a thread one number.
__global__ void combine_kernel(const __grid_constant__ VitqCachedAttention a, int tiles) {
  __shared__ float tops[MOST_SPLITS], totals[MOST_SPLITS];
  start_dependents();
  const int group = a.query_heads / a.heads, h = blockIdx.x % a.query_heads, t = blockIdx.x / a.query_heads % a.tokens;
  const int batch = blockIdx.x / a.query_heads / a.tokens, row = h % group * a.tokens + t, pitch = a.dim + 2;
  const int64_t unit = (int64_t(batch) * a.heads + h / group) * tiles + row / QUERIES;
  const float* const from = a.workspace + (unit * a.splits * QUERIES + row % QUERIES) * pitch;
  const int step = QUERIES * pitch;
  wait_for_kernels_before();
  for (int s = threadIdx.x; s < a.splits; s += blockDim.x) tops[s] = from[s * step + a.dim], totals[s] = from[s * step + a.dim + 1];
  constexpr int EARLY = 20;  // numbers that are read at once with these
  float early[EARLY];
#pragma unroll
  for (int s = 0; s < EARLY; ++s) early[s] = from[min(s, a.splits - 1) * step + threadIdx.x];
  __syncthreads();
  float top = -INFINITY, total = 0.0f, y = 0.0f;
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, tops[s]);
  const auto add = [&](int s, float number) {
    if (tops[s] == -INFINITY) return;  // nothing was written
    const float factor = power_of_two(tops[s] - top);
    total = fmaf(factor, totals[s], total), y = fmaf(factor, number, y);
  };
#pragma unroll
  for (int s = 0; s < EARLY; ++s)
    if (s < a.splits) add(s, early[s]);
#pragma unroll 8
  for (int s = EARLY; s < a.splits; ++s) add(s, from[s * step + threadIdx.x]);
  store_float(a.out, batch * a.out_strides[0] + t * a.out_strides[1] + h * a.out_strides[2] + threadIdx.x, total > 0.0f ? y / total : 0.0f, a.dtype);
}

int check_rows(VitqCacheRows& r, int dim) {
  if (r.rows == nullptr || !(r.bits == 16 || (r.bits >= 2 && r.bits <= 8))) return VITQ_BAD_ARGUMENT;
  bool words = uintptr_t(r.rows) % 4 == 0;
  r.aligned = aligned16(r.rows) && r.strides[0] % 16 == 0 && r.strides[1] % 16 == 0 && (r.bits != 16 || r.strides[2] % 16 == 0);
  for (int64_t stride : r.strides) words = words && stride % 4 == 0;
  return words && dim % 16 == 0 ? 0 : VITQ_BAD_ARGUMENT;
}

}  // namespace
}  // namespace cached
}  // namespace vitq

extern "C" int vitq_cached_attention(const VitqCachedAttention* args, void* stream) {
  using namespace vitq;
  VitqCachedAttention a = *args;
  if (a.batch < 1 || a.heads < 1 || a.tokens < 1 || a.room < 1 || a.splits < 1 || a.query_heads < 1 || a.query_heads % a.heads) return VITQ_BAD_ARGUMENT;
  if (!a.q || !a.out || !a.state || (a.splits > 1 && !a.workspace) || (a.dtype != VITQ_F16 && a.dtype != VITQ_BF16)) return VITQ_BAD_ARGUMENT;
  if (int error = cached::check_rows(a.keys, a.dim)) return error;
  if (int error = cached::check_rows(a.values, a.dim)) return error;
  if (a.room % cached::TOKENS != 0 || a.splits > cached::MOST_SPLITS) return VITQ_UNSUPPORTED;
  const auto s = static_cast<cudaStream_t>(stream);
  const int error = a.dim == 64 ? attend_64(a, s) : a.dim == 80 ? attend_80(a, s) : a.dim == 96 ? attend_96(a, s)
                    : a.dim == 128 ? attend_128(a, s) : VITQ_UNSUPPORTED;
  if (error || a.splits == 1) return error;
  const int tiles = (a.query_heads / a.heads * a.tokens + cached::QUERIES - 1) / cached::QUERIES;
  return launch_early(cached::combine_kernel, unsigned(a.batch * a.tokens * a.query_heads), a.dim, 0, s, a, tiles);
}
