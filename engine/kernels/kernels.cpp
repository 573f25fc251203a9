// Paged attention and linear layers on the CPU, in float32 over weights of float32 or bfloat16 and KV of these or float8 e4m3.
// With AVX512-BF16 what meets weights or KV of bfloat16 is rounded to it, and the CPU multiplies pairs, summed in float32.
//
// One rule holds everywhere: a number is summed in one fixed order, whatever else is in the batch. A product of a row and a
// column runs along their length; attention runs over keys in chunks of CHUNK from position 0, in a chunk over tiles of TILE,
// and chunks are merged from left to right. So a row's result has the same bits alone, in any batch, in any chunk of a prompt,
// and with its prefix shared with other rows (Hydragen, arXiv 2402.05099) or not.
//
// Built once per instruction set by build.py; plain C interface, pointers checked by the caller (engine/kernels/library.py).
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int WIDE = 4;  // vectors of a panel: 24 sums of 32 registers
#else
constexpr int LANES = 8;
constexpr int WIDE = 2;
#endif
constexpr int PANEL = LANES * WIDE;  // columns of a packed weight, query vectors of an attention task
constexpr int GEMM_ROWS = 6;
constexpr int TILE = 96;    // keys between two updates of the running softmax
constexpr int CHUNK = 768;  // keys of one partial result
static_assert(TILE % LANES == 0 && CHUNK % TILE == 0);

// Two of bfloat16, the first in the lower bits: of two tokens, two dimensions, two places along a product.
typedef uint32_t Pair;

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int16_t VecShort __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t VecByte __attribute__((vector_size(LANES), aligned(1), may_alias));

constexpr long LINE = 64;  // bytes that memory gives at once

// Scratch begins with a line: a vector that lies in two of them costs two loads.
template <typename Item>
struct LineAllocator {
  using value_type = Item;
  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  Item* allocate(size_t count) { return static_cast<Item*>(::operator new(count * sizeof(Item), std::align_val_t(LINE))); }
  void deallocate(Item* items, size_t) { ::operator delete(items, std::align_val_t(LINE)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <typename Number>
using Row = std::vector<Number, LineAllocator<Number>>;
using Floats = Row<float>;

// Of weights and pools; the numbers are those of _ELEMENTS in library.py. FLOAT8 is e4m3 without infinities: a sign, 4 bits of
// exponent (bias 7), 3 of mantissa; up to 448, the code above it is NaN. It has no scale.
enum Element : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT8 = 2 };

static inline __attribute__((always_inline)) Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
static inline __attribute__((always_inline)) VecBits load(const Pair* from) { return *reinterpret_cast<const VecBits*>(from); }
static inline __attribute__((always_inline)) VecBits load_bits(const uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const VecHalf*>(from), VecBits);
}
static inline __attribute__((always_inline)) Vec load(const uint16_t* from) { return reinterpret_cast<Vec>(load_bits(from) << 16); }
static inline __attribute__((always_inline)) Vec first_of(VecBits pairs) { return reinterpret_cast<Vec>(pairs << 16); }
static inline __attribute__((always_inline)) Vec second_of(VecBits pairs) { return reinterpret_cast<Vec>(pairs & 0xffff0000u); }
// Through float16, which is 2^8 smaller with the same fields; subnormal codes cost nothing this way.
static inline __attribute__((always_inline)) Vec load(const uint8_t* from) {
  const VecShort wide = __builtin_convertvector(*reinterpret_cast<const VecByte*>(from), VecShort) << 7;
  const VecShort small = (wide & static_cast<short>(0xbfff)) | ((wide & 0x3f80) == 0x3f80);  // NaN: all bits
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(small)) * 256.0f;
#else
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(small)) * 256.0f;
#endif
}
static inline __attribute__((always_inline)) void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
static inline __attribute__((always_inline)) void store(Pair* to, VecBits value) { *reinterpret_cast<VecBits*>(to) = value; }
static inline __attribute__((always_inline)) Vec splat(float value) { return value - Vec{}; }
static inline __attribute__((always_inline)) VecBits splat(Pair value) { return value - VecBits{}; }

static inline __attribute__((always_inline)) void store_together(float* to, Vec alone, Vec) { store(to, alone); }

// sum + one * two. Of pairs both products are added, the same way wherever the sum stands.
static inline __attribute__((always_inline)) Vec add_product(Vec sum, Vec one, Vec two) { return sum + one * two; }
#if defined(__AVX512BF16__)
static inline __attribute__((always_inline)) Vec add_product(Vec sum, VecBits one, VecBits two) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(one), reinterpret_cast<__m512bh>(two));
}
// To the nearest, ties to even; subnormals become 0.
static inline __attribute__((always_inline)) VecHalf halves_of(Vec wide) { return reinterpret_cast<VecHalf>(_mm512_cvtneps_pbh(wide)); }
static inline __attribute__((always_inline)) void store_together(Pair* to, Vec first, Vec second) {
  store(to, __builtin_convertvector(halves_of(first), VecBits) | __builtin_convertvector(halves_of(second), VecBits) << 16);
}
#endif

// Of NaN and a number the second.
static inline __attribute__((always_inline)) Vec larger(Vec one, Vec two) {
#if defined(__AVX512F__)
  return _mm512_max_ps(one, two);
#else
  return _mm256_max_ps(one, two);
#endif
}

#if defined(__AVX512F__)
constexpr int POWER_BITS = 5;
#else
constexpr int POWER_BITS = 3;
#endif
constexpr int POWERS = 1 << POWER_BITS;
static_assert(POWERS % LANES == 0);

// The bits of 2^(i / POWERS), less what the lower part of a whole number of such steps adds to the exponent in exp_of.
struct Powers {
  alignas(LINE) uint32_t bits[POWERS];
  Powers() {
    for (uint32_t i = 0; i < POWERS; i++) {
      const float power = static_cast<float>(std::exp2(static_cast<double>(i) / POWERS));
      std::memcpy(bits + i, &power, sizeof power);
      bits[i] -= i << (23 - POWER_BITS);
    }
  }
};
static const Powers powers;

// e^x for x <= 88, 0 below -87; exactly 1 of 0; relative error below 2e-7 + 2e-8 |x|. A power of two from a table times a polynomial.
static inline __attribute__((always_inline)) Vec exp_of(Vec x) {
  const Vec per_step = splat(POWERS * 1.44269504f);
  const Vec shifted = x * per_step + splat(12582912.0f);  // the nearest whole number of steps, in the lowest bits
  const Vec rest = x * per_step - (shifted - splat(12582912.0f));
  const VecBits steps = reinterpret_cast<VecBits>(shifted);
#if defined(__AVX512F__)
  const VecBits found = reinterpret_cast<VecBits>(_mm512_permutex2var_epi32(
      _mm512_load_si512(powers.bits), reinterpret_cast<__m512i>(steps), _mm512_load_si512(powers.bits + LANES)));
  const Vec power = reinterpret_cast<Vec>(found + (steps << (23 - POWER_BITS)));
  const Vec slope = rest * splat(2.3459666e-4f) + splat(2.1661167e-2f);
  return _mm512_maskz_fmadd_ps(_mm512_cmp_ps_mask(x, splat(-87.0f), _CMP_NLT_UQ), power * rest, slope, power);
#else
  const VecBits found = reinterpret_cast<VecBits>(
      _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(powers.bits)), reinterpret_cast<__m256i>(steps)));
  const Vec power = reinterpret_cast<Vec>(found + (steps << (23 - POWER_BITS)));
  const Vec slope = (rest * splat(1.0839106e-4f) + splat(3.7540255e-3f)) * rest + splat(8.6643402e-2f);
  const Vec sum = power * rest * slope + power;
  return x < splat(-87.0f) ? Vec{} : sum;
#endif
}

static inline __attribute__((always_inline)) void store_line(float* to, const float* from, int count) {
  std::memcpy(to, from, count * sizeof(float));
}
// To bfloat16, to the nearest, ties to even; NaN stays NaN.
static inline __attribute__((always_inline)) void store_line(uint16_t* to, const float* from, int count) {
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
  }
}

// To float8 e4m3, to the nearest, ties to even; what lies outside becomes +-448, NaN stays NaN.
static inline __attribute__((always_inline)) void store_line(uint8_t* to, const float* from, int count) {
  for (int i = 0; i < count; i++) {
    const float size = std::min(448.0f, std::fabs(from[i]));  // NaN: 448, replaced below
    uint32_t sign, bits;
    std::memcpy(&sign, from + i, sizeof sign);
    std::memcpy(&bits, &size, sizeof bits);
    const uint32_t power = std::max(bits & 0x7f800000, 121u << 23) + (20u << 23);  // its last bit is that of a code
    float anchor;
    std::memcpy(&anchor, &power, sizeof anchor);
    const float rounded = (size + anchor) - anchor;
    std::memcpy(&bits, &rounded, sizeof bits);
    const uint32_t normal = (bits >> 20) - (120u << 3), subnormal = static_cast<uint32_t>(static_cast<int32_t>(rounded * 512.0f));
    const uint32_t code = from[i] != from[i] ? 0x7f : rounded < 0.015625f ? subnormal : normal;
    to[i] = static_cast<uint8_t>(code | (sign >> 24 & 0x80));
  }
}

// ---- small operations, one row after the other

constexpr long ROWS_FOR_THREADS = 16;  // fewer are done before other threads would wake up

static void norm_row(const float* x, long count, const float* weight, float eps, float* y) {
  Vec sums = Vec{};
  long i = 0;
  for (; i + LANES <= count; i += LANES) sums += load(x + i) * load(x + i);
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
  for (; i < count; i++) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
  for (i = 0; i + LANES <= count; i += LANES) store(y + i, load(weight + i) * (load(x + i) * splat(factor)));
  for (; i < count; i++) y[i] = weight[i] * (x[i] * factor);
}

static inline __attribute__((always_inline)) Vec silu(Vec x) {
  const Vec small = exp_of(x < Vec{} ? x : -x), one = splat(1.0f);
  return x * ((x < Vec{} ? small : one) / (one + small));
}

// Rotates the heads of one row by halves, in place.
static void rotate_row(float* heads, long count, long dim, const float* cosines, const float* sines) {
  const long half = dim / 2;
  for (long h = 0; h < count; h++)
    for (long i = 0; i < half; i++) {
      float *first = heads + h * dim + i, *second = first + half;
      const float x = *first, y = *second;
      *first = x * cosines[i] - y * sines[i];
      *second = y * cosines[i] + x * sines[i];
    }
}

// ---- linear layers

constexpr long STRETCH = 1024;              // of a panel's length, at most: with the next one it lies in the second cache
constexpr long SPLIT_ROWS = 256;            // rows that one pass over the weights takes, about: they stay in that cache
constexpr long LEAST_SPLIT_ROWS = 48;       // where panels alone do not keep all threads busy
constexpr long WIDEN_FROM_ROWS = 13;        // more than two row blocks: widening bfloat16 once pays
constexpr long FETCH_UP_TO_ROWS = 4 * SPLIT_ROWS;  // more rows hide the way of the weights by themselves

// What a linear layer does with its sums.
enum Finish : int {
  PLAIN = 0,
  ADD = 1,   // to `onto`
  GATE = 2,  // a panel's first half through silu, times its second half
};

struct Linear {
  const float* x;     // [rows, k_count]
  long rows, k_count;
  const void* w;      // [panels][k_count][PANEL], of bfloat16 [panels][k_count / 2][PANEL][2]
  int half;           // bfloat16: k_count is even
  int finish;         // Finish
  const float* bias;  // [panels][PANEL] or null
  const float* onto;  // [rows, columns]
  float* y;           // [rows, columns]
  long columns;
};

// Weights that are fetched while others are multiplied: memory and sums would else take turns.
struct Stream {
  const char *at, *end;
  int burst;  // cache lines for every four lines of the panel

  inline __attribute__((always_inline)) void fetch() {
    for (int i = 0; i < burst && at < end; i++, at += LINE) __builtin_prefetch(at, 0, 2);
  }
};

// sum += ROWS rows of x times one line of a panel: PANEL numbers, or PANEL pairs of them.
template <int ROWS, typename Number>
static inline __attribute__((always_inline)) void add_line(const Number* x, long x_stride, const Number* line, Vec (&sum)[ROWS][WIDE]) {
  decltype(load(line)) column[WIDE];
  for (int v = 0; v < WIDE; v++) column[v] = load(line + v * LANES);
  for (int r = 0; r < ROWS; r++) {
    const auto value = splat(x[r * x_stride]);
    for (int v = 0; v < WIDE; v++) sum[r][v] = add_product(sum[r][v], value, column[v]);
  }
}
template <int ROWS>
static inline __attribute__((always_inline)) void add_line(const float* x, long x_stride, const Pair* line, Vec (&sum)[ROWS][WIDE]) {
  float wide[2 * PANEL];
  for (int v = 0; v < PANEL; v += LANES) store(wide + v, first_of(load(line + v))), store(wide + PANEL + v, second_of(load(line + v)));
  add_line<ROWS, float>(x, x_stride, wide, sum);
  add_line<ROWS, float>(x + 1, x_stride, wide + PANEL, sum);
}

// Numbers of a row for each line of a panel.
template <typename Number, typename Weight>
constexpr int PER_LINE = std::is_same_v<Weight, Pair> && std::is_same_v<Number, float> ? 2 : 1;

// sums [ROWS][PANEL] += ROWS rows of x times some lines of a panel; `begin`: of 0 instead.
template <int ROWS, typename Number, typename Weight>
static inline __attribute__((always_inline)) void stretch_rows(const Number* x, long x_stride, const Weight* w, long lines, bool begin,
                                                               float* sums, Stream& next) {
  constexpr int EACH = PER_LINE<Number, Weight>;
  Vec sum[ROWS][WIDE];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < WIDE; v++) sum[r][v] = begin ? Vec{} : load(sums + r * PANEL + v * LANES);
  const auto step = [&](long i) __attribute__((always_inline)) { add_line<ROWS>(x + i * EACH, x_stride, w + i * PANEL, sum); };
  long i = 0;
  for (; i + 4 <= lines; i += 4) {
    next.fetch();
    step(i);
    step(i + 1);
    step(i + 2);
    step(i + 3);
  }
  for (; i < lines; i++) step(i);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < WIDE; v++) store(sums + r * PANEL + v * LANES, sum[r][v]);
}

template <typename Number, typename Weight>
static void stretch(int rows, const Number* x, long x_stride, const Weight* w, long lines, bool begin, float* sums, Stream& next) {
  switch (rows) {
    case 1: return stretch_rows<1>(x, x_stride, w, lines, begin, sums, next);
    case 2: return stretch_rows<2>(x, x_stride, w, lines, begin, sums, next);
    case 3: return stretch_rows<3>(x, x_stride, w, lines, begin, sums, next);
    case 4: return stretch_rows<4>(x, x_stride, w, lines, begin, sums, next);
    case 5: return stretch_rows<5>(x, x_stride, w, lines, begin, sums, next);
    default: return stretch_rows<GEMM_ROWS>(x, x_stride, w, lines, begin, sums, next);
  }
}

// From the sums of one row in one panel to y.
static void finish_row(const Linear& l, long row, long panel, const float* sums) {
  const long width = l.finish == GATE ? PANEL / 2 : PANEL, first = panel * width;
  const long count = std::min(width, l.columns - first), place = row * l.columns + first;
  const bool whole = count == width;
  alignas(LINE) float part[PANEL];  // of the last panel, padded
  if (l.finish == ADD && !whole) std::memcpy(part, l.onto + place, count * sizeof(float));
  const float* onto = whole && l.onto ? l.onto + place : part;
  float* to = whole ? l.y + place : part;
  const auto sum_of = [&](long c) __attribute__((always_inline)) {
    return l.bias ? load(sums + c) + load(l.bias + panel * PANEL + c) : load(sums + c);
  };
  for (long c = 0; c < width; c += LANES) {
    Vec value = sum_of(c);
    if (l.finish == GATE) value = silu(value) * sum_of(width + c);
    if (l.finish == ADD) value += load(onto + c);
    store(to + c, value);
  }
  if (!whole) std::memcpy(l.y + place, part, count * sizeof(float));
}

#if !defined(__AVX512BF16__)
// Pairs of lines, one after the other, as float32.
static void widen_lines(const Pair* from, long count, Floats& widened) {
  widened.resize(2 * count * PANEL);
  for (long line = 0; line < count; line++) {
    float* to = widened.data() + 2 * line * PANEL;
    for (int c = 0; c < PANEL; c += LANES) {
      const VecBits pairs = load(from + line * PANEL + c);
      store(to + c, first_of(pairs));
      store(to + PANEL + c, second_of(pairs));
    }
  }
}
#endif

// Rows [first, end) of the columns of one panel. x: rows of l.x, perhaps as pairs. `ahead`: a panel follows that this thread will
// want next.
template <typename Number, typename Weight>
static void linear_task(const Linear& l, const Number* x, long x_stride, long panel, long first, long end, bool ahead, Floats& sums,
                        Floats& widened) {
  constexpr bool NARROW = PER_LINE<Number, Weight> == 2;  // weights of bfloat16 that are multiplied as float32
  const long all = std::is_same_v<Weight, Pair> ? l.k_count / 2 : l.k_count, rows = end - first;
  const long stretches = (l.k_count + STRETCH - 1) / STRETCH, length = (all + stretches - 1) / stretches;
  const Weight* w = static_cast<const Weight*>(l.w) + panel * all * PANEL;
  const bool widen = NARROW && rows >= WIDEN_FROM_ROWS, fetch = rows > GEMM_ROWS && rows <= FETCH_UP_TO_ROWS;
  sums.resize((stretches > 1 ? rows : GEMM_ROWS) * PANEL);
  for (long line = 0; line < all; line += length) {
    const long count = std::min(length, all - line);
    const Weight *here = w + line * PANEL, *after = here + count * PANEL;
    const bool last = line + count == all;
    const long follows = last ? (ahead ? std::min(length, all) : 0) : std::min(length, all - line - count);
    Stream next{reinterpret_cast<const char*>(after), reinterpret_cast<const char*>(fetch ? after + follows * PANEL : after), 0};
    if constexpr (NARROW)
      if (widen) widen_lines(here, count, widened);
    for (long row = first; row < end; row += GEMM_ROWS) {
      const int taken = static_cast<int>(std::min<long>(GEMM_ROWS, end - row));
      const Number* from = x + row * x_stride + line * PER_LINE<Number, Weight>;
      float* place = sums.data() + (stretches > 1 ? (row - first) * PANEL : 0);
      const long due = 4 * PANEL * static_cast<long>(sizeof(Weight)) / (widen ? 2 : 1) / LINE;
      next.burst = static_cast<int>((due * taken + rows - 1) / rows);
      if constexpr (NARROW) {
        if (widen) stretch(taken, from, x_stride, widened.data(), 2 * count, line == 0, place, next);
        else stretch(taken, from, x_stride, here, count, line == 0, place, next);
      } else {
        stretch(taken, from, x_stride, here, count, line == 0, place, next);
      }
      if (last)
        for (int r = 0; r < taken; r++) finish_row(l, row + r, panel, place + r * PANEL);
    }
  }
}

// Splits of rows come one after the other, the panels of each among the threads: threads read the same weights at about the same time.
template <typename Weight, typename Number>
static void linear(const Linear& l, const Number* x, long x_stride) {
  const long width = l.finish == GATE ? PANEL / 2 : PANEL, panels = (l.columns + width - 1) / width;
  const long wanted = (2 * omp_get_max_threads() + panels - 1) / panels;
  const long splits = std::max({1L, (l.rows + SPLIT_ROWS / 2) / SPLIT_ROWS, std::min(wanted, l.rows / LEAST_SPLIT_ROWS)});
  const long per_split = ((l.rows + splits - 1) / splits + GEMM_ROWS - 1) / GEMM_ROWS * GEMM_ROWS;
#pragma omp parallel
  {
    Floats sums, widened;
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num(), tasks = panels * splits;
    const long stop = tasks * (thread + 1) / threads;
    for (long task = tasks * thread / threads; task < stop; task++) {
      const long panel = task % panels, first = task / panels * per_split, end = std::min(first + per_split, l.rows);
      const bool ahead = task + 1 < stop && panel + 1 < panels;
      if (first < end) linear_task<Number, Weight>(l, x, x_stride, panel, first, end, ahead, sums, widened);
    }
  }
}

#if defined(__AVX512BF16__)
// Rounds to pairs along the row, to the nearest, ties to even. count: even.
static void round_row(const float* from, long count, Pair* to) {
  long i = 0;
  for (; i + LANES <= count; i += LANES) *reinterpret_cast<VecHalf*>(to + i / 2) = halves_of(load(from + i));
  for (; i < count; i += 2) {
    uint16_t both[2];
    store_line(both, from + i, 2);
    std::memcpy(to + i / 2, both, sizeof both);
  }
}

// [rows, count] -> [rows, count / 2], valid until the calling thread's next call.
static const Pair* round_rows(const float* x, long rows, long count) {
  static thread_local Row<Pair> kept;
  if (kept.size() < static_cast<size_t>(rows * count / 2)) {
    kept.clear();  // nothing to copy
    kept.resize(rows * count / 2);
  }
  Pair* pairs = kept.data();
#pragma omp parallel for if (rows >= ROWS_FOR_THREADS)
  for (long row = 0; row < rows; row++) round_row(x + row * count, count, pairs + row * (count / 2));
  return pairs;
}
#endif

// ---- attention

struct Attention {
  const float* query;      // [rows, heads, dim], rows query_stride apart
  long query_stride;
  const void* pool;        // one layer: [block, k or v, page token, kv_head, dim]
  int element;             // Element
  int heads, kv_heads, dim, page_tokens;
  float scale;
  const int32_t* begins;   // [rows] first visible position
  const int32_t* ends;     // [rows] one past the last visible position
  // Tasks: query rows that read the same keys, and the chunks they read.
  int tasks;
  const int32_t* task_rows;    // [tasks] start in `rows`
  const int32_t* task_counts;  // [tasks]
  const int32_t* task_blocks;  // [tasks] start in `blocks`: the block of position 0 of the sequence
  const int32_t* task_chunks;  // [tasks, 2] first chunk and one past the last
  const int32_t* task_slots;   // [tasks] start in `slots`, or -1: the output is complete
  const int32_t* rows;
  const int32_t* blocks;
  const int32_t* slots;        // where each row of a task puts its partial result
  float* partial;              // [slots, heads, dim]
  float* partial_lse;          // [slots, heads]
  float* output;               // [rows, heads, dim]
};

// Calls with an element of the pool. Pairs are of bfloat16 alone.
template <typename Number, typename Call>
static inline void with_element(const Attention& a, const Call& call) {
  if constexpr (std::is_same_v<Number, Pair>) {
    call(uint16_t());
  } else {
    switch (a.element) {
      case FLOAT8: return call(uint8_t());
      case BFLOAT16: return call(uint16_t());
      default: return call(float());
    }
  }
}

static inline int vectors_of(int queries) { return (queries + LANES - 1) / LANES; }

// Up to PANEL queries of a task. They are columns, so that a lane is a query and no sum crosses lanes.
// Number: float, or Pair where the pool is of bfloat16 and the CPU multiplies pairs of it: dimensions of queries and keys, tokens of
// weights and values. There are that many fewer lines of them.
template <typename Number>
struct Panel {
  Row<Number> query;
  Floats sum, merged;
  int kv_head, first, queries;  // the queries [first, first + queries) of the task
  alignas(LINE) float highest[PANEL], total[PANEL], lse[PANEL], merged_lse[PANEL];
  alignas(LINE) int32_t begin[PANEL], end[PANEL];
  int32_t least_begin, most_begin, least_end, most_end;
};

constexpr int FEW = LANES / 2;  // so few queries would leave most lanes empty: lanes are keys instead, with the same sums
constexpr int MOST_PANELS = 8;  // of one thread: of one KV head, whose keys they read together, or of neighbouring KV heads
constexpr int MOST_UNITS_PER_THREAD = 4;  // about, where there are enough panels
constexpr double EVEN = 1.1;  // of the busiest thread: to read keys again for a finer cut costs more

constexpr int LINE_PARTS = 64;  // a pace may be less than a line

// What the next tile reads, fetched row by row while this one is computed: memory and sums would else take turns.
struct Ahead {
  const char* rows[2 * TILE];  // keys, then values
  int count, done, bytes;
  int at;         // bytes of the next row that are fetched already
  int pace, due;  // lines that a call of fetch_lines adds, and those it has not fetched yet, in parts of LINE_PARTS

  inline __attribute__((always_inline)) void fetch_row() {
    if (done >= count) return;
    const char *row = rows[done++], *end = row + bytes;
    for (; end - row >= 4 * LINE; row += 4 * LINE) {
      __builtin_prefetch(row, 0, 2);
      __builtin_prefetch(row + LINE, 0, 2);
      __builtin_prefetch(row + 2 * LINE, 0, 2);
      __builtin_prefetch(row + 3 * LINE, 0, 2);
    }
    for (; row < end; row += LINE) __builtin_prefetch(row, 0, 2);
  }

  // Evenly: a burst of lines would drive those that are in use out of the first cache.
  inline __attribute__((always_inline)) void fetch_lines() {
    for (due += pace; due >= LINE_PARTS && done < count; due -= LINE_PARTS) {
      __builtin_prefetch(rows[done] + at, 0, 3);
      at += LINE;
      if (at >= bytes) at = 0, done++;
    }
  }
};

// Dimensions or tokens of a Number.
template <typename Number>
constexpr int TOGETHER_IN = std::is_same_v<Number, Pair> ? 2 : 1;

// Scratch of one thread.
template <typename Number>
struct Scratch {
  Panel<Number> panels[MOST_PANELS];
  int used;
  bool few;  // one panel per KV head, of at most FEW queries: lanes are keys
  Row<Number> key, value, weight;  // of a tile: [token][dimensions], [tokens][dimension], [tokens][PANEL] or of few [query][tokens]
  Floats score;                    // [token][PANEL], of few [query][TILE]
  alignas(LINE) float highest[PANEL];  // of each query's scores in a tile
  Ahead next;
};

// How far scores may rise above the one that weights are relative to, before sums are scaled anew: weights then are up to e^8.
constexpr float LEEWAY = 8.0f;

// The sums of queries from `first` on, before another tile is added.
template <typename Number>
static inline void rescale(int dim, int first, Panel<Number>& p, const float* factor) {
  for (int q = first; q < std::min(p.queries, first + LANES); q++)
    if (factor[q - first] != 1.0f)
      for (int d = 0; d < dim; d += LANES) {
        float* place = p.sum.data() + q * dim + d;
        store(place, load(place) * splat(factor[q - first]));
      }
}

// scores[t][v] of TOKENS keys against VECTORS vectors of queries, and the highest of each query.
template <int TOKENS, int VECTORS, typename Number>
static inline __attribute__((always_inline)) void score_tokens(const Number* query, const Number* key, int lines,
                                                               float* score, float* highest) {
  Vec sum[TOKENS][VECTORS];
  for (int t = 0; t < TOKENS; t++)
    for (int v = 0; v < VECTORS; v++) sum[t][v] = Vec{};
  for (int d = 0; d < lines; d++) {
    decltype(load(query)) column[VECTORS];
    for (int v = 0; v < VECTORS; v++) column[v] = load(query + d * VECTORS * LANES + v * LANES);
    for (int t = 0; t < TOKENS; t++) {
      const auto value = splat(key[t * lines + d]);
      for (int v = 0; v < VECTORS; v++) sum[t][v] = add_product(sum[t][v], value, column[v]);
    }
  }
  for (int v = 0; v < VECTORS; v++) {
    Vec most = load(highest + v * LANES);
    for (int t = 0; t < TOKENS; t++) {
      most = larger(sum[t][v], most);
      store(score + t * PANEL + v * LANES, sum[t][v]);
    }
    store(highest + v * LANES, most);
  }
}

template <int VECTORS, typename Number>
static void score_tile(const Number* query, const Number* key, int tokens, int lines, float* score, float* highest) {
  constexpr int TOKENS = VECTORS < WIDE ? 8 : 6;
  std::fill(highest, highest + PANEL, -INFINITY);
  for (int t = 0; t < tokens; t += TOKENS)
    score_tokens<TOKENS, VECTORS>(query, key + t * lines, lines, score + t * PANEL, highest);
}

// The weights of a tile and its values, side by side.
template <typename Number>
struct Copied {
  const Number *weights, *values;
  int dim;
  static constexpr int PER_LINE = PANEL, PER_QUERY = 1;  // of weights
  static constexpr float* totals = nullptr;
  inline __attribute__((always_inline)) auto value(int line, int d) const { return load(values + line * dim + d); }
};

// The same with values in the pool.
template <typename Number, typename Element>
struct Scattered {
  const Number* weights;
  const Element* const* keys;
  long to_value;
  float* totals;  // of each query's weights, of float32: one chain of sums, which costs nothing beside the others
  static constexpr int PER_LINE = 1, PER_QUERY = TILE / TOGETHER_IN<Number>;
  inline __attribute__((always_inline)) auto value(int line, int d) const {
    if constexpr (std::is_same_v<Number, Pair>) {
      const uint16_t *first = keys[2 * line] + to_value + d, *second = keys[2 * line + 1] + to_value + d;
      return load_bits(first) | load_bits(second) << 16;
    } else {
      return load(keys[line] + to_value + d);
    }
  }
};

// sum[q][d] += weight[t][q] * value[t][d] for ROWS queries and VECTORS vectors of dimensions from d on. `beside` is called for every
// line of tokens.
template <int ROWS, int VECTORS, typename Source, typename Beside>
static inline __attribute__((always_inline)) void add_values(const Source source, int q, int d, int dim, int lines, float* sum,
                                                             float* weights_total, const Beside& beside) {
  Vec total[ROWS][VECTORS];
  float all[ROWS] = {};
  for (int r = 0; weights_total && r < ROWS; r++) all[r] = weights_total[r];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) total[r][v] = load(sum + r * dim + v * LANES);
  for (int i = 0; i < lines; i++) {
    beside();
    decltype(source.value(0, 0)) line[VECTORS];
    for (int v = 0; v < VECTORS; v++) line[v] = source.value(i, d + v * LANES);
    for (int r = 0; r < ROWS; r++) {
      const auto alone = source.weights[i * Source::PER_LINE + (q + r) * Source::PER_QUERY];
      if constexpr (Source::PER_LINE == 1 && std::is_same_v<decltype(alone), const float>) all[r] += alone;
      const auto weight = splat(alone);
      for (int v = 0; v < VECTORS; v++) total[r][v] = add_product(total[r][v], weight, line[v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(sum + r * dim + v * LANES, total[r][v]);
  for (int r = 0; weights_total && r < ROWS; r++) weights_total[r] = all[r];
}

template <int VECTORS, typename Source, typename Beside>
static void add_values_of(const Source& source, int d, int dim, int lines, int queries, float* sum, const Beside& beside) {
  const auto add = [&](auto rows, int q) __attribute__((always_inline)) {
    float* total = source.totals && d == 0 ? source.totals + q : nullptr;
    add_values<decltype(rows)::value, VECTORS>(source, q, d, dim, lines, sum + q * dim, total, beside);
  };
  int q = 0;
  for (; q + 6 <= queries; q += 6) add(std::integral_constant<int, 6>(), q);
  switch (queries - q) {
    case 1: add(std::integral_constant<int, 1>(), q); break;
    case 2: add(std::integral_constant<int, 2>(), q); break;
    case 3: add(std::integral_constant<int, 3>(), q); break;
    case 4: add(std::integral_constant<int, 4>(), q); break;
    case 5: add(std::integral_constant<int, 5>(), q); break;
  }
}

template <typename Source, typename Beside>
static void add_all_values(const Source& source, int dim, int lines, int queries, float* sum, const Beside& beside) {
  int d = 0;
  for (; d + WIDE * LANES <= dim; d += WIDE * LANES) add_values_of<WIDE>(source, d, dim, lines, queries, sum + d, beside);
  for (; d < dim; d += LANES) add_values_of<1>(source, d, dim, lines, queries, sum + d, beside);
}

template <typename Element>
static inline __attribute__((always_inline)) void copy_key(const Element* from, int dim, float* tile, int t) {
  for (int d = 0; d < dim; d += LANES) store(tile + t * dim + d, load(from + d));
}
template <typename Element>
static inline __attribute__((always_inline)) void copy_value(const Element* from, int dim, float* tile, int t) {
  copy_key(from, dim, tile, t);
}
static inline __attribute__((always_inline)) void copy_key(const uint16_t* from, int dim, Pair* tile, int t) {
  std::memcpy(tile + t * (dim / 2), from, dim * sizeof *from);
}
static inline __attribute__((always_inline)) void copy_value(const uint16_t* from, int dim, Pair* tile, int t) {
  Pair* line = tile + t / 2 * dim;
  for (int d = 0; d < dim; d += LANES) store(line + d, t % 2 ? load(line + d) | load_bits(from + d) << 16 : load_bits(from + d));
}

// Copies the keys and values of a tile side by side, widened or as pairs: lines of the pool lie far apart, and a copy waits for many of
// them at once where sums over them would wait for one after the other. Keys past the last token stay what they were: masked.
template <typename Element, typename Number>
static void copy_elements(const Attention& a, const int32_t* blocks, int kv_head, int position, int tokens, Scratch<Number>& s) {
  const long line = static_cast<long>(a.kv_heads) * a.dim, to_value = line * a.page_tokens;
  const int dim = a.dim, page_tokens = a.page_tokens;
  const Element* head = static_cast<const Element*>(a.pool) + static_cast<long>(kv_head) * dim;
  int page = position / page_tokens, offset = position % page_tokens;
  for (int t = 0; t < tokens; page++, offset = 0) {
    const Element* from = head + static_cast<long>(blocks[page]) * 2 * to_value + offset * line;
    for (; t < tokens && offset < page_tokens; t++, offset++, from += line) {
      copy_key(from, dim, s.key.data(), t);
      copy_value(from + to_value, dim, s.value.data(), t);
    }
  }
}

template <typename Number>
static void copy_tile(const Attention& a, const int32_t* blocks, int kv_head, int position, int tokens, Scratch<Number>& s) {
  const auto copy = [&](auto element) { copy_elements<decltype(element)>(a, blocks, kv_head, position, tokens, s); };
  with_element<Number>(a, copy);
}

// ---- tiles of few queries

template <int WIDTH>
static inline __attribute__((always_inline)) void swap_blocks(Vec* rows) {
  VecInt upper, lower;
  for (int lane = 0; lane < LANES; lane++) {
    upper[lane] = lane & WIDTH ? LANES + lane - WIDTH : lane;
    lower[lane] = lane & WIDTH ? LANES + lane : lane + WIDTH;
  }
  for (int i = 0; i < LANES; i++) {
    if (i & WIDTH) continue;
    const Vec one = rows[i], two = rows[i + WIDTH];
    rows[i] = __builtin_shuffle(one, two, upper);
    rows[i + WIDTH] = __builtin_shuffle(one, two, lower);
  }
}
static inline __attribute__((always_inline)) void transpose(Vec* rows) {
#if defined(__AVX512F__)
  swap_blocks<8>(rows);
#endif
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

// Where the keys of a tile lie. The last one stands for those past the last token, up to a whole vector.
template <typename Element>
static void find_keys(const Attention& a, const int32_t* blocks, int kv_head, int position, int tokens, const Element** keys) {
  const long line = static_cast<long>(a.kv_heads) * a.dim, page_size = 2 * line * a.page_tokens;
  const Element* head = static_cast<const Element*>(a.pool) + static_cast<long>(kv_head) * a.dim;
  int t = 0, page = position / a.page_tokens, offset = position % a.page_tokens;
  for (; t < tokens; page++, offset = 0) {
    const Element* from = head + blocks[page] * page_size + offset * line;
    const int count = std::min(tokens - t, a.page_tokens - offset);
    for (int i = 0; i < count; i++) keys[t + i] = from + i * line;
    t += count;
  }
  for (const Element* last = keys[tokens - 1]; t % LANES; t++) keys[t] = last;
}

static void look_ahead(const Attention& a, const int32_t* blocks, int kv_head, int position, int tokens, Ahead& next) {
  const int size = a.element == FLOAT32 ? 4 : a.element == BFLOAT16 ? 2 : 1;
  const long line = static_cast<long>(a.kv_heads) * a.dim * size, to_value = line * a.page_tokens;
  const char* head = static_cast<const char*>(a.pool) + static_cast<long>(kv_head) * a.dim * size;
  next.bytes = a.dim * size;
  next.count = 2 * tokens;
  next.done = 0;
  next.at = 0;
  next.due = 0;
  int page = position / a.page_tokens, offset = position % a.page_tokens;
  for (int t = 0; t < tokens; page++, offset = 0) {
    const char* from = head + static_cast<long>(blocks[page]) * 2 * to_value + offset * line;
    const int count = std::min(tokens - t, a.page_tokens - offset);
    for (int i = 0; i < count; i++) next.rows[t + i] = from + i * line;
    for (int i = 0; i < count; i++) next.rows[tokens + t + i] = from + to_value + i * line;
    t += count;
  }
}

// Of two vectors of four-byte parts, in every 16 bytes: the first halves, or the second ones, part by part or pair by pair.
#if defined(__AVX512F__)
typedef __m512d VecPairs;
static inline __attribute__((always_inline)) Vec low_parts(Vec one, Vec two) { return _mm512_unpacklo_ps(one, two); }
static inline __attribute__((always_inline)) Vec high_parts(Vec one, Vec two) { return _mm512_unpackhi_ps(one, two); }
static inline __attribute__((always_inline)) VecPairs low_of(VecPairs one, VecPairs two) { return _mm512_unpacklo_pd(one, two); }
static inline __attribute__((always_inline)) VecPairs high_of(VecPairs one, VecPairs two) { return _mm512_unpackhi_pd(one, two); }
#else
typedef __m256d VecPairs;
static inline __attribute__((always_inline)) Vec low_parts(Vec one, Vec two) { return _mm256_unpacklo_ps(one, two); }
static inline __attribute__((always_inline)) Vec high_parts(Vec one, Vec two) { return _mm256_unpackhi_ps(one, two); }
static inline __attribute__((always_inline)) VecPairs low_of(VecPairs one, VecPairs two) { return _mm256_unpacklo_pd(one, two); }
static inline __attribute__((always_inline)) VecPairs high_of(VecPairs one, VecPairs two) { return _mm256_unpackhi_pd(one, two); }
#endif
static inline __attribute__((always_inline)) Vec low_pairs(Vec one, Vec two) {
  return reinterpret_cast<Vec>(low_of(reinterpret_cast<VecPairs>(one), reinterpret_cast<VecPairs>(two)));
}
static inline __attribute__((always_inline)) Vec high_pairs(Vec one, Vec two) {
  return reinterpret_cast<Vec>(high_of(reinterpret_cast<VecPairs>(one), reinterpret_cast<VecPairs>(two)));
}

constexpr int PARTS = LANES / 2;  // of four bytes of every key, which are turned together
constexpr int TOGETHER = LANES == 16 ? 3 : 2;  // vectors of keys that few queries read: alone, their sums would wait for themselves
static_assert(TILE / LANES % TOGETHER == 0);

// parts[i][lane]: the part `at + i` of each key. Loads put halves in place by themselves: that much less is left to shuffle.
template <typename Element>
static inline __attribute__((always_inline)) void turn(const Element* const* keys, long at, Vec* parts) {
  const auto from = [&](int key) __attribute__((always_inline)) { return reinterpret_cast<const float*>(keys[key]) + at; };
  Vec mixed[PARTS];
  for (int i = 0; i < 4; i++) {
#if defined(__AVX512F__)
    const auto pair = [&](int key) __attribute__((always_inline)) {
      return static_cast<Vec>(_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from(key))), _mm256_loadu_ps(from(key + 4)), 1));
    };
    const Vec one = pair(i), two = pair(i + 8);
    mixed[i] = _mm512_shuffle_f32x4(one, two, 0x88);
    mixed[i + 4] = _mm512_shuffle_f32x4(one, two, 0xdd);
#else
    mixed[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from(i))), _mm_loadu_ps(from(i + 4)), 1);
#endif
  }
  for (int i = 0; i < PARTS; i += 4) {
    const Vec low = low_parts(mixed[i], mixed[i + 1]), high = high_parts(mixed[i], mixed[i + 1]);
    const Vec low_next = low_parts(mixed[i + 2], mixed[i + 3]), high_next = high_parts(mixed[i + 2], mixed[i + 3]);
    parts[i] = low_pairs(low, low_next);
    parts[i + 1] = high_pairs(low, low_next);
    parts[i + 2] = low_pairs(high, high_next);
    parts[i + 3] = high_pairs(high, high_next);
  }
}

// sum[q] += the products of one part of a vector of keys: a dimension, or two of bfloat16, the first in the lower bits.
template <int QUERIES>
static inline __attribute__((always_inline)) void add_part(Vec part, const float* query, Vec* sum, const float*) {
  for (int q = 0; q < QUERIES; q++) sum[q] += part * splat(query[q]);
}
template <int QUERIES>
static inline __attribute__((always_inline)) void add_part(Vec part, const float* query, Vec* sum, const uint16_t*) {
  const VecBits bits = reinterpret_cast<VecBits>(part);
  const Vec first = first_of(bits), second = second_of(bits);
  for (int q = 0; q < QUERIES; q++) sum[q] += first * splat(query[q]);
  for (int q = 0; q < QUERIES; q++) sum[q] += second * splat(query[LANES + q]);
}
#if defined(__AVX512BF16__)
template <int QUERIES>
static inline __attribute__((always_inline)) void add_part(Vec part, const Pair* query, Vec* sum, const uint16_t*) {
  for (int q = 0; q < QUERIES; q++) sum[q] = add_product(sum[q], reinterpret_cast<VecBits>(part), splat(query[q]));
}
#endif

// scores[q][TILE] of VECTORS vectors of keys, which are turned in registers.
template <int QUERIES, int VECTORS, typename Number, typename Element>
static inline __attribute__((always_inline)) void score_keys(const Number* query, const Element* const* keys, int dim, float* score,
                                                             Ahead& next) {
  constexpr int EACH = 4 / sizeof(Element);             // dimensions of a part
  constexpr int NUMBERS = EACH / TOGETHER_IN<Number>;  // of a query
  const int rows = std::max(1, LANES * PARTS * EACH / dim);  // fetched while as many bytes are turned
  Vec sum[VECTORS][QUERIES];
  for (int v = 0; v < VECTORS; v++)
    for (int q = 0; q < QUERIES; q++) sum[v][q] = Vec{};
  for (int d = 0; d < dim; d += PARTS * EACH)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) {
      Vec parts[PARTS];
      turn(keys + v * LANES, d / EACH, parts);
      for (int row = 0; row < rows; row++) next.fetch_row();
      const Number* here = query + d / EACH * NUMBERS * LANES;
      __asm__("" : "+r"(here));  // read anew for each vector: kept, these would take the registers of the sums
      for (int i = 0; i < PARTS; i++)
        add_part<QUERIES>(parts[i], here + i * NUMBERS * LANES, sum[v], static_cast<const Element*>(nullptr));
    }
  for (int v = 0; v < VECTORS; v++)
    for (int q = 0; q < QUERIES; q++) store(score + q * TILE + v * LANES, sum[v][q]);
}

// The same of float8, widened before it is turned.
template <int QUERIES>
static inline __attribute__((always_inline)) void score_keys_wide(const float* query, const uint8_t* const* keys, int dim,
                                                                  float* score, Ahead& next) {
  Vec sum[QUERIES];
  for (int q = 0; q < QUERIES; q++) sum[q] = Vec{};
  for (int d = 0; d < dim; d += LANES) {
    Vec rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load(keys[i] + d);
    transpose(rows);
    for (int row = 0; row < std::max(1, LANES * LANES / dim); row++) next.fetch_row();
    for (int i = 0; i < LANES; i++)
      for (int q = 0; q < QUERIES; q++) sum[q] += rows[i] * splat(query[(d + i) * LANES + q]);
  }
  for (int q = 0; q < QUERIES; q++) store(score + q * TILE, sum[q]);
}

template <int QUERIES, typename Number, typename Element>
static void score_few(const Number* query, const Element* const* keys, int tokens, int dim, float* score, Ahead& next) {
  constexpr int VECTORS = QUERIES <= 2 ? TOGETHER : 1;
  int t = 0;
  if constexpr (sizeof(Element) == 1) {
    for (; t < tokens; t += LANES) score_keys_wide<QUERIES>(query, keys + t, dim, score + t, next);
  } else {
    for (; t + (VECTORS - 1) * LANES < tokens; t += VECTORS * LANES)
      score_keys<QUERIES, VECTORS>(query, keys + t, dim, score + t, next);
    for (; t < tokens; t += LANES) score_keys<QUERIES, 1>(query, keys + t, dim, score + t, next);
  }
}

static inline __attribute__((always_inline)) float highest_of(Vec lanes) {
  for (int width = LANES / 2; width; width /= 2) {
    VecInt from;
    for (int lane = 0; lane < LANES; lane++) from[lane] = lane ^ width;
    lanes = larger(lanes, __builtin_shuffle(lanes, from));
  }
  return lanes[0];
}

// As mask_tile and weigh_tile, from scores [q][TILE] to weights in their place; add_values or pair_few adds these to the totals.
template <typename Number>
static void weigh_few(int dim, long position, int tokens, Panel<Number>& p, float* scores) {
  VecInt lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
  const bool masked = position < p.most_begin || position + TILE > p.least_end;
  float factor[LANES] = {};
  for (int q = 0; q < p.queries; q++) {
    Vec line[TILE / LANES], most = splat(-INFINITY);
    const int vectors = vectors_of(tokens);
    for (int v = 0; v < vectors; v++) {
      line[v] = load(scores + q * TILE + v * LANES);
      if (masked) {
        const VecInt here = lanes + static_cast<int32_t>(position + v * LANES);
        line[v] = ((here >= p.begin[q]) & (here < p.end[q])) ? line[v] : splat(-INFINITY);
      }
      most = line[v] > most ? line[v] : most;
    }
    const float here = highest_of(most), highest = here > p.highest[q] + LEEWAY ? here : p.highest[q];
    const float base = highest == -INFINITY ? 0.0f : highest;
    factor[q] = exp_of(splat(p.highest[q] - base))[0];
    p.highest[q] = highest;
    p.total[q] *= factor[q];
    for (int v = 0; v < vectors; v++) store(scores + q * TILE + v * LANES, exp_of(line[v] - splat(base)));
  }
  rescale(dim, 0, p, factor);
}

#if defined(__AVX512BF16__)
// From weights [q][TILE] to pairs of tokens, and adds them to the totals.
static void pair_few(int tokens, Panel<Pair>& p, const float* weights, Pair* pairs) {
  const int count = vectors_of(tokens) * LANES;
  for (int q = 0; q < p.queries; q++) round_row(weights + q * TILE, count, pairs + q * (TILE / 2));
  for (int q = 0; q < p.queries; q++)
    for (int t = 0; t < tokens; t++) p.total[q] += weights[q * TILE + t];
}
#endif

template <typename Element, typename Number>
static void attend_few(const Attention& a, const int32_t* blocks, long position, int tokens, Panel<Number>& p, Scratch<Number>& s) {
  constexpr bool PAIRS = std::is_same_v<Number, Pair>;
  const Element* keys[TILE];
  find_keys(a, blocks, p.kv_head, static_cast<int>(position), tokens, keys);
  float* scores = s.score.data();
  const Number* query = p.query.data();
  switch (p.queries) {
    case 1: score_few<1>(query, keys, tokens, a.dim, scores, s.next); break;
    case 2: score_few<2>(query, keys, tokens, a.dim, scores, s.next); break;
    case 3: score_few<3>(query, keys, tokens, a.dim, scores, s.next); break;
    case 4: score_few<4>(query, keys, tokens, a.dim, scores, s.next); break;
#if defined(__AVX512F__)
    case 5: score_few<5>(query, keys, tokens, a.dim, scores, s.next); break;
    case 6: score_few<6>(query, keys, tokens, a.dim, scores, s.next); break;
    case 7: score_few<7>(query, keys, tokens, a.dim, scores, s.next); break;
    case 8: score_few<8>(query, keys, tokens, a.dim, scores, s.next); break;
#endif
  }
  weigh_few(a.dim, position, tokens, p, scores);
  const Number* weights;
  if constexpr (PAIRS) {
    pair_few(tokens, p, scores, s.weight.data());
    weights = s.weight.data();
  } else {
    weights = scores;
  }
  const long to_value = static_cast<long>(a.kv_heads) * a.dim * a.page_tokens;
  const Scattered<Number, Element> source{weights, keys, to_value, PAIRS ? nullptr : p.total};
  const int lines = (tokens + TOGETHER_IN<Number> - 1) / TOGETHER_IN<Number>;
  add_all_values(source, a.dim, lines, p.queries, p.sum.data(), [&s] {
    for (int i = 0; i < TOGETHER_IN<Number>; i++) s.next.fetch_row();
  });
}

template <typename Number>
static void attend_few_of(const Attention& a, const int32_t* blocks, long position, int tokens, Panel<Number>& p, Scratch<Number>& s) {
  with_element<Number>(a, [&](auto element) { attend_few<decltype(element)>(a, blocks, position, tokens, p, s); });
}

// ---- tiles of many queries

// Scores of keys that a query does not see become -inf; `highest` is that of the others.
template <typename Number>
static void mask_tile(long position, int tokens, const Panel<Number>& p, float* scores, float* highest) {
  for (int first = 0; first < p.queries; first += LANES) {
    const VecInt begin = *reinterpret_cast<const VecInt*>(p.begin + first), end = *reinterpret_cast<const VecInt*>(p.end + first);
    Vec most = splat(-INFINITY);
    for (int t = 0; t < tokens; t++) {
      const VecInt here = VecInt{} + static_cast<int32_t>(position + t);
      float* place = scores + t * PANEL + first;
      const Vec score = ((here >= begin) & (here < end)) ? load(place) : splat(-INFINITY);
      most = larger(score, most);
      store(place, score);
    }
    store(highest + first, most);
  }
}

// The running softmax over one tile: from scores to weights, perhaps in their place; rescales what was summed before.
template <typename Number>
static void weigh_tile(int dim, int tokens, Panel<Number>& p, const float* scores, Number* weights, const float* tile_highest) {
  for (int first = 0; first < p.queries; first += LANES) {
    const Vec none = splat(-INFINITY), before = load(p.highest + first), most = larger(load(tile_highest + first), before);
    const Vec highest = most > before + splat(LEEWAY) ? most : before;
    const Vec base = highest == none ? Vec{} : highest;  // nothing visible yet: all weights are 0
    const Vec keep = exp_of(before - base);
    Vec total = load(p.total + first) * keep;
    constexpr int EACH = TOGETHER_IN<Number>;
    for (int t = 0; t < tokens; t += EACH) {
      Vec weight[2] = {};
      for (int i = 0; i < EACH && t + i < tokens; i++) {
        weight[i] = exp_of(load(scores + (t + i) * PANEL + first) - base);
        total += weight[i];
      }
      store_together(weights + t / EACH * PANEL + first, weight[0], weight[1]);
    }
    store(p.highest + first, highest);
    store(p.total + first, total);
    float factor[LANES];
    store(factor, keep);
    rescale(dim, first, p, factor);
  }
}

template <typename Number>
static void attend_tile(int dim, long position, int tokens, Panel<Number>& p, Scratch<Number>& s) {
  float* scores = s.score.data();
  const Number *query = p.query.data(), *key = s.key.data();
  const int dims = dim / TOGETHER_IN<Number>, lines = (tokens + TOGETHER_IN<Number> - 1) / TOGETHER_IN<Number>;
  switch (vectors_of(p.queries)) {
    case 1: score_tile<1>(query, key, tokens, dims, scores, s.highest); break;
    case 2: score_tile<2>(query, key, tokens, dims, scores, s.highest); break;
#if defined(__AVX512F__)
    case 3: score_tile<3>(query, key, tokens, dims, scores, s.highest); break;
    default: score_tile<4>(query, key, tokens, dims, scores, s.highest); break;
#endif
  }
  if (position < p.most_begin || position + TILE > p.least_end) mask_tile(position, tokens, p, scores, s.highest);
  Number* weights;
  if constexpr (std::is_same_v<Number, Pair>) weights = s.weight.data();
  else weights = scores;
  weigh_tile(dim, tokens, p, scores, weights, s.highest);
  const Copied<Number> source{weights, s.value.data(), dim};
  add_all_values(source, dim, lines, p.queries, p.sum.data(), [&s] {
    for (int i = 0; i < TOGETHER_IN<Number>; i++) s.next.fetch_lines();
  });
}

// Of Ahead: so that the next tile is there when this one's panels have added their values.
template <typename Number>
static int pace_of(const Attention& a, const Scratch<Number>& s) {
  const int heads = s.panels[s.used - 1].kv_head - s.panels[0].kv_head + 1;
  const int size = a.element == FLOAT32 ? 4 : a.element == BFLOAT16 ? 2 : 1;
  const int additions = s.used / heads * ((s.panels[0].queries + 5) / 6) * ((a.dim + WIDE * LANES - 1) / (WIDE * LANES));
  const int lines = 2 * ((a.dim * size + static_cast<int>(LINE) - 1) / static_cast<int>(LINE));  // of a token
  return (lines * LINE_PARTS + additions - 1) / additions;
}

// `sum` and `lse` of every panel over the keys of one chunk; -inf where a query sees none of them.
template <typename Number>
static void attend_chunk(const Attention& a, const int32_t* blocks, int chunk, Scratch<Number>& s) {
  int32_t last = 0, first = INT32_MAX;
  for (int i = 0; i < s.used; i++) {
    Panel<Number>& p = s.panels[i];
    last = std::max(last, p.most_end);
    first = std::min(first, p.least_begin);
    std::fill(p.sum.begin(), p.sum.begin() + p.queries * a.dim, 0.0f);
    std::fill(p.highest, p.highest + PANEL, -INFINITY);
    std::fill(p.total, p.total + PANEL, 0.0f);
  }
  const long stop = std::min<long>(static_cast<long>(chunk + 1) * CHUNK, last);
  s.next.pace = pace_of(a, s);
  for (long position = static_cast<long>(chunk) * CHUNK; position < stop; position += TILE) {
    const int tokens = static_cast<int>(std::min<long>(TILE, stop - position));
    if (position + tokens <= first) continue;
    int read = -1;
    for (int i = 0; i < s.used; i++) {
      Panel<Number>& p = s.panels[i];
      if (position >= p.most_end) continue;
      if (p.kv_head != read) {
        const bool ahead = s.panels[s.used - 1].kv_head > p.kv_head;
        const long after = ahead ? position : position + TILE;
        const long left = ahead ? tokens : std::max(0L, std::min<long>(TILE, last - after));  // of this chunk or the next
        look_ahead(a, blocks, ahead ? p.kv_head + 1 : s.panels[0].kv_head, static_cast<int>(after), static_cast<int>(left), s.next);
        if (!s.few) copy_tile(a, blocks, p.kv_head, static_cast<int>(position), tokens, s);
        read = p.kv_head;
      }
      if (s.few) attend_few_of(a, blocks, position, tokens, p, s);
      else attend_tile(a.dim, position, tokens, p, s);
    }
  }
  for (int i = 0; i < s.used; i++) {
    Panel<Number>& p = s.panels[i];
    for (int q = 0; q < p.queries; q++) {
      const bool any = p.total[q] > 0.0f;
      p.lse[q] = any ? p.highest[q] + std::log(p.total[q]) : -INFINITY;
      const float inverse = any ? 1.0f / p.total[q] : 0.0f;
      for (int d = 0; d < a.dim; d += LANES) {
        float* place = p.sum.data() + q * a.dim + d;
        store(place, load(place) * splat(inverse));
      }
    }
  }
}

// Adds the partial (output, lse) to what was merged before it. An empty side changes nothing.
// Never inlined: another copy might round in another order.
static __attribute__((noinline)) void merge(float* merged, float& merged_lse, const float* partial, float lse, int dim) {
  if (lse == -INFINITY) return;
  if (merged_lse == -INFINITY) {
    std::memcpy(merged, partial, dim * sizeof(float));
    merged_lse = lse;
    return;
  }
  const float highest = std::max(merged_lse, lse);
  const float before = std::exp(merged_lse - highest), now = std::exp(lse - highest), total = before + now;
  const Vec keep = splat(before / total), add = splat(now / total);
  for (int d = 0; d < dim; d += LANES) store(merged + d, keep * load(merged + d) + add * load(partial + d));
  merged_lse = highest + std::log(total);
}

// Reads the queries [first, first + queries) of a task: (row, head of the group) one after the other, scaled.
template <typename Number>
static void open_panel(const Attention& a, const int32_t* rows, int kv_head, int first, int queries, Panel<Number>& p) {
  const int group = a.heads / a.kv_heads, width = vectors_of(queries) * LANES;
  p.kv_head = kv_head;
  p.first = first;
  p.queries = queries;
  p.query.resize(static_cast<size_t>(a.dim / TOGETHER_IN<Number>) * width);
  p.sum.resize(static_cast<size_t>(queries) * a.dim);
  p.merged.assign(static_cast<size_t>(queries) * a.dim, 0.0f);
  std::fill(p.merged_lse, p.merged_lse + PANEL, -INFINITY);
  std::fill(p.begin, p.begin + PANEL, 0);
  std::fill(p.end, p.end + PANEL, 0);
  const float* from[PANEL] = {};
  for (int q = 0; q < queries; q++) {
    const int row = rows[(first + q) / group], head = kv_head * group + (first + q) % group;
    from[q] = a.query + row * a.query_stride + static_cast<long>(head) * a.dim;
    p.begin[q] = a.begins[row];
    p.end[q] = a.ends[row];
  }
  for (int q = 0; q < width; q += LANES)
    for (int d = 0; d < a.dim; d += LANES) {
      Vec lines[LANES];
      for (int i = 0; i < LANES; i++) lines[i] = from[q + i] ? load(from[q + i] + d) * splat(a.scale) : Vec{};
      transpose(lines);
      constexpr int EACH = TOGETHER_IN<Number>;
      for (int i = 0; i < LANES; i += EACH)
        store_together(p.query.data() + static_cast<size_t>((d + i) / EACH) * width + q, lines[i], lines[i + EACH - 1]);
    }
  p.least_begin = *std::min_element(p.begin, p.begin + queries);
  p.most_begin = *std::max_element(p.begin, p.begin + queries);
  p.least_end = *std::min_element(p.end, p.end + queries);
  p.most_end = *std::max_element(p.end, p.end + queries);
}

template <typename Number>
static void close_panel(const Attention& a, int task, const Panel<Number>& p) {
  const int group = a.heads / a.kv_heads;
  const bool partial = a.task_slots[task] >= 0;
  for (int q = 0; q < p.queries; q++) {
    const int member = (p.first + q) / group;
    const long line = partial ? a.slots[a.task_slots[task] + member] : a.rows[a.task_rows[task] + member];
    const long place = line * a.heads + p.kv_head * group + (p.first + q) % group;
    std::memcpy((partial ? a.partial : a.output) + place * a.dim, p.merged.data() + q * a.dim, a.dim * sizeof(float));
    if (partial) a.partial_lse[place] = p.merged_lse[q];
  }
}

template <typename Element>
static void write_row(Element* pool, const float* from_key, const float* from_value, long key, long value, long line) {
  store_line(pool + key, from_key, line);
  store_line(pool + value, from_value, line);
}

// A unit of work: the queries from `first` on of one task, so many panels of them, for so many KV heads.
struct Unit {
  int task, kv_head, heads, first, panels;
  long work;
};

template <typename Number>
static void attention_unit(const Attention& a, const Unit& unit, Scratch<Number>& s) {
  const int task = unit.task, all = a.task_counts[task] * (a.heads / a.kv_heads);
  s.used = 0;
  s.few = all <= FEW;
  const size_t tile = TILE / TOGETHER_IN<Number>, width = s.few ? FEW : PANEL;
  s.score.resize(TILE * width);
  if (std::is_same_v<Number, Pair>) s.weight.resize(tile * width);
  if (!s.few) {  // of few nothing more: to get and clear memory would cost as much as a short sequence
    s.key.resize(tile * a.dim);
    s.value.resize(tile * a.dim);
  }
  for (int head = unit.kv_head; head < unit.kv_head + unit.heads; head++)
    for (int i = 0, q = unit.first; i < unit.panels && q < all; i++, q += PANEL)
      open_panel(a, a.rows + a.task_rows[task], head, q, std::min(PANEL, all - q), s.panels[s.used++]);
  const int32_t* blocks = a.blocks + a.task_blocks[task];
  for (int chunk = a.task_chunks[2 * task]; chunk < a.task_chunks[2 * task + 1]; chunk++) {
    attend_chunk(a, blocks, chunk, s);
    for (int i = 0; i < s.used; i++) {
      Panel<Number>& p = s.panels[i];
      for (int q = 0; q < p.queries; q++)
        merge(p.merged.data() + q * a.dim, p.merged_lse[q], p.sum.data() + q * a.dim, p.lse[q], a.dim);
    }
  }
  for (int i = 0; i < s.used; i++) close_panel(a, task, s.panels[i]);
}

// The work of `queries` of one KV head and task from `first` on: vectors of queries times keys that the last of them sees.
static long work_of(const Attention& a, int task, int first, int queries) {
  const int group = a.heads / a.kv_heads;
  const int32_t *rows = a.rows + a.task_rows[task], *chunks = a.task_chunks + 2 * task;
  const long begin = std::max<long>(chunks[0] * static_cast<long>(CHUNK), a.begins[rows[first / group]]);
  const long end = std::min<long>(chunks[1] * static_cast<long>(CHUNK), a.ends[rows[(first + queries - 1) / group]]);
  return std::max(1L, end - begin) * vectors_of(queries);
}

// Panels of one KV head and neighbouring heads go together in units of up to `most` work, the largest unit first.
static std::vector<Unit> cut_units(const Attention& a, long most) {
  const int group = a.heads / a.kv_heads;
  const auto parts = [](long all, long each) { return static_cast<int>((all + each - 1) / each); };
  std::vector<Unit> units;
  for (int task = 0; task < a.tasks; task++) {
    const int all = a.task_counts[task] * group, panels = parts(all, PANEL);
    const long each = std::max(1L, work_of(a, task, 0, all) / panels), together = std::clamp<long>(most / each, 1, MOST_PANELS);
    const int here = parts(panels, parts(panels, together));
    const int heads = parts(a.kv_heads, parts(a.kv_heads, together / here));
    for (int first = 0; first < all; first += PANEL * here)
      for (int head = 0; head < a.kv_heads; head += heads) {
        const int taken = std::min(heads, a.kv_heads - head);
        units.push_back({task, head, taken, first, here, work_of(a, task, first, std::min(PANEL * here, all - first)) * taken});
      }
  }
  std::stable_sort(units.begin(), units.end(), [](const Unit& one, const Unit& two) { return one.work > two.work; });
  return units;
}

// The busiest thread's work against an even share, where each thread that is done takes the next unit: from 1 up to the threads.
static double unevenness_of(const std::vector<Unit>& units, int threads) {
  std::vector<long> loads(threads, 0);  // a heap, the least on top
  long most = 0, all = 0;
  for (const Unit& unit : units) {
    std::pop_heap(loads.begin(), loads.end(), std::greater<long>());
    most = std::max(most, loads.back() += unit.work);
    all += unit.work;
    std::push_heap(loads.begin(), loads.end(), std::greater<long>());
  }
  return static_cast<double>(most) * threads / static_cast<double>(all);
}

// The coarsest cut that keeps threads even: what goes together is read once, but a prefix that many rows share is most of a step.
static std::vector<Unit> even_units(const Attention& a) {
  const int threads = omp_get_max_threads();
  long all = 0;
  for (int task = 0; task < a.tasks; task++) all += work_of(a, task, 0, a.task_counts[task] * (a.heads / a.kv_heads)) * a.kv_heads;
  for (int per_thread = 1;; per_thread *= 2) {
    std::vector<Unit> units = cut_units(a, all / threads / per_thread);
    if (per_thread == MOST_UNITS_PER_THREAD || unevenness_of(units, threads) <= EVEN) return units;
  }
}

template <typename Number>
static void attention(const Attention& a, const int32_t* merged_rows, const int32_t* starts, int merged_count) {
  const std::vector<Unit> units = even_units(a);
#pragma omp parallel
  {
    Scratch<Number> scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t unit = 0; unit < units.size(); unit++)
      attention_unit(a, units[unit], scratch);
#pragma omp for schedule(static)
    for (long item = 0; item < static_cast<long>(merged_count) * a.heads; item++) {
      const long index = item / a.heads, head = item % a.heads;
      float* out = a.output + (static_cast<long>(merged_rows[index]) * a.heads + head) * a.dim;
      float lse = -INFINITY;
      for (int32_t slot = starts[index]; slot < starts[index + 1]; slot++) {
        const long place = static_cast<long>(slot) * a.heads + head;
        merge(out, lse, a.partial + place * a.dim, a.partial_lse[place], a.dim);
      }
      if (lse == -INFINITY) std::fill(out, out + a.dim, 0.0f);  // the row sees no key
    }
  }
}

extern "C" {

int kernels_panel() { return PANEL; }
int kernels_lanes() { return LANES; }
int kernels_chunk() { return CHUNK; }

void kernels_linear(const Linear* given) {
  const Linear& l = *given;
  if (!l.half) return linear<float>(l, l.x, l.k_count);
#if defined(__AVX512BF16__)
  linear<Pair>(l, round_rows(l.x, l.rows, l.k_count), l.k_count / 2);
#else
  linear<Pair>(l, l.x, l.k_count);
#endif
}

// y [rows, count] = x / rms(x) * weight; `weights` rows of weight are used in turn (one per head).
void kernels_norm(const float* x, long rows, long stride, long count, const float* weight, long weights, float eps, float* y) {
#pragma omp parallel for if (rows >= ROWS_FOR_THREADS)
  for (long row = 0; row < rows; row++)
    for (long w = 0; w < weights; w++)
      norm_row(x + row * stride + w * count, count, weight + w * count, eps, y + (row * weights + w) * count);
}

// Rotates heads [rows, count, dim] in place, rows `stride` apart; cos_sin [rows, dim]: cosines, then sines.
void kernels_rotate(float* heads, long rows, long stride, long count, long dim, const float* cos_sin) {
#pragma omp parallel for if (rows >= ROWS_FOR_THREADS)
  for (long row = 0; row < rows; row++)
    rotate_row(heads + row * stride, count, dim, cos_sin + row * dim, cos_sin + row * dim + dim / 2);
}

// Writes rows of keys and values [rows, line], rows a stride apart, to their places in one layer of the pool.
void kernels_write(const float* keys, const float* values, long rows, long key_stride, long value_stride, long line,
                   const int64_t* slots, long page_tokens, int element, void* pool) {
#pragma omp parallel for if (rows >= ROWS_FOR_THREADS)
  for (long row = 0; row < rows; row++) {
    const long place = slots[row] / page_tokens * 2 * page_tokens + slots[row] % page_tokens;
    const long key = place * line, value = (place + page_tokens) * line;
    const float *from_key = keys + row * key_stride, *from_value = values + row * value_stride;
    switch (element) {
      case FLOAT8: write_row(static_cast<uint8_t*>(pool), from_key, from_value, key, value, line); break;
      case BFLOAT16: write_row(static_cast<uint16_t*>(pool), from_key, from_value, key, value, line); break;
      default: write_row(static_cast<float*>(pool), from_key, from_value, key, value, line);
    }
  }
}

// Of the call that is given to kernels_attention, by its count of the work: see unevenness_of.
double kernels_attention_unevenness(const Attention* given) { return unevenness_of(even_units(*given), omp_get_max_threads()); }

// Runs all tasks, then merges the slots of `merged_rows`: row i has slots [starts[i], starts[i + 1]), in the order of their chunks.
void kernels_attention(const Attention* given, const int32_t* merged_rows, const int32_t* starts, int merged_count) {
  const Attention& a = *given;
#if defined(__AVX512BF16__)
  if (a.element == BFLOAT16) return attention<Pair>(a, merged_rows, starts, merged_count);
#endif
  attention<float>(a, merged_rows, starts, merged_count);
}
}
