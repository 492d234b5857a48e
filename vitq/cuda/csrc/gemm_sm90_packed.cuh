// Packed int4 weights in the Hopper GEMM: three warps of the loading warpgroup widen them. Each takes every third piece of 128 columns, which comes by
// TMA to a place of its own, and writes it as int8 to the tile's stage, where the MMAs read it.
//
// What bounds it is shared memory: of 256 x 128 x 128 products the MMAs alone read 96 KB in the 1024 clocks that they take at best, TMA writes 40, and
// widening reads and writes 24 more. (Pairs of warps that share a piece, with its packed bytes in registers while more come, were no faster.)
#pragma once

#include "gemm_sm90_tile.cuh"
#include "widen.cuh"

namespace vitq::sm90 {

// What a warp widens of a piece. The constants of four rows, eight apart, are one word (`even_first` of layout.py): a lane has such a quadruple, or of 64
// rows half of one.
template <class T>
struct Widener {
  static constexpr int ROWS = T::N / 32, QUADRUPLES = T::N / 4;  // ROWS: of a lane
  const VitqLinear& p;
  int lane, quadruple, start, row;  // start: of the lane's rows in their quadruple; row: the first of them
  uint32_t multipliers = 0, zeros = 0;

  __device__ __forceinline__ Widener(const VitqLinear& p, int lane)
      : p(p), lane(lane), quadruple(lane % QUADRUPLES), start(lane / QUADRUPLES * ROWS), row(quadruple / 8 * 32 + quadruple % 8 + 8 * start) {}

  // The constants of a group of columns.
  __device__ __forceinline__ void fetch(int first_row, int group) {
    const int n_pad = (p.n + 31) / 32 * 32, line = first_row + quadruple / 8 * 32;
    if (line >= n_pad) return;
    const int64_t at = int64_t(group) * n_pad + line + quadruple % 8 * 4;
    multipliers = __ldg(reinterpret_cast<const uint32_t*>(p.multiplier + at));
    if (p.group_zero != nullptr) zeros = __ldg(reinterpret_cast<const uint32_t*>(p.group_zero + at));
  }

  // from: rows of 64 bytes, 64-byte swizzle; to: rows of 128 bytes, 128-byte swizzle.
  __device__ __forceinline__ void widen(const char* from, char* to) const {
    if (p.multiplier == nullptr)
      rows(from, to, [](int) { return Shifted{}; });
    else
      rows(from, to, [&](int i) {
        const int bits = 8 * (start + i);
        return Multiplied(static_cast<int8_t>(multipliers >> bits), static_cast<int8_t>(zeros >> bits));
      });
  }

  // A row is read before the one before it is written: the compiler does not exchange them.
  template <class F>
  __device__ __forceinline__ void rows(const char* from, char* to, const F& how_of) const {
    uint4 v[2][4];
    const auto read = [&](int i) {
#pragma unroll
      for (int half = 0; half < 4; ++half)
        v[i % 2][half] = *reinterpret_cast<const uint4*>(from + (row + 8 * i) * 64 + ((half ^ lane % 8 / 2) << 4));
    };
    read(0);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      if (i + 1 < ROWS) read(i + 1);
      const auto how = how_of(i);
      char* codes = to + (row + 8 * i) * 128;
#pragma unroll
      for (int half = 0; half < 4; ++half) {  // of the two blocks of 64 codes: 16 of the low nibbles, and 16 of the high ones 32 codes further on
        const uint4& w = v[i % 2][half];
        const int low = half / 2 * 4 + half % 2;
        *reinterpret_cast<uint4*>(codes + ((low ^ lane % 8) << 4)) = make_uint4(how.low(w.x), how.low(w.y), how.low(w.z), how.low(w.w));
        *reinterpret_cast<uint4*>(codes + ((low + 2 ^ lane % 8) << 4)) = make_uint4(how.high(w.x), how.high(w.y), how.high(w.z), how.high(w.w));
      }
    }
  }
};

// What a widening warp does: its pieces of all tiles of a block, into the ring's stages. column_of(i): the column of tiles that tile i of the block is in.
template <class T, class F>
__device__ __forceinline__ void widen_pieces(const Problem& problem, const CUtensorMap& b_map, Barriers& bars, char* packed, char* ring, int tiles,
                                             const F& column_of) {
  const int warp = threadIdx.x % 128 / 32 - 1, lane = threadIdx.x % 32, pieces = tiles * problem.k_tiles, stages = problem.stages;
  Widener<T> widener(problem.p, lane);
  const int pieces_of_group = problem.p.multiplier == nullptr ? 1 : problem.p.group_columns / VITQ_PACKED_GROUP;
  char* const places = packed + warp * T::PACKED_DEPTH * T::PACKED_BYTES;
  uint64_t* const arrived = bars.packed + warp * T::PACKED_DEPTH;
  // The pieces of this warp, in order: where it works, and what it fetches next. Divisions only where a tile begins.
  struct Place {
    int piece, tile, kt, column;
  } now, next;
  const auto skip = [&](Place& place, int count) {
    place.piece += count, place.kt += count;
    if (place.kt < problem.k_tiles) return;
    do ++place.tile; while ((place.kt -= problem.k_tiles) >= problem.k_tiles);
    if (place.piece < pieces) place.column = column_of(place.tile);
  };
  now = {0, 0, 0, pieces ? column_of(0) : 0};
  skip(now, warp);
  next = now;
  Ring from, ahead, at;
  const auto fetch = [&] {
    if (lane == 0 && next.piece < pieces) {
      barrier_expect(&arrived[ahead.slot], T::PACKED_BYTES);
      load_box(&b_map, &arrived[ahead.slot], places + ahead.slot * T::PACKED_BYTES, next.kt * 64, next.column * T::N);
    }
    ahead.next(T::PACKED_DEPTH);
    skip(next, WIDENERS);
  };
  const auto fetch_constants = [&] {
    if (problem.p.multiplier != nullptr && now.piece < pieces)
      widener.fetch(now.column * T::N, pieces_of_group == 1 ? now.kt : now.kt / pieces_of_group);
  };
  for (int i = 0; i < T::PACKED_DEPTH; ++i) fetch();
  fetch_constants();
  // Of `count` stages further on. A parity tells of a stage whether it is empty again only if its last turn was waited for as well.
  const auto wait_for_stage = [&](int count) {
    for (; count > stages; count -= stages) {
      at.parity ^= 1;
      barrier_wait(&bars.empty[at.slot], at.parity ^ 1);
    }
    for (at.slot += count; at.slot >= stages; at.slot -= stages) at.parity ^= 1;
    barrier_wait(&bars.empty[at.slot], at.parity ^ 1);
    // Which the one before says already, by way of the warps that multiplied; racecheck sees an order only between those that arrive at a barrier and
    // those that wait for it. For its sake every lane arrives, too.
    barrier_wait(&bars.full[at.slot], at.parity ^ 1);
  };
  for (int stages_on = warp + now.tile * problem.k_tiles_fp; now.piece < pieces;) {
    wait_for_stage(stages_on);
    barrier_wait(&arrived[from.slot], from.parity);
    widener.widen(places + from.slot * T::PACKED_BYTES, ring + at.slot * T::STAGE_BYTES + T::A_BYTES);
    written_for_mma();
    barrier_arrive(&bars.full[at.slot]);
    fetch();
    from.next(T::PACKED_DEPTH);
    const int tile = now.tile;
    skip(now, WIDENERS);
    stages_on = WIDENERS + (now.tile - tile) * problem.k_tiles_fp;
    fetch_constants();
  }
}

}  // namespace vitq::sm90
