// Hopper's asynchronous machinery as plain functions: mbarriers, bulk tensor copies, warpgroup MMA through CuTe's atoms.
#pragma once

#include <cuda.h>
#include <stdint.h>

#include <utility>

#include "cute/arch/mma_sm90_gmma.hpp"

namespace vitq::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* bar, uint32_t times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(times) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// A box of a matrix, its first element at (column, row), to shared memory. What lies outside of the matrix is zero.
__device__ __forceinline__ void load_box(const CUtensorMap* map, uint64_t* bar, void* to, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row)
      : "memory");
}

// Neighbouring bytes, a multiple of 16.
__device__ __forceinline__ void load_bytes(uint64_t* bar, void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(shared_address(to)), "l"(from),
               "r"(shared_address(bar)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread wrote to shared memory can be read by the asynchronous MMAs of whoever it tells next.
__device__ __forceinline__ void written_for_mma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Descriptor of an operand in shared memory: rows of 128 bytes, 128-byte swizzle, K contiguous. 8 rows are 1024 bytes.
__device__ __forceinline__ uint64_t operand(const void* p) {
  uint64_t address = (shared_address(p) & 0x3FFFF) >> 4;
  return address | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}

// The same of pieces without a swizzle: eight rows of 16 bytes, the rows after them behind them, and `stride` bytes to what follows in K.
__device__ __forceinline__ uint64_t pieces(const void* p, int stride) {
  return (shared_address(p) & 0x3FFFF) >> 4 | uint64_t(stride >> 4) << 16 | uint64_t(128 >> 4) << 32;
}

constexpr int STEP = 32 >> 4;  // what a k-step of 32 bytes adds to a descriptor

namespace gmma = cute::SM90::GMMA;
constexpr auto K_MAJOR = gmma::Major::K;

// The atoms by width: 64 rows times N columns, a k-step of 32 codes or 16 halves.
template <int N>
struct Atom;
#define VITQ_ATOM(N)                                                 \
  template <>                                                        \
  struct Atom<N> {                                                   \
    using Codes = gmma::MMA_64x##N##x32_S32S8S8_SS_TN;               \
    using Halves = gmma::MMA_64x##N##x16_F32F16F16_SS<K_MAJOR, K_MAJOR>; \
  };
VITQ_ATOM(64)
VITQ_ATOM(96)
VITQ_ATOM(128)
VITQ_ATOM(192)
VITQ_ATOM(256)
#undef VITQ_ATOM

template <class Op, class T, int COUNT, size_t... I>
__device__ __forceinline__ void mma(uint64_t a, uint64_t b, T (&d)[COUNT], bool accumulate, std::index_sequence<I...>) {
  Op::fma(a, b, d[I]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}

template <int N>
__device__ __forceinline__ void mma(uint64_t a, uint64_t b, uint32_t (&d)[N / 2], bool accumulate) {
  mma<typename Atom<N>::Codes>(a, b, d, accumulate, std::make_index_sequence<N / 2>());
}

template <int N>
__device__ __forceinline__ void mma(uint64_t a, uint64_t b, float (&d)[N / 2], bool accumulate) {
  mma<typename Atom<N>::Halves>(a, b, d, accumulate, std::make_index_sequence<N / 2>());
}

// Keeps the compiler from moving reads and writes of accumulators across the asynchronous MMAs.
template <class T, int COUNT>
__device__ __forceinline__ void pin(T (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace vitq::sm90
