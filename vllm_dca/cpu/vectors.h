// Vectors of one instruction set, and what the tiles of panels.h and few.h do with them.

namespace {

// A tile's sums, kTall x kVectors of them, stay in registers while it is multiplied.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTall = 8, kVectors = 3;
#if defined(__AVX512BF16__)
constexpr char kInstructions[] = "AVX512_BF16";
#else
constexpr char kInstructions[] = "AVX512";
#endif
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTall = 4, kVectors = 3;  // it has half as many registers
constexpr char kInstructions[] = "AVX2";
#else
constexpr int kLanes = 4, kTall = 4, kVectors = 2;
constexpr char kInstructions[] = "baseline";
#endif
constexpr int kWidth = kVectors * kLanes;
constexpr float kLowest = -1e30f;
// What is subtracted from scores need not be their maximum: weights up to 2^kSlack do no harm, so
// that it rarely has to rise.
constexpr float kSlack = 8.0f;
// Rows of a partial result before its values: what was subtracted, and from kSums the sum of
// weights, of which each lane has a share where one query's keys lie along the lanes.
constexpr int64_t kSums = kLanes, kHead = 2 * kLanes;

// At any address that holds floats.
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// What is multiplied at once: a number, or with AVX512_BF16 a pair of bfloat16 whose two products
// are summed. Other half precision is converted to float first.
struct Pair {
  uint16_t numbers[2];
};
template <typename Cell>
constexpr int kNumbers = std::is_same_v<Cell, Pair> ? 2 : 1;

template <typename Cell>
inline Vector& at(Cell* place) {
  return *reinterpret_cast<Vector*>(place);
}
template <typename Cell>
inline const Vector& at(const Cell* place) {
  return *reinterpret_cast<const Vector*>(place);
}

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// Lane i is element of(i) of both vectors, the first's before the second's.
template <typename Of, size_t... i>
inline Vector shuffle(Vector a, Vector b, Of of, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, of(i)...);
#else
  return __builtin_shuffle(a, b, Integers{of(i)...});
#endif
}
constexpr auto kEach = std::make_index_sequence<kLanes>();

template <size_t... i>
inline Integers numbered(std::index_sequence<i...>) {
  return Integers{int(i)...};
}

// The same in every lane: a sum with zeros would be one more instruction.
template <typename Lanes, typename Number, size_t... i>
constexpr Lanes repeated(Number number, std::index_sequence<i...>) {
  return Lanes{(void(i), number)...};
}
inline Vector everywhere(float number) { return repeated<Vector>(number, kEach); }

// In every lane, what `combine` makes of all lanes.
template <int step = kLanes / 2, typename Combine>
inline Vector over_lanes(Vector x, Combine combine) {
  if constexpr (step == 0) return x;
  else {
    constexpr auto turned = [](int i) { return (i + step) % kLanes; };
    return over_lanes<step / 2>(combine(x, shuffle(x, x, turned, kEach)), combine);
  }
}

// Where lane i takes its first summand from, when two vectors become one of `count` vectors' sums.
template <int count>
constexpr int summand(int i) {
  if (count >= 8) return i / 4 * 8 + i % 4;
  return i / 4 * 4 + (count == 4 ? i / 2 % 2 * kLanes + i % 2 : i % 2 * kLanes + i / 2 % 2);
}

// Lane i of the result is the sum of the lanes of vector i, of kLanes vectors. They are joined
// within 128 bits first, where that costs least: four of them become one, then those become one.
template <int count>
inline Vector joined(Vector a, Vector b) {
  constexpr auto one = [](int i) { return summand<count>(i); };
  constexpr auto other = [](int i) { return summand<count>(i) + (count >= 8 ? 4 : 2); };
  return shuffle(a, b, one, kEach) + shuffle(a, b, other, kEach);
}
inline Vector four_joined(const Vector* of) {
  return joined<4>(joined<2>(of[0], of[1]), joined<2>(of[2], of[3]));
}
template <int count = kLanes>
inline Vector all_joined(const Vector* fours) {
  if constexpr (count == 4) return *fours;
  else return joined<count>(all_joined<count / 2>(fours), all_joined<count / 2>(fours + count / 8));
}

inline Vector sums(const Vector* of) {
  Vector fours[kLanes / 4];
  for (int i = 0; i < kLanes / 4; ++i) fours[i] = four_joined(of + 4 * i);
  return all_joined(fours);
}

inline Integers widened(const uint16_t* from) {
  typedef uint16_t Numbers __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Numbers*>(from), Integers);
}

// 2^x for x <= 100, and 2^-126 below that: an integer n nearest to x, and a polynomial for the rest
// (minimax, to 8e-8; for pairs, whose rounding is 25 times as coarse, to 8e-5).
template <typename Cell>
inline Vector power_of_two(Vector x) {
  const Vector shift = everywhere(0x1.8p23f);  // beyond it, floats are integers
  x = larger(x, everywhere(-126.0f));
  const Vector n = x + shift, r = x - (n - shift);
  Vector p;
  if constexpr (std::is_same_v<Cell, Pair>) {
    p = 0.0551716691f * r + 0.242611122f;
    p = (p * r + 0.693260985f) * r + 0.999928074f;
  } else {
    p = 0.0013276472f * r + 0.00967554133f;
    p = (p * r + 0.0555071327f) * r + 0.240221197f;
    p = (p * r + 0.693146967f) * r + 1.00000007f;
  }
  return reinterpret_cast<Vector>(reinterpret_cast<Integers>(p) +
                                  (reinterpret_cast<Integers>(n) << 23));
}

// cap * tanh(x / cap), to 4e-7 of itself: a quotient of polynomials, past which it is +-cap.
inline Vector soft_capped(Vector x, float cap) {
  const Vector end = everywhere(7.90531111f);
  const Vector y = -larger(-larger(x / cap, -end), -end), q = y * y;
  Vector p = -2.76076848e-16f * q + 2.00018790e-13f;
  p = (p * q - 8.60467152e-11f) * q + 5.12229710e-08f;
  p = (p * q + 1.48572236e-05f) * q + 6.37261929e-04f;
  p = (p * q + 4.89352456e-03f) * y * cap;
  return p / (((1.19825839e-06f * q + 1.18534706e-04f) * q + 2.26843463e-03f) * q +
              4.89352519e-03f);
}

// The same cell in every lane; cells lie in vectors of floats whatever they are.
template <typename Cell>
inline Vector everywhere(const Cell* cell) {
  if constexpr (std::is_same_v<Cell, float>) return everywhere(*cell);
  else {
    int32_t bits;
    std::memcpy(&bits, cell, sizeof bits);
    return reinterpret_cast<Vector>(repeated<Integers>(bits, kEach));
  }
}

// sum + left * right, lane by lane.
template <typename Cell>
inline Vector add_product(Vector sum, Vector left, Vector right) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<Cell, Pair>)
    return _mm512_dpbf16_ps(sum, (__m512bh)(left), (__m512bh)(right));
#endif
  return sum + left * right;
}

// A value that is in a register from here on. Else GCC reads anew from memory what several products
// share, once for each, and loads are what limits a tile then.
inline Vector in_register(Vector x) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(x));
#elif defined(__SSE__)
  asm volatile("" : "+x"(x));
#endif
  return x;
}

// sum[i][j] += sum over l of a[i, l] b[l, j], a by both its strides, b with rows of kWide vectors.
template <typename Cell, int kWide>
inline void multiply(Vector (&sum)[kTall][kWide], const Cell* a, int64_t a_row, int64_t a_column,
                     const Cell* b, int64_t depth) {
  for (int64_t l = 0; l < depth; ++l, a += a_column, b += kWide * kLanes) {
    Vector right[kWide];
    for (int j = 0; j < kWide; ++j) right[j] = in_register(at(b + j * kLanes));
    for (int i = 0; i < kTall; ++i) {
      const Vector left = in_register(everywhere(a + i * a_row));
      for (int j = 0; j < kWide; ++j) sum[i][j] = add_product<Cell>(sum[i][j], left, right[j]);
    }
  }
}

// kLanes numbers of half precision: bfloat16 is the upper half of a float.
inline Vector as_floats(const c10::BFloat16* from) {
  return reinterpret_cast<Vector>(widened(&from->x) << 16);
}
inline Vector as_floats(const c10::Half* from) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector to;
  for (int i = 0; i < kLanes; ++i) to[i] = float(from[i]);
  return to;
#endif
}

// Whether one instruction or two make floats of a vector of them.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
template <typename T>
constexpr bool kVectorLoads = true;
#else
template <typename T>
constexpr bool kVectorLoads = !std::is_same_v<T, c10::Half>;
#endif

inline bool any_above(Vector x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > everywhere(limit)));
#else
  return over_lanes(x, larger)[0] > limit;
#endif
}

// A key's weights for each lane's query as cells; as pairs, with those of the key beside it.
inline void store_rows(Vector a, Vector, float* to) { at(to) = a; }

// A query's weights side by side as cells: a vector of floats, or two of them rounded to pairs.
inline void store_numbers(const Vector* from, float* to) { at(to) = *from; }

// Numbers of half precision that are no pairs are loaded two vectors at a time.
template <typename Stored>
constexpr int kVectorsOf = sizeof(Stored) == 2 ? 2 : 1;
// How many are loaded together, as far as their order is concerned: this is their own where it costs
// fewer instructions. Number i of them is then at place_of(i).
template <typename Stored>
constexpr int kTogether = std::is_same_v<Stored, float> ? kLanes : 2 * kLanes;
template <typename Stored>
constexpr bool kOwnOrder = std::is_same_v<Stored, Pair> || std::is_same_v<Stored, c10::BFloat16>;
template <typename Stored>
constexpr int place_of(int i) {
  if (std::is_same_v<Stored, Pair>) return i / 8 * 4 + i % 4 + i / 4 % 2 * kLanes;
  return i % 2 * kLanes + i / 2;
}

// Vector `number` from an address on, which is a constant. Of bfloat16 there are two in one of
// integers: the lower halves, then the upper ones.
template <typename Cell>
inline Vector vector_of(const Cell* from, int number) { return at(from + number * kLanes); }
inline Vector vector_of(const c10::BFloat16* from, int number) {
  Integers both = *reinterpret_cast<const Integers*>(from + number / 2 * 2 * kLanes);
  if (number % 2 == 0) return reinterpret_cast<Vector>(both << 16);
#if defined(__AVX2__) && !defined(__AVX512F__)
  // From memory: there is no register for it.
  static constexpr Integers upper = repeated<Integers>(int32_t(0xffff0000), kEach);
  asm("vandps %1, %0, %0" : "+x"(both) : "m"(upper));
  return reinterpret_cast<Vector>(both);
#else
  return reinterpret_cast<Vector>(both & int32_t(0xffff0000));
#endif
}
inline Vector vector_of(const c10::Half* from, int number) {
  return as_floats(from + number * kLanes);
}

// The same of a token's values; of pairs, with those of the token beside it.
template <typename Stored>
inline Vector value_of(const Stored* value, const Stored*, int number) {
  return vector_of(value, number);
}

#if defined(__AVX512BF16__)
inline void store_numbers(const Vector* from, Pair* to) {
  at(to) = (Vector)_mm512_cvtne2ps_pbh((__m512)from[1], (__m512)from[0]);
}

inline void store_rows(Vector a, Vector b, Pair* to) {
  typedef int16_t Order __attribute__((vector_size(64)));
  constexpr Order order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  at(to) = (Vector)_mm512_permutexvar_epi16((__m512i)order, (__m512i)both);
}

// cells[i] is the pair of a's number i and b's.
inline void pair_up(const Pair* a, const Pair* b, int64_t count, Pair* cells) {
  for (int64_t i = 0; i < count; i += kLanes)
    at(cells + i) = reinterpret_cast<Vector>(widened(a->numbers + i) |
                                             widened(b->numbers + i) << 16);
}

// Unpacked within 128 bits: one instruction a vector.
inline Vector value_of(const Pair* value, const Pair* beside, int number) {
  const __m512i a = (__m512i)at(value + number / 2 * kLanes);
  const __m512i b = (__m512i)at(beside + number / 2 * kLanes);
  return (Vector)(number % 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
}
#endif

}  // namespace
