// int8 matmul with AMX: one tdpbssd multiplies 16 channels of 64 codes by 16 rows of 64 codes.
//
//   tiles 0..3  sums: channels 0-15 and 16-31 x rows 0-15 and 16-31, int32
//   tiles 4, 5  w: [16 channels][64 codes], as the weight is stored
//   tiles 6, 7  x: [16 groups of k][16 rows][4 codes]
//
//   x: 32 rows              w: 32 channels
//   [k / 4][32][4] int8     [32][STRIDE] int8, or where the weight is stored
//
// A tile is loaded from rows that are any distance apart, so the weight is multiplied where it is stored. Only the rows
// whose ends are not the end of a cache line are copied. What is loaded of the weight stays in the first-level cache
// for all rows of x, which are loaded past it. tdpbf16ps multiplies pairs of bfloat16 in the same shapes.
//
// These instructions leave the vector units idle, so other work is done between them: see `between`.
//
// Without the instructions the same code runs on arrays. That is slow, and lets other CPUs test it.
#pragma once

#include <cstdint>
#include <cstring>

#include "tile_float.h"
#include "tile_generic.h"
#include "tile_vnni.h"

#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>
// Macros, since the number of a tile must be a literal: it is part of the instruction.
#define INT8FX_TILE_ZERO(t) _tile_zero(t)
#define INT8FX_TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define INT8FX_TILE_LOAD_PAST_CACHE(t, from, stride) _tile_stream_loadd(t, from, stride)
#define INT8FX_TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define INT8FX_TILE_DOT(sums, w, x) _tile_dpbssd(sums, w, x)
// GCC's tile loads do not say that they read memory: what was written before must be there.
#define INT8FX_TILE_READS(x, w, y) asm volatile("" ::"r"(x), "r"(w), "r"(y) : "memory")
#define INT8FX_TILE_DOT_BFLOAT16(sums, w, x) _tile_dpbf16ps(sums, w, x)
#else
#define INT8FX_TILE_ZERO(t) amx_arrays[t].zero()
#define INT8FX_TILE_LOAD(t, from, stride) amx_arrays[t].load(from, stride)
#define INT8FX_TILE_LOAD_PAST_CACHE(t, from, stride) amx_arrays[t].load(from, stride)
#define INT8FX_TILE_STORE(t, to, stride) amx_arrays[t].store(to, stride)
#define INT8FX_TILE_READS(x, w, y)
#define INT8FX_TILE_DOT(sums, w, x) amx_arrays[sums].dot(amx_arrays[w], amx_arrays[x])
#define INT8FX_TILE_DOT_BFLOAT16(sums, w, x) amx_arrays[sums].dot_bfloat16(amx_arrays[w], amx_arrays[x])
#endif

namespace int8fx {

#ifndef __AMX_INT8__
// A tile register, and the instructions on it.
struct AmxArray {
  int8_t bytes[16][64];

  void zero() { std::memset(bytes, 0, sizeof bytes); }
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(bytes[row], (const int8_t*)from + row * stride, 64);
  }
  void store(void* to, int64_t stride) const {
    for (int row = 0; row < 16; ++row) std::memcpy((int8_t*)to + row * stride, bytes[row], 64);
  }
  void dot(const AmxArray& w, const AmxArray& x) {
    for (int n = 0; n < 16; ++n) {
      int32_t sums[16];
      std::memcpy(sums, bytes[n], 64);
      for (int k = 0; k < 64; ++k)
        for (int m = 0; m < 16; ++m) sums[m] += int32_t(w.bytes[n][k]) * int32_t(x.bytes[k / 4][m * 4 + k % 4]);
      std::memcpy(bytes[n], sums, 64);
    }
  }
  void dot_bfloat16(const AmxArray& w, const AmxArray& x) {
    const auto value = [](const int8_t* at) {
      uint16_t bits;
      std::memcpy(&bits, at, sizeof bits);
      return std::bit_cast<float>(uint32_t(bits) << 16);
    };
    for (int n = 0; n < 16; ++n) {
      float sums[16];
      std::memcpy(sums, bytes[n], 64);
      for (int k = 0; k < 32; ++k)
        for (int m = 0; m < 16; ++m) sums[m] += value(w.bytes[n] + k * 2) * value(x.bytes[k / 2] + m * 4 + k % 2 * 2);
      std::memcpy(bytes[n], sums, 64);
    }
  }
};
inline thread_local AmxArray amx_arrays[8];
#endif

struct AmxTile {
  static constexpr bool IN_PLACE = true;
  static constexpr int MR = 32, NR = 32, PANEL = 32, UNIT = 32, KG = 64, BLOCK_M = 256, OFFSET = 0;
  static constexpr int64_t DEPTH = 1024, STRIDE = stride_of<int8_t>(DEPTH);
  using X = int8_t;
  using W = int8_t;

#ifdef __AMX_INT8__
  // Sets the shape of this thread's tiles, and releases them: other libraries set other shapes.
  struct Setup {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Setup() {
      // Linux ends a process that has not requested it. One that runs a package of AOTInductor has loaded nothing else.
      constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
      static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
      if (!permitted)
        throw std::runtime_error("int8fx: this system does not permit AMX's tiles; legal: kernels without them");
      static constexpr Shapes shapes;  // constant: GCC would not know that all of a local one is read
      _tile_loadconfig(&shapes);
    }
    Setup(const Setup&) = delete;
    ~Setup() { _tile_release(); }
  };
#else
  struct Setup {};
#endif

  static void pack_x(const int8_t* codes, int64_t stride, int64_t rows, int64_t k, X* out) {
    VnniTile::pack_x(codes, stride, rows, k, out);
  }

  static void load_w(const int8_t* w, int64_t k, W* out) {
    if (w != out) std::memcpy(out, w, k);
    std::memset(out + k, 0, (k + KG - 1) / KG * KG - k);
  }

  // Calls `between` once for each KG columns of each NR channels.
  template <typename Between = Nothing>
  static void run(int64_t k, const X* x, const Channels& channels, W* w, int32_t* y, bool first, int64_t rows,
                  const Between& between = {}) {
    const auto of = [&](int64_t n, const W* w, int64_t stride) {
      if (rows <= MR / 2)
        sums<true>(k, x, w, stride, y + n * MR, first, channels, n, between);
      else
        sums<false>(k, x, w, stride, y + n * MR, first, channels, n, between);
    };
    if (channels.in_place)
      for (int64_t n = 0; n < channels.count; n += NR) of(n, channels.rows + n * channels.stride, channels.stride);
    else
      run_channels<AmxTile>(k, channels, w, [&](int64_t n, const W* w) { of(n, w, STRIDE); });
  }

  // Up to four rows of fixed-point numbers of 32 bits, exactly: each is four digits to the base of 256, from -128 to
  // 127, and a digit is a row of x. Digit d has weight 256 ** d.
  //
  //   x  [k / 4][4 rows][4 digits][4 k] int8
  //   y  [16 channels][4 rows][4 digits] int32
  static constexpr int DIGIT_ROWS = 4, DIGITS = 4;
  static constexpr int64_t MOST_K = INT32_MAX / (128 * 127);  // sums of more may overflow

  static void pack_digits(const int32_t* numbers, int64_t k, int row, X* out) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint8_t Bytes16 __attribute__((vector_size(16)));
    const auto pack = [&](const int32_t* from, X* to) __attribute__((always_inline)) {
      Four four;
      std::memcpy(&four, from, sizeof four);
      const Bytes16 bytes = (Bytes16)((four + 0x80808080u) ^ 0x80808080u);  // 0 to 255 less 128
      const Bytes16 digits =
          __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      std::memcpy(to, &digits, sizeof digits);
    };
    out += row * 16;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4, out += DIGIT_ROWS * 16) pack(numbers + i, out);
    if (i < k) {
      int32_t rest[4] = {};
      std::copy(numbers + i, numbers + k, rest);
      pack(rest, out);
    }
  }

  // w: 16 channels, `stride` apart, of a multiple of KG columns. Fetches as much `ahead`.
  static void dot_digits(int64_t k, const X* x, const W* w, int64_t stride, const W* ahead, bool first, int32_t* y) {
    INT8FX_TILE_READS(x, w, y);
    if (first)
      INT8FX_TILE_ZERO(0);
    else
      INT8FX_TILE_LOAD(0, y, 64);
    INT8FX_TILE_ZERO(1);
    for (int64_t i = 0; i < k; i += KG) {
      for (int64_t n = 0; n < 16; ++n) __builtin_prefetch(ahead + n * stride + i, 0, 2);
      INT8FX_TILE_LOAD(4, w + i, stride);
      INT8FX_TILE_LOAD(6, x + i * 16, 64);
      if (i / KG % 2 == 0)
        INT8FX_TILE_DOT(0, 4, 6);
      else
        INT8FX_TILE_DOT(1, 4, 6);
    }
    alignas(64) int32_t odd[16 * 16];
    INT8FX_TILE_STORE(0, y, 64);
    INT8FX_TILE_STORE(1, odd, 64);
    for (int i = 0; i < 16 * 16; ++i) y[i] += odd[i];
  }

 private:
  template <bool HALF, typename Between>
  static void sums(int64_t k, const X* x, const W* w, int64_t stride, int32_t* y, bool first, const Channels& channels,
                   int64_t channel, const Between& between) {
    INT8FX_TILE_READS(x, w, y);
    if (first) {
      INT8FX_TILE_ZERO(0);
      INT8FX_TILE_ZERO(1);
      INT8FX_TILE_ZERO(2);
      INT8FX_TILE_ZERO(3);
    } else {
      INT8FX_TILE_LOAD(0, y, MR * 4);
      INT8FX_TILE_LOAD(2, y + 16 * MR, MR * 4);
      if (!HALF) {
        INT8FX_TILE_LOAD(1, y + 16, MR * 4);
        INT8FX_TILE_LOAD(3, y + 16 * MR + 16, MR * 4);
      }
    }
    for (int64_t i = 0; i < k; i += KG, x += MR * KG, w += KG) {
      channels.fetch<NR>(channel, i);
      INT8FX_TILE_LOAD(4, w, stride);
      INT8FX_TILE_LOAD_PAST_CACHE(6, x, MR * 4);
      INT8FX_TILE_DOT(0, 4, 6);
      INT8FX_TILE_LOAD(5, w + 16 * stride, stride);
      INT8FX_TILE_DOT(2, 5, 6);
      if (HALF)
        between();
      else {
        INT8FX_TILE_LOAD_PAST_CACHE(7, x + 64, MR * 4);
        between();
        INT8FX_TILE_DOT(1, 4, 7);
        INT8FX_TILE_DOT(3, 5, 7);
      }
    }
    INT8FX_TILE_STORE(0, y, MR * 4);
    INT8FX_TILE_STORE(2, y + 16 * MR, MR * 4);
    if (HALF) return;
    INT8FX_TILE_STORE(1, y + 16, MR * 4);
    INT8FX_TILE_STORE(3, y + 16 * MR + 16, MR * 4);
  }
};

// bfloat16 in the shapes of AmxTile. Its first and last lines are those of `AmxTile::sums`, which takes 9 to 20 % longer
// if they share them.
template <int PANEL>
struct AmxBfloat16Tile : Bfloat16Tile<AmxTile::MR, PANEL> {
  using Base = Bfloat16Tile<AmxTile::MR, PANEL>;
  static constexpr int MR = AmxTile::MR, NR = AmxTile::NR, STEP = 32;
  static constexpr int64_t STRIDE = Base::STRIDE;
  using X = typename Base::X;
  using W = typename Base::W;

  static void load_codes(const int8_t* codes, int64_t k, W* out) {
    Base::load_codes(codes, k, out);
    clear(k, out);
  }

  static void load_floats(const Floats& weight, int64_t at, int64_t k, W* out) {
    std::memcpy(out, static_cast<const W*>(weight.data) + at, k * sizeof(W));
    clear(k, out);
  }

  static void run(int64_t k, const X* x, const W* w, float* y, bool first, bool half) {
    INT8FX_TILE_READS(x, w, y);
    if (first) {
      INT8FX_TILE_ZERO(0);
      INT8FX_TILE_ZERO(1);
      INT8FX_TILE_ZERO(2);
      INT8FX_TILE_ZERO(3);
    } else {
      INT8FX_TILE_LOAD(0, y, MR * 4);
      INT8FX_TILE_LOAD(1, y + 16, MR * 4);
      INT8FX_TILE_LOAD(2, y + 16 * MR, MR * 4);
      INT8FX_TILE_LOAD(3, y + 16 * MR + 16, MR * 4);
    }
    for (int64_t i = 0; i < k; i += STEP, x += MR * STEP, w += STEP) {
      INT8FX_TILE_LOAD(4, w, STRIDE * 2);
      INT8FX_TILE_LOAD_PAST_CACHE(6, x, MR * 4);
      INT8FX_TILE_DOT_BFLOAT16(0, 4, 6);
      INT8FX_TILE_LOAD(5, w + 16 * STRIDE, STRIDE * 2);
      INT8FX_TILE_DOT_BFLOAT16(2, 5, 6);
      if (half) continue;
      INT8FX_TILE_LOAD_PAST_CACHE(7, x + 32, MR * 4);
      INT8FX_TILE_DOT_BFLOAT16(1, 4, 7);
      INT8FX_TILE_DOT_BFLOAT16(3, 5, 7);
    }
    INT8FX_TILE_STORE(0, y, MR * 4);
    INT8FX_TILE_STORE(1, y + 16, MR * 4);
    INT8FX_TILE_STORE(2, y + 16 * MR, MR * 4);
    INT8FX_TILE_STORE(3, y + 16 * MR + 16, MR * 4);
  }

 private:
  static void clear(int64_t k, W* out) { std::memset(out + k, 0, ((k + STEP - 1) / STEP * STEP - k) * sizeof(W)); }
};

}  // namespace int8fx

#undef INT8FX_TILE_ZERO
#undef INT8FX_TILE_LOAD
#undef INT8FX_TILE_LOAD_PAST_CACHE
#undef INT8FX_TILE_STORE
#undef INT8FX_TILE_READS
#undef INT8FX_TILE_DOT
#undef INT8FX_TILE_DOT_BFLOAT16
