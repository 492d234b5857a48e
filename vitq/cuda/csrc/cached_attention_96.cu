#include "cached_attention.cuh"

namespace vitq {
int attend_96(const VitqCachedAttention& a, cudaStream_t stream) { return cached::launch_keys<96>(a, stream); }
}  // namespace vitq
