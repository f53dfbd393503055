// y = epilogue(x @ weight.T + x_columns @ columns_weight.T), weight of any format. The forms are those of product.h:
//
// weight-only  M <= INT8FX_WEIGHT_ONLY_ROWS, not rotated. x is not quantised; groups_few.h.
// blocked      more rows. A task is at most BLOCK_M rows x PANEL channels. It decodes its channels, some columns at a time,
//              and multiplies them by all rows of the task. Whichever of these serves x and the format:
//
//              int8 codes of x                  sums of a group by Tile, in int32, then scaled in floating point; levels that
//                                               are no int8 multiples of one number are rounded to multiples of 1 / 127
//              bfloat16 x, integer levels       the same by Bfloat16Tile, in float
//              others                           FloatTile with dequantised weights
//
// The order of sums does not depend on M, so a row's result does not depend on how many other rows there are.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "group_weight.h"
#include "groups_few.h"
#include "parallel.h"
#include "product.h"

namespace int8fx {

// Columns of one group, that a tile multiplies at once.
struct Segment {
  int64_t k, depth, g;
  int64_t x_at, w_at;  // of X from the tile's first, of W from the channel's
};

// Segments of one block, a tile of x and some channels of w.
template <typename X, typename W, typename T>
struct Groups {
  const std::vector<Segment>& segments;
  const X* x;
  W* w;  // of each channel, [STRIDE]
  const int32_t* x_sums;  // [segments][MR]; null if all offsets are 0
  const int32_t* zeros;  // [segments][PANEL]; null if x_sums are the offsets
  const T* scales;  // [segments][PANEL]
};

// Tiles that add the scaled sums of groups to floats:
//
//   values[n][m] += sum_g((sum_k(x[m, k] * w[n, k]) + offset) * scales[g, n]), offset = -zeros[g, n] * x_sums[g, m]
//
// for n < NR and m < MR, or m < MR / 2 if `half`. `pack` writes x, and `load` a row of w, in which each integer is larger by
// `excess`. Without HAS_ZERO, w is loaded without the zero.

// Lanes<T>::N int32 as T.
template <typename T>
inline typename Lanes<T>::V convert(const int32_t* values) {
  typedef int32_t Signed __attribute__((vector_size(Lanes<T>::N * 4), aligned(4), may_alias));
  return __builtin_convertvector(*(const Signed*)values, typename Lanes<T>::V);
}

// By a tile: int8 codes of x and integers.
template <typename Base>
struct CodesTile : Base {
  using From = int8_t;
  using X = typename Base::X;
  using W = typename Base::W;
  static constexpr int MR = Base::MR, NR = Base::NR, PANEL = Base::PANEL;
  static constexpr bool HAS_ZERO = true;
  static_assert(Base::OFFSET == 0);

  static void pack(const int8_t* x, int64_t stride, int64_t rows, int64_t k, X* out) {
    Base::pack_x(x, stride, rows, k, out);
  }

  // Symmetric integers are loaded without their zero, so that there are no offsets.
  static int32_t excess(const GroupWeight& weight, const Steps& steps) {
    return weight.zero_point ? 0 : -weight.common_zero(steps);
  }

  static void load(const GroupWeight& weight, int64_t n, int64_t k, int64_t depth, const Steps& steps, W* out) {
    int8_t integers[Base::DEPTH];
    weight.load_integers(n, k, depth, steps, integers);
    if (const int8_t more = excess(weight, steps); more != 0)
      for (int64_t i = 0; i < depth; ++i) integers[i] += more;
    Base::load_w(integers, depth, out);
  }

  template <typename T>
  static void add(const Groups<X, W, T>& groups, T* values, bool half) {
    using V = typename Lanes<T>::V;
    alignas(64) int32_t sums[NR * MR];
    for (size_t i = 0; i < groups.segments.size(); ++i) {
      const Segment& at = groups.segments[i];
      Base::run(at.depth, groups.x + at.x_at, Channels{NR, false}, groups.w + at.w_at, sums, true, half ? MR / 2 : MR);
      for (int n = 0; n < NR; ++n) {
        const int32_t factor = groups.zeros ? -groups.zeros[i * PANEL + n] : 1;
        if (groups.x_sums != nullptr)
          for (int m = 0; m < MR; ++m) sums[n * MR + m] += factor * groups.x_sums[i * MR + m];
        for (int m = 0; m < (half ? MR / 2 : MR); m += Lanes<T>::N)
          *(V*)(values + n * MR + m) += convert<T>(sums + n * MR + m) * groups.scales[i * PANEL + n];
      }
    }
  }
};

// The same by AVX512-VNNI, with the sums in registers. w is the unsigned operand: 128 is added to integers that may be
// negative.
struct VnniGroupTile : VnniTile {
  using From = int8_t;
  using X = int8_t;
  using W = uint8_t;
  static constexpr int NR = 12;
  static constexpr bool HAS_ZERO = true;

  static void pack(const int8_t* x, int64_t stride, int64_t rows, int64_t k, X* out) { pack_x(x, stride, rows, k, out); }

  static int32_t excess(const GroupWeight& weight, const Steps& steps) {
    return weight.levels != nullptr && steps.are_codes() ? 0 : 128;
  }

  static void load(const GroupWeight& weight, int64_t n, int64_t k, int64_t depth, const Steps& steps, W* out) {
    weight.load_integers(n, k, depth, steps, reinterpret_cast<int8_t*>(out));
    if (excess(weight, steps) == 0) return;
    for (int64_t i = 0; i < depth; ++i) out[i] ^= 0x80;
  }

  template <typename T>
  static void add(const Groups<X, W, T>& groups, T* values, bool half) {
    if (half) return add<1, NR>(groups, 0, values);
    for (int n = 0; n < NR; n += NR / 2) add<2, NR / 2>(groups, n, values);
  }

 private:
  // Of channels n0 on. Sums and values are in registers.
  template <int VECTORS, int CHANNELS, typename T>
  static void add(const Groups<X, W, T>& groups, int n0, T* values) {
    using V = typename Lanes<T>::V;
    constexpr int L = Lanes<T>::N, PARTS = VECTORS * 16 / L;
    V totals[CHANNELS][PARTS];
    values += n0 * MR;
#pragma GCC unroll 12
    for (int n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) totals[n][i] = *(const V*)(values + n * MR + i * L);
    const int32_t *x_sums = groups.x_sums, *zeros = groups.zeros ? groups.zeros + n0 : nullptr;
    const T* scales = groups.scales + n0;
    for (const Segment& at : groups.segments) {
      const X* x = groups.x + at.x_at;
      const W* w = groups.w + n0 * STRIDE + at.w_at;
      Vector sums[CHANNELS][VECTORS] = {};
      if (x_sums != nullptr) {
#pragma GCC unroll 12
        for (int n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) {
            sums[n][v] = *(const Vector*)(x_sums + v * 16);
            if (zeros != nullptr) sums[n][v] *= -zeros[n];
          }
        x_sums += MR;
      }
      for (int64_t i = 0; i < at.depth; i += KG, x += MR * KG) {
        Vector rows[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) std::memcpy(&rows[v], x + v * 64, 64);
#pragma GCC unroll 12
        for (int n = 0; n < CHANNELS; ++n) {
          int32_t four;
          std::memcpy(&four, w + n * STRIDE + i, sizeof four);
          const Vector all = Vector{} + four;
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[n][v] = dot(sums[n][v], all, rows[v]);
        }
      }
#pragma GCC unroll 12
      for (int n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; ++i) totals[n][i] += convert<T>((const int32_t*)&sums[n] + i * L) * scales[n];
      scales += PANEL;
      if (zeros != nullptr) zeros += PANEL;
    }
#pragma GCC unroll 12
    for (int n = 0; n < CHANNELS; ++n)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) *(V*)(values + n * MR + i * L) = totals[n][i];
  }
};

// By Bfloat16Tile: bfloat16 x. Integers less their zero are bfloat16 values.
template <int MR_>
struct BitsTile : Bfloat16Tile<MR_, Tile::PANEL> {
  using Base = Bfloat16Tile<MR_, Tile::PANEL>;
  using From = c10::BFloat16;
  static constexpr int64_t DEPTH = FLOAT_DEPTH;
  static constexpr bool HAS_ZERO = false;

  static void pack(const From* x, int64_t stride, int64_t rows, int64_t k, uint16_t* out) {
    for (int64_t i0 = 0; i0 < k; i0 += 64)  // which the first-level cache holds
      for (int64_t m = 0; m < MR_; ++m)
        for (int64_t i = i0; i < std::min((k + 1) / 2 * 2, i0 + 64); ++i)
          out[(i / 2 * MR_ + m) * 2 + i % 2] = m < rows && i < k ? x[m * stride + i].x : 0;
  }

  static void load(const GroupWeight& weight, int64_t n, int64_t k, int64_t depth, const Steps& steps, uint16_t* out) {
    weight.load_bits(n, k, depth, steps, out);
    if (depth % 2 != 0) out[depth] = 0;
  }

  static void add(const Groups<uint16_t, uint16_t, float>& groups, float* values, bool half) {
    using V = typename Base::Vector;
    alignas(64) float sums[Base::NR * MR_];
    for (size_t i = 0; i < groups.segments.size(); ++i) {
      const Segment& at = groups.segments[i];
      Base::run(at.depth, groups.x + at.x_at, groups.w + at.w_at, sums, true, half);
      for (int n = 0; n < Base::NR; ++n)
        for (int m = 0; m < (half ? MR_ / 2 : MR_); m += 16)
          *(V*)(values + n * MR_ + m) += *(V*)(sums + n * MR_ + m) * groups.scales[i * Tile::PANEL + n];
    }
  }
};

template <typename scalar_t>
struct GroupProduct {
  using T = compute_t<scalar_t>;

  const scalar_t* x;  // [M, K]
  bool weight_only;  // few rows: x is not quantised, unless it has codes, which `takes_few_codes` allows
  const int8_t* codes;  // [M, K]; null if all columns are outliers
  const T* x_scale;  // [M]
  std::vector<int64_t> outliers;  // columns of x with a value at or above the threshold, unless these are all
  GroupWeight weight;
  std::vector<int64_t> columns;  // the unquantised columns, in every call
  Floats columns_weight;  // [N, columns]
  Epilogue epilogue;
  scalar_t* y;  // [M, N]
  int64_t M;

  // Whether few rows of x may be codes, without outliers. Few is a parameter since only a condition that depends on one
  // discards a body with names that do not exist.
  template <typename Few = FewCodes>
  bool takes_few_codes() const {
    if constexpr (Few::EXISTS && std::is_same_v<T, float>) {
      const std::optional<Steps> steps = integer_steps();
      return steps && Few::serves(weight, *steps);
    }
    return false;
  }

  void run() const {
    if (M == 0 || weight.N == 0) return;
    if (weight_only) return codes == nullptr ? multiply_few() : multiply_few_codes();
    std::optional<Steps> steps = integer_steps();
    if (codes != nullptr) {
      if constexpr (std::is_same_v<T, float>)
        if (!steps || !steps->are_int8()) steps = Steps::nearest(weight.levels);
      if (steps) return multiply_blocks(InGroups<IntegerTile>(*this, *steps, codes));
      return multiply_blocks(InFloats(*this, codes, nullptr));
    }
    const std::vector<scalar_t> rows = without_columns<scalar_t>();
    if constexpr (MAY_USE_BFLOAT16)
      if (steps) return multiply_blocks(InGroups<BitsTile<MR>>(*this, *steps, rows.data()));
    multiply_blocks(InFloats(*this, rows.data(), nullptr));
  }

 private:
  static constexpr int MR = Tile::MR, PANEL = Tile::PANEL, L = Lanes<T>::N;
  static constexpr bool MAY_USE_BFLOAT16 = HAS_BFLOAT16 && std::is_same_v<scalar_t, c10::BFloat16>;
  using V = typename Lanes<T>::V;
  using IntegerTile = std::conditional_t<std::is_same_v<Tile, VnniTile>, VnniGroupTile, CodesTile<Tile>>;

  static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  // Levels as integers; none where the rounding of their unit is too large an error, or there are no such integers.
  std::optional<Steps> integer_steps() const {
    if (weight.levels == nullptr) return Steps{};
    const std::optional<Steps> steps = Steps::of(weight.levels);
    return steps && (steps->unit == 1 || sizeof(T) == 4) ? steps : std::nullopt;
  }

  // x with zeros in the unquantised columns.
  template <typename U>
  std::vector<U> without_columns() const {
    std::vector<U> rows(M * weight.K);
    load(x, rows.data(), M * weight.K);
    for (int64_t m = 0; m < M; ++m)
      for (const int64_t k : columns) rows[m * weight.K + k] = U(0);
    return rows;
  }

  // ---- few rows ----------------------------------------------------------------------------------------------------

  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  void multiply_few() const {
    if constexpr (MAY_USE_BFLOAT16) {
      using Few = FewGroups<4, Bfloat16Pieces>;
      if (Few::serves(weight) && weight.has_small_zero_points())
        if (const std::optional<Steps> steps = integer_steps()) return multiply_few_by<Few>(*steps, steps->unit);
    }
    if constexpr (std::is_same_v<T, float> && (VECTOR_BYTES == 64 || HAS_BFLOAT16)) {
      if (FewGroups<4, FloatPieces>::serves(weight)) return multiply_few_by<FewGroups<4, FloatPieces>>(weight.levels, 1);
      if (FewGroups<8, FloatPieces>::serves(weight)) return multiply_few_by<FewGroups<8, FloatPieces>>(weight.levels, 1);
    }
    multiply_few_by<Dequantized>(weight.levels, 1);
  }

  // Any groups: a channel is dequantised.
  struct Dequantized {
    using Row = T;

    static int64_t padded(int64_t K) { return K; }
    static void order(const T* row, int64_t K, T* out) { std::copy_n(row, K, out); }
    static int64_t scratch_size(const GroupWeight& weight) { return weight.G + weight.K; }

    template <int ROWS>
    static void multiply(const GroupWeight& weight, const float*, const T* x, int64_t n0, int64_t count, T* scratch,
                         T (&sums)[ROWS][WIDTH]) {
      const int64_t K = weight.K;
      T* channel = scratch + weight.G;
      for (int64_t n = 0; n < count; ++n) {
        weight.load_scales(n0 + n, 1, scratch);
        weight.decode(n0 + n, 0, K, scratch, channel);
        for (int r = 0; r < ROWS; ++r) sums[r][n] = dot(x + r * K, channel, K);
      }
    }

   private:
    static T dot(const T* a, const T* b, int64_t size) {
      V sums[4] = {};
      int64_t i = 0;
      for (; i + 4 * L <= size; i += 4 * L)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += *(const V*)(a + i + j * L) * *(const V*)(b + i + j * L);
      const V all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      T sum = 0;
      for (int lane = 0; lane < L; ++lane) sum += all[lane];
      for (; i < size; ++i) sum += a[i] * b[i];
      return sum;
    }
  };

  // `table` is what Kernel makes its own of.
  template <typename Kernel, typename Table>
  void multiply_few_by(const Table& table, float unit) const {
    static_assert(INT8FX_WEIGHT_ONLY_ROWS == 4);
    switch (M) {
      case 1: return multiply_few_by<Kernel, 1>(table, unit);
      case 2: return multiply_few_by<Kernel, 2>(table, unit);
      case 3: return multiply_few_by<Kernel, 3>(table, unit);
      default: return multiply_few_by<Kernel, 4>(table, unit);
    }
  }

  void multiply_few_codes() const {
    static_assert(INT8FX_WEIGHT_ONLY_ROWS == 4);
    switch (M) {
      case 1: return multiply_few_codes<1>();
      case 2: return multiply_few_codes<2>();
      case 3: return multiply_few_codes<3>();
      default: return multiply_few_codes<4>();
    }
  }

  template <int ROWS, typename Few = FewCodes>
  void multiply_few_codes() const {
    if constexpr (Few::EXISTS && std::is_same_v<T, float>) {
      const Few few(weight, *integer_steps(), codes, ROWS);
      store_few<ROWS>(WIDTH * weight.G, [&](int64_t n0, int64_t count, T* scratch, T (&sums)[ROWS][WIDTH]) {
        few.template multiply<ROWS>(n0, count, scratch, sums);
        for (int r = 0; r < ROWS; ++r)
          for (int64_t n = 0; n < WIDTH; ++n) sums[r][n] *= x_scale[r];
      });
    }
  }

  template <typename Kernel, int ROWS, typename Table>
  void multiply_few_by(const Table& table, float unit) const {
    using Row = std::conditional_t<std::is_same_v<typename Kernel::Row, uint16_t>, c10::BFloat16, T>;  // of whose bits
    const int64_t K = weight.K, stride = Kernel::padded(K);
    const std::vector<Row> quantised = without_columns<Row>();
    std::vector<typename Kernel::Row> rows(ROWS * stride);
    for (int r = 0; r < ROWS; ++r)
      Kernel::order(reinterpret_cast<const typename Kernel::Row*>(quantised.data()) + r * K, K, rows.data() + r * stride);
    store_few<ROWS>(Kernel::scratch_size(weight), [&](int64_t n0, int64_t count, T* scratch, T (&sums)[ROWS][WIDTH]) {
      Kernel::template multiply<ROWS>(weight, table, rows.data(), n0, count, scratch, sums);
      for (int r = 0; r < ROWS; ++r)
        for (int64_t n = 0; n < WIDTH; ++n) sums[r][n] *= unit;
    });
  }

  // Adds unquantised columns and the bias to what `multiply`(first channel, channels, scratch, sums) makes, and stores it.
  template <int ROWS, typename Multiply>
  void store_few(int64_t scratch_size, const Multiply& multiply) const {
    const int64_t N = weight.N, K = weight.K, C = columns.size();
    std::vector<T> unquantised(ROWS * C);
    for (int r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c) unquantised[r * C + c] = static_cast<T>(x[r * K + columns[c]]);
    parallel_for((N + WIDTH - 1) / WIDTH, grain_of(K * WIDTH), [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(scratch_size), channel(C);
      T sums[ROWS][WIDTH] = {}, bias[WIDTH] = {};
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n0 = block * WIDTH, count = std::min(WIDTH, N - n0);
        if (epilogue.bias.data) load_any(epilogue.bias, n0, count, WIDTH, bias);
        multiply(n0, count, scratch.data(), sums);
        for (int64_t n = 0; n < count && C > 0; ++n) {
          load_any(columns_weight, (n0 + n) * C, C, C, channel.data());
          for (int r = 0; r < ROWS; ++r)
            for (int64_t c = 0; c < C; ++c) sums[r][n] += unquantised[r * C + c] * channel[c];
        }
        for (int r = 0; r < ROWS; ++r) {
          for (int64_t n = 0; n < WIDTH; ++n) sums[r][n] += bias[n];
          epilogue.store(sums[r], r, n0, count, N, y);
        }
      }
    });
  }

  // ---- blocked -----------------------------------------------------------------------------------------------------

  struct Task {
    int64_t n0, count;  // channels
    int64_t first, last;  // tiles of rows
    bool half_at_end;  // whether the last tile has at most half of its rows

    bool is_half(int64_t tile) const { return tile == last - 1 && half_at_end; }
  };

  // Of a thread.
  struct Scratch {
    [[no_unique_address]] typename Tile::Setup setup;
    alignas(64) T values[Tile::BLOCK_M * PANEL];  // [tiles][PANEL][MR]
    Buffer w, scales;  // [PANEL][STRIDE] of a tile's W; [PANEL][G] of T

    explicit Scratch(int64_t G)
        : w(PANEL * std::max({int64_t(sizeof(typename Tile::W)) * Tile::STRIDE, int64_t(sizeof(T)) * F::STRIDE})),
          scales(PANEL * G * sizeof(T)) {}
  };

  // values[n][m] += sum_g(sum_k(x[m, k] * (integer[n, k] - zero[n, g])) * scale[n, g] * unit)
  template <typename GroupTile>
  struct InGroups {
    using X = typename GroupTile::X;
    using W = typename GroupTile::W;
    static constexpr int NR = GroupTile::NR;
    static constexpr int64_t KG = GroupTile::KG, STRIDE = GroupTile::STRIDE;

    const GroupProduct& p;
    Steps steps;
    std::vector<std::vector<Segment>> blocks;  // of at most DEPTH columns
    bool adjoin = true;  // whether W has no gap between segments
    int64_t tile_size = 0, segments = 0;
    int32_t excess = 0, zero = 0;  // zero: of all groups, if they have one in common
    std::unique_ptr<Buffer> x;  // [tiles][segments][depth / KG][MR][KG]
    std::vector<int32_t> x_sums;  // [tiles][segments][MR]; times -zero if that is of all groups; or nothing

    InGroups(const GroupProduct& p, const Steps& steps, const typename GroupTile::From* from) : p(p), steps(steps) {
      const int64_t K = p.weight.K, tiles = (p.M + MR - 1) / MR;
      for (int64_t k = 0, w_at = 0; k < K; ++segments) {
        const int64_t g = k / p.weight.group_size;
        const int64_t depth = std::min({K - k, (g + 1) * p.weight.group_size - k, GroupTile::DEPTH});
        if (blocks.empty() || w_at + round_up(depth, KG) > GroupTile::DEPTH) blocks.emplace_back(), w_at = 0;
        blocks.back().push_back({k, depth, g, tile_size, w_at});
        w_at += round_up(depth, KG);
        tile_size += round_up(depth, KG) * MR;
        k += depth;
        if (depth % KG != 0 && k < K) adjoin = false;
      }
      tile_size += 64 * MR;  // a tile packs up to 64 columns at a time
      x = std::make_unique<Buffer>(tiles * tile_size * sizeof(X));
      if constexpr (GroupTile::HAS_ZERO) {
        excess = GroupTile::excess(p.weight, steps);
        if (has_common_zero()) zero = p.weight.common_zero(steps) + excess;
        if (!has_common_zero() || zero != 0) x_sums.resize(tiles * segments * MR);
      }
      const int32_t factor = has_common_zero() ? -zero : 1;
      parallel_for(tiles, grain_of(K * MR), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t rows = std::min<int64_t>(MR, p.M - tile * MR);
          int32_t* sums = x_sums.data() + tile * segments * MR;
          for (const std::vector<Segment>& block : blocks)
            for (const Segment& at : block) {
              const auto* of_tile = from + tile * MR * K + at.k;
              GroupTile::pack(of_tile, K, rows, at.depth, x->as<X>() + tile * tile_size + at.x_at);
              if (!x_sums.empty())
                for (int64_t m = 0; m < MR; ++m, ++sums)
                  if (m < rows)
                    *sums = factor * std::accumulate(of_tile + m * K, of_tile + m * K + at.depth, int32_t(0));
            }
        }
      });
    }

    bool has_common_zero() const { return p.weight.zero_point == nullptr; }

    void operator()(const Task& task, Scratch& s) const {
      const GroupWeight& weight = p.weight;
      const int64_t G = weight.G;
      W* w = s.w.template as<W>();
      T* scales = s.scales.template as<T>();
      weight.load_scales(task.n0, task.count, scales);
      std::vector<int32_t> zeros;  // [segments][PANEL], as scale
      std::vector<T> scale;
      int64_t first = 0;
      for (const std::vector<Segment>& block : blocks) {
        const int64_t size = block.size();
        scale.assign(size * PANEL, T(0));
        if (!has_common_zero()) zeros.assign(size * PANEL, 0);
        for (int64_t n = 0; n < task.count; ++n)  // without anything between, so that reads follow one another
          if (adjoin) {
            GroupTile::load(weight, task.n0 + n, block[0].k, block[size - 1].k + block[size - 1].depth - block[0].k, steps,
                            w + n * STRIDE);
          } else {
            for (const Segment& at : block)
              GroupTile::load(weight, task.n0 + n, at.k, at.depth, steps, w + n * STRIDE + at.w_at);
          }
        for (int64_t n = 0; n < task.count; ++n)
          for (int64_t i = 0; i < size; ++i) {
            scale[i * PANEL + n] = scales[n * G + block[i].g] * steps.unit;
            if (!has_common_zero()) zeros[i * PANEL + n] = weight.zero_point_at((task.n0 + n) * G + block[i].g) + excess;
          }
        for (int64_t tile = task.first; tile < task.last; ++tile)
          for (int64_t n = 0; n < task.count; n += NR) {
            const Groups<X, W, T> groups{block,
                                         x->as<X>() + tile * tile_size,
                                         w + n * STRIDE,
                                         x_sums.empty() ? nullptr : x_sums.data() + (tile * segments + first) * MR,
                                         has_common_zero() ? nullptr : zeros.data() + n,
                                         scale.data() + n};
            GroupTile::add(groups, s.values + ((tile - task.first) * PANEL + n) * MR, task.is_half(tile));
          }
        first += size;
      }
    }
  };

  using F = FloatTile<T, MR, PANEL>;

  // values[n][m] += sum_k(x[m, k] * w[n, k]) over columns k, in a list or all, of dequantised weights.
  struct InFloats {
    const GroupProduct& p;
    const std::vector<int64_t>* list;  // null: all columns
    int64_t count;
    std::unique_ptr<Buffer> x;  // [tiles][count][MR] of T

    template <typename U>
    InFloats(const GroupProduct& p, const U* from, const std::vector<int64_t>* list)
        : p(p), list(list), count(list ? list->size() : p.weight.K) {
      const int64_t K = p.weight.K, tiles = (p.M + MR - 1) / MR;
      x = std::make_unique<Buffer>(tiles * count * MR * sizeof(T));
      parallel_for(tiles, grain_of(count * MR), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t rows = std::min<int64_t>(MR, p.M - tile * MR);
          T* to = x->as<T>() + tile * count * MR;
          for (int64_t c0 = 0; c0 < count; c0 += 64)  // which the first-level cache holds
            for (int64_t m = 0; m < MR; ++m)
              for (int64_t c = c0; c < std::min(count, c0 + 64); ++c)
                to[c * MR + m] = m < rows ? static_cast<T>(from[(tile * MR + m) * K + (list ? (*list)[c] : c)]) : T(0);
        }
      });
    }

    void operator()(const Task& task, Scratch& s) const {
      const GroupWeight& weight = p.weight;
      T* scales = s.scales.template as<T>();
      weight.load_scales(task.n0, task.count, scales);
      multiply(task, s, [&](int64_t n, int64_t c, int64_t depth, T* out) {
        if (list == nullptr) return weight.decode(task.n0 + n, c, depth, scales + n * weight.G, out);
        for (int64_t i = 0; i < depth; ++i)
          weight.decode(task.n0 + n, (*list)[c + i], 1, scales + n * weight.G, out + i);
      });
    }

    // load(channel of the task, first of the columns, how many, to)
    template <typename Load>
    void multiply(const Task& task, Scratch& s, const Load& load) const {
      T* w = s.w.template as<T>();
      for (int64_t c = 0; c < count; c += FLOAT_DEPTH) {
        const int64_t depth = std::min(FLOAT_DEPTH, count - c);
        for (int64_t n = 0; n < task.count; ++n) load(n, c, depth, w + n * F::STRIDE);
        for (int64_t tile = task.first; tile < task.last; ++tile)
          for (int64_t n = 0; n < task.count; n += F::NR)
            F::run(depth, x->as<T>() + (tile * count + c) * MR, w + n * F::STRIDE,
                   s.values + ((tile - task.first) * PANEL + n) * MR, false, task.is_half(tile));
      }
    }
  };

  template <typename Sums>
  void multiply_blocks(const Sums& sums) const {
    const int64_t N = weight.N, C = columns.size();
    std::optional<InFloats> of_outliers, of_columns;
    if (!outliers.empty()) of_outliers.emplace(*this, x, &outliers);
    if (C > 0) of_columns.emplace(*this, x, &columns);
    const int64_t tiles = (M + MR - 1) / MR, threads = thread_count(), panels = (N + PANEL - 1) / PANEL;
    const int64_t tasks = threads > 1 ? 8 * threads : 1;  // at least, so that threads get equal work
    const int64_t by_size = (tiles * MR + Tile::BLOCK_M - 1) / Tile::BLOCK_M, by_threads = (tasks + panels - 1) / panels;
    const int64_t wanted = std::max(by_size, by_threads);
    const int64_t block_tiles = (tiles + wanted - 1) / wanted, blocks = (tiles + block_tiles - 1) / block_tiles;
    parallel_for(blocks * panels, grain_of(M * weight.K * PANEL), [&](int64_t begin, int64_t end) {
      const auto scratch = std::make_unique<Scratch>(weight.G);
      for (int64_t i = begin; i < end; ++i) {
        Task task{i % panels * PANEL};
        task.count = std::min<int64_t>(PANEL, N - task.n0);
        task.first = i / panels * block_tiles, task.last = std::min(tiles, task.first + block_tiles);
        task.half_at_end = M - (task.last - 1) * MR <= MR / 2;
        T* values = scratch->values;
        std::fill_n(values, (task.last - task.first) * PANEL * MR, T(0));
        sums(task, *scratch);
        if (codes != nullptr) scale(task, values);
        if (of_outliers) (*of_outliers)(task, *scratch);
        if (of_columns)
          of_columns->multiply(task, *scratch, [&](int64_t n, int64_t c, int64_t depth, T* out) {
            load_any(columns_weight, (task.n0 + n) * C + c, depth, depth, out);
          });
        store(task, values);
      }
    });
  }

  // values[n][m] *= x_scale[m]
  void scale(const Task& task, T* values) const {
    for (int64_t tile = task.first; tile < task.last; ++tile) {
      T scales[MR] = {};
      std::copy_n(x_scale + tile * MR, std::min<int64_t>(MR, M - tile * MR), scales);
      for (int64_t n = 0; n < task.count; ++n)
        for (int64_t m = 0; m < MR; m += L) *(V*)(values + ((tile - task.first) * PANEL + n) * MR + m) *= *(V*)(scales + m);
    }
  }

  // Rounds values, with the bias, to y.
  void store(const Task& task, const T* values) const {
    alignas(64) T bias[PANEL] = {}, row[L][PANEL];
    if (epilogue.bias.data) load_any(epilogue.bias, task.n0, task.count, PANEL, bias);
    for (int64_t tile = task.first; tile < task.last; ++tile, values += PANEL * MR) {
      const int64_t rows = std::min<int64_t>(MR, M - tile * MR);
      for (int64_t m0 = 0; m0 < rows; m0 += L) {
        for (int64_t n = 0; n < task.count; n += L) {
          V block[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) block[i] = *(const V*)(values + (n + i) * MR + m0) + bias[n + i];
          transpose(block);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) *(V*)(&row[i][n]) = block[i];
        }
        for (int64_t m = m0; m < std::min(rows, m0 + L); ++m)
          epilogue.store(row[m - m0], tile * MR + m, task.n0, task.count, weight.N, y);
      }
    }
  }
};

}  // namespace int8fx
