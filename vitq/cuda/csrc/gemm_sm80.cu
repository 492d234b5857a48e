// vitq_linear_sm80: the choice of a tile; the kernel is in gemm_sm80.cuh.
#include <algorithm>

#include "gemm_sm80.cuh"
#include "launch.cuh"

namespace vitq {
namespace sm80 {
namespace {

constexpr int FORCE_NATIVE_INT4 = 100;  // config + 100, 4-bit inputs: the s4 instruction even where it is emulated

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
  if (int error = vitq::check_linear(p)) return error;
  if (p.multiplier != nullptr) return VITQ_UNSUPPORTED;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  vitq::Gpu device;
  if (int error = vitq::gpu_of_now(device)) return error;
  bool segments = p.segments > 1 || p.column_sums != nullptr || p.a_fp != nullptr;
  int tile = p.config;
  bool native = device.major == 8;
  if (p.a_bits == 4 && tile >= FORCE_NATIVE_INT4) native = true, tile -= FORCE_NATIVE_INT4;
  if (tile < -1 || tile >= TILE_COUNT) return VITQ_BAD_ARGUMENT;
  if (tile == -1) tile = choose(p, segments, device.processors);
  if (p.a_bits == 4) return segments ? linear_segments_w4a4(p, tile, native, stream) : linear_w4a4(p, tile, native, stream);
  if (segments) return linear_segments(p, tile, stream);
  return p.weight_bits == 4 ? linear_w4a8(p, tile, stream) : linear_w8a8(p, tile, stream);
}
