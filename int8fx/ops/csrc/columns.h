// Which columns of a block are multiplied in int8, and which in floating point.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tile_generic.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace int8fx {

// Whether there is vpermb, which splits 64 codes of a row into those of columns that are multiplied in floating point
// and the others.
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define INT8FX_SPLITS
#endif

// Columns k to k + depth, of x and of the weight.
struct Block {
  int64_t k, depth;
  int64_t kept;  // that are multiplied in int8: all, where x has zeros in the others, or only these
  std::vector<int64_t> outliers;  // from k on, if it splits: that are multiplied in floating point with codes
  int64_t x_at = 0, floats_at = 0;  // where x's tiles have them: see Packed in product.h

  // Sorted columns. `excluded` are outliers and unquantised ones. Of 32 columns one is excluded at least if it splits,
  // of `one_of` columns if it compacts: multiplying zeros is cheaper than taking out fewer.
  Block(int64_t k, int64_t depth, [[maybe_unused]] const std::vector<int64_t>& all_outliers,
        [[maybe_unused]] const std::vector<int64_t>& excluded, [[maybe_unused]] int64_t one_of)
      : k(k), depth(depth), kept(depth) {
#ifdef INT8FX_SPLITS
    const std::vector<int64_t> out = within(excluded);
    if (int64_t(out.size()) * 32 < depth) return;
    if (int64_t(out.size()) * one_of >= depth) kept -= out.size();
    outliers = within(all_outliers);
    std::vector<char> is(depth, KEPT);
    for (const int64_t i : out) is[i] = UNQUANTISED;
    for (const int64_t i : outliers) is[i] = OUTLIER;
    chunks.resize((depth + 63) / 64);
    for (int64_t i = 0; i < depth; ++i) {
      Chunk& chunk = chunks[i / 64];
      if (is[i] == KEPT) chunk.kept[chunk.kept_count++] = i % 64;
      if (is[i] == OUTLIER) chunk.outliers[chunk.outlier_count++] = i % 64;
      ++chunk.count;
    }
#endif
  }

  // Whether codes are taken out of the int8 matmul.
  bool compacts() const { return kept < depth; }

  // Whether `split` is to be called.
#ifdef INT8FX_SPLITS
  bool splits() const { return !chunks.empty(); }
#else
  bool splits() const { return false; }
#endif

  // Rows of codes, `stride` apart, to the kept ones, then zeros up to a multiple of 64, and to those of the outlier
  // columns, then up to 63 of any value; either may be null.
  template <int ROWS>
  void split([[maybe_unused]] const int8_t* rows, [[maybe_unused]] int64_t stride, [[maybe_unused]] int8_t* to_kept,
             [[maybe_unused]] int64_t kept_stride, [[maybe_unused]] int8_t* to_outliers,
             [[maybe_unused]] int64_t outlier_stride) const {
#ifdef INT8FX_SPLITS
    int64_t left = (kept + 63) / 64 * 64;
    for (const Chunk& chunk : chunks) {
      const __m512i kept_here = _mm512_load_si512(chunk.kept), outliers_here = _mm512_load_si512(chunk.outliers);
      const __mmask64 exists = low_bits(chunk.count), keeps = low_bits(chunk.kept_count);
      const bool needed = to_kept != nullptr || chunk.outlier_count > 0;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS && needed; ++r) {
        const __m512i codes = _mm512_maskz_loadu_epi8(exists, rows + r * stride);
        if (to_kept != nullptr)
          _mm512_storeu_si512(to_kept + r * kept_stride, _mm512_maskz_permutexvar_epi8(keeps, kept_here, codes));
        if (to_outliers != nullptr && chunk.outlier_count > 0) {
          const __m512i here = _mm512_permutexvar_epi8(outliers_here, codes);
          if (chunk.outlier_count <= 16)
            _mm_storeu_si128((__m128i*)(to_outliers + r * outlier_stride), _mm512_castsi512_si128(here));
          else
            _mm512_storeu_si512(to_outliers + r * outlier_stride, here);
        }
      }
      rows += 64;
      left -= chunk.kept_count;
      if (to_kept != nullptr) to_kept += chunk.kept_count;
      if (to_outliers != nullptr) to_outliers += chunk.outlier_count;
    }
    if (to_kept == nullptr) return;
    for (int r = 0; r < ROWS; ++r)
      _mm512_mask_storeu_epi8(to_kept + r * kept_stride, low_bits(left), _mm512_setzero_si512());
#endif
  }

 private:
  enum : char { KEPT, OUTLIER, UNQUANTISED };

  std::vector<int64_t> within(const std::vector<int64_t>& columns) const {
    std::vector<int64_t> here(std::lower_bound(columns.begin(), columns.end(), k),
                              std::lower_bound(columns.begin(), columns.end(), k + depth));
    for (int64_t& column : here) column -= k;
    return here;
  }

#ifdef INT8FX_SPLITS
  struct alignas(64) Chunk {  // 64 columns, or those that are left
    uint8_t kept[64] = {}, outliers[64] = {};
    int count = 0, kept_count = 0, outlier_count = 0;
  };
  std::vector<Chunk> chunks;  // none if it does not split

  static __mmask64 low_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
#endif
};

}  // namespace int8fx
