// softmax(q·kᵀ·logit_scale + bias + mask)·v on int8 codes, for sm_80 and newer: which kernel takes which shape.
//
// Windows, anything else of at most 64 queries and keys, up to 144 keys with a bias, and 145 to 208 without one at head sizes
// up to 64: attention_registers.cuh.
// More: attention_passes.cuh.
#include <math.h>

#include "attention_passes.cuh"
#include "attention_registers.cuh"
#include "launch.cuh"

namespace vitq {
namespace {

constexpr int MOST_KEYS = 32768;  // 255 · 255 · keys fits an int32

struct Device {
  int sms, shared_sm, shared_block;
};

int ask_device(Device* device) {
  int id;
  cudaError_t error = cudaGetDevice(&id);
  if (!error) error = cudaDeviceGetAttribute(&device->sms, cudaDevAttrMultiProcessorCount, id);
  if (!error) error = cudaDeviceGetAttribute(&device->shared_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  if (!error) error = cudaDeviceGetAttribute(&device->shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  return error;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename Kernel>
int start(Kernel kernel, const Launch& p, int64_t blocks, int threads, int bytes, cudaStream_t stream) {
  if (blocks >= int64_t{1} << 31) return VITQ_UNSUPPORTED;
  if (bytes > 48 * 1024) {
    cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel));
    if (error) return error;
    // So that as many blocks fit an SM as were counted on.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(p);
  return cudaGetLastError();
}

void set_threads(Launch* p, int threads) {
  p->row_step = threads / p->copies.by;
  p->copy_step = threads % p->copies.by;
  p->quick = p->copy == 16 && p->copy_step == 0 && p->row_step % 8 == 0;
}

void natural_logits(Launch* p) {
  for (int i = 0; i < p->a.scales; ++i) p->own[i].c = p->a.logit_scale[i];
}

template <int KS, Extra EXTRA>
int launch_chunked(Launch p, const Device& device, cudaStream_t stream) {
  constexpr int ROWS = 16 * CHUNK_WARPS<KS>, BYTES = (ROWS + 2 * CHUNK_STAGES * CHUNK) * 32 * KS;
  if (BYTES > device.shared_block) return VITQ_UNSUPPORTED;
  if (EXTRA != PLAIN) natural_logits(&p);
  p.parts = ceil_div(p.a.queries, ROWS);
  p.by_parts = Divisor(p.parts);
  p.part_rows = ROWS;
  set_threads(&p, 32 * CHUNK_WARPS<KS>);
  const int64_t blocks = static_cast<int64_t>(p.a.batch) * p.windows.by * p.a.heads * p.parts;
  return start(chunked_attention_kernel<KS, EXTRA == PLAIN ? PLAIN : ADDED>, p, blocks, 32 * CHUNK_WARPS<KS>, BYTES, stream);
}

// Two passes over keys in shared memory. The block's warps are chosen so that their tiles come out even and the SM is full.
template <int KS, Extra EXTRA>
int launch_passes(Launch p, const Device& device, cudaStream_t stream) {
  constexpr int PITCH = 32 * KS, ALL = Passes<KS>::ALL;
  const int64_t pairs = static_cast<int64_t>(p.a.batch) * p.windows.by * p.a.heads;
  const int tiles = ceil_div(p.a.queries, 16), key_bytes = 2 * ceil_div(p.a.keys, 32) * 32 * PITCH;
  int best = 0, score = -1;
  if (EXTRA != PLAIN) natural_logits(&p);
  p.parts = 1;
  auto bytes = [&](int warps) { return key_bytes + 32 * warps * PITCH; };
  auto blocks_of = [&](int warps) {
    const int fit = device.shared_sm / (bytes(warps) + 1024);
    return bytes(warps) > device.shared_block ? 0 : fit < ALL / warps ? fit : ALL / warps;
  };
  for (int parts = 1; parts <= 4; ++parts) {
    const int part = ceil_div(tiles, parts);
    for (int warps = Passes<KS>::WARPS; warps >= 4; --warps) {
      const int rounds = ceil_div(part, warps);
      const int worth = 1000 * blocks_of(warps) * part / rounds;  // warps at work on an SM, on average
      if (worth > score + score / 16) {  // another part loads all keys again
        score = worth;
        best = warps;
        p.parts = ceil_div(tiles, part);
      }
    }
  }
  if (score <= 0) return launch_chunked<KS, EXTRA>(p, device, stream);
  // One round of tiles a warp, or half of one, if the machine would not be full otherwise.
  for (int candidate : {best, 4}) {
    const int more = ceil_div(tiles, candidate);
    if (more > p.parts && pairs * more <= device.sms * blocks_of(candidate)) {
      p.parts = more;
      best = candidate;
    }
  }
  p.by_parts = Divisor(p.parts);
  p.part_rows = 16 * ceil_div(tiles, p.parts);
  if (best > p.part_rows / 16) best = p.part_rows / 16 < 4 ? 4 : p.part_rows / 16;
  set_threads(&p, 32 * best);
  constexpr Extra GLOBAL = EXTRA == PLAIN ? PLAIN : ADDED;
  return start(p.q_zeros ? passes_kernel<KS, GLOBAL, true> : passes_kernel<KS, GLOBAL, false>, p, pairs * p.parts, 32 * best,
               bytes(best), stream);
}

template <int NB, int KS, Extra EXTRA>
int launch(Launch p, const Device& device, cudaStream_t stream) {
  using S = Shape<NB>;
  if (EXTRA == ADDED) natural_logits(&p);
  const int64_t units = static_cast<int64_t>(p.a.batch) * p.windows.by;
  const int tiles = ceil_div(p.a.queries, 16), slots = device.sms * S::BLOCKS;
  int warps;
  if (S::WARP) {
    // Few windows: fewer warps a block, on more SMs, but not so few that filling the bias takes longer.
    p.parts = 1;
    p.part_rows = 16 * tiles;
    warps = S::WARPS;
    while (warps > (EXTRA == KEPT ? 4 : 1) && units * p.a.heads <= static_cast<int64_t>(slots) * (warps / 2)) warps /= 2;
  } else {
    // One round of tiles a warp, or half of one, if the machine would not be full otherwise.
    int most = S::TILES;
    const int fewer[2] = {S::WARPS, 4};
    for (int candidate : fewer) {
      if (units * p.a.heads * ceil_div(tiles, candidate) <= slots) most = candidate;
    }
    p.parts = ceil_div(tiles, most);
    p.part_rows = 16 * ceil_div(tiles, p.parts);
    p.by_parts = Divisor(p.parts);
    warps = p.part_rows / 16 < S::WARPS ? p.part_rows / 16 : S::WARPS;
  }
  const int64_t items = S::WARP ? units : units * p.a.heads * p.parts;
  if (items >= int64_t{1} << 30) return VITQ_UNSUPPORTED;
  p.items = static_cast<int>(items);
  set_threads(&p, S::WARP ? 32 : 32 * warps);

  p.query_bytes = p.part_rows * 32 * KS;
  p.stage_bytes = p.query_bytes + 2 * S::KEYS * 32 * KS;
  const int stage = p.stage_bytes * (S::WARP ? warps : 1);
  p.geometry_bytes = p.a.window_h ? ceil_div(p.a.keys, 32) * 128 : 0;
  const int kept = EXTRA == KEPT ? tiles * NB * 512 : 0;
  int blocks = S::BLOCKS, bytes = 0;
  for (; blocks; --blocks) {  // two stages, if as many blocks then fit an SM; else one
    for (p.stages = 2; p.stages; --p.stages) {
      bytes = p.geometry_bytes + kept + p.stages * stage;
      if (bytes <= device.shared_block && blocks * (bytes + 1024) <= device.shared_sm) break;
    }
    if (p.stages) break;
  }
  if (!blocks) return launch_chunked<KS, EXTRA>(p, device, stream);
  int64_t grid = static_cast<int64_t>(device.sms) * blocks;
  if (S::WARP) {
    const int64_t needed = (items + warps - 1) / warps, most = grid / p.a.heads > 1 ? grid / p.a.heads : 1;
    grid = (needed < most ? needed : most) * p.a.heads;
  } else if (items < grid) {
    grid = items;
  }
  return start(attention_kernel<NB, KS, EXTRA>, p, grid, 32 * warps, bytes, stream);
}

template <int KS>
int launch_dim(const Launch& p, const Device& device, cudaStream_t stream) {
  const bool shifted = p.a.window_h && (p.a.shift_h || p.a.shift_w);
  const bool plain = !p.a.bias && !p.a.mask && !shifted;
  const int keys = p.a.keys;
  if (keys <= 64 && p.a.queries <= 64) {
    if (plain) return launch<8, KS, PLAIN>(p, device, stream);
    if (p.a.mask) return launch<8, KS, ADDED>(p, device, stream);
    return keys <= 49 ? launch<7, KS, KEPT>(p, device, stream) : launch<8, KS, KEPT>(p, device, stream);
  }
  // A ViT's 197 tokens: DeiT-S at batch 200 on an H200 takes 58 us with the logits in registers, 80 in two passes.
  if (KS == 2 && keys > 144 && keys <= 208 && plain) return launch<26, 2, PLAIN>(p, device, stream);
  if (plain) return launch_passes<KS, PLAIN>(p, device, stream);
  if (keys <= 144) return launch<18, KS, ADDED>(p, device, stream);
  return launch_passes<KS, ADDED>(p, device, stream);
}

bool multiple(int64_t a, int64_t b, int64_t c, int64_t d, int of) { return (a | b | c | d) % of == 0; }

// The widest copy that the alignment of every row of q, k, v and pad allows.
int copy_width(const VitqAttention& a) {
  for (int bytes = 16; bytes >= 4; bytes /= 2) {
    const bool fits = a.dim % bytes == 0 &&
                      multiple(reinterpret_cast<int64_t>(a.q), a.q_strides[0], a.q_strides[1], a.q_strides[2], bytes) &&
                      multiple(reinterpret_cast<int64_t>(a.k), a.k_strides[0], a.k_strides[1], a.k_strides[2], bytes) &&
                      multiple(reinterpret_cast<int64_t>(a.v), a.v_strides[0], a.v_strides[1], a.v_strides[2], bytes) &&
                      reinterpret_cast<int64_t>(a.pad) % bytes == 0;
    if (fits) return bytes;
  }
  return 1;
}

bool valid(const VitqAttention& a) {
  const bool codes = a.out_dtype == VITQ_S8;
  if (!a.q || !a.k || !a.v || !a.out) return false;
  if (a.batch < 0 || a.heads <= 0 || a.queries < 0 || a.keys <= 0 || a.dim <= 0) return false;
  if (a.p_bits < 1 || a.p_bits > 8) return false;
  if ((a.scales != 1 && a.scales != a.heads) || !a.logit_scale || !a.v_scale || !a.q_zero || !a.v_zero) return false;
  for (int i = 0; i < a.scales; ++i) {
    if (a.q_zero[i] < -128 || a.q_zero[i] > 127 || a.v_zero[i] < -128 || a.v_zero[i] > 127) return false;
    if (!(a.logit_scale[i] >= 0.0f) || !isfinite(a.logit_scale[i]) || !isfinite(a.v_scale[i])) return false;
  }
  if (!codes && a.out_dtype != VITQ_F32 && a.out_dtype != VITQ_F16 && a.out_dtype != VITQ_BF16) return false;
  if (codes) {
    if (!(a.out_scale > 0.0f) || a.qmin < -128 || a.qmax > 127 || a.qmin > a.qmax) return false;
    if (a.out_zero < -128 || a.out_zero > 127) return false;
  }
  if (a.mask && a.mask_windows <= 0) return false;
  if (a.window_h < 0) return false;
  if (a.window_h) {
    if (a.window_w <= 0 || a.height <= 0 || a.width <= 0 || a.queries != a.keys) return false;
    if (static_cast<int64_t>(a.window_h) * a.window_w != a.keys) return false;
    if (static_cast<int64_t>(a.height) * a.width >= int64_t{1} << 31) return false;
    for (int64_t stride : {a.q_strides[1], a.k_strides[1], a.v_strides[1]}) {
      if (stride != static_cast<int32_t>(stride)) return false;
    }
    if (a.shift_h < 0 || a.shift_w < 0 || a.shift_h >= a.window_h || a.shift_w >= a.window_w) return false;
    if (!a.pad && (a.height % a.window_h || a.width % a.window_w)) return false;
  }
  return true;
}

}  // namespace
}  // namespace vitq

extern "C" int vitq_attention_supports(int32_t queries, int32_t keys, int32_t dim, int32_t windows) {
  const bool fits = queries > 0 && keys > 0 && keys <= vitq::MOST_KEYS && dim > 0 && dim <= 128 && windows >= 0;
  return fits ? 0 : VITQ_UNSUPPORTED;
}

extern "C" int vitq_attention(const VitqAttention* args, void* stream) {
  using namespace vitq;
  if (!args) return VITQ_BAD_ARGUMENT;
  const VitqAttention& a = *args;
  if (a.batch == 0 || a.queries == 0) return 0;
  if (!valid(a)) return VITQ_BAD_ARGUMENT;
  if (vitq_attention_supports(a.queries, a.keys, a.dim, a.window_h) || a.scales > VITQ_MOST_HEADS) return VITQ_UNSUPPORTED;

  Launch p = {};
  p.a = a;
  for (uint32_t& start : p.start) start = MAGIC_BITS;
  p.top = static_cast<float>((1 << a.p_bits) - 1);
  const bool codes = a.out_dtype == VITQ_S8;
  p.range = static_cast<float>(a.qmax - a.qmin);
  const bool plain = !a.bias && !a.mask && !(a.window_h && (a.shift_h || a.shift_w));
  p.per_head = a.scales > 1;
  for (int i = 0; i < a.scales; ++i) {
    Head& head = p.own[i];
    head = {a.logit_scale[i] * LOG2E, codes ? a.v_scale[i] / a.out_scale : a.v_scale[i], a.q_zero[i], a.v_zero[i]};
    // Without bias, differences of logits are multiples of c: beyond 64 each is 0 or underflows, and so does the result stay.
    if (plain) head.c = fminf(fmaxf(head.c, 1e-30f), 64.0f);
    if (codes && a.qmax > a.qmin) head.share /= p.range;
    p.q_zeros |= head.q_zero != 0;
    p.v_zeros |= head.v_zero != 0;
  }
  p.zero = a.qmax > a.qmin ? (a.out_zero - a.qmin) / p.range : 0.0f;
  p.low = MAGIC + a.qmin;
  p.copy = copy_width(a);
  p.copies = Divisor(a.dim / p.copy);
  p.heads = Divisor(a.heads);
  if (a.window_h) {
    const int64_t across = ceil_div(a.width, a.window_w), windows = across * ceil_div(a.height, a.window_h);
    p.windows_x = Divisor(static_cast<int>(across));
    p.windows = Divisor(static_cast<int>(windows));
    p.window_w = Divisor(a.window_w);
    p.pads = a.height % a.window_h || a.width % a.window_w;
    p.from_y = a.shift_h % a.height;
    p.from_x = a.shift_w % a.width;
  }
  p.pairs = a.keys % 2 == 0 &&
            (!a.bias || (reinterpret_cast<int64_t>(a.bias) % 8 == 0 && a.bias_head % 2 == 0 && a.bias_row % 2 == 0)) &&
            (!a.mask || (reinterpret_cast<int64_t>(a.mask) % 8 == 0 && a.mask_window % 2 == 0 && a.mask_row % 2 == 0));
  const int element = codes ? 1 : a.out_dtype == VITQ_F32 ? 4 : 2;
  p.by_four = a.dim % 4 == 0 && reinterpret_cast<int64_t>(a.out) % (4 * element) == 0;
  p.wide = a.dim % 32 == 0 && reinterpret_cast<int64_t>(a.out) % 16 == 0;

  Device device;
  const int error = ask_device(&device);
  if (error) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch ((a.dim + 31) / 32) {
    case 1: return launch_dim<1>(p, device, s);
    case 2: return launch_dim<2>(p, device, s);
    case 3: return launch_dim<3>(p, device, s);
    default: return launch_dim<4>(p, device, s);
  }
}
