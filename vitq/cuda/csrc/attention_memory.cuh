// Where attention's codes lie: windows of images, copies into shared memory, the result's way out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_tile.cuh"
#include "vitq_cuda.h"

namespace vitq {
namespace {

// What is added to the logits: nothing; bias, mask and shift mask from global memory; a head's bias kept in shared memory
// in the order of the fragments, and the shift mask.
enum Extra { PLAIN, ADDED, KEPT };

constexpr float APART = -100.0f;  // Swin's shift mask

// Division by a launch constant of numbers below 2^31 (Granlund and Montgomery 1994).
struct Divisor {
  int by;
  uint32_t inverse, shift;
  Divisor() : Divisor(1) {}
  explicit Divisor(int divisor) : by(divisor), inverse(0), shift(0) {
    while ((1u << shift) < static_cast<uint32_t>(divisor)) ++shift;
    if (divisor > 1) inverse = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
    shift = shift ? shift - 1 : 0;
  }
  __device__ __forceinline__ int divide(int n) const { return by == 1 ? n : __umulhi(n, inverse) >> shift; }
};

struct Head {
  float c;      // logit of one unit of q·k, base 2 (natural with ADDED)
  float share;  // v_scale, over the output's scale if that is codes
  int q_zero, v_zero;
};

struct Launch {
  VitqAttention a;
  Head own[VITQ_MOST_HEADS];  // read by `head_of`
  int per_head;        // 1: each head has its own, 0: the first is everyone's
  bool q_zeros, v_zeros;  // whether any is not 0
  uint32_t start[4];   // MAGIC_BITS: see multiply_keys
  float top;           // largest code of a probability
  float zero, range, low;  // of output codes: (zero point - qmin) / range, qmax - qmin, 1.5·2^23 + qmin
  int items, parts, part_rows;  // (image, window, head, part of the queries), or (image, window) of warps
  int geometry_bytes;  // of shared memory
  int query_bytes, stage_bytes;  // of shared memory: one group's queries, and all it loads for one item
  int copy;            // bytes of one copy
  Divisor copies;      // copies of a row of dim codes
  int row_step, copy_step;  // what one step of all threads of a group adds to (row, copy)
  int stages;
  Divisor heads, by_parts, windows, windows_x, window_w;
  int from_y, from_x;  // shift modulo the image
  bool pads;           // some windows reach beyond the image
  bool quick;          // 16-byte copies, and every step of all threads adds to the row only, a multiple of 8
  bool pairs;          // bias and mask can be read two keys at a time
  bool wide;           // rows of the result are whole, aligned 16-byte pieces
  bool by_four;        // four neighbouring features are aligned
};

__device__ __forceinline__ const Head& head_of(const Launch& p, int head) { return p.own[head * p.per_head]; }

struct Place {
  int unit, batch, head, y, x, first_row;  // y, x: upper left token of the window in the shifted image
  bool bottom, right;  // window that the shift filled from two sides
};

__device__ __forceinline__ Place place_of(const Launch& p, int unit, int head, int part) {
  Place at = {unit, unit, head, 0, 0, part * p.part_rows, false, false};
  if (p.a.window_h) {
    at.batch = p.windows.divide(unit);
    const int window = unit - at.batch * p.windows.by, row = p.windows_x.divide(window),
              column = window - row * p.windows_x.by;
    at.y = row * p.a.window_h;
    at.x = column * p.a.window_w;
    at.bottom = p.a.shift_h && at.y + p.a.window_h >= p.a.height;
    at.right = p.a.shift_w && at.x + p.a.window_w >= p.a.width;
  }
  return at;
}

__device__ __forceinline__ int2 in_window(const Launch& p, int token) {
  const int y = p.window_w.divide(token);
  return make_int2(token - y * p.a.window_w, y);
}

// Which token of the image is `token` of the window; -1 in the padding.
__device__ __forceinline__ int in_image(const Launch& p, const Place& at, int token) {
  const int2 inside = in_window(p, token);
  int y = at.y + inside.y, x = at.x + inside.x;
  if (y >= p.a.height || x >= p.a.width) return -1;
  y += p.from_y;
  x += p.from_x;
  if (y >= p.a.height) y -= p.a.height;
  if (x >= p.a.width) x -= p.a.width;
  return y * p.a.width + x;
}

// Tokens of a window as 2^16·y + x, in shared memory: one read in place of a division.
__device__ __forceinline__ int in_image(const Launch& p, const Place& at, const int* geometry, int token) {
  const int inside = geometry[token];
  int y = at.y + (inside >> 16), x = at.x + (inside & 0xFFFF);
  if (p.pads && (y >= p.a.height || x >= p.a.width)) return -1;
  y += p.from_y;
  x += p.from_x;
  if (y >= p.a.height) y -= p.a.height;
  if (x >= p.a.width) x -= p.a.width;
  return y * p.a.width + x;
}

__device__ __forceinline__ void fill_geometry(const Launch& p, int* geometry) {
  if (!p.a.window_h) return;
  for (int i = threadIdx.x; i < p.a.keys; i += blockDim.x) {
    const int2 inside = in_window(p, i);
    geometry[i] = inside.y << 16 | inside.x;
  }
}

// Bit 0: the token comes from above the seam of the shift, bit 1: from left of it. geometry: may be null.
__device__ __forceinline__ int side(const Launch& p, const int* geometry, int token) {
  const int2 inside = geometry ? make_int2(geometry[token] & 0xFFFF, geometry[token] >> 16) : in_window(p, token);
  return (inside.y < p.a.window_h - p.a.shift_h ? 1 : 0) | (inside.x < p.a.window_w - p.a.shift_w ? 2 : 0);
}

__device__ __forceinline__ void copy(uint32_t to, const int8_t* from, int bytes) {
  if (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else if (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
  } else if (bytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(static_cast<int>(*from)) : "memory");
  }
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Walks a group's threads over (row, copy of the row) without a division a step.
struct Walk {
  int row, copy;
  __device__ Walk(const Launch& p, int thread) {
    row = p.copies.divide(thread);
    copy = thread - row * p.copies.by;
  }
  __device__ void step(const Launch& p) {
    row += p.row_step;
    copy += p.copy_step;
    if (copy >= p.copies.by) {
      copy -= p.copies.by;
      ++row;
    }
  }
};

// Rows first .. first + rows - 1 of a sequence (an image's tokens, or a window's) into shared memory.
// which: 0 q, 1 k, 2 v. geometry: fill_geometry's, or null.
template <int KS>
__device__ __forceinline__ void load_rows(const Launch& p, const Place& at, int which, uint32_t to, int first, int rows,
                                          int thread, const int* geometry) {
  const int64_t* strides = which == 0 ? p.a.q_strides : which == 1 ? p.a.k_strides : p.a.v_strides;
  const int8_t* base = which == 0 ? p.a.q : which == 1 ? p.a.k : p.a.v;
  base += at.batch * strides[0] + at.head * strides[2];
  const int64_t stride = strides[1];
  Walk w(p, thread);
  if (p.quick && !p.a.window_h) {
    const int8_t* from = base + (first + w.row) * stride + 16 * w.copy;
    uint32_t here = to + place<KS>(w.row, 16 * w.copy);
    for (; w.row < rows; w.row += p.row_step) {
      copy(here, from, 16);
      from += p.row_step * stride;
      here += p.row_step * (32 * KS);
    }
    return;
  }
  for (; w.row < rows; w.step(p)) {
    const int d = w.copy * p.copy;
    const int8_t* from = base + (first + w.row) * stride;
    if (p.a.window_h) {
      const int token = geometry ? in_image(p, at, geometry, first + w.row) : in_image(p, at, first + w.row);
      from = token < 0 ? p.a.pad + (which * p.a.heads + at.head) * p.a.dim : base + token * stride;
    }
    copy(to + place<KS>(w.row, d), from + d, p.copy);
  }
}

// The same for 16 queries, by one warp.
template <int KS>
__device__ __forceinline__ void load_tile(const Launch& p, const Place& at, uint32_t to, int first, int lane) {
  const int8_t* base = p.a.q + at.batch * p.a.q_strides[0] + at.head * p.a.q_strides[2];
  const int rows = min(16, p.a.queries - first), copies = p.copies.by;
  if (p.quick && !p.a.window_h && (copies & (copies - 1)) == 0) {
    int row = p.copies.divide(lane);
    const int d = 16 * (lane - row * copies), step = p.copies.divide(32);
    const int8_t* from = base + (first + row) * p.a.q_strides[1] + d;
    for (; row < rows; row += step, from += step * p.a.q_strides[1]) copy(to + place<KS>(row, d), from, 16);
    return;
  }
  for (int i = lane; i < rows * copies; i += 32) {
    const int row = p.copies.divide(i), d = (i - row * copies) * p.copy;
    const int8_t* from = base + (first + row) * p.a.q_strides[1];
    if (p.a.window_h) {
      const int token = in_image(p, at, first + row);
      from = token < 0 ? p.a.pad + at.head * p.a.dim : base + token * p.a.q_strides[1];
    }
    copy(to + place<KS>(row, d), from + d, p.copy);
  }
}

// q, k and v of a whole window at once, so that each token's place is computed once.
template <int KS>
__device__ __forceinline__ void load_window(const Launch& p, const Place& at, uint32_t q, uint32_t k, uint32_t v, int thread,
                                            const int* geometry) {
  const int8_t* bases[3] = {p.a.q + at.batch * p.a.q_strides[0] + at.head * p.a.q_strides[2],
                            p.a.k + at.batch * p.a.k_strides[0] + at.head * p.a.k_strides[2],
                            p.a.v + at.batch * p.a.v_strides[0] + at.head * p.a.v_strides[2]};
  const int strides[3] = {static_cast<int>(p.a.q_strides[1]), static_cast<int>(p.a.k_strides[1]),
                          static_cast<int>(p.a.v_strides[1])};
  const uint32_t to[3] = {q, k, v};
  Walk w(p, thread);
  if (p.quick && !p.pads) {
#pragma unroll
    for (int i = 0; i < 3; ++i) bases[i] += 16 * w.copy;
    const uint32_t top = at.y + p.from_y, side = at.x + p.from_x;
    const uint32_t first = place<KS>(w.row, 16 * w.copy), end = p.a.keys;
#pragma unroll 1
    for (uint32_t row = w.row, here = first; row < end; row += p.row_step, here += p.row_step * (32 * KS)) {
      const uint32_t inside = geometry[row], y = top + (inside >> 16), x = side + (inside & 0xFFFF);
      // the smaller one, without a sign, is within the image
      const int token = min(y, y - p.a.height) * p.a.width + min(x, x - p.a.width);
#pragma unroll
      for (int i = 0; i < 3; ++i) copy(to[i] + here, bases[i] + static_cast<int64_t>(token) * strides[i], 16);
    }
    return;
  }
  for (; w.row < p.a.keys; w.step(p)) {
    const int d = w.copy * p.copy, token = in_image(p, at, geometry, w.row);
    const uint32_t offset = place<KS>(w.row, d);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int8_t* from = token < 0 ? p.a.pad + (i * p.a.heads + at.head) * p.a.dim
                                     : bases[i] + static_cast<int64_t>(token) * strides[i];
      copy(to[i] + offset, from + d, p.copy);
    }
  }
}

// Features dim .. 32·KS - 1 of the keys: zero once, never written again. q's and v's may hold anything.
template <int KS>
__device__ __forceinline__ void clear_columns(const Launch& p, uint32_t keys, int rows, int thread, int threads) {
  const int columns = 32 * KS - p.a.dim;
  for (int i = thread; i < rows * columns; i += threads) {
    const int row = i / columns;
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(keys + place<KS>(row, p.a.dim + i - row * columns)), "r"(0) : "memory");
  }
}

// The part of the queries fastest, then the head: neighbours share what is in L2.
__device__ __forceinline__ Place place_of(const Launch& p, int item) {
  const int pair = p.by_parts.divide(item), unit = p.heads.divide(pair);
  return place_of(p, unit, pair - unit * p.a.heads, item - pair * p.parts);
}

// Which token of its image's result row `row` of the sequence is; -1: it is padding.
__device__ __forceinline__ int out_token(const Launch& p, const Place& at, const int* geometry, int row) {
  if (!p.a.window_h) return row;
  return geometry ? in_image(p, at, geometry, row) : in_image(p, at, row);
}

__device__ __forceinline__ uint32_t to_code(const Launch& p, float y, float share) {
  // An FMA saturates to 0 .. 1 for nothing.
  return __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(y, share, p.zero)), p.range, p.low));
}

template <typename T>
__device__ __forceinline__ void store_float(const Launch& p, int64_t at, int d, const float (&y)[4]) {
  T* out = static_cast<T*>(p.a.out) + at;
  if (p.by_four) {
    union {
      T values[4];
      uint2 bits[sizeof(T) / 2];
    } u;
#pragma unroll
    for (int i = 0; i < 4; ++i) u.values[i] = static_cast<T>(y[i]);
    if (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(out) = make_uint4(u.bits[0].x, u.bits[0].y, u.bits[sizeof(T) / 2 - 1].x,
                                                  u.bits[sizeof(T) / 2 - 1].y);
    } else {
      *reinterpret_cast<uint2*>(out) = u.bits[0];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (d + i < p.a.dim) out[i] = static_cast<T>(y[i]);
    }
  }
}

// Rows row .. row + left - 1 (at most 16) of the sequence. o: exact sums as floats. share: of rows g and g + 8.
// staging: 16 rows of shared memory that only this warp uses (its queries, read by then).
template <int KS>
__device__ __forceinline__ void store_tile(const Launch& p, const Place& at, const uint32_t (&o)[KS][2][2][4],
                                           const float (&share)[2], int row, int left, uint32_t staging, const int* geometry,
                                           int lane) {
  const int g = lane >> 2, t = lane & 3;
  const int width = p.a.heads * p.a.dim, tokens = p.a.window_h ? p.a.height * p.a.width : p.a.queries;
  const int64_t first = static_cast<int64_t>(at.batch) * tokens * width + at.head * p.a.dim;
  if (p.a.out_dtype == VITQ_S8 && p.wide) {
    __syncwarp();
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t code[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            code[i] = to_code(p, __uint_as_float(o[ks][chunk][i & 1][2 * half + (i >> 1)]), share[half]);
          }
          const uint32_t low = __byte_perm(code[0], code[1], 0x0040), high = __byte_perm(code[2], code[3], 0x0040);
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(staging + place<KS>(g + 8 * half, 32 * ks + 16 * chunk + 4 * t)),
                       "r"(__byte_perm(low, high, 0x5410))
                       : "memory");
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < KS; ++n) {
      const int i = lane + 32 * n, r = i / (2 * KS), d = 16 * (i - r * (2 * KS));
      uint4 bytes;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                   : "r"(staging + place<KS>(r, d))
                   : "memory");
      if (r < left) {
        const int token = out_token(p, at, geometry, row + r);
        if (token >= 0) {
          *reinterpret_cast<uint4*>(static_cast<int8_t*>(p.a.out) + first + d + static_cast<int64_t>(token) * width) = bytes;
        }
      }
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = g + 8 * half;
    if (r >= left) continue;
    const int token = out_token(p, at, geometry, row + r);
    if (token < 0) continue;
    const int64_t place = first + static_cast<int64_t>(token) * width;
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int d = 32 * ks + 16 * chunk + 4 * t;
        if (d >= p.a.dim) continue;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = __uint_as_float(o[ks][chunk][i & 1][2 * half + (i >> 1)]);
        if (p.a.out_dtype == VITQ_S8) {
          int8_t* out = static_cast<int8_t*>(p.a.out) + place + d;
          char4 code = make_char4(to_code(p, y[0], share[half]), to_code(p, y[1], share[half]), to_code(p, y[2], share[half]),
                                  to_code(p, y[3], share[half]));
          if (p.by_four) {
            *reinterpret_cast<char4*>(out) = code;
          } else {
            out[0] = code.x;
            if (d + 1 < p.a.dim) out[1] = code.y;
            if (d + 2 < p.a.dim) out[2] = code.z;
            if (d + 3 < p.a.dim) out[3] = code.w;
          }
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] *= share[half];
        if (p.a.out_dtype == VITQ_F32) {
          store_float<float>(p, place + d, d, y);
        } else if (p.a.out_dtype == VITQ_F16) {
          store_float<__half>(p, place + d, d, y);
        } else {
          store_float<__nv_bfloat16>(p, place + d, d, y);
        }
      }
    }
  }
}

}  // namespace
}  // namespace vitq
