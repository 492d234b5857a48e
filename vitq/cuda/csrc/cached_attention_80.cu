#include "cached_attention.cuh"

namespace vitq {
int attend_80(const VitqCachedAttention& a, cudaStream_t stream) { return cached::launch_keys<80>(a, stream); }
}  // namespace vitq
