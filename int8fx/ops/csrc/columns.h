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

// Whether columns that are multiplied in floating point are left out of the int8 matmul. Without vpcompressb, which takes them
// out of a row, 64 codes an instruction, the int8 matmul multiplies zeros of x there.
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define INT8FX_COMPACTS
#endif

// Columns k to k + depth, of x and of the weight.
struct Block {
  int64_t k, depth;
  int64_t kept;  // that are multiplied in int8
  std::vector<int64_t> outliers;  // that are multiplied in floating point with the weight's codes; from k on
  int64_t x_at = 0, floats_at = 0;  // where x's tiles have them: see Packed in product.h

  // Sorted columns. `excluded` are outliers and unquantised ones.
  Block(int64_t k, int64_t depth, const std::vector<int64_t>& all_outliers, const std::vector<int64_t>& excluded)
      : k(k), depth(depth), kept(depth), outliers(within(all_outliers)) {
#ifdef INT8FX_COMPACTS
    const std::vector<int64_t> out = within(excluded);
    if (out.empty()) return;
    if (int64_t(out.size()) * 64 >= depth) kept -= out.size();  // with fewer, multiplying zeros is cheaper
    masks.resize((depth + 63) / 64);
    for (size_t i = 0; i < masks.size(); ++i) {
      masks[i].exists = depth - int64_t(i) * 64 >= 64 ? ~0ull : (1ull << (depth - i * 64)) - 1;
      masks[i].kept = masks[i].exists;
    }
    for (const int64_t i : out) masks[i / 64].kept &= ~(1ull << i % 64);
    for (const int64_t i : outliers) masks[i / 64].outliers |= 1ull << i % 64;
#endif
  }

  // Whether `keep` takes codes out.
  bool compacts() const { return kept < depth; }

  // The kept codes of a row's block, then zeros up to a multiple of 64. Returns the sum of the codes.
  int32_t keep([[maybe_unused]] const int8_t* row, [[maybe_unused]] int8_t* out) const {
#ifdef INT8FX_COMPACTS
    __m512i sums = _mm512_setzero_si512();
    const int8_t* const end = out + (kept + 63) / 64 * 64;
    for (size_t i = 0; i < masks.size(); ++i) {
      const __m512i codes = _mm512_maskz_compress_epi8(masks[i].kept, load(row, i));
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), codes);
      _mm512_storeu_si512(out, codes);
      out += __builtin_popcountll(masks[i].kept);
    }
    if (out < end) _mm512_mask_storeu_epi8(out, (1ull << (end - out)) - 1, _mm512_setzero_si512());
    return _mm512_reduce_add_epi32(sums);
#else
    return 0;
#endif
  }

  // The codes of a row's block in the outlier columns, and up to 63 of any value after them.
  void gather(const int8_t* row, int8_t* out) const {
#ifdef INT8FX_COMPACTS
    if (outliers.size() > 16) {
      for (size_t i = 0; i < masks.size(); ++i) {
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(masks[i].outliers, load(row, i)));
        out += __builtin_popcountll(masks[i].outliers);
      }
      return;
    }
#endif
    for (const int64_t i : outliers) *out++ = row[i];
  }

 private:
  std::vector<int64_t> within(const std::vector<int64_t>& columns) const {
    std::vector<int64_t> here(std::lower_bound(columns.begin(), columns.end(), k),
                              std::lower_bound(columns.begin(), columns.end(), k + depth));
    for (int64_t& column : here) column -= k;
    return here;
  }

#ifdef INT8FX_COMPACTS
  struct Masks {  // of 64 columns
    uint64_t exists, kept, outliers = 0;
  };
  std::vector<Masks> masks;  // none if no column is excluded

  __m512i load(const int8_t* row, size_t i) const { return _mm512_maskz_loadu_epi8(masks[i].exists, row + i * 64); }
#endif
};

}  // namespace int8fx
