// Attention with whole rows of logits in registers: few keys. A warp keeps 16 rows.
// Groups of warps (one warp where there are at most 64 queries and keys, else the block) stay on the machine and walk
// through (image, window, head); the next one's codes are on their way while this one is computed.
#pragma once

#include "attention_logits.cuh"

namespace vitq {
namespace {

// A head's bias in the order of the fragments: bias[tile][block][lane] of (row g: 2 keys; row g + 8: 2 keys).
template <int NB>
__device__ __forceinline__ void keep_bias(const Launch& p, int head, float4* kept, int tiles) {
#pragma unroll 4
  for (int i = threadIdx.x; i < tiles * NB * 32; i += blockDim.x) {
    const int lane = i & 31, block = (i >> 5) % NB, tile = (i >> 5) / NB;
    const int key = 8 * block + 2 * (lane & 3);
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * tile + (lane >> 2) + 8 * (e >> 1), column = key + (e & 1);
      value[e] = column < p.a.keys ? 0.0f : -INFINITY;
      if (p.a.bias && row < p.a.queries && column < p.a.keys) {
        value[e] = __ldg(p.a.bias + head * p.a.bias_head + row * p.a.bias_row + column) * LOG2E;
      }
    }
    kept[i] = make_float4(value[0], value[1], value[2], value[3]);
  }
}

template <int NB>
__device__ __forceinline__ void add_kept(float c, uint32_t (&s)[NB][4], const float4* kept, bool single) {
#pragma unroll
  for (int j = 0; j < NB; ++j) {
    const float4 b = kept[j * 32];
    s[j][0] = __float_as_uint(__fmaf_rn(__uint_as_float(s[j][0]) - MAGIC, c, b.x));
    if (!single || j < NB - 1) s[j][1] = __float_as_uint(__fmaf_rn(__uint_as_float(s[j][1]) - MAGIC, c, b.y));
    s[j][2] = __float_as_uint(__fmaf_rn(__uint_as_float(s[j][2]) - MAGIC, c, b.z));
    if (!single || j < NB - 1) s[j][3] = __float_as_uint(__fmaf_rn(__uint_as_float(s[j][3]) - MAGIC, c, b.w));
  }
}

// above, left: bit 2j + i says on which side of the seams this lane's key i of block j lies.
template <int NB>
__device__ __forceinline__ void add_shift_mask(const Launch& p, const Place& at, uint32_t (&s)[NB][4], int row, uint32_t above,
                                               uint32_t left, const int* geometry) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = side(p, geometry, min(row + 8 * half, p.a.queries - 1));
    uint32_t apart = 0;
    if (at.bottom) apart |= own & 1 ? ~above : above;
    if (at.right) apart |= own & 2 ? ~left : left;
#pragma unroll
    for (int j = 0; j < NB; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t& x = s[j][2 * half + i];
        if (apart >> (2 * j + i) & 1) x = __float_as_uint(__uint_as_float(x) + APART * LOG2E);
      }
    }
  }
}

// Threads and blocks an SM of each kernel: the registers that whole rows of logits leave.
template <int NB>
struct Shape {
  static constexpr bool WARP = NB <= 8;
  static constexpr bool SINGLE = NB == 7;  // 7x7 windows have 49 keys
  static constexpr int WARPS = WARP ? 8 : NB <= 18 ? 5 : NB <= 26 ? 8 : 6;
  static constexpr int BLOCKS = NB > 8 && NB <= 18 ? 3 : 2;
  static constexpr int TILES = WARP ? 4 : NB <= 26 ? 2 * WARPS : 3 * WARPS;  // most tiles of 16 queries a group takes
  static constexpr int FEWER = NB <= 8 ? 0 : NB <= 18 ? 0 : NB <= 26 ? 18 : 26;  // blocks of the next smaller kernel
  static constexpr int KEYS = (NB + 3) / 4 * 32;  // rows of k and v in shared memory
};

template <int NB, int KS, Extra EXTRA>
__device__ __forceinline__ void attend(const Launch& p, Place at, int item, uint32_t q, uint32_t k, uint32_t v, int row,
                                       int left, const float4* kept, uint32_t above, uint32_t sides, const int* geometry,
                                       int lane) {
  using S = Shape<NB>;
  uint32_t s[NB][4];
  {
    uint32_t fragments[KS][4];
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) ldmatrix(fragments[ks], q + row_offset<KS>(lane, ks));
    if (p.q_zeros) {
      multiply_keys<NB, KS, true>(s, fragments, k, head_of(p, at.head).q_zero, p.start, lane);
    } else {
      multiply_keys<NB, KS, false>(s, fragments, k, 0, p.start, lane);
    }
  }
  if (EXTRA == PLAIN) {
#pragma unroll
    for (int j = Shape<NB>::FEWER; j < NB; ++j) {
      if (8 * j + 8 > p.a.keys) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * j + 2 * (lane & 3) + (e & 1) >= p.a.keys) s[j][e] = 0xFF800000u;  // -inf
        }
      }
    }
  } else if (EXTRA == ADDED) {
    add_extra<NB>(p, at, s, row + (lane >> 2), 0, geometry, lane);
  } else {
    add_kept<NB>(head_of(p, at.head).c, s, kept, S::SINGLE);
    if (at.bottom || at.right) add_shift_mask<NB>(p, at, s, row + (lane >> 2), above, sides, geometry);
  }

  uint32_t packed[(NB + 1) / 2][2];
  float weight[2] = {0.0f, 0.0f};  // top · sum of the exponentials
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half == 1 && left <= 8) {
#pragma unroll
      for (int i = 0; i < (NB + 1) / 2; ++i) packed[i][1] = 0;
      break;
    }
    const float maximum =
        quad_maximum(EXTRA == PLAIN ? maximum_of_integers<NB>(s, half) : maximum_of_logits<NB, S::SINGLE>(s, half));
    const Softmax f = EXTRA == PLAIN ? softmax_of_integers(maximum, head_of(p, at.head).c, p.top)
                                     : softmax_of_logits(maximum, EXTRA == KEPT ? 1.0f : LOG2E, p.top);
    weight[half] = quad_sum(encode<NB, S::SINGLE>(packed, s, half, f, EXTRA == KEPT)) * f.top;
  }

  uint32_t o[KS][2][2][4];
#pragma unroll
  for (int i = 0; i < KS * 16; ++i) o[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = MAGIC_BITS;
  multiply_values<NB, KS>(o, packed, v, lane);
  uint32_t sums[4] = {0, 0, 0, 0};
  if (p.v_zeros) add_codes<NB>(sums, packed);

  if (EXTRA == PLAIN && !Shape<NB>::WARP) {
    // Found again, so that it holds no registers beside the logits; the compiler must not see that it is known.
    asm volatile("" : "+r"(item));
    at = place_of(p, item);
  }
  float share[2];
  to_floats<KS>(p, head_of(p, at.head), o, sums, weight, share, 8 * NB * 255 * 128 < 1 << 22);
  store_tile<KS>(p, at, o, share, row, left, q, geometry, lane);
}

template <int NB, int KS, Extra EXTRA>
__global__ __launch_bounds__(32 * Shape<NB>::WARPS, Shape<NB>::BLOCKS) void attention_kernel(const __grid_constant__ Launch p) {
  using S = Shape<NB>;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int thread = S::WARP ? lane : threadIdx.x, threads = S::WARP ? 32 : blockDim.x;
  constexpr int PITCH = 32 * KS;
  const uint32_t kept_bytes = EXTRA == KEPT ? p.part_rows / 16 * NB * 512 : 0;
  const int* geometry = reinterpret_cast<const int*>(shared);
  const float4* kept = reinterpret_cast<const float4*>(shared + p.geometry_bytes) + lane;
  const uint32_t base =
      static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + p.geometry_bytes + kept_bytes +
      (S::WARP ? warp * p.stages * p.stage_bytes : 0);

  // A warp's block stays with one head, whose bias it keeps.
  const int fixed_head = blockIdx.x % p.a.heads;
  int item = S::WARP ? blockIdx.x / p.a.heads * warps + warp : blockIdx.x;
  const int item_step = S::WARP ? gridDim.x / p.a.heads * warps : gridDim.x;

  auto find = [&](int i) {
    return S::WARP ? place_of(p, i, fixed_head, 0) : place_of(p, i);
  };
  auto load = [&](int i, uint32_t to) {
    const Place at = find(i);
    const uint32_t k = to + p.query_bytes, v = k + S::KEYS * PITCH;
    if (S::WARP && p.a.window_h) {
      load_window<KS>(p, at, to, k, v, thread, geometry);
    } else {
      load_rows<KS>(p, at, 0, to, at.first_row, min(p.part_rows, p.a.queries - at.first_row), thread, geometry);
      load_rows<KS>(p, at, 1, k, 0, p.a.keys, thread, geometry);
      load_rows<KS>(p, at, 2, v, 0, p.a.keys, thread, geometry);
    }
  };
  auto sync = [&] {
    if (S::WARP) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  if (p.a.dim != PITCH) {
    for (int i = 0; i < p.stages; ++i) clear_columns<KS>(p, base + i * p.stage_bytes + p.query_bytes, S::KEYS, thread, threads);
  }
  if (p.a.window_h) {
    fill_geometry(p, reinterpret_cast<int*>(shared));
    __syncthreads();
  }
  if (item < p.items) load(item, base);
  commit();

  uint32_t above = 0, sides = 0;
  if (EXTRA == KEPT) {
    keep_bias<NB>(p, fixed_head, reinterpret_cast<float4*>(shared + p.geometry_bytes), p.part_rows / 16);
    if (p.a.window_h) {
#pragma unroll
      for (int i = 0; i < 2 * NB; ++i) {
        const int own = side(p, geometry, min(8 * (i / 2) + 2 * (lane & 3) + i % 2, p.a.keys - 1));
        above |= (own & 1) << i;
        sides |= (own >> 1) << i;
      }
    }
    __syncthreads();
  }

  int stage = 0, turn = S::WARP ? 0 : (warp + blockIdx.x) % warps;
  for (; item < p.items; item += item_step) {
    const uint32_t here = base + stage * p.stage_bytes;
    const int next = item + item_step;
    if (p.stages == 2) {
      stage ^= 1;
      if (next < p.items) load(next, base + stage * p.stage_bytes);
      commit();
      wait<1>();
    } else {
      wait<0>();
    }
    sync();
    const Place at = find(item);
    const int rows = min(p.part_rows, p.a.queries - at.first_row);
    const uint32_t k = here + p.query_bytes, v = k + S::KEYS * PITCH;
    for (int i = S::WARP ? 0 : warp; i < S::KEYS / 32 * KS; i += S::WARP ? 1 : warps) {
      arrange_values<KS>(v + i / KS * (32 * PITCH), i % KS, lane);
    }
    sync();
    // Tiles rarely divide evenly among the warps, hence among the SM's four schedulers: take turns at being short of one.
    if (!S::WARP && ++turn >= warps) turn = 0;
    for (int tile = turn; 16 * tile < rows; tile += S::WARP ? 1 : warps) {
      attend<NB, KS, EXTRA>(p, at, item, here + 16 * tile * PITCH, k, v, at.first_row + 16 * tile, rows - 16 * tile,
                            kept + tile * NB * 32, above, sides, geometry, lane);
    }
    sync();
    if (p.stages == 1) {
      if (next < p.items) load(next, base);
      commit();
    }
  }
}

}  // namespace
}  // namespace vitq
