// y = epilogue(x_int8 @ weight.T * scales + x_float @ weight_float.T): the int8 matmul, its 16-bit part, one store.
//
// The weight is read as it is stored, [N, K] int8. Three forms:
//
// weight-only  M <= INT8FX_WEIGHT_ONLY_ROWS, not rotated. Reading the weight takes the time and arithmetic is free, so x
//              is not quantised: the weight is widened to floats, and the result is more exact than the scheme requires.
// few          M <= FEW_ROWS. Sums run along K over the weight as it is stored: packing it would cost more than it saves.
// blocked      more rows. x is packed once, for the tiles of the instruction set. A task is at most BLOCK_M rows x NR
//              channels. It packs its channels' weights, DEPTH of K at a time, and sums tiles. These weights stay in the
//              first-level cache until all rows of the task are multiplied.
//
// The last two sum in int32, scale, add the 16-bit part in floating point, and store. The order of these sums does not
// depend on M, so a row's result does not depend on how many other rows there are.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>

#include "epilogue.h"
#include "lanes.h"
#include "tile_amx.h"
#include "tile_generic.h"
#include "tile_vnni.h"
#ifdef __AVX2__
#include "tile_avx2.h"
#endif

namespace int8fx {

#if defined(INT8FX_TILE)  // tests choose another tile than the instruction set's
using Tile = INT8FX_TILE;
#elif defined(__AMX_INT8__)
using Tile = AmxTile;
#elif defined(__AVX512VNNI__)
using Tile = VnniTile;
#elif defined(__AVX2__)
using Tile = Avx2Tile;
#else
using Tile = GenericTile;
#endif

#ifndef INT8FX_WEIGHT_ONLY_ROWS
#error "INT8FX_WEIGHT_ONLY_ROWS is a number of rows: native.py takes it from rows.py"
#endif

template <typename AnyTile>
constexpr bool HAS_FEW = requires { &AnyTile::template few<1>; };  // sums along K by instructions of its own
constexpr bool TILE_HAS_FEW = HAS_FEW<Tile>;
constexpr int64_t FEW_ROWS = TILE_HAS_FEW ? 16 : 8;
constexpr int64_t DEPTH = 512;

// Whether M rows are multiplied without quantising x. rows.py has the rule for all devices.
inline bool weight_only(int64_t M, int64_t block) { return M <= INT8FX_WEIGHT_ONLY_ROWS && block == 1; }

template <typename scalar_t>
struct Product {
  using T = compute_t<scalar_t>;

  const scalar_t* x;  // [M, K]
  bool weight_only;  // x is not quantised: codes, x_scale and outliers are not read
  const int8_t* codes;  // [M, K]
  const T* x_scale;  // [M]
  std::vector<int64_t> outliers;  // columns of x with a value at or above the threshold, in this call
  const int8_t* weight;  // [N, K]
  at::Tensor weight_scale;  // [N]
  std::vector<int64_t> columns;  // the unquantised columns, in every call
  at::Tensor columns_weight;  // [N, columns]
  Epilogue epilogue;
  scalar_t* y;  // [M, N]
  int64_t M, N, K;

  void run() const {
    if (M == 0 || N == 0) return;
    if (!weight_only) return blocked();
    static_assert(INT8FX_WEIGHT_ONLY_ROWS == 4);
    switch (M) {
      case 1: return multiply_floats<1>();
      case 2: return multiply_floats<2>();
      case 3: return multiply_floats<3>();
      default: return multiply_floats<4>();
    }
  }

 private:
  // ---- weight-only ------------------------------------------------------------------------------------------------

  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  template <int ROWS>
  void multiply_floats() const {
    const int64_t C = columns.size();
    std::vector<T> rows(ROWS * K), unquantised(ROWS * C);
    load(x, rows.data(), ROWS * K);
    for (int r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c) unquantised[r * C + c] = std::exchange(rows[r * K + columns[c]], T(0));
    const int64_t grain = std::max<int64_t>(1, 32768 / (K * WIDTH + 1));
    at::parallel_for(0, (N + WIDTH - 1) / WIDTH, grain, [&](int64_t begin, int64_t end) {
      std::vector<T> channel(C);  // of columns_weight
      T sums[ROWS][WIDTH] = {}, scale[WIDTH], bias[WIDTH] = {};
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n0 = block * WIDTH, count = std::min(WIDTH, N - n0);
        load_any(weight_scale, n0, count, WIDTH, scale);
        if (epilogue.bias.defined()) load_any(epilogue.bias, n0, count, WIDTH, bias);
        dot_floats<ROWS>(rows.data(), n0, count, sums);
        for (int64_t n = 0; n < count; ++n) {
          for (int r = 0; r < ROWS; ++r) sums[r][n] *= scale[n];
          if (C == 0) continue;
          load_any(columns_weight, (n0 + n) * C, C, C, channel.data());
          for (int r = 0; r < ROWS; ++r)
            for (int64_t c = 0; c < C; ++c) sums[r][n] += unquantised[r * C + c] * channel[c];
        }
        for (int r = 0; r < ROWS; ++r) epilogue.store(sums[r], bias, r, n0, count, WIDTH, N, y);
      }
    });
  }

  // sums[r][n] = sum_k(rows[r, k] * weight[n0 + n, k]), in enough vectors of partial sums that additions (four cycles each)
  // do not wait for each other. Several rows take two channels at a time, and AT_ONCE k of them, which the first-level
  // cache holds. One row is bound by bandwidth, so it reads the weight in the order of memory.
  template <int ROWS>
  void dot_floats(const T* rows, int64_t n0, int64_t count, T (&sums)[ROWS][WIDTH]) const {
    constexpr int L = Lanes<T>::N, PARTS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1, CHANNELS = ROWS == 1 ? 1 : 2;
    constexpr int64_t STEP = PARTS * L, AT_ONCE = 4096 / ROWS / STEP * STEP;
    using V = typename Lanes<T>::V;
    V partial[WIDTH][ROWS][PARTS] = {};
    const int64_t K_vectors = K / STEP * STEP;  // the k that fill vectors
    for (int64_t k0 = 0; k0 < K_vectors; k0 += AT_ONCE)
      for (int64_t n = 0; n < count; n += CHANNELS) {
        const int8_t* w[CHANNELS];
        for (int c = 0; c < CHANNELS; ++c) w[c] = weight + (n0 + std::min(n + c, count - 1)) * K;
        V part_sums[CHANNELS][ROWS][PARTS];
        std::memcpy(part_sums, partial[n], sizeof part_sums);
        for (int64_t k = k0; k < std::min(K_vectors, k0 + AT_ONCE); k += STEP) {
          if (ROWS == 1) prefetch(w[0] + k);
#pragma GCC unroll 4
          for (int part = 0; part < PARTS; ++part) {
            V value[CHANNELS];
            for (int c = 0; c < CHANNELS; ++c) value[c] = widen<T>(w[c] + k + part * L);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
              const V row = *(const V*)(rows + r * K + k + part * L);
              for (int c = 0; c < CHANNELS; ++c) part_sums[c][r][part] += row * value[c];
            }
          }
        }
        std::memcpy(partial[n], part_sums, sizeof part_sums);
      }
    for (int64_t n = 0; n < count; ++n)
      for (int r = 0; r < ROWS; ++r) {
        V all = partial[n][r][0];
        for (int part = 1; part < PARTS; ++part) all += partial[n][r][part];
        T sum = 0;
        for (int i = 0; i < L; ++i) sum += all[i];
        for (int64_t k = K_vectors; k < K; ++k) sum += rows[r * K + k] * T(weight[(n0 + n) * K + k]);
        sums[r][n] = sum;
      }
  }

  // ---- few, blocked ------------------------------------------------------------------------------------------------

  void blocked() const {
    constexpr int MR = Tile::MR, NR = Tile::NR, KG = Tile::KG;
    const bool few = M <= FEW_ROWS;
    const int64_t groups = (K + KG - 1) / KG, tiles = (M + MR - 1) / MR, C = outliers.size() + columns.size();
    const int64_t widened = TILE_HAS_FEW ? 0 : M * K * sizeof(int16_t);
    const int64_t size = few ? widened : tiles * groups * MR * KG * sizeof(typename Tile::X);
    const at::Tensor packed = at::empty({size}, at::kByte);
    const at::Tensor packed_floats = at::empty({tiles * C * MR * int64_t(sizeof(T))}, at::kByte);
    Packed p{few, groups, packed.data_ptr(), static_cast<T*>(packed_floats.data_ptr())};
    if (few && TILE_HAS_FEW)
      for (int64_t m = 0; m < M; ++m) p.x_sums[m] = std::accumulate(codes + m * K, codes + (m + 1) * K, int32_t(0));
    else if (few)
      for (int64_t i = 0; i < M * K; ++i) static_cast<int16_t*>(p.x)[i] = codes[i];
    at::parallel_for(0, tiles, std::max<int64_t>(1, 32768 / (K * MR + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t m0 = tile * MR, rows = std::min<int64_t>(MR, M - m0);
        auto* out = static_cast<typename Tile::X*>(p.x) + tile * groups * MR * KG;
        if (!few) pack_rows<MR, KG>(codes + m0 * K, K, rows, K, out, Tile::FLIP);
        for (int64_t c = 0; c < C; ++c)
          for (int64_t m = 0; m < MR; ++m)
            p.floats[(tile * C + c) * MR + m] = m < rows ? static_cast<T>(x[(m0 + m) * K + float_column(c)]) : T(0);
      }
    });
    const int64_t panels = (N + NR - 1) / NR, tasks = 2 * at::get_num_threads();  // at least: with fewer, threads would wait
    const int64_t by_size = (tiles * MR + Tile::BLOCK_M - 1) / Tile::BLOCK_M, by_threads = (tasks + panels - 1) / panels;
    const int64_t wanted = few ? 1 : std::max(by_size, by_threads);
    const int64_t block_tiles = (tiles + wanted - 1) / wanted;  // blocks of one size, so that threads get equal work
    const int64_t blocks = (tiles + block_tiles - 1) / block_tiles;
    const int64_t grain = few ? std::max<int64_t>(1, 32768 / (K * NR + 1)) : 1;
    at::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / panels * block_tiles, last = std::min(tiles, first + block_tiles);
        panel(task % panels * NR, first, last, p, scratch);
      }
    });
  }

  struct Packed {
    bool few;
    int64_t groups;
    void* x;  // [tiles][groups][MR][KG] of Tile::X; for few rows [M][K] of int16, or nothing if the tile has `few`
    T* floats;  // [tiles][C][MR], the float columns of x
    int32_t x_sums[FEW_ROWS] = {};  // of each of few rows, if the tile has `few`
  };

  struct Scratch {
    [[no_unique_address]] typename Tile::Setup setup;
    alignas(64) int32_t sums[Tile::BLOCK_M * Tile::NR];
    alignas(64) T residual[Tile::BLOCK_M * Tile::NR];
    alignas(64) typename Tile::W w[Tile::panel_size(DEPTH)];
    alignas(64) T float_weight[DEPTH * Tile::NR];
  };

  // The float columns of a call: its outliers, then the unquantised columns.
  int64_t float_column(int64_t c) const {
    const int64_t O = outliers.size();
    return c < O ? outliers[c] : columns[c - O];
  }

  // to[i][n]: the weight of float column c + i in channel n0 + n, 0 where there is none.
  void pack_float_weight(int64_t c, int64_t depth, int64_t n0, int64_t count, const T* scale, T* to) const {
    constexpr int NR = Tile::NR;
    const int64_t O = outliers.size(), unquantised = columns.size(), first = std::clamp<int64_t>(O - c, 0, depth);
    T row[DEPTH];  // of columns_weight
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t n = count; n < NR; ++n) to[i * NR + n] = T(0);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t i = 0; i < first; ++i)
        to[i * NR + n] = T(weight[(n0 + n) * K + outliers[c + i]]) * scale[n];
      if (first == depth) continue;
      load_any(columns_weight, (n0 + n) * unquantised + c + first - O, depth - first, depth - first, row);
      for (int64_t i = first; i < depth; ++i) to[i * NR + n] = row[i - first];
    }
  }

  void panel(int64_t n0, int64_t first, int64_t last, const Packed& p, Scratch& s) const {
    constexpr int MR = Tile::MR, NR = Tile::NR, KG = Tile::KG;
    const int64_t count = std::min<int64_t>(NR, N - n0), C = outliers.size() + columns.size();
    alignas(64) T scale[NR], bias[NR] = {}, values[NR];
    load_any(weight_scale, n0, count, NR, scale);
    if (epilogue.bias.defined()) load_any(epilogue.bias, n0, count, NR, bias);

    if (p.few) {
      for (int64_t n = 0; n < count; n += 4)
        for (int64_t m = 0; m < M; m += 4)  // the four channels' weights stay in the first-level cache
          switch (M - m) {
            case 1: few_sums<1>(n0 + n, m, count - n, p, s.sums + m * NR + n); break;
            case 2: few_sums<2>(n0 + n, m, count - n, p, s.sums + m * NR + n); break;
            case 3: few_sums<3>(n0 + n, m, count - n, p, s.sums + m * NR + n); break;
            default: few_sums<4>(n0 + n, m, count - n, p, s.sums + m * NR + n);
          }
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = count; n < NR; ++n) s.sums[m * NR + n] = 0;
    } else {
      const auto* packed = static_cast<const typename Tile::X*>(p.x);
      int64_t k = 0;
      do {
        const int64_t depth = std::min(DEPTH, K - k);
        Tile::pack_w(weight + n0 * K + k, K, count, depth, s.w);
        for (int64_t tile = first; tile < last; ++tile)
          Tile::run((depth + KG - 1) / KG, packed + (tile * p.groups + k / KG) * MR * KG, s.w,
                    s.sums + (tile - first) * MR * NR, k == 0);
        k += depth;
      } while (k < K);
    }

    for (int64_t c = 0; c < C; c += DEPTH) {
      const int64_t depth = std::min(DEPTH, C - c);
      pack_float_weight(c, depth, n0, count, scale, s.float_weight);
      for (int64_t tile = first; tile < last; ++tile)
        add_residual(depth, p.floats + (tile * C + c) * MR, s.float_weight, s.residual + (tile - first) * MR * NR, c == 0);
    }

    for (int64_t m = first * MR; m < std::min(M, last * MR); ++m) {
      const int64_t at = (m - first * MR) * NR;
      for (int n = 0; n < NR; ++n) values[n] = static_cast<T>(s.sums[at + n]) * x_scale[m] * scale[n];
      if (C > 0)
        for (int n = 0; n < NR; ++n) values[n] += s.residual[at + n];
      epilogue.store(values, bias, m, n0, count, NR, N, y);
    }
  }

  // sums[r * NR + c] = sum_k(codes[m + r, k] * weight[n + c, k]) of ROWS rows and four channels, of which `count` exist.
  template <int ROWS, typename AnyTile = Tile>
  void few_sums(int64_t n, int64_t m, int64_t count, const Packed& p, int32_t* sums) const {
    const int8_t* w[4];
    for (int64_t c = 0; c < 4; ++c) w[c] = weight + (n + std::min(c, count - 1)) * K;
    if constexpr (HAS_FEW<AnyTile>)
      AnyTile::template few<ROWS>(codes + m * K, p.x_sums + m, K, w, sums, AnyTile::NR);
    else
      for (int64_t c = 0; c < std::min<int64_t>(4, count); ++c)
        dot<ROWS>(static_cast<const int16_t*>(p.x) + m * K, K, w[c], sums + c, AnyTile::NR);
  }

  // sums[MR, NR] (+)= x[depth, MR].T @ w[depth, NR]
  static void add_residual(int64_t depth, const T* x, const T* w, T* sums, bool first) {
    constexpr int MR = Tile::MR, NR = Tile::NR, L = Lanes<T>::N, VECTORS = NR / L;
    constexpr int ROWS = MR % 8 == 0 ? 8 : MR;  // as many rows as the registers hold sums of
    using V = typename Lanes<T>::V;
    for (int m0 = 0; m0 < MR; m0 += ROWS, sums += ROWS * NR) {
      V acc[ROWS][VECTORS];
      for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v) acc[m][v] = first ? V{} : *(const V*)(sums + m * NR + v * L);
      for (int64_t i = 0; i < depth; ++i)
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) acc[m][v] += x[i * MR + m0 + m] * *(const V*)(w + i * NR + v * L);
      for (int m = 0; m < ROWS; ++m)
        for (int v = 0; v < VECTORS; ++v) *(V*)(sums + m * NR + v * L) = acc[m][v];
    }
  }
};

}  // namespace int8fx
