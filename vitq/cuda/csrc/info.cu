// What the library is and what it runs on, in numbers and words for vitq/cuda/loader.py.
#include <cuda_runtime.h>
#include <cutlass/version.h>

#include "launch.cuh"
#include "transformed_rows.cuh"

#define VITQ_QUOTE(x) #x
#define VITQ_TEXT(x) VITQ_QUOTE(x)

// build.py names the architectures, one after the other, as -DVITQ_ARCHS="sm_80 sm_90a".
#ifndef VITQ_ARCHS
#define VITQ_ARCHS "unnamed architectures"
#endif

extern "C" {

int vitq_abi_version(void) { return VITQ_ABI_VERSION; }

const char* vitq_error(int code) {
  switch (code) {
    case 0: return "success";
    case VITQ_BAD_ARGUMENT: return "an argument that the kernel does not take";
    case VITQ_UNSUPPORTED: return "a case that the kernel was not built for";
    case VITQ_NO_DRIVER_SYMBOL: return "the driver lacks cuTensorMapEncodeTiled (CUDA 12.0 or newer is needed)";
    default: return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "an unknown code";
  }
}

const char* vitq_build(void) {
  return VITQ_ARCHS ", CUTLASS " VITQ_TEXT(CUTLASS_MAJOR) "." VITQ_TEXT(CUTLASS_MINOR) "." VITQ_TEXT(CUTLASS_PATCH);
}

int vitq_arch(void) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return -1;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return -1;
  return 10 * major + minor;
}

int vitq_driver_version(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int vitq_runtime_version(void) {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

#ifdef VITQ_NO_SM90  // built without sm_90a: sources named _sm90 are not among those compiled
int vitq_linear_sm90(const VitqLinear*, void*) { return VITQ_UNSUPPORTED; }
int vitq_linear_sm90_configs(void) { return 0; }
#endif

}  // extern "C"

#ifdef VITQ_NO_SM90
int vitq::launch_kronecker_sm90(TransformedLaunch, const Gpu&, cudaStream_t) { return VITQ_UNSUPPORTED; }
#endif
