// Dispatch of the Hopper GEMM to its instances, which are compiled in files of their own.
//
// config  columns  warpgroups x rows  tiles
//  0..2   192, 128, 256   2 x 64      resident
//  3..4   96, 64          2 x 64      resident
//  5      128             2 x 128     resident
//  6..7   192, 128        3 x 64      resident
//  8..9   256, 192        2 x 64      streaming
//  10     128             2 x 128     streaming
//  11..12 128, 64         2 x 64      streaming
// Of packed weights: 10 to 12.
#include "gemm_sm90.cuh"

namespace vitq::sm90 {

namespace {
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver, at run time: the library then loads on machines without one.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}
}  // namespace

int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

int encode_map(CUtensorMap* map, const void* data, Boxes boxes, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return VITQ_NO_DRIVER_SYMBOL;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {boxes == CODES ? 128u : 64u, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  CUresult result = encode(map, boxes == HALVES ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 2,
                           const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           boxes == PACKED_CODES ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : VITQ_BAD_ARGUMENT;
}

}  // namespace vitq::sm90

extern "C" int vitq_linear_sm90_configs(void) { return vitq::sm90::CONFIGS; }

extern "C" int vitq_linear_sm90(const VitqLinear* args, void* stream_) {
  using namespace vitq;
  const VitqLinear& p = *args;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (p.m <= 0) return p.m < 0 ? VITQ_BAD_ARGUMENT : 0;  // first: without rows there may be no pointers either
  if (int error = check_linear(p)) return error;
  if (p.a_bits != 8) return VITQ_UNSUPPORTED;
  if (p.weight_bits == 4) {
    const bool groups = p.multiplier != nullptr;
    return p.segments > 1 || (groups && (p.group_columns < VITQ_PACKED_GROUP || p.group_columns % VITQ_PACKED_GROUP)) ? VITQ_UNSUPPORTED : sm90::launch_packed(p, p.config, stream);
  }
  if (p.multiplier != nullptr) return VITQ_UNSUPPORTED;
  if (p.segments > 1) return sm90::launch_segments(p, p.config, stream);
  // Row scales alone too: its epilogue is straight-line code, 5 % faster at 2048 x 8192 x 8192 on an H200.
  const bool mixed = p.column_sums != nullptr || p.a_fp != nullptr || (p.row_scale != nullptr && p.config >= 8 && p.config != 9);
  if (mixed) return sm90::launch_mixed(p, p.config, stream);
  switch (epilogue_of(p)) {
    case FLOAT_OUT: return sm90::launch_float(p, p.config, stream);
    case CODES_OUT: return sm90::launch_codes(p, p.config, stream);
    case ACT_CODES_OUT: return sm90::launch_act_codes(p, p.config, stream);
    default: return sm90::launch_act_float(p, p.config, stream);
  }
}
