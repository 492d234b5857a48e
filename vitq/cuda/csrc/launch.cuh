// What launches of several kernels share: host code only.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

#include "vitq_cuda.h"

namespace vitq {

struct Gpu {
  int processors, major, shared;  // shared: bytes that a block may have
};

// The current device.
inline int gpu_of_now(Gpu& out) {
  constexpr int DEVICES = 64;
  static std::atomic<uint64_t> known[DEVICES];  // shared << 32 | processors << 8 | major
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  uint64_t packed = device < DEVICES ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int processors, major, shared;
    if ((error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) != cudaSuccess) return error;
    packed = uint64_t(shared) << 32 | unsigned(processors) << 8 | unsigned(major);
    if (device < DEVICES) known[device].store(packed, std::memory_order_relaxed);
  }
  out = {static_cast<int>(packed >> 8 & 0xFFFFFF), static_cast<int>(packed & 0xFF), static_cast<int>(packed >> 32)};
  return 0;
}

// Lets a kernel have all the shared memory that a block of the device may have. Not what one launch needs: another thread may ask for
// less between this and the launch.
inline cudaError_t allow_shared(const void* kernel) {
  int device, most;
  cudaFuncAttributes own;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaFuncGetAttributes(&own, kernel);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - int(own.sharedSizeBytes));
  return error;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// 0 where both GEMM kernels could take the arguments, m > 0 aside.
inline int check_linear(const VitqLinear& p) {
  if (p.n < 1 || p.k < 32 || p.a_columns < 1 || p.a_columns > p.k || p.rows_per_group < 1) return VITQ_BAD_ARGUMENT;
  if ((p.a_bits != 8 && p.a_bits != 4) || (p.weight_bits != 8 && p.weight_bits != 4)) return VITQ_BAD_ARGUMENT;
  if (p.k % (p.weight_bits == 4 ? 64 : 32) != 0) return VITQ_BAD_ARGUMENT;
  if (p.weight == nullptr || p.scale == nullptr || p.out.data == nullptr || p.a == nullptr) return VITQ_BAD_ARGUMENT;
  if (p.lda % 16 != 0 || !aligned16(p.a) || !aligned16(p.weight)) return VITQ_BAD_ARGUMENT;
  if (!aligned16(p.scale) || !aligned16(p.column_sums) || !aligned16(p.bias)) return VITQ_BAD_ARGUMENT;
  if (p.segments < 1 || p.segments > VITQ_MAX_SEGMENTS) return VITQ_BAD_ARGUMENT;
  for (int s = 0, before = 0; s < p.segments; before = p.segment_ends[s++])
    if (p.segment_ends[s] <= before || p.segment_ends[s] % 32 != 0) return VITQ_BAD_ARGUMENT;
  if (p.segment_ends[p.segments - 1] != p.k) return VITQ_BAD_ARGUMENT;
  if (p.column_sums != nullptr && p.row_shift == nullptr) return VITQ_BAD_ARGUMENT;
  if (p.a_fp != nullptr) {
    if (p.weight_fp == nullptr || p.k_fp < 16 || p.k_fp % 16 != 0 || p.lda_fp % 8 != 0) return VITQ_BAD_ARGUMENT;
    if (!aligned16(p.a_fp) || !aligned16(p.weight_fp)) return VITQ_BAD_ARGUMENT;
  }
  if (p.out.dtype < VITQ_F32 || p.out.dtype > VITQ_S8 || p.activation < VITQ_NO_ACTIVATION || p.activation > VITQ_GELU_TANH)
    return VITQ_BAD_ARGUMENT;
  if (p.residual.data != nullptr && (p.out.dtype == VITQ_S8 || p.residual.dtype < VITQ_F32 || p.residual.dtype > VITQ_BF16))
    return VITQ_BAD_ARGUMENT;
  if (p.a_bits == 4 && p.weight_bits == 8) return VITQ_UNSUPPORTED;
  // sums of 128·128·k must fit 32 bits; row and column numbers of the last tile as well
  if (p.k >= 1 << 17 || p.k_fp >= 1 << 28 || p.m > INT32_MAX - 256 || p.n > INT32_MAX - 256) return VITQ_UNSUPPORTED;
  return 0;
}

// Starting early (programmatic dependent launch): a kernel that `launch_early` starts may begin once all blocks of the one before it have called
// `start_dependents` or have ended. It prepares what no one else can see, and then every thread of it calls `wait_for_kernels_before`, which
// returns when all kernels before have ended and what they wrote can be read. Reads of it must not be __ldg, which the compiler may move across.
// On chips before sm_90 kernels start one after the other.
__device__ __forceinline__ void start_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// By all threads of a block, before the wait: what no kernel writes, such as a layer's constants, is on its way from memory while one waits; or rows of which some
// may yet be written. null: nothing.
__device__ __forceinline__ void prefetch(const void* p, int64_t bytes) {
  if (p == nullptr) return;
  for (int64_t at = 128 * int64_t(threadIdx.x); at < bytes; at += 128 * int64_t(blockDim.x))
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(p) + at));
}

// Whether the code for this GPU has these instructions: on sm_90 it is compiled for it, later chips run that of sm_80.
inline bool starts_early(const Gpu& gpu) {
#ifdef __CUDA_ARCH_LIST__
  constexpr int compiled[] = {__CUDA_ARCH_LIST__};
  for (int arch : compiled)
    if (arch == 900) return gpu.major == 9;
#endif
  return false;
}

template <class... Parameters, class... Arguments>
inline cudaError_t launch_early(void (*kernel)(Parameters...), unsigned blocks, int threads, int shared, cudaStream_t stream, const Arguments&... arguments) {
  Gpu gpu;
  if (int error = gpu_of_now(gpu)) return static_cast<cudaError_t>(error);
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(blocks), how.blockDim = dim3(threads), how.dynamicSmemBytes = shared, how.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  if (starts_early(gpu)) how.attrs = &early, how.numAttrs = 1;
  return cudaLaunchKernelEx(&how, kernel, arguments...);
}

}  // namespace vitq
