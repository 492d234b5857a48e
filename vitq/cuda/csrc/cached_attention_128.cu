#include "cached_attention.cuh"

namespace vitq {
int attend_128(const VitqCachedAttention& a, cudaStream_t stream) { return cached::launch_keys<128>(a, stream); }
}  // namespace vitq
