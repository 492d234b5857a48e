// Rows multiplied with a Kronecker product on Hopper: as kronecker.cu does it, with the MMAs of warpgroups, which read X and the matrices from
// shared memory themselves. Accumulators are half of what they are there, so that twice as many warps share a multiprocessor and one token's gates and codes
// fill the time of another's products.
//
// A team of one to four warpgroups has a token, a warpgroup 64 columns of the result, all rows of them: Yᵀ = (rightᵀ·Xᵀ)·left. A warp has a strip of 16 of
// them, a thread two neighbours. Operands lie in shared memory as pieces of eight rows x 16 bytes, without a swizzle: X by pieces of eight columns.
#include <cuda_runtime.h>

#include "kronecker.cuh"
#include "sm90.cuh"

#include "cute/arch/mma_sm90_gmma_ext.hpp"

namespace vitq {
namespace {

using namespace sm90;

constexpr int most_warps(int tiles) { return tiles <= 4 ? 24 : 16; }

// The atoms by rows of X: first operand from shared memory, or from registers.
template <int N>
struct Products;
#define VITQ_PRODUCTS(N)                                                   \
  template <>                                                              \
  struct Products<N> {                                                     \
    using First = gmma::MMA_64x##N##x16_F32F16F16_SS<K_MAJOR, K_MAJOR>;    \
    using Second = gmma::MMA_64x##N##x16_F32F16F16_RS<K_MAJOR, K_MAJOR>;   \
  };
VITQ_PRODUCTS(16)
VITQ_PRODUCTS(32)
VITQ_PRODUCTS(48)
VITQ_PRODUCTS(64)
VITQ_PRODUCTS(80)
VITQ_PRODUCTS(96)
VITQ_PRODUCTS(112)
VITQ_PRODUCTS(128)
#undef VITQ_PRODUCTS

template <class Op, int COUNT, size_t... I>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint64_t b, float (&d)[COUNT], bool accumulate, std::index_sequence<I...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, d[I]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}

// A matrix in fragments (`pack_transform`) to pieces, `stride` bytes from eight inputs to the next. row: of output 16 n + 8 h + g.
template <class F>
__device__ __forceinline__ void spread(const void* from, int outputs, int inputs, uint8_t* to, int stride, F row) {
  constexpr int BATCH = 8;  // loads under way
  const int all = 32 * outputs * inputs, g = threadIdx.x % 32 / 4;
  for (int first = threadIdx.x; first < all; first += BATCH * blockDim.x) {
    uint4 q[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      if (const int i = first + j * blockDim.x; i < all) q[j] = __ldg(static_cast<const uint4*>(from) + i);
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      if (const int i = first + j * blockDim.x; i < all) {
        const int tile = i / 32, n = tile / inputs, k = tile - n * inputs;
        uint8_t* const at = to + 2 * k * stride + 4 * (i % 4);
        *reinterpret_cast<uint32_t*>(at + 16 * row(n, g, 0)) = q[j].x;
        *reinterpret_cast<uint32_t*>(at + 16 * row(n, g, 1)) = q[j].y;
        *reinterpret_cast<uint32_t*>(at + 16 * row(n, g, 0) + stride) = q[j].z;
        *reinterpret_cast<uint32_t*>(at + 16 * row(n, g, 1) + stride) = q[j].w;
      }
  }
}

enum Made { AS_IT_IS, GATED, NORMED };

// A row of x as it lies in shared memory -> X, as float16.
template <class T, Made MADE>
__device__ __forceinline__ void prepare(const TransformedLaunch& p, const uint4* from, uint8_t* to, Team& team) {
  const VitqTransformedRows& a = p.a;
  const int vectors = a.columns / 8, in_row = p.columns / (p.fours ? 4 : 8);
  const auto put = [&](int v, uint4 x) {
    if (p.fours) {  // eight numbers may belong to two rows
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = p.by_row.divide(2 * v + half), at = 2 * v + half - row * in_row;
        *reinterpret_cast<uint2*>(to + at / 2 * 2 * p.pitch + 16 * row + 8 * (at % 2)) = half ? make_uint2(x.z, x.w) : make_uint2(x.x, x.y);
      }
    } else {
      const int row = p.by_row.divide(v);
      *reinterpret_cast<uint4*>(to + (v - row * in_row) * 2 * p.pitch + 16 * row) = x;
    }
  };
  const auto values = [&](int v, float (&x)[8]) {
    Eight<T> raw;
    raw.q[0] = from[v];
    to_floats(raw, x);
  };
  const auto rounded = [](const float (&x)[8]) { return make_uint4(halves(x[0], x[1]), halves(x[2], x[3]), halves(x[4], x[5]), halves(x[6], x[7])); };
  const auto kept = [&](const Eight<T>& raw) {
    if constexpr (std::is_same_v<T, __half>) {
      return make_uint4(saturated(raw.q[0].x), saturated(raw.q[0].y), saturated(raw.q[0].z), saturated(raw.q[0].w));
    } else {
      float x[8];
      to_floats(raw, x);
      return rounded(x);
    }
  };
  if constexpr (MADE == NORMED) {
    const auto total = [&](auto of) {
      float sum = 0.0f;
      for (int v = team.thread; v < vectors; v += team.threads) {
        float x[8];
        values(v, x);
#pragma unroll
        for (int w = 0; w < 8; ++w) sum = of(sum, x[w]);
      }
      return team.sum(sum) * p.inverse_columns;
    };
    float mean = 0.0f;
    if (a.norm == VITQ_LAYER_NORM) mean = total([](float sum, float x) { return sum + x; });
    const float squares = total([&](float sum, float x) { return fmaf(x - mean, x - mean, sum); });
    const float rstd = rsqrtf(squares + a.eps);
    for (int v = team.thread; v < vectors; v += team.threads) {
      float x[8];
      values(v, x);
      normalise<true>(a, x, 8 * v, mean, rstd);
      put(v, rounded(x));
    }
  } else {
#pragma unroll 2
    for (int v = team.thread; v < vectors; v += team.threads) {
      Eight<T> raw, up;
      raw.q[0] = from[v];
      if constexpr (MADE == GATED) up.q[0] = from[vectors + v], apply_gate<T>(raw, up, a.gate);
      put(v, kept(raw));
    }
  }
}

template <int TILES, class T, Made MADE>
__global__ void __launch_bounds__(32 * most_warps(TILES), 1) kronecker_sm90_kernel(const __grid_constant__ TransformedLaunch p) {
  constexpr int N = 16 * TILES;  // rows of X, with what pads them
  extern __shared__ __align__(16) uint8_t shared[];
  const VitqTransformedRows& a = p.a;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0), group = warp / p.warps, strip = warp - group * p.warps;
  uint8_t* const scratch = shared + p.scratch + TEAM_BYTES * group;
  auto* const arrived = reinterpret_cast<uint64_t*>(scratch + 256);
  Team team{32 * strip + lane, 32 * p.warps, 1 + group, reinterpret_cast<uint32_t*>(scratch), 0};
  uint8_t* const place = shared + p.tokens + group * p.token_bytes;

  start_dependents();
  // Before the wait: what no kernel writes. What pads X and the matrix stays 0.
  for (int i = 16 * team.thread; i < p.staged; i += 16 * team.threads) *reinterpret_cast<uint4*>(place + i) = make_uint4(0, 0, 0, 0);
  const int right_stride = 256 * p.warps, strips = (p.columns + 31) / 32 * 2;
  spread(a.right, strips, p.right_tiles, shared, right_stride, [](int n, int g, int h) {  // output 32 n + 16 s + 8 h + g is column 32 n + 4 g + 2 s + h
    const int half = 2 * g + n % 2;
    return 16 * (n / 2 * 2 + half / 8) + 8 * h + half % 8;
  });
  spread(a.left, TILES, TILES, shared + p.left, 16 * N, [](int n, int g, int h) { return 16 * n + 8 * h + g; });
  for (int i = threadIdx.x, pad = 16 * (p.warps - strips); i < 2 * p.right_tiles * pad; i += blockDim.x)
    *reinterpret_cast<uint4*>(shared + i / pad * right_stride + 16 * (16 * strips + i % pad)) = make_uint4(0, 0, 0, 0);
  if (team.thread < p.stages) barrier_init(arrived + team.thread, 1);
  barrier_init_done();
  if constexpr (MADE == NORMED) prefetch(a.weight, 4 * a.columns), prefetch(a.bias, 4 * a.columns);
  const float2 clip = clip_of(a);
  written_for_mma();
  __syncthreads();

  unsigned token = blockIdx.x + gridDim.x * group;
  const unsigned stride = gridDim.x * p.groups;
  const auto fetch = [&](unsigned token, int stage) {
    if (team.thread != 0 || token >= unsigned(a.m)) return;
    barrier_expect(arrived + stage, p.stage_bytes);
    load_bytes(arrived + stage, place + p.staged + stage * p.stage_bytes, static_cast<const T*>(a.x) + int64_t(token) * a.x_stride, p.stage_bytes);
  };
  const auto begin = [&] {
    wait_for_kernels_before();
    for (int stage = 0; stage < p.stages; ++stage) fetch(token + stage * stride, stage);
  };
  const uint64_t right = pieces(shared + 1024 * (strip / 4), right_stride), left = pieces(shared + p.left, 16 * N), x_at = pieces(place, 2 * p.pitch);
  const int x_step = p.pitch / 4, right_step = right_stride / 8;
  constexpr int LEFT_STEP = 2 * N;
  constexpr auto all = std::make_index_sequence<N / 2>();
  using First = typename Products<N>::First;
  using Second = typename Products<N>::Second;

  uint32_t parity = 0;
  bool real = !p.rehearses;
  if (real) begin();
  for (int stage = 0; token < unsigned(a.m);) {
    if (real) barrier_wait(arrived + stage, parity);
    prepare<T, MADE>(p, reinterpret_cast<const uint4*>(place + p.staged + stage * p.stage_bytes), place, team);
    written_for_mma();
    team.meet();
    if (real) {
      fetch(token + p.stages * stride, stage);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }

    float y[N / 2];
    pin(y);
#pragma unroll 2
    for (int k = 0; k < p.right_tiles; ++k) {
      cute::warpgroup_arrive();
      sm90::mma<First>(right + k * right_step, x_at + k * x_step, y, k > 0, all);
      cute::warpgroup_commit_batch();
    }
    cute::warpgroup_wait<0>();
    pin(y);
    uint32_t z[TILES][4];
#pragma unroll
    for (int k = 0; k < TILES; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) z[k][i] = halves(y[8 * k + 2 * i], y[8 * k + 2 * i + 1]);
    pin(y);
#pragma unroll
    for (int k = 0; k < TILES; ++k) pin(z[k]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < TILES; ++k) multiply<Second>(z[k], left + k * LEFT_STEP, y, k > 0, all);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    pin(y);

    // Of tile j a thread has columns 16 strip + 2 g and the next, of rows 8 j + 2 t and the next.
    const int t = lane % 4, g = lane / 4;
    float lo = INFINITY, hi = -INFINITY;
    const auto add = [&](auto valid) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const bool there = valid(8 * (i / 4) + 2 * t + i % 2);
        lo = fminf(lo, there ? y[i] : INFINITY), hi = fmaxf(hi, there ? y[i] : -INFINITY);
      }
    };
    // What pads a result is 0, which changes no range but one that need not hold it.
    if (!a.row_shift || a.clip) add([](int) { return true; });
    else if (16 * strip + 2 * g < p.columns) add([&](int row) { return row < p.rows; });
    team.extremes(lo, hi);
    const ClippedRange range = clipped_range(p, clip, lo, hi);
    if (real && team.thread == 0) store_range(p, token, range);

    // Neighbours exchange rows, so that each writes four codes of one.
    const int odd = g % 2, column = 16 * strip + 4 * (g / 2), first = 2 * t + odd;
    const int end = real && column < p.columns ? p.rows - first : 0;  // of this thread's rows, from its first on
    uint8_t* const out = reinterpret_cast<uint8_t*>(a.out) + int64_t(token) * a.out_stride + (first * p.columns + column);
    with_rounded_codes(p, range, [&](auto code) {
#pragma unroll
      for (int j = 0; j < 2 * TILES; ++j) {
        const uint32_t own = pack_codes(code(y[4 * j]), code(y[4 * j + 2]), code(y[4 * j + 1]), code(y[4 * j + 3]));
        const uint32_t word = __byte_perm(own, __shfl_xor_sync(0xFFFFFFFFu, own, 4), odd ? 0x3276 : 0x5410);
        if (8 * j < end) *reinterpret_cast<uint32_t*>(out + 8 * j * p.columns) = word;
      }
    });
    if (real) token += stride;
    else real = true, begin();
  }
}

template <int TILES, class T>
int launch_type(const TransformedLaunch& p, const Gpu& gpu, cudaStream_t stream) {
  return start_teams(p.a.gate   ? kronecker_sm90_kernel<TILES, T, GATED>
                     : p.a.norm ? kronecker_sm90_kernel<TILES, T, NORMED>
                                : kronecker_sm90_kernel<TILES, T, AS_IT_IS>,
                     p, gpu, stream);
}

}  // namespace

int launch_kronecker_sm90(TransformedLaunch p, const Gpu& gpu, cudaStream_t stream) {
  if (gpu.major != 9 || p.a.x_dtype == VITQ_F32 || !p.a.left || !p.a.right || p.left_tiles > 8 || !p.words) return VITQ_UNSUPPORTED;
  p.eights = true;
  p.fours = p.columns % 8 != 0;
  p.by_row = divisor(p.columns / (p.fours ? 4 : 8));
  p.warps = 4 * ((p.columns + 63) / 64);
  p.left = 512 * p.warps * p.right_tiles;
  p.tokens = p.left + 512 * p.left_tiles * p.left_tiles;
  p.pitch = 8 * (16 * p.left_tiles + 1);  // an odd number of 16 bytes: neighbouring columns lie in other banks
  const int64_t own = int64_t(2) * p.right_tiles * 2 * p.pitch;
  return with_tiles(p.left_tiles, [&](auto count) -> int {
    constexpr int TILES = decltype(count)::value;
    if (!place_tokens(p, own, most_warps(TILES), gpu.processors, gpu.shared, true)) return VITQ_UNSUPPORTED;
    return p.a.x_dtype == VITQ_F16 ? launch_type<TILES, __half>(p, gpu, stream) : launch_type<TILES, __nv_bfloat16>(p, gpu, stream);
  });
}

}  // namespace vitq
