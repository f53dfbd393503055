// The most that this machine can do: int8 multiply-adds on registers, and bytes read from memory.
//
// The multiply-add loops keep enough sums in flight to hide their latency and read no memory. Where the compiler could
// compute a product once for all turns, an empty asm statement claims to change an operand.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AMX_INT8__)

constexpr char NAME[] = "tdpbssd";
constexpr int64_t OPS = 4 * 2 * 16 * 16 * 64;  // 4 tiles of 16 x 16 sums over 64

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

int64_t multiply(int64_t turns) {
  static constexpr TileConfig config;  // constant: GCC would not know that all of a local one is read
  _tile_loadconfig(&config);
  alignas(64) int8_t tile[1024] = {};
  _tile_loadd(4, tile, 64);
  _tile_loadd(5, tile, 64);
  _tile_loadd(6, tile, 64);
  _tile_loadd(7, tile, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < turns; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, tile, 64);
  _tile_release();
  return tile[0];
}

#elif defined(__AVX512VNNI__)

constexpr char NAME[] = "vpdpbusd";
constexpr int SUMS = 16;
constexpr int64_t OPS = SUMS * 2 * 64;

int64_t multiply(int64_t turns) {
  __m512i sums[SUMS];
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < turns; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < SUMS; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], a, b);
  for (int j = 1; j < SUMS; ++j) sums[0] = _mm512_add_epi32(sums[0], sums[j]);
  return _mm512_reduce_add_epi32(sums[0]);
}

#elif defined(__AVX2__)

constexpr char NAME[] = "vpmaddwd";
constexpr int SUMS = 6;  // more would spill
constexpr int64_t OPS = SUMS * 2 * 16;

int64_t multiply(int64_t turns) {
  __m256i sums[SUMS], a = _mm256_set1_epi16(1);
  const __m256i b = _mm256_set1_epi16(1);
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < turns; ++i)
#pragma GCC unroll 6
    for (int j = 0; j < SUMS; ++j) {
      asm volatile("" : "+x"(a));
      sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(a, b));
    }
  for (int j = 1; j < SUMS; ++j) sums[0] = _mm256_add_epi32(sums[0], sums[j]);
  return _mm256_extract_epi32(sums[0], 0);
}

#else

constexpr char NAME[] = "the compiler's own";
constexpr int SUMS = 64;
constexpr int64_t OPS = SUMS * 2;

int64_t multiply(int64_t turns) {
  int32_t sums[SUMS] = {};
  int16_t a[SUMS], b[SUMS];
  for (int j = 0; j < SUMS; ++j) a[j] = b[j] = 1;
  for (int64_t i = 0; i < turns; ++i) {
    asm volatile("" : : "r"(a) : "memory");
    for (int j = 0; j < SUMS; ++j) sums[j] += int32_t(a[j]) * b[j];
  }
  int64_t sum = 0;
  for (const auto value : sums) sum += value;
  return sum;
}

#endif

}  // namespace

// The instruction, and the operations (multiplications and additions) of one turn on one thread.
extern "C" const char* int8_instruction() { return NAME; }
extern "C" int64_t int8_operations() { return OPS; }

// `turns` turns on each of `threads` threads.
extern "C" int64_t int8_multiply(int64_t turns, int threads) {
  int64_t sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  sum += multiply(turns);
  return sum;
}

// The sum of `count` words, each thread reading a stretch of its own. It fetches 16 KiB ahead into the second-level cache:
// without that, two cores of an AMD EPYC (Zen 4) read 27 GB/s and not 31.
extern "C" uint64_t read_words(const uint64_t* words, int64_t count, int threads) {
  constexpr int64_t LINE = 8, AHEAD = 2048;
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static)
  for (int64_t line = 0; line < count / LINE; ++line) {
    __builtin_prefetch(words + line * LINE + AHEAD, 0, 2);
    for (int64_t i = 0; i < LINE; ++i) sum += words[line * LINE + i];
  }
  for (int64_t i = count / LINE * LINE; i < count; ++i) sum += words[i];
  return sum;
}
