#include "cached_attention.cuh"

namespace vitq {
int attend_64(const VitqCachedAttention& a, cudaStream_t stream) { return cached::launch_keys<64>(a, stream); }
}  // namespace vitq
