// Copies of 16 bytes to shared memory that a thread does not wait for (cp.async).
#pragma once

#include <cstdint>

namespace vitq {

// 16 bytes to shared memory while the thread works on, or zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER>  // groups that may still be under way
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

}  // namespace vitq
