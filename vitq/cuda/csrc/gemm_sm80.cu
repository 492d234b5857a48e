// vitq_linear_sm80: argument checks and the choice of a tile; the kernel is in gemm_sm80.cuh.
#include <algorithm>
#include <atomic>

#include "gemm_sm80.cuh"

namespace vitq {
namespace sm80 {
namespace {

constexpr int FORCE_NATIVE_INT4 = 100;  // config + 100, 4-bit inputs: the s4 instruction even where it is emulated

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int check(const VitqLinear& p) {
  if (p.n < 1 || p.k < 32 || p.a_columns < 1 || p.a_columns > p.k || p.rows_per_group < 1) return VITQ_BAD_ARGUMENT;
  if ((p.a_bits != 8 && p.a_bits != 4) || (p.weight_bits != 8 && p.weight_bits != 4)) return VITQ_BAD_ARGUMENT;
  if (p.k % (p.weight_bits == 4 ? 64 : 32) != 0) return VITQ_BAD_ARGUMENT;
  if (p.weight == nullptr || p.scale == nullptr || p.out.data == nullptr || p.a == nullptr) return VITQ_BAD_ARGUMENT;
  if (p.lda % 16 != 0 || !aligned16(p.a) || !aligned16(p.weight)) return VITQ_BAD_ARGUMENT;
  if (!aligned16(p.scale) || !aligned16(p.zero) || !aligned16(p.bias)) return VITQ_BAD_ARGUMENT;
  if (p.segments < 1 || p.segments > VITQ_MAX_SEGMENTS) return VITQ_BAD_ARGUMENT;
  for (int s = 0, before = 0; s < p.segments; before = p.segment_ends[s++])
    if (p.segment_ends[s] <= before || p.segment_ends[s] % 32 != 0) return VITQ_BAD_ARGUMENT;
  if (p.segment_ends[p.segments - 1] != p.k) return VITQ_BAD_ARGUMENT;
  if (p.zero != nullptr && p.row_sums == nullptr) return VITQ_BAD_ARGUMENT;
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

struct Gpu {
  int processors, major;
};

int gpu(Gpu& out) {
  constexpr int DEVICES = 64;
  static std::atomic<uint64_t> known[DEVICES];  // processors << 32 | major
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  uint64_t packed = device < DEVICES ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int processors, major;
    if ((error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return error;
    if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != cudaSuccess) return error;
    packed = uint64_t(processors) << 32 | unsigned(major);
    if (device < DEVICES) known[device].store(packed, std::memory_order_relaxed);
  }
  out = {static_cast<int>(packed >> 32), static_cast<int>(packed & 0xFFFFFFFFu)};
  return 0;
}

// Estimated cycles of a tile configuration: the fullest SM's share of products and of traffic from L2, or, if that is less,
// what the latency of its loads costs; then its outputs.
double estimate(const VitqLinear& p, const Tile& t, int processors) {
  double tiles = double((p.m + t.bm - 1) / t.bm) * ((p.n + t.bn - 1) / t.bn);
  double share = double((int64_t(tiles) + processors - 1) / processors);
  double rounds = double((int64_t(share) + t.blocks - 1) / t.blocks);
  double bytes_k = p.k * p.a_bits / 8.0 + 2.0 * (p.a_fp != nullptr ? p.k_fp : 0);
  double rate = t.wm * t.wn >= 64 * 64 ? 2400 : t.wm * t.wn >= 32 * 64 ? 2000 : 1400;  // multiply-adds a cycle
  double products = share * t.bm * t.bn * bytes_k / rate;
  double traffic = share * (t.bm + t.bn * p.weight_bits / double(p.a_bits)) * bytes_k / 36;
  double latency = rounds * (1500 + 250.0 * (int64_t(bytes_k) + t.bk - 1) / t.bk);
  return std::max({products, traffic, latency}) + share * t.bm * t.bn * 0.08;
}

int choose(const VitqLinear& p, bool segments, int processors) {
  int best = -1;
  double least = 0;
  for (int i = 0; i < TILE_COUNT; ++i) {
    if (segments && !TILES[i].takes_segments()) continue;
    double cycles = estimate(p, TILES[i], processors);
    if (best < 0 || cycles < least) best = i, least = cycles;
  }
  return best;
}

}  // namespace
}  // namespace sm80
}  // namespace vitq

extern "C" int vitq_linear_sm80_configs(void) { return vitq::sm80::TILE_COUNT; }

extern "C" int vitq_linear_sm80(const VitqLinear* args, void* stream_) {
  using namespace vitq::sm80;
  if (args == nullptr) return VITQ_BAD_ARGUMENT;
  const VitqLinear& p = *args;
  if (p.m <= 0) return p.m < 0 ? VITQ_BAD_ARGUMENT : 0;  // first: without rows there may be no pointers either
  if (int error = check(p)) return error;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Gpu device;
  if (int error = gpu(device)) return error;
  bool segments = p.segments > 1 || p.zero != nullptr || p.a_fp != nullptr;
  int tile = p.config;
  bool native = device.major == 8;
  if (p.a_bits == 4 && tile >= FORCE_NATIVE_INT4) native = true, tile -= FORCE_NATIVE_INT4;
  if (tile < -1 || tile >= TILE_COUNT) return VITQ_BAD_ARGUMENT;
  if (tile == -1) tile = choose(p, segments, device.processors);
  if (p.a_bits == 4) return segments ? linear_segments_w4a4(p, tile, native, stream) : linear_w4a4(p, tile, native, stream);
  if (segments) return linear_segments(p, tile, stream);
  return p.weight_bits == 4 ? linear_w4a8(p, tile, stream) : linear_w8a8(p, tile, stream);
}
