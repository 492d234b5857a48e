/* What the loader asks before it binds any kernel. */
#include "common.h"

VITQ_API int32_t vitq_cpu_abi_version(void) { return VITQ_ABI_VERSION; }

/* 1 when the CPU (and the operating system) offer what VITQ_AVX512 compiles for. */
VITQ_API int32_t vitq_cpu_supported(void) {
#ifdef VITQ_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}
