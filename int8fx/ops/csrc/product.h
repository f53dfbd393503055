// y = epilogue(x_int8 @ weight.T * scales + x_float @ weight_float.T): the int8 matmul, its 16-bit part, one store.
//
// The weight is read as it is stored, [N, K] int8. Three forms:
//
// weight-only  M <= INT8FX_WEIGHT_ONLY_ROWS, not rotated. Reading the weight takes the time and arithmetic is free, so
//              x is not quantised: the weight is widened to floats, and the result is more exact than the scheme
//              requires. AMX multiplies x of 16 bits as four int8 digits of a fixed-point number, which is as exact.
// few          M <= FEW_ROWS. Sums run along K over the weight as it is stored: a copy of it would serve too few rows.
// blocked      more rows, or any number with AMX. x is packed once, so that its rows are in the lanes of vectors, and
//              codes of the weight are broadcast to them. A task is at most BLOCK_M rows x PANEL channels. It copies
//              its channels' weights, DEPTH columns at a time, and multiplies them by all rows of the task. AMX copies
//              no weight, unless rows do not begin and end with cache lines, or columns are taken out.
//
// The last two sum in int32, scale, add the 16-bit part in floating point, and store. The order of these sums does not
// depend on M, so a row's result does not depend on how many other rows there are.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>

#include "columns.h"
#include "epilogue.h"
#include "lanes.h"
#include "parallel.h"
#include "tile_amx.h"
#include "tile_float.h"
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

#if defined(__AVX512BF16__) || defined(INT8FX_BFLOAT16)  // tests compile it without its instruction
constexpr bool HAS_BFLOAT16 = true;
#else
constexpr bool HAS_BFLOAT16 = false;
#endif

#ifndef INT8FX_WEIGHT_ONLY_ROWS
#error "INT8FX_WEIGHT_ONLY_ROWS is a number of rows: native.py takes it from rows.py"
#endif

template <typename AnyTile>
constexpr bool HAS_FEW = requires { AnyTile::FEW_AT_ONCE; };  // sums along K by instructions of its own
constexpr bool TILE_HAS_FEW = HAS_FEW<Tile>;
template <typename AnyTile>
constexpr bool MULTIPLIES_IN_PLACE = requires { AnyTile::IN_PLACE; };  // the weight where it is stored
constexpr bool TILE_IN_PLACE = MULTIPLIES_IN_PLACE<Tile>;
constexpr int64_t FEW_ROWS = TILE_HAS_FEW ? 24 : TILE_IN_PLACE ? 0 : 12;
// One of so many columns is taken out of a block that compacts. In place no weight is copied unless a block does.
constexpr int64_t COMPACTS_ONE_OF = TILE_IN_PLACE ? 4 : 32;
// Bytes of x that stay in a second-level cache of 2 MiB, beside the weight. Used in place.
constexpr int64_t X_IN_CACHE = 5 << 18;

// Whether M rows are multiplied without quantising x. rows.py has the rule for all devices.
inline bool weight_only(int64_t M, int64_t block) { return M <= INT8FX_WEIGHT_ONLY_ROWS && block == 1; }

// `size` bytes of any value.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(std::aligned_alloc(64, (size + 127) / 64 * 64), std::free) {
    if (bytes == nullptr) throw std::bad_alloc();
  }

  template <typename U>
  U* as() const { return static_cast<U*>(bytes.get()); }

 private:
  std::unique_ptr<void, decltype(&std::free)> bytes;
};

template <typename scalar_t>
struct Product {
  using T = compute_t<scalar_t>;

  const scalar_t* x;  // [M, K]
  bool weight_only;  // x is not quantised: codes, x_scale and outliers are not read
  const int8_t* codes;  // [M, K]
  const T* x_scale;  // [M]
  std::vector<int64_t> outliers;  // sorted: columns of x with a value at or above the threshold, in this call
  const int8_t* weight;  // [N, K]
  Floats weight_scale;  // [N]
  std::vector<int64_t> columns;  // the unquantised columns, in every call
  bool rotated;  // codes are of rotated rows, so that none of their columns is a column of x
  Floats columns_weight;  // [N, columns]
  Epilogue epilogue;
  scalar_t* y;  // [M, N]
  int64_t M, N, K;

  void run() const {
    if (M == 0 || N == 0) return;
    if (!weight_only) return multiply_codes();
    static_assert(INT8FX_WEIGHT_ONLY_ROWS == 4);
    switch (M) {
      case 1: return multiply_floats<1>();
      case 2: return multiply_floats<2>();
      case 3: return multiply_floats<3>();
      default: return multiply_floats<4>();
    }
  }

 private:
  static constexpr int MR = Tile::MR, NR = Tile::NR, PANEL = Tile::PANEL, L = Lanes<T>::N;
  static constexpr int64_t DEPTH = Tile::DEPTH;
  static constexpr int UNIT = Tile::UNIT;
  static_assert(PANEL % NR == 0 && PANEL % UNIT == 0 && UNIT % 16 == 0 && MR % L == 0);
  static_assert(Tile::BLOCK_M % MR == 0 && Tile::BLOCK_M >= 2 * MR);

  using InT = FloatTile<T, MR, PANEL>;
  static constexpr bool MAY_USE_BFLOAT16 = HAS_BFLOAT16 && std::is_same_v<scalar_t, c10::BFloat16>;
  using BF16 = std::conditional_t<std::is_same_v<Tile, AmxTile>, AmxBfloat16Tile<PANEL>, Bfloat16Tile<MR, PANEL>>;
  using OutlierTile = std::conditional_t<MAY_USE_BFLOAT16, BF16, InT>;

  static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  // ---- weight-only ------------------------------------------------------------------------------------------------

  static constexpr int64_t WIDTH = 16;  // channels that a thread takes at a time

  template <int ROWS>
  void multiply_floats() const {
    const int64_t C = columns.size();
    std::vector<T> unquantised(ROWS * C);
    std::vector<scalar_t> values(x, x + ROWS * K);
    for (int r = 0; r < ROWS; ++r)
      for (int64_t c = 0; c < C; ++c)
        unquantised[r * C + c] = static_cast<T>(std::exchange(values[r * K + columns[c]], scalar_t(0)));
    if constexpr (TILE_IN_PLACE && sizeof(scalar_t) == 2)
      if (const std::optional<Digits<ROWS>> digits = digits_of<ROWS>(values.data()))
        return multiply_channels<ROWS>(unquantised, [&](int64_t n0, int64_t count, T (&sums)[ROWS][WIDTH]) {
          dot_digits(*digits, n0, count, sums);
        });
    using Row = std::conditional_t<MAY_USE_BFLOAT16, uint16_t, T>;
    const int64_t stride = MAY_USE_BFLOAT16 ? round_up(K, 64) : K;
    std::vector<Row> rows(ROWS * stride);
    for (int r = 0; r < ROWS; ++r)
      if constexpr (MAY_USE_BFLOAT16)
        OutlierTile::order_few(reinterpret_cast<const uint16_t*>(values.data()) + r * K, K, rows.data() + r * stride);
      else
        load(values.data() + r * K, rows.data() + r * stride, K);
    multiply_channels<ROWS>(unquantised, [&](int64_t n0, int64_t count, T (&sums)[ROWS][WIDTH]) {
      if constexpr (MAY_USE_BFLOAT16)
        dot_bfloat16<ROWS>(rows.data(), stride, n0, count, sums);
      else
        dot_floats<ROWS>(rows.data(), n0, count, sums);
    });
  }

  // dot(n0, count, sums): sums[r][n] of channels n0 on, of which `count` exist, not scaled.
  template <int ROWS, typename Dot>
  void multiply_channels(const std::vector<T>& unquantised, const Dot& dot) const {
    const int64_t C = columns.size();
    parallel_for((N + WIDTH - 1) / WIDTH, grain_of(K * WIDTH), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] typename Tile::Setup setup;
      std::vector<T> channel(C);  // of columns_weight
      T sums[ROWS][WIDTH] = {}, scale[WIDTH], bias[WIDTH] = {};
      for (int64_t block = begin; block < end; ++block) {
        const int64_t n0 = block * WIDTH, count = std::min(WIDTH, N - n0);
        load_any(weight_scale, n0, count, WIDTH, scale);
        if (epilogue.bias.data) load_any(epilogue.bias, n0, count, WIDTH, bias);
        dot(n0, count, sums);
        for (int64_t n = 0; n < count; ++n) {
          for (int r = 0; r < ROWS; ++r) sums[r][n] *= scale[n];
          if (C == 0) continue;
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

  // Rows as fixed-point numbers: x[r, k] = number * unit[r], with an error of at most unit[r] / 2. The largest number
  // of a row has 30 bits, so errors are below 2 ** -30 of a row's largest value.
  template <int ROWS>
  struct Digits {
    Buffer x;  // as AmxTile::pack_digits has it
    double unit[ROWS];
  };

  // Nothing if a value is not finite, or if sums may overflow.
  template <int ROWS>
  std::optional<Digits<ROWS>> digits_of(const scalar_t* values) const {
    if (K > AmxTile::MOST_K) return {};
    Digits<ROWS> digits{Buffer(round_up(K, 64) * 16), {}};
    auto* out = digits.x.template as<int8_t>();
    std::memset(out, 0, round_up(K, 64) * 16);
    std::vector<float> row(K);
    std::vector<int32_t> numbers(K);
    for (int r = 0; r < ROWS; ++r) {
      load(values + r * K, row.data(), K);
      int32_t bits = 0;
      for (int64_t k = 0; k < K; ++k) bits = std::max(bits, abs_bits(row[k]));
      const float largest = std::bit_cast<float>(bits);
      if (!std::isfinite(largest)) return {};
      int exponent = 0;
      std::frexp(largest, &exponent);  // largest < 2 ** exponent
      digits.unit[r] = std::ldexp(1.0, exponent - 30);
      // Powers of two are exact, but no float is that of a subnormal `largest`.
      const float first = std::ldexp(1.0f, -exponent / 2), second = std::ldexp(1.0f, 30 - exponent + exponent / 2);
      for (int64_t k = 0; k < K; ++k) numbers[k] = static_cast<int32_t>(std::nearbyint(row[k] * first * second));
      AmxTile::pack_digits(numbers.data(), K, r, out);
    }
    return digits;
  }

  template <int ROWS>
  void dot_digits(const Digits<ROWS>& digits, int64_t n0, int64_t count, T (&sums)[ROWS][WIDTH]) const {
    static_assert(WIDTH == 16);
    const auto* x = digits.x.template as<int8_t>();
    alignas(64) int32_t all[WIDTH][AmxTile::DIGIT_ROWS][AmxTile::DIGITS];
    if (is_aligned() && count == WIDTH) {
      const int8_t* w = weight + n0 * K;
      AmxTile::dot_digits(K, x, w, K, n0 + 2 * WIDTH <= N ? w + WIDTH * K : w, true, all[0][0]);
    } else {
      alignas(64) int8_t w[WIDTH * AmxTile::STRIDE];
      for (int64_t k = 0; k == 0 || k < K; k += AmxTile::DEPTH) {  // once if K is 0, to write zeros
        const int64_t depth = std::min(AmxTile::DEPTH, K - k);
        for (int64_t n = 0; n < WIDTH; ++n)
          AmxTile::load_w(weight + (n0 + std::min(n, count - 1)) * K + k, depth, w + n * AmxTile::STRIDE);
        AmxTile::dot_digits(round_up(depth, 64), x + k * 16, w, AmxTile::STRIDE, w, k == 0, all[0][0]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int64_t n = 0; n < WIDTH; ++n) {
        int64_t total = 0;
        for (int d = AmxTile::DIGITS - 1; d >= 0; --d) total = total * 256 + all[n][r][d];
        sums[r][n] = static_cast<T>(total * digits.unit[r]);
      }
  }

  // Whether rows of the weight begin and end with cache lines.
  bool is_aligned() const { return K % 64 == 0 && reinterpret_cast<uintptr_t>(weight) % 64 == 0; }

  // sums[r][n] = sum_k(rows[r, k] * weight[n0 + n, k]), AT_ONCE k at a time, so that the first-level cache holds
  // the rows
  template <int ROWS>
  void dot_bfloat16(const uint16_t* rows, int64_t stride, int64_t n0, int64_t count, T (&sums)[ROWS][WIDTH]) const {
    constexpr int64_t AT_ONCE = 4096 / ROWS / 64 * 64;
    typename OutlierTile::Vector partial[WIDTH / 4][ROWS][4] = {};
    for (int64_t k = 0; k < K; k += AT_ONCE)
      for (int64_t n = 0; n < count; n += 4) {
        const int8_t* w[4];
        for (int64_t c = 0; c < 4; ++c) w[c] = weight + (n0 + std::min(n + c, count - 1)) * K + k;
        OutlierTile::template few<ROWS>(rows + k, stride, std::min(AT_ONCE, K - k), w, WIDTH * K, partial[n / 4]);
      }
    for (int64_t n = 0; n < count; n += 4) OutlierTile::template total_few<ROWS>(partial[n / 4], sums[0] + n, WIDTH);
  }

  // The same in floats, in enough vectors of partial sums that additions (four cycles each) do not wait for each other.
  // Several rows take two channels at a time, and AT_ONCE k of them, which the first-level cache holds. One row is
  // bound by bandwidth, so it reads the weight in the order of memory.
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

  // x as the tiles want it
  struct Packed {
    std::vector<Block> blocks;
    std::vector<int64_t> outliers;  // of blocks that do not split
    int64_t x_size = 0, float_tile_size = 0;  // of all codes; bytes of a tile's floats
    int64_t outliers_at = 0, columns_at = 0;
    // [blocks][tiles][kept / KG][MR][KG] of Tile::X; few rows: [M][K] of int16, or `pack_few`
    std::unique_ptr<Buffer> x;
    // [tiles][outliers / KG][MR][KG] of OutlierTile::X: of blocks that split, of `outliers`, and of the columns
    std::unique_ptr<Buffer> floats;
    std::vector<T> x_scale;  // 0 where there is no row
    std::vector<int32_t> excess;  // of a row's sums

    typename Tile::X* x_of(const Block& block, int64_t tile) const {
      return x->as<typename Tile::X>() + block.x_at + tile * round_up(block.kept, 64) * MR;
    }
  };

  struct Scratch {
    [[no_unique_address]] typename Tile::Setup setup;
    alignas(64) int32_t sums[Tile::BLOCK_M * PANEL];  // [tiles][PANEL][MR]
    alignas(64) T values[Tile::BLOCK_M * PANEL];  // of outlier columns
    alignas(64) T unquantised[Tile::BLOCK_M * PANEL];
    alignas(64) typename Tile::W w[PANEL * Tile::STRIDE];
    alignas(64) T float_w[PANEL * InT::STRIDE];  // or, fewer bytes, of Bfloat16Tile::W
    alignas(64) int8_t codes[PANEL][DEPTH + 64];  // of outlier columns
    alignas(64) T scale[PANEL], bias[PANEL];
  };

  // Calls f with a value of the tile's type for the unquantised columns.
  template <typename F>
  void with_columns_tile(F&& f) const {
    if constexpr (MAY_USE_BFLOAT16)
      if (columns_weight.dtype == Dtype::bfloat16) return f(OutlierTile{});
    f(InT{});
  }

  // Tasks are of one block's rows and of neighbouring units of channels.
  void multiply_codes() const {
    const bool few = M <= FEW_ROWS;
    const int64_t tiles = (M + MR - 1) / MR, threads = thread_count();
    const Packed p = pack(few);
    const int64_t units = (N + UNIT - 1) / UNIT;
    const int64_t tasks = threads > 1 ? 8 * threads : 1;  // at least, so that threads get equal work
    int64_t at_most = Tile::BLOCK_M;  // rows
    const int64_t row_bytes = K + 2 * outliers.size() + 1;  // of x as tiles have it
    if (TILE_IN_PLACE) at_most = std::clamp<int64_t>(X_IN_CACHE / row_bytes, 2 * MR, at_most);
    const int64_t by_size = (tiles + at_most / MR - 1) / (at_most / MR), by_threads = (tasks + units - 1) / units;
    const int64_t wanted = std::max(by_size, by_threads);
    const int64_t block_tiles = (tiles + wanted - 1) / wanted;  // blocks of one size
    const int64_t blocks = (tiles + block_tiles - 1) / block_tiles;
    const int64_t operations = K * UNIT * std::max<int64_t>(1, std::min(M, block_tiles * MR) / 8);
    parallel_for(blocks * units, grain_of(operations), [&](int64_t begin, int64_t end) {
      const auto scratch = std::make_unique_for_overwrite<Scratch>();
      while (begin < end) {
        const int64_t first = begin / units * block_tiles, last = std::min(tiles, first + block_tiles);
        const int64_t unit = begin % units, count = std::min({int64_t(PANEL / UNIT), units - unit, end - begin});
        panel(unit * UNIT, std::min(count * UNIT, N - unit * UNIT), first, last, few, p, *scratch);
        begin += count;
      }
    });
  }

  Packed pack(bool few) const {
    const int64_t tiles = (M + MR - 1) / MR;
    Packed p;
    std::vector<int64_t> excluded = outliers;
    if (!rotated && !columns.empty()) {
      excluded.insert(excluded.end(), columns.begin(), columns.end());
      std::sort(excluded.begin(), excluded.end());
    }
    const int64_t count = (K + DEPTH - 1) / DEPTH, depth = count == 0 ? 0 : round_up((K + count - 1) / count, 64);
    for (int64_t k = 0; k < K || p.blocks.empty(); k += depth) {  // at least one block, and all of nearly one size
      Block& block = p.blocks.emplace_back(k, std::min(depth, K - k), outliers, excluded, COMPACTS_ONE_OF);
      block.x_at = p.x_size;
      block.floats_at = p.float_tile_size;
      p.x_size += tiles * round_up(block.kept, 64) * MR;
      p.float_tile_size += round_up(block.outliers.size(), OutlierTile::STEP) * MR * sizeof(typename OutlierTile::X);
      if (block.splits()) continue;
      const auto from = std::lower_bound(outliers.begin(), outliers.end(), block.k);
      p.outliers.insert(p.outliers.end(), from, std::lower_bound(from, outliers.end(), block.k + block.depth));
    }
    p.outliers_at = p.float_tile_size;
    p.float_tile_size += round_up(p.outliers.size(), OutlierTile::STEP) * MR * sizeof(typename OutlierTile::X);
    p.columns_at = p.float_tile_size;
    p.float_tile_size += round_up(columns.size(), std::max(InT::STEP, OutlierTile::STEP)) * MR * sizeof(T);
    p.x_scale.resize(tiles * MR);
    std::copy(x_scale, x_scale + M, p.x_scale.begin());
    p.excess.resize(tiles * MR);
    p.floats = std::make_unique<Buffer>(tiles * p.float_tile_size);
    if (few) {
      if constexpr (TILE_HAS_FEW)
        pack_few<Tile>(p);
      else {
        p.x = std::make_unique<Buffer>(M * K * sizeof(int16_t));
        for (int64_t i = 0; i < M * K; ++i) p.x->template as<int16_t>()[i] = codes[i];
      }
    } else
      p.x = std::make_unique<Buffer>(p.x_size * sizeof(typename Tile::X));
    parallel_for(tiles, grain_of(K * MR), [&](int64_t begin, int64_t end) {
      Buffer kept(MR * (DEPTH + 64));
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t m0 = tile * MR, rows = std::min<int64_t>(MR, M - m0);
        char* floats = p.floats->template as<char>() + tile * p.float_tile_size;
        if (Tile::OFFSET != 0 && !few)
          for (int64_t m = m0; m < m0 + rows; ++m) p.excess[m] = Tile::OFFSET * sum_codes(codes + m * K, K);
        for (const Block& block : p.blocks) {
          if (!few) pack_codes(block, m0, rows, kept.as<int8_t>(), p.x_of(block, tile));
          pack_floats<OutlierTile>(block.k, block.outliers, m0, rows, floats + block.floats_at);
        }
        pack_floats<OutlierTile>(0, p.outliers, m0, rows, floats + p.outliers_at);
        with_columns_tile([&](auto of) { pack_floats<decltype(of)>(0, columns, m0, rows, floats + p.columns_at); });
      }
    });
    return p;
  }

  void pack_codes(const Block& block, int64_t m0, int64_t rows, int8_t* buffer, typename Tile::X* out) const {
    constexpr int64_t WIDTH = DEPTH + 64;
    const int8_t* from = codes + m0 * K + block.k;
    if (!block.compacts()) return Tile::pack_x(from, K, rows, block.kept, out);
    for (int64_t m = 0; m < rows; ++m) block.template split<1>(from + m * K, K, buffer + m * WIDTH, WIDTH, nullptr, 0);
    Tile::pack_x(buffer, WIDTH, rows, block.kept, out);
  }

  // [columns / KG][MR][KG] of F::X, 0 where there is no row or no column up to a multiple of STEP
  template <typename F>
  void pack_floats(int64_t k, const std::vector<int64_t>& of_columns, int64_t m0, int64_t rows, void* out) const {
    constexpr int KG = F::KG;
    const int64_t C = of_columns.size();
    if (C == 0) return;
    auto* to = static_cast<typename F::X*>(out);
    if (C % F::STEP != 0 || rows < MR) std::fill_n(to, round_up(C, F::STEP) * MR, typename F::X(0));
    for (int64_t m = 0; m < rows; ++m) {
      const scalar_t* from = x + (m0 + m) * K + k;
      if constexpr (KG == 2) {
        for (int64_t c = 0; c + 1 < C; c += 2) {
          typename F::X* pair = to + (c / 2 * MR + m) * 2;
          if (of_columns[c] + 1 == of_columns[c + 1])
            std::memcpy(pair, from + of_columns[c], 2 * sizeof(typename F::X));
          else
            pair[0] = F::as_x(from[of_columns[c]]), pair[1] = F::as_x(from[of_columns[c + 1]]);
        }
        if (C % 2 != 0) to[(C / 2 * MR + m) * 2] = F::as_x(from[of_columns[C - 1]]);
      } else
        for (int64_t c = 0; c < C; ++c) to[c * MR + m] = F::as_x(from[of_columns[c]]);
    }
  }

  // Channels n0 to n0 + count of tiles first to last - 1.
  void panel(int64_t n0, int64_t count, int64_t first, int64_t last, bool few, const Packed& p, Scratch& s) const {
    load_any(weight_scale, n0, count, PANEL, s.scale);
    std::fill_n(s.bias, PANEL, T(0));
    if (epilogue.bias.data) load_any(epilogue.bias, n0, count, PANEL, s.bias);

    with_columns_tile([&](auto of) {
      using F = decltype(of);
      const int64_t C = columns.size();
      auto* w = reinterpret_cast<typename F::W*>(s.float_w);
      for (int64_t c = 0; c < C; c += FLOAT_DEPTH) {
        const int64_t depth = std::min(FLOAT_DEPTH, C - c);
        for (int64_t n = 0; n < count; ++n)
          F::load_floats(columns_weight, (n0 + n) * C + c, depth, w + n * F::STRIDE);
        const int64_t at = p.columns_at + c * MR * sizeof(typename F::X);
        run_floats<F>(depth, count, first, last, p, at, c == 0, s.unquantised, s);
      }
    });
    bool no_sums = true, no_values = true;
    if (few) {
      multiply_few(n0, count, p, s.sums);
      no_sums = false;
    }
    const int64_t gathered = p.outliers.size();
    for (int64_t c = 0; c < gathered; c += FLOAT_DEPTH) {
      const int64_t depth = std::min(FLOAT_DEPTH, gathered - c);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = 0; i < depth; ++i) s.codes[n][i] = weight[(n0 + n) * K + p.outliers[c + i]];
      const int64_t at = p.outliers_at + c * MR * sizeof(typename OutlierTile::X);
      add_outliers(depth, 0, count, first, last, p, at, no_values, s);
    }
    for (const Block& block : p.blocks) {
      const int8_t* rows = weight + n0 * K + block.k;
      const int64_t outliers_here = block.outliers.size();
      if (block.splits())
        for (int64_t n = 0; n < count;) n += split(block, rows + n * K, n, count - n, few || !block.compacts(), s);
      for (int64_t c = 0; c < outliers_here; c += FLOAT_DEPTH)
        add_outliers(std::min(FLOAT_DEPTH, outliers_here - c), c, count, first, last, p,
                     block.floats_at + c * MR * sizeof(typename OutlierTile::X), no_values, s);
      const bool is_last = &block == &p.blocks.back(), multiplies = !few && block.kept > 0, is_first = no_sums;
      const int8_t* ahead = is_last ? rows - block.k + count * K : rows + block.depth;
      const int64_t ahead_count = is_last ? std::min(count, N - n0 - count) : count;
      Channels channels{count, true, rows, K, ahead, K, ahead_count, false};
      if (block.compacts()) channels.rows = reinterpret_cast<const int8_t*>(s.w), channels.stride = Tile::STRIDE;
      if (TILE_IN_PLACE && !block.compacts() && is_aligned() && count % NR == 0)
        channels.in_place = true, channels.load = false;
      no_sums &= !multiplies;
      // Sums of one block are read once, from the first-level cache: two tiles have room.
      const auto sums_of = [&](int64_t tile) {
        return s.sums + (p.blocks.size() == 1 ? tile % 2 : tile - first) * PANEL * MR;
      };
      Pieces pieces{};  // of the tile before
      const auto store_next = [&] {
        const int64_t at = (pieces.tile - first) * PANEL * MR;
        store(pieces, n0, no_sums ? nullptr : sums_of(pieces.tile), no_values ? nullptr : s.values + at,
              columns.empty() ? nullptr : s.unquantised + at, p, s);
      };
      for (int64_t tile = first; tile < last; ++tile) {
        if (multiplies) {
          if constexpr (TILE_IN_PLACE) {
            const int64_t of_tile = (ahead_count + last - first - 1) / (last - first), from = of_tile * (tile - first);
            channels.ahead = ahead + from * K, channels.ahead_count = std::min(of_tile, ahead_count - from);
            const int64_t number = pieces.number(), steps = round_up(block.kept, 64) / 64 * ((count + NR - 1) / NR);
            int64_t due = 0;
            Tile::run(block.kept, p.x_of(block, tile), channels, s.w, sums_of(tile), is_first, rows_of(tile), [&] {
              for (due += number; due >= steps; due -= steps) store_next();
            });
          } else
            Tile::run(block.kept, p.x_of(block, tile), channels, s.w, sums_of(tile), is_first, rows_of(tile));
        }
        channels.load = false;
        while (pieces.left()) store_next();
        if (!is_last) continue;
        pieces = {tile, rows_of(tile), count};
        if (!TILE_IN_PLACE || tile + 1 == last)
          while (pieces.left()) store_next();
      }
    }
  }

  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(MR, M - tile * MR); }

  // Channels n on, of which `count` exist, of a weight's block that splits. Returns how many it has done.
  int64_t split(const Block& block, const int8_t* rows, int64_t n, int64_t count, bool outliers_only,
                Scratch& s) const {
    auto* w = outliers_only ? nullptr : reinterpret_cast<int8_t*>(s.w + n * Tile::STRIDE);
    const int64_t done = count >= 4 ? 4 : 1;
    if (done == 4)
      block.template split<4>(rows, K, w, Tile::STRIDE, s.codes[n], DEPTH + 64);
    else
      block.template split<1>(rows, K, w, Tile::STRIDE, s.codes[n], DEPTH + 64);
    return done;
  }

  // values (+)= columns c to c + depth of s.codes times floats `at` a place in a tile's
  void add_outliers(int64_t depth, int64_t c, int64_t count, int64_t first, int64_t last, const Packed& p, int64_t at,
                    bool& no_values, Scratch& s) const {
    using F = OutlierTile;
    auto* w = reinterpret_cast<typename F::W*>(s.float_w);
    for (int64_t n = 0; n < count; ++n) F::load_codes(s.codes[n] + c, depth, w + n * F::STRIDE);
    run_floats<F>(depth, count, first, last, p, at, no_values, s.values, s);
    no_values = false;
  }

  template <typename F>
  void run_floats(int64_t depth, int64_t count, int64_t first, int64_t last, const Packed& p, int64_t at, bool is_first,
                  T* values, const Scratch& s) const {
    const auto* w = reinterpret_cast<const typename F::W*>(s.float_w);
    for (int64_t tile = first; tile < last; ++tile) {
      const char* floats = p.floats->template as<char>() + tile * p.float_tile_size + at;
      for (int64_t n = 0; n < count; n += F::NR)
        F::run(depth, reinterpret_cast<const typename F::X*>(floats), w + n * F::STRIDE,
               values + ((tile - first) * PANEL + n) * MR, is_first, rows_of(tile) <= MR / 2);
    }
  }

  using V = typename Lanes<T>::V;

  // L rows of L channels of a tile, channels MR apart.
  struct Piece {
    const int32_t* sums;  // null: zeros
    const int32_t* excess;
    V x_scale;
    const T *values, *unquantised;  // null: zeros
    const T *scale, *bias;

    // ((sums - excess) * x_scale + values) * scale + bias + unquantised
    V of_channel(int n) const {
      V v = values == nullptr ? V{} : *(const V*)(values + n * MR);
      if (sums != nullptr)
        v += convert_difference<T>(sums + n * MR, Tile::OFFSET == 0 ? nullptr : excess) * x_scale;
      v = v * scale[n] + bias[n];
      return unquantised == nullptr ? v : v + *(const V*)(unquantised + n * MR);
    }
  };

  // The pieces of a tile, row by row.
  struct Pieces {
    int64_t tile, rows, count, m = 0, n = 0;

    int64_t number() const { return (rows + L - 1) / L * ((count + L - 1) / L); }
    bool left() const { return m < rows; }
    void next() {
      n += L;
      if (n >= count) n = 0, m += L;
    }
  };

  // Rounds the next one of `pieces` to y.
  void store(Pieces& pieces, int64_t n0, const int32_t* sums, const T* values, const T* unquantised, const Packed& p,
             const Scratch& s) const {
    const int64_t m = pieces.tile * MR + pieces.m, n = pieces.n, at = n * MR + pieces.m;
    const int64_t rows = std::min<int64_t>(L, pieces.rows - pieces.m);
    const int64_t channels = std::min<int64_t>(L, pieces.count - n);
    const Piece piece{
        sums == nullptr ? nullptr : sums + at,
        p.excess.data() + m,
        *(const V*)(p.x_scale.data() + m),
        values == nullptr ? nullptr : values + at,
        unquantised == nullptr ? nullptr : unquantised + at,
        s.scale + n,
        s.bias + n,
    };
    scalar_t* to = y + m * N + n0 + n;
    pieces.next();
#ifdef __AVX512BF16__
    const bool plain = epilogue.activation == Activation::none && epilogue.binary == Binary::none;
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>)
      if (plain && channels == L)
        if (sums == nullptr || unquantised != nullptr ? round_all(piece, to, N, rows)
                : values == nullptr                   ? round_sums<false>(piece, to, N, rows)
                                                      : round_sums<true>(piece, to, N, rows))
          return;
#endif
    V block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) block[i] = piece.of_channel(i);
    transpose(block);
    for (int64_t i = 0; i < rows; ++i) epilogue.store((const T*)&block[i], m + i, n0 + n, channels, N, y);
  }

#ifdef __AVX512BF16__
  // `round_transposed` of a piece of which there are sums, and nothing unquantised. Not inline: GCC would spill the
  // addresses.
  template <bool VALUES>
  [[gnu::noinline]] static bool round_sums(const Piece& piece, c10::BFloat16* y, int64_t stride, int64_t rows) {
    const int32_t *sums = piece.sums, *excess = Tile::OFFSET == 0 ? nullptr : piece.excess;
    const T* values = piece.values;
    const V x_scale = piece.x_scale;
    const auto of = [&](int n) __attribute__((always_inline)) {
      const V sum = convert_difference<T>(sums + n * MR, excess);
      return VALUES ? sum * x_scale + *(const V*)(values + n * MR) : sum * x_scale;
    };
    return round_transposed<true>(of, piece.scale, piece.bias, y, stride, rows);
  }

  [[gnu::noinline]] static bool round_all(const Piece& piece, c10::BFloat16* y, int64_t stride, int64_t rows) {
    return round_transposed<false>([&](int n) __attribute__((always_inline)) { return piece.of_channel(n); }, nullptr,
                                   nullptr, y, stride, rows);
  }
#endif

  // sums[n][m] of all rows, with the weight as it is stored.
  void multiply_few(int64_t n0, int64_t count, const Packed& p, int32_t* sums) const {
    constexpr int64_t CHANNELS = 4;
    for (int64_t n = 0; n < count; n += CHANNELS) {
      const int8_t* w[CHANNELS];
      for (int64_t c = 0; c < CHANNELS; ++c) w[c] = weight + (n0 + std::min(n + c, count - 1)) * K;
      few_sums(w, p, sums + n * MR);
    }
  }

  // sums[c * MR + m] = sum_k(codes[m, k] * w[c][k]). The channels' weights stay in the first-level cache.
  template <size_t CHANNELS, typename AnyTile = Tile>
  void few_sums(const int8_t* const (&w)[CHANNELS], const Packed& p, int32_t* sums) const {
    if constexpr (HAS_FEW<AnyTile>)
      for (int64_t m = 0; m < M; m += AnyTile::FEW_AT_ONCE)
        AnyTile::few(std::min<int64_t>(AnyTile::FEW_AT_ONCE, M - m), p.x->template as<uint8_t>() + m * round_up(K, 64), K,
                     w, m == 0, sums + m);
    else
      for (size_t c = 0; c < CHANNELS; ++c)
        for (int64_t m = 0; m < M; m += 4) {
          const int16_t* rows = p.x->template as<int16_t>() + m * K;
          int32_t* to = sums + c * MR + m;
          switch (M - m) {
            case 1: dot<1>(rows, K, w[c], to); break;
            case 2: dot<2>(rows, K, w[c], to); break;
            case 3: dot<3>(rows, K, w[c], to); break;
            default: dot<4>(rows, K, w[c], to);
          }
        }
  }

  template <typename AnyTile>
  void pack_few(Packed& p) const {
    const int64_t stride = round_up(K, 64);
    p.x = std::make_unique<Buffer>(round_up(M, 4) * stride);
    for (int64_t m = 0; m < M; m += AnyTile::FEW_AT_ONCE)
      AnyTile::pack_few(codes + m * K, K, std::min<int64_t>(AnyTile::FEW_AT_ONCE, M - m),
                        p.x->template as<uint8_t>() + m * stride);
  }
};

}  // namespace int8fx
