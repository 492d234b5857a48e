// Images to codes of patches, static and exact: the input of a patch embedding that runs as a linear layer.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "codes.cuh"
#include "vitq_cuda.h"

namespace vitq {
namespace {

constexpr int THREADS = 128;
// Of codes that a block gathers. Small blocks: many share a multiprocessor, and some load while others store.
constexpr int STAGE_BYTES = 4096;
constexpr int MOST_STAGE = 46 * 1024;
constexpr int IN_FLIGHT = 4;  // loads of 16 bytes a thread has under way

struct PatchesLaunch {
  const void* images;
  int8_t* out;
  int64_t out_stride;
  StaticCodes code;
  int32_t channels, height, width, patch_h, patch_w;
  int32_t down, across;      // patches of an image
  int32_t features;          // of a patch
  int64_t lines;             // rows of patches, of all images
  int32_t lines_each, across_each, channels_each;  // that a block takes
  int32_t features_each;     // of a patch in these channels
  int32_t chunks, together;  // loads that cover a row of pixels of across_each patches; rows of pixels that threads meet at once
  int32_t pitch;             // bytes between patches in shared memory
  int32_t word;              // bytes of codes in a store: 16, 4, or 1 where rows of codes are not aligned
  Divisor by_chunks, by_patch_w, by_patch_h, by_strip, by_strips, by_groups, by_words;
};

// 16 bytes of pixels as they lie in memory; of those beyond the row, of which `left` are left, zeros. VECTORS: rows are whole vectors.
template <typename T, bool VECTORS>
__device__ __forceinline__ uint4 load_pixels(const T* from, int left) {
  if constexpr (VECTORS) return left > 0 ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      if (i < left) word[i] = __ldg(reinterpret_cast<const uint32_t*>(from) + i);
    } else {
      const auto* halves = reinterpret_cast<const uint16_t*>(from);
      if (2 * i < left) word[i] = __ldg(halves + 2 * i);
      if (2 * i + 1 < left) word[i] |= uint32_t(__ldg(halves + 2 * i + 1)) << 16;
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename T>
__device__ __forceinline__ void to_pixels(const uint4& raw, float (&x)[16 / sizeof(T)]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = both.x;
      x[2 * i + 1] = both.y;
    } else {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
}

template <typename T>
__device__ __forceinline__ float load_pixel(const T* from) {
  if constexpr (sizeof(T) == 4) return *from;
  else if constexpr (std::is_same_v<T, __half>) return __half2float(*from);
  else return __bfloat162float(*from);
}

// A block takes `lines_each` rows of patches of an image (or a part of one, `across_each` wide), in all channels or in one:
// reads along image rows, codes to their places in shared memory, features of patches out. A thread stays in its columns of
// pixels, so that it looks only once for the patches there. GRAIN: neighbouring pixels that surely lie in one patch. ROWS:
// rows of pixels of a patch that a thread takes at once: 4 x 4 pixels are 16 neighbouring codes. VECTORS: loads by 16 bytes.
template <typename T, int GRAIN, int ROWS, bool VECTORS>
__global__ void __launch_bounds__(THREADS, 8) patches_kernel(const __grid_constant__ PatchesLaunch p) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int EACH = 16 / sizeof(T), PIECES = EACH / GRAIN, UNITS = VECTORS ? IN_FLIGHT / ROWS : 2;
  const unsigned strip = p.by_groups.divide(blockIdx.x), group = blockIdx.x - strip * (p.channels / p.channels_each);
  const unsigned image = p.by_strips.divide(strip);
  const int strips = (p.down + p.lines_each - 1) / p.lines_each;
  const int line = int(strip - image * strips) * p.lines_each, lines = min(p.lines_each, p.down - line);
  const int first = blockIdx.y * p.across_each, across = min(p.across_each, p.across - first);
  const int area = p.patch_h * p.patch_w;

  const unsigned y = p.by_chunks.divide(threadIdx.x), x = EACH * (threadIdx.x - y * p.chunks);
  const int left = p.width - first * p.patch_w - int(x);
  int place[PIECES];  // of the pixels of a load, from where the row of pixels lies; -1 beyond the patches
#pragma unroll
  for (int j = 0; j < PIECES; j++) {
    const unsigned patch = p.by_patch_w.divide(x + j * GRAIN);
    place[j] = int(patch) < across ? int(patch * p.pitch + x + j * GRAIN - patch * p.patch_w) : -1;
  }
  const T* images = static_cast<const T*>(p.images) +
                    ((int64_t(image) * p.channels + group * p.channels_each) * p.height + line * p.patch_h) * p.width +
                    first * p.patch_w + x;
  const unsigned high = p.patch_h / ROWS, rows = p.lines_each * high, total = rows * p.channels_each;

  for (unsigned start = y; start < total; start += p.together * UNITS) {
    uint4 raw[UNITS][ROWS];
    int to[UNITS];
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
      const unsigned unit = start + i * p.together;
      const unsigned channel = p.by_strip.divide(unit), row = unit - channel * rows;
      const unsigned down = p.by_patch_h.divide(row), dy = row - down * high;
      const bool inside = unit < total && int(down) < lines;
      to[i] = inside ? int(down * across * p.pitch + channel * area + dy * ROWS * p.patch_w) : -1;
      const T* from = images + (channel * p.height + row * ROWS) * p.width;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        raw[i][r] = make_uint4(0, 0, 0, 0);
        if (inside) raw[i][r] = load_pixels<T, VECTORS>(from + r * p.width, left);
      }
    }
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
      if (to[i] < 0) continue;
      uint32_t word[ROWS][EACH / 4];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float value[EACH];
        to_pixels<T>(raw[i][r], value);
#pragma unroll
        for (int w = 0; w < EACH / 4; w++)
          word[r][w] = pack_codes(static_code(value[4 * w], p.code), static_code(value[4 * w + 1], p.code),
                                  static_code(value[4 * w + 2], p.code), static_code(value[4 * w + 3], p.code));
      }
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        if (place[j] < 0) continue;
        uint8_t* at = shared + to[i] + place[j];
        const int shift = j * GRAIN % 4 * 8;
        const uint32_t codes = word[0][j * GRAIN / 4] >> shift;
        if constexpr (ROWS == 4) *reinterpret_cast<uint4*>(at) = make_uint4(word[0][j], word[1][j], word[2][j], word[3][j]);
        else if constexpr (GRAIN == 8) *reinterpret_cast<uint2*>(at) = make_uint2(word[0][0], word[0][EACH / 4 - 1]);
        else if constexpr (GRAIN == 4) *reinterpret_cast<uint32_t*>(at) = codes;
        else if constexpr (GRAIN == 2) *reinterpret_cast<uint16_t*>(at) = uint16_t(codes);
        else *at = uint8_t(codes);
      }
    }
  }
  __syncthreads();

  // The block's patches follow each other, unless it takes a part of a line.
  const int64_t patch = (int64_t(image) * p.down + line) * p.across + first;
  int8_t* out = p.out + patch * p.out_stride + group * p.features_each;
  const unsigned patches = unsigned(lines) * across, each = (p.features_each + p.word - 1) / p.word;
  const auto copy = [&](auto word) {
    using Word = decltype(word);
#pragma unroll 2
    for (unsigned i = threadIdx.x; i < patches * each; i += blockDim.x) {
      const unsigned local = p.by_words.divide(i), column = (i - local * each) * unsigned(sizeof(Word));
      *reinterpret_cast<Word*>(out + local * p.out_stride + column) =
          *reinterpret_cast<const Word*>(shared + local * p.pitch + column);
    }
  };
  if (p.word == 16) copy(uint4());
  else if (p.word == 4) copy(uint32_t());
  else copy(uint8_t());
}

// Patches that are too large for shared memory, or wider than a block: one code at a time.
template <typename T>
__global__ void __launch_bounds__(THREADS) large_patches_kernel(const __grid_constant__ PatchesLaunch p) {
  const T* images = static_cast<const T*>(p.images);
  const int64_t total = p.lines * p.across * p.features, stride = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < total; i += stride) {
    const int64_t patch = i / p.features, line = patch / p.across, image = line / p.down;
    const int feature = int(i - patch * p.features), row = feature / p.patch_w, channel = row / p.patch_h;
    const int64_t y = (line - image * p.down) * p.patch_h + row - channel * p.patch_h;
    const int64_t x = (patch - line * p.across) * p.patch_w + feature - row * p.patch_w;
    const float value = load_pixel(images + ((image * p.channels + channel) * p.height + y) * p.width + x);
    p.out[patch * p.out_stride + feature] = int8_t(__float_as_uint(static_code(value, p.code)));
  }
}

template <typename T>
int launch_large(const PatchesLaunch& p, cudaStream_t stream) {
  const int64_t blocks = (p.lines * p.across * p.features + THREADS - 1) / THREADS;
  large_patches_kernel<T><<<unsigned(std::min<int64_t>(blocks, 1 << 16)), THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
int launch(PatchesLaunch p, cudaStream_t stream) {
  constexpr int EACH = 16 / sizeof(T);
  const auto whole = [&](int bytes) {
    return p.features % bytes == 0 && p.out_stride % bytes == 0 && uintptr_t(p.out) % bytes == 0;
  };
  p.word = whole(16) ? 16 : whole(4) ? 4 : 1;
  const bool vectors = p.width % EACH == 0 && uintptr_t(p.images) % 16 == 0;
  int grain = vectors ? EACH : 1;
  while (p.patch_w % grain) grain /= 2;
  const int rows = p.patch_w == 4 && grain == 4 && p.patch_h % 4 == 0 && p.word == 16 ? 4 : 1;

  // Patches lie an odd number of words apart, of 4, 8 or 16 bytes, so that lanes meet other banks.
  const int64_t area = int64_t(p.patch_h) * p.patch_w;
  const int64_t odd = p.word == 16 ? 16 : std::max(grain, 4);
  const auto pitch = [&](int64_t features) { return (features + odd - 1) / odd * odd | odd; };
  p.channels_each = p.channels;
  if (p.word == 16 && area % 32 == 0 && p.across * pitch(p.features) > STAGE_BYTES) p.channels_each = 1;
  const int64_t features = area * p.channels_each, bytes = pitch(features);
  // A part of a line starts where a load does.
  const int64_t step = EACH / std::gcd(EACH, p.patch_w);
  const int64_t parts = std::max<int64_t>((p.across * bytes + STAGE_BYTES - 1) / STAGE_BYTES,
                                          (int64_t(p.across) * p.patch_w + EACH * THREADS - 1) / (EACH * THREADS));
  const int64_t across = std::min<int64_t>((p.across + step * parts - 1) / (step * parts) * step, p.across);
  const int64_t chunks = (across * p.patch_w + EACH - 1) / EACH;
  const bool fits = across * bytes <= MOST_STAGE && chunks <= THREADS;
  const int64_t lines = across == p.across ? std::clamp<int64_t>(STAGE_BYTES / (across * bytes), 1, p.down) : 1;
  const int64_t groups = p.channels / p.channels_each, strips = (p.down + lines - 1) / lines;
  const int64_t blocks = p.lines / p.down * strips * groups, many = (p.across + across - 1) / across;
  if (!fits || blocks > INT32_MAX || many > 65535 || int64_t(p.channels) * p.height * p.width > INT32_MAX)
    return launch_large<T>(p, stream);

  p.features_each = int(features);
  p.pitch = int(bytes);
  p.across_each = int(across);
  p.lines_each = int(lines);
  p.chunks = int(chunks);
  const int high = p.patch_h / rows, total = p.lines_each * high * p.channels_each;
  const int most = std::min(THREADS / p.chunks, total), passes = (total + most - 1) / most;
  p.together = (total + passes - 1) / passes;
  p.by_chunks = divisor(p.chunks);
  p.by_patch_w = divisor(p.patch_w);
  p.by_patch_h = divisor(high);
  p.by_strip = divisor(p.lines_each * high);
  p.by_strips = divisor(uint32_t(strips));
  p.by_groups = divisor(uint32_t(groups));
  p.by_words = divisor((p.features_each + p.word - 1) / p.word);

  void (*kernel)(PatchesLaunch);
  if (!vectors) kernel = patches_kernel<T, 1, 1, false>;
  else if (rows == 4) kernel = patches_kernel<T, 4, 4, true>;
  else if (grain == EACH) kernel = patches_kernel<T, EACH, 1, true>;
  else if (grain == 4) kernel = patches_kernel<T, 4, 1, true>;
  else kernel = grain == 2 ? patches_kernel<T, 2, 1, true> : patches_kernel<T, 1, 1, true>;
  kernel<<<dim3(unsigned(blocks), unsigned(many)), p.chunks * p.together, p.lines_each * p.across_each * p.pitch, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace vitq

extern "C" int vitq_patches(const VitqPatches* args, void* stream_) {
  using namespace vitq;
  if (!args) return VITQ_BAD_ARGUMENT;
  const VitqPatches& a = *args;
  if (a.dtype != VITQ_F32 && a.dtype != VITQ_F16 && a.dtype != VITQ_BF16) return VITQ_BAD_ARGUMENT;
  if (a.batch < 0 || a.channels < 1 || a.height < 0 || a.width < 0 || a.patch_h < 1 || a.patch_w < 1) return VITQ_BAD_ARGUMENT;
  if (a.qmin < -128 || a.qmax > 127 || a.qmin > a.qmax || a.zero < -(1 << 20) || a.zero > 1 << 20) return VITQ_BAD_ARGUMENT;
  if (!(a.scale >= 0x1p-100f && a.scale <= 0x1p100f)) return VITQ_BAD_ARGUMENT;
  const int64_t features = int64_t(a.channels) * a.patch_h * a.patch_w;
  if (features > INT32_MAX) return VITQ_UNSUPPORTED;

  PatchesLaunch p{};
  p.down = a.height / a.patch_h;
  p.across = a.width / a.patch_w;
  p.lines = int64_t(a.batch) * p.down;
  if (!p.lines || !p.across) return 0;
  if (!a.images || !a.out) return VITQ_BAD_ARGUMENT;
  p.images = a.images;
  p.out = a.out;
  p.out_stride = a.out_stride;
  p.code = make_static(a.scale, a.zero, a.qmin, a.qmax);
  p.channels = a.channels;
  p.height = a.height;
  p.width = a.width;
  p.patch_h = a.patch_h;
  p.patch_w = a.patch_w;
  p.features = int(features);
  const auto stream = static_cast<cudaStream_t>(stream_);
  return a.dtype == VITQ_F16 ? launch<__half>(p, stream)
         : a.dtype == VITQ_BF16 ? launch<__nv_bfloat16>(p, stream) : launch<float>(p, stream);
}
