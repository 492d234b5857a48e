// Rows multiplied with a Kronecker product, leftᵀ·X·right, and quantized with the range that they then have: both products on tensor cores, nothing
// but x read and codes written.
//
// Blocks stay for many tokens, the matrices in shared memory in the order of the MMA's fragments (layout.py's pack_transform), a few warps to a token. A
// warp makes 32 columns of the result, all rows of them, and needs nothing of others: Yᵀ = (rightᵀ·Xᵀ)·left of its 32 rows, where the accumulators
// of the first product have the layout that the second reads its operand in. So results stay in registers until the warps of a token have
// agreed on its range. Which columns a warp's fragments hold is chosen so that a thread has four neighbours, whose codes are one word.
// While the products run, the token to come is copied to shared memory as it is; gates and norms are applied on its way to float16.
#include <cuda_runtime.h>

#include "kronecker.cuh"

namespace vitq {
namespace {

// Warps of a block: fewer than registers would allow. 2048 x 4096 with 64 x 64 took 18.5 us with 12 of 4 tiles and 22.5 with 16 on an H100.
constexpr int most_warps(int tiles) { return tiles <= 2 || tiles == 8 ? 16 : tiles <= 5 ? 12 : 8; }
// Strips of 16 columns that a warp works on at once, so that each fragment of X and of the left matrix is read for two.
constexpr int strips_of(int tiles) { return tiles < 8 ? 2 : 1; }

// What `prepare` needs of the arguments, in registers.
struct Before {
  int columns, gate, norm;
  const float *weight, *bias;
  float eps, inverse_columns;
  int row_columns, pitch;  // numbers of a row of X, and halves in shared memory
  bool right, staged;      // staged: the row is in shared memory already
  Divisor by_row;
};

// A row of x, gated or normalised, as float16 [rows, pitch] in shared memory. With a left matrix alone, whose fragments are read from it, the columns of
// each 32 are in the order of `pack_transform`: 8 q + g holds column 4 g + q.
// Returns the team's turn. A function of its own, not inlined, so that the many ways through it take no registers of the products.
template <class T, bool EIGHTS>
__device__ __noinline__ int prepare(Before a, const T* from, __half* to, Team team) {
  const int vectors = (a.columns + 7) / 8, columns = a.row_columns;
  float mean = 0.0f, rstd = 1.0f;
  if (a.norm) {
    const auto total = [&](auto of) {
      float sum = 0.0f;
#pragma unroll 1
      for (int v = team.thread; v < vectors; v += team.threads) {
        float x[8];
        to_floats(read_eight<T, EIGHTS>(from, 8 * v, a.columns), x);
#pragma unroll
        for (int w = 0; w < 8; ++w)
          if (EIGHTS || 8 * v + w < a.columns) sum = of(sum, x[w]);
      }
      return team.sum(sum) * a.inverse_columns;
    };
    if (a.norm == VITQ_LAYER_NORM) mean = total([](float sum, float x) { return sum + x; });
    rstd = rsqrtf(total([&](float sum, float x) { return fmaf(x - mean, x - mean, sum); }) + a.eps);
  }
  const auto place = [&](int row, int column) { return row * a.pitch + (a.right ? column : (column & ~31) + 8 * (column & 3) + (column & 31) / 4); };
  const auto put = [&](int v, uint32_t (&word)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = saturated(word[i]);
    if constexpr (EIGHTS) {
      const int row = a.by_row.divide(v), column = 8 * v - row * columns;
      if (a.right) {
        *reinterpret_cast<uint4*>(to + row * a.pitch + column) = make_uint4(word[0], word[1], word[2], word[3]);
      } else {  // columns q and q + 4, which are neighbours
        auto* const at = reinterpret_cast<uint32_t*>(to + place(row, column));
        at[0] = __byte_perm(word[0], word[2], 0x5410), at[4] = __byte_perm(word[0], word[2], 0x7632);
        at[8] = __byte_perm(word[1], word[3], 0x5410), at[12] = __byte_perm(word[1], word[3], 0x7632);
      }
    } else {
#pragma unroll
      for (int w = 0; w < 8; ++w) {
        const int i = 8 * v + w, row = a.by_row.divide(i);
        if (i < a.columns) reinterpret_cast<uint16_t*>(to)[place(row, i - row * columns)] = uint16_t(word[w / 2] >> 16 * (w & 1));
      }
    }
  };
  const auto words_of = [&](const Eight<T>& raw, auto change, uint32_t (&word)[4]) {
    float x[8];
    to_floats(raw, x);
    change(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 both = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      word[i] = *reinterpret_cast<const uint32_t*>(&both);
    }
  };
  const auto convert = [&](int v, const Eight<T>& raw) {
    uint32_t word[4];
    if constexpr (std::is_same_v<T, __half>) word[0] = raw.q[0].x, word[1] = raw.q[0].y, word[2] = raw.q[0].z, word[3] = raw.q[0].w;
    else words_of(raw, [](float (&)[8]) {}, word);
    put(v, word);
  };
  if (a.norm) {
#pragma unroll 1
    for (int v = team.thread; v < vectors; v += team.threads) {
      uint32_t word[4];
      words_of(read_eight<T, EIGHTS>(from, 8 * v, a.columns), [&](float (&x)[8]) { normalise<EIGHTS>(a, x, 8 * v, mean, rstd); }, word);
      put(v, word);
    }
  } else if (a.gate && a.staged) {
#pragma unroll 1
    for (int v = team.thread; v < vectors; v += team.threads) convert(v, read_gated<T, EIGHTS>(a, from, 8 * v));
  } else if (a.gate) {
    constexpr int BATCH = EIGHTS ? 8 / int(sizeof(T)) : 1;
#pragma unroll 1
    for (int v = team.thread; v < vectors; v += BATCH * team.threads) {
      Eight<T> gate[BATCH], up[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int at = 8 * min(v + i * team.threads, vectors - 1);
        gate[i] = read_eight<T, EIGHTS>(from, at, a.columns), up[i] = read_eight<T, EIGHTS>(from + a.columns, at, a.columns);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (v + i * team.threads < vectors) apply_gate<T>(gate[i], up[i], a.gate), convert(v + i * team.threads, gate[i]);
    }
  } else {
    // Loads of several before what is stored of the first, which the compiler would not move past it.
    constexpr int BATCH = EIGHTS ? 16 / int(sizeof(T)) / 2 : 1;
#pragma unroll 1
    for (int v = team.thread; v < vectors; v += BATCH * team.threads) {
      Eight<T> raw[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) raw[i] = read_eight<T, EIGHTS>(from, 8 * min(v + i * team.threads, vectors - 1), a.columns);
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (v + i * team.threads < vectors) convert(v + i * team.threads, raw[i]);
    }
  }
  return team.turn;
}

// TILES: of 16 rows of the result, the most that a warp has. Strips of 16 columns lie in pairs, whose 32 columns are 4 g + 2 s + h: of strip s, row
// g + 8 h of the fragment.
template <int TILES>
__global__ void __launch_bounds__(32 * most_warps(TILES), 1) kronecker_kernel(const __grid_constant__ TransformedLaunch p) {
  constexpr int STRIPS = strips_of(TILES);
  constexpr bool PART = TILES > 8;  // the left matrix has less than TILES
  const int tiles = PART ? p.left_tiles : TILES;
  extern __shared__ __align__(16) uint8_t shared[];
  const VitqTransformedRows& a = p.a;
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 / p.warps, warp = threadIdx.x / 32 - group * p.warps;
  Team team{int(threadIdx.x) - 32 * p.warps * group, 32 * p.warps, 1 + group, reinterpret_cast<uint32_t*>(shared + p.scratch + TEAM_BYTES * group), 0};
  uint8_t* const place = shared + p.tokens + group * p.token_bytes;
  auto* const rows = reinterpret_cast<__half*>(place);
  const int sizes = a.x_dtype == VITQ_F32 ? 4 : 2, row_bytes = (a.gate ? 2 : 1) * a.columns * sizes;
  for (int i = 16 * team.thread; i < p.staged; i += 16 * team.threads)
    *reinterpret_cast<uint4*>(place + i) = make_uint4(0, 0, 0, 0);  // what pads X stays 0

  start_dependents();
  const auto copy_all = [&](const void* from, int to, int count) {
    for (int i = 16 * threadIdx.x; i < count; i += 16 * blockDim.x)
      copy_async(uint32_t(__cvta_generic_to_shared(shared)) + to + i, static_cast<const uint8_t*>(from) + i, true);
  };
  const int pairs = (a.columns / p.rows + 31) / 32;
  // Before the wait: no kernel writes them, and of few rows their way from memory is most of the time.
  if (a.right) copy_all(a.right, 0, 1024 * pairs * p.right_tiles);
  if (a.left) copy_all(a.left, p.left, 512 * p.left_tiles * p.left_tiles);
  commit_copies();
  if (a.norm) prefetch(a.weight, 4 * a.columns), prefetch(a.bias, 4 * a.columns);
  const float2 clip = clip_of(a);
  unsigned token = blockIdx.x + gridDim.x * group;
  const unsigned stride = gridDim.x * p.groups;
  const auto start_of = [&](unsigned token) { return static_cast<const uint8_t*>(a.x) + int64_t(token) * a.x_stride * sizes; };
  const auto fetch = [&](unsigned token, int stage) {
    if (p.stages && token < unsigned(a.m)) {
      const uint8_t* from = start_of(token);
      const uint32_t to = uint32_t(__cvta_generic_to_shared(place)) + p.staged + stage * p.stage_bytes;
      for (int i = 16 * team.thread; i < row_bytes; i += 16 * team.threads) copy_async(to + i, from + i, true);
    }
    commit_copies();
  };
  const auto begin = [&] {
    wait_for_kernels_before();
    fetch(token, 0);
    if (p.stages == 2) fetch(token + stride, 1);
    else commit_copies();
  };

  const auto* right = reinterpret_cast<const uint4*>(shared) + lane;
  const auto* left = reinterpret_cast<const uint4*>(shared + p.left) + lane;
  const uint32_t at = uint32_t(__cvta_generic_to_shared(rows));
  const uint32_t step = 2 * p.pitch;  // bytes between rows
  const uint32_t by_rows = at + (8 * (lane / 16) + lane % 8) * step + 16 * (lane / 8 % 2);
  const bool once = p.items <= p.warps;  // results stay in registers
  const int columns = p.columns;

  const Before before{a.columns, a.gate, a.norm, a.weight, a.bias, a.eps, p.inverse_columns, columns, p.pitch, a.right != nullptr, p.stages != 0, p.by_row};
  bool ready = false;  // whether the matrices are there for all
  bool real = !(p.rehearses && p.stages);
  if (real) begin();
  for (int stage = 0; token < unsigned(a.m);) {
    if (real && (p.stages == 2 || !ready)) wait_copies<1>();
    else wait_copies<0>();
    team.meet();
    const auto of_type = [&](auto type) {
      using T = decltype(type);
      const T* from = reinterpret_cast<const T*>(p.stages ? place + p.staged + stage * p.stage_bytes : start_of(token));
      team.turn = p.eights ? prepare<T, true>(before, from, rows, team) : prepare<T, false>(before, from, rows, team);
    };
    if (a.x_dtype == VITQ_F16) of_type(__half());
    else if (a.x_dtype == VITQ_BF16) of_type(__nv_bfloat16());
    else of_type(float());
    if (ready) team.meet();
    else __syncthreads();
    ready = true;
    if (real) {
      fetch(token + max(p.stages, 1) * stride, stage);
      stage = p.stages == 2 ? stage ^ 1 : 0;
    }

    float lo = INFINITY, hi = -INFINITY;
    ClippedRange range{};
    float y[STRIPS][2 * TILES][4];
    const auto clear = [&] {
#pragma unroll
      for (int s = 0; s < STRIPS; ++s)
#pragma unroll
        for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) y[s][j][e] = 0.0f;
    };
    clear();  // here: results of the token before need no registers while a row is prepared
    const int strips = 2 * pairs / STRIPS;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int item = warp; item < p.items; item += p.warps) {
        const int chunk = a.left ? 0 : item / strips, first = STRIPS * (item - chunk * strips);
        if (pass == 0 || !once) {
          if (!once) clear();
          if (a.right) {
            const uint32_t x_at = by_rows + 16 * TILES * chunk * step;
#pragma unroll 2
            for (int k = 0; k < p.right_tiles; ++k) {
              uint32_t r[STRIPS][4];
#pragma unroll
              for (int s = 0; s < STRIPS; ++s) {
                const uint4 q = right[32 * ((first + s) * p.right_tiles + k)];
                r[s][0] = q.x, r[s][1] = q.y, r[s][2] = q.z, r[s][3] = q.w;
              }
#pragma unroll
              for (int j = 0; j < TILES; ++j) {
                if (PART && j >= tiles) break;
                uint32_t x[4];
                ldmatrix(x, x_at + 16 * j * step + 32 * k);
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) mma(y[s][2 * j], r[s], x[0], x[1], __half()), mma(y[s][2 * j + 1], r[s], x[2], x[3], __half());
              }
            }
            if (a.left) {
              uint32_t x[STRIPS][TILES][4];
#pragma unroll
              for (int s = 0; s < STRIPS; ++s)
#pragma unroll
                for (int k = 0; k < TILES; ++k) {
                  x[s][k][0] = halves(y[s][2 * k][0], y[s][2 * k][1]), x[s][k][1] = halves(y[s][2 * k][2], y[s][2 * k][3]);
                  x[s][k][2] = halves(y[s][2 * k + 1][0], y[s][2 * k + 1][1]), x[s][k][3] = halves(y[s][2 * k + 1][2], y[s][2 * k + 1][3]);
                }
              clear();
#pragma unroll
              for (int k = 0; k < TILES; ++k) {
                if (PART && k >= tiles) break;
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                  if (PART && i >= tiles) break;
                  const uint4 l = left[32 * (i * tiles + k)];
#pragma unroll
                  for (int s = 0; s < STRIPS; ++s) mma(y[s][2 * i], x[s][k], l.x, l.z, __half()), mma(y[s][2 * i + 1], x[s][k], l.y, l.w, __half());
                }
              }
            }
          } else {
            const uint32_t x_at = by_rows + 32 * first;
#pragma unroll 1
            for (int k = 0; k < tiles; ++k) {
              uint32_t x[STRIPS][4];
#pragma unroll
              for (int s = 0; s < STRIPS; ++s) ldmatrix_transposed(x[s], x_at + 16 * k * step + 32 * s);
#pragma unroll
              for (int i = 0; i < TILES; ++i) {
                if (PART && i >= tiles) break;
                const uint4 l = left[32 * (i * tiles + k)];
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) mma(y[s][2 * i], x[s], l.x, l.z, __half()), mma(y[s][2 * i + 1], x[s], l.y, l.w, __half());
              }
            }
          }
        }
        // A thread has columns `column` to `column` + 2 STRIPS - 1 of rows `row(j, e)`.
        const int column = 32 * (first / 2) + 4 * (lane / 4) + 2 * (first % 2), width = columns - column;
        const auto row = [&](int j, int e) { return 16 * TILES * chunk + 8 * j + 2 * (lane % 4) + e; };
        if (pass == 0) {
          // What pads a result is 0, which changes no range but one that need not hold it.
          const bool any = !a.row_shift || a.clip;
          const auto add = [&](auto valid) {
#pragma unroll
            for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
              for (int s = 0; s < STRIPS; ++s)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const bool there = valid(j, i % 2, 2 * s + i / 2);
                  lo = fminf(lo, there ? y[s][j][i] : INFINITY), hi = fmaxf(hi, there ? y[s][j][i] : -INFINITY);
                }
          };
          if (any) add([](int, int, int) { return true; });
          else add([&](int j, int e, int c) { return row(j, e) < p.rows && c < width; });
          continue;
        }
        uint8_t* const out = reinterpret_cast<uint8_t*>(a.out) + int64_t(token) * a.out_stride + column;
        // Sums are rounded, so that a rounded quotient makes no difference in kind: one multiplication in place of an exact division.
        const auto store = [&](auto code, auto put) {
#pragma unroll
          for (int j = 0; j < 2 * TILES; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              put(out + row(j, e) * columns, real && row(j, e) < p.rows && width > 0,
                  pack_codes(code(y[0][j][e]), code(y[0][j][2 + e]), code(y[STRIPS - 1][j][e]), code(y[STRIPS - 1][j][2 + e])));
        };
        const auto shifted = [&](float x) { return fmaf(clamped(x, range), range.s.inverse, range.magic); };
        const auto symmetric = [&](float x) { return fmaf(fminf(fmaxf(x, range.low), range.high), range.s.inverse, MAGIC); };
        const auto word_to = [&](uint8_t* to, bool there, uint32_t word) {
          if (there) *reinterpret_cast<std::conditional_t<STRIPS == 2, uint32_t, uint16_t>*>(to) = word;
        };
        if (p.words) {
          if (a.row_shift) store(shifted, word_to);
          else store(symmetric, word_to);
        } else {
          store(shifted, [&](uint8_t* to, bool there, uint32_t word) {
#pragma unroll
            for (int c = 0; c < 2 * STRIPS; ++c)
              if (there && c < width) to[c] = uint8_t(word >> 8 * c);
          });
        }
      }
      if (pass == 0) {
        team.extremes(lo, hi);
        range = clipped_range(p, clip, lo, hi);
        if (real && team.thread == 0) store_range(p, token, range);
      }
    }
    if (real) token += stride;
    else real = true, begin();
  }
  if (!ready) {
    wait_copies<1>();
    __syncthreads();
  }
  wait_copies<0>();
}

// The kernel's TILES for the rows of a result: all of them, or where there is no left matrix a part.
int tiles_of(const TransformedLaunch& p) {
  if (p.left_tiles) return p.left_tiles <= 8 ? p.left_tiles : 16;
  const int all = (p.rows + 15) / 16, chunks = (all + 3) / 4;
  return (all + chunks - 1) / chunks;
}

}  // namespace

// How many tokens and warps a block has, and what lies where in its shared memory; VITQ_UNSUPPORTED where it cannot hold one token.
int plan_kronecker(TransformedLaunch& p, int processors, int shared) {
  const VitqTransformedRows& a = p.a;
  const auto up = [](int n, int multiple) { return (n + multiple - 1) / multiple; };
  const int columns = a.right_size ? a.right_size : a.columns / a.left_size, pairs = up(columns, 32);
  p.rows = a.columns / columns, p.columns = columns;
  p.left_tiles = a.left_size ? up(p.rows, 16) : 0;
  p.right_tiles = a.right_size ? up(columns, 16) : 0;
  p.eights &= columns % 8 == 0;
  p.by_row = divisor(p.eights ? columns / 8 : columns);
  // An odd number of 16 bytes, so that ldmatrix meets each bank once.
  p.pitch = 16 * (a.right_size ? p.right_tiles : 2 * pairs) + 8;
  const int tiles = tiles_of(p), chunks = up(p.rows, 16 * tiles), warps = most_warps(tiles);
  p.items = chunks * 2 * pairs / strips_of(tiles);
  p.left = 1024 * pairs * p.right_tiles;
  p.tokens = p.left + 512 * p.left_tiles * p.left_tiles;
  const int64_t own = int64_t(2) * p.pitch * 16 * (a.left_size ? p.left_tiles : tiles * chunks);
  p.warps = std::min({p.items, warps, 16});
  if (!place_tokens(p, own, warps, processors, shared, false)) return VITQ_UNSUPPORTED;
  // Fewer tokens than processors: more warps copy and convert.
  if (a.m <= processors) p.warps = std::max(p.warps, std::min(8, warps));
  return 0;
}

int launch_kronecker(TransformedLaunch& p, cudaStream_t stream) {
  Gpu gpu;
  if (const int error = gpu_of_now(gpu)) return error;
  const bool eights = p.eights;
  p.rehearses = starts_early(gpu) && !p.a.gate && p.a.m <= VITQ_FEW_ROWS;
  if (const int error = plan_kronecker(p, gpu.processors, gpu.shared)) return error;
  p.words = p.columns % 4 == 0 && uintptr_t(p.a.out) % 4 == 0 && p.a.out_stride % 4 == 0;
  if (eights && !p.a.fragments) {
    if (const int error = launch_kronecker_left(p, stream); error != VITQ_UNSUPPORTED) return error;
    if (const int error = launch_kronecker_sm90(p, gpu, stream); error != VITQ_UNSUPPORTED) return error;
  }
  const int tiles = tiles_of(p);
  if (tiles > 8) return start_teams(kronecker_kernel<16>, p, gpu, stream);
  return with_tiles(tiles, [&](auto count) { return start_teams(kronecker_kernel<decltype(count)::value>, p, gpu, stream); });
}

}  // namespace vitq
