// Packed int4 codes (layout.py) to bytes, four at a time: those in the low or in the high nibbles of a word.
#pragma once

#include <stdint.h>

namespace vitq {

// The codes of a row that share a multiplier and a zero point: (code - zero)·multiplier, which fits a byte.
struct Multiplied {
  uint32_t multiplier, addend;

  // code + 8 (0 to 15) times up to 127 stays in 16 bits; what takes 8 of them off again and adds the offset modulo 256 keeps the sum positive.
  __device__ __forceinline__ Multiplied(int scale, int zero)
      : multiplier(scale), addend((0x800u - 8u * scale + (uint32_t(-zero * scale) & 0xFFu)) * 0x00010001u) {}

  __device__ __forceinline__ uint32_t two(uint32_t word) const {
    uint32_t biased;  // in one instruction, with one of the constants in a register
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(biased) : "r"(word), "n"(0x000F000F), "r"(0x00080008));
    return biased * multiplier + addend;
  }
  __device__ __forceinline__ uint32_t low(uint32_t word) const { return __byte_perm(two(word), two(word >> 8), 0x6240); }
  __device__ __forceinline__ uint32_t high(uint32_t word) const { return low(word >> 4); }
};

// 16 times the codes.
struct Shifted {
  __device__ __forceinline__ uint32_t low(uint32_t word) const { return word << 4 & 0xF0F0F0F0u; }
  __device__ __forceinline__ uint32_t high(uint32_t word) const { return word & 0xF0F0F0F0u; }
};

}  // namespace vitq
