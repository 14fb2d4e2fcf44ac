// Few queries, as in decode: the entries of a head lie along the lanes, and what counts is that
// keys and values are read once, as fast as memory gives them.

namespace {

constexpr int64_t kFewKeys = 64;       // taken at a time, at most,
constexpr int64_t kFewBytes = 1 << 14;  // and of these keys and values: two times that is in L1
// They are read once: where L1 has room beside them, no other cache need keep them.
#if defined(__AVX512F__)
constexpr int kLocality = 0;
#else
constexpr int kLocality = 3;
#endif

// Keys and values of neighbouring tokens as they are stored, in rows of `row` of these, and where
// those that come next are, which are fetched meanwhile, keys and values in one.
template <typename Stored>
struct Neighbours {
  const Stored *keys, *values, *next;
  int64_t row, count;
};

template <typename Cell>
struct Few {
  static constexpr int64_t kStep = kFewKeys / kNumbers<Cell>;  // cells of a query's weights

  const Cell* queries;  // [count, size] numbers
  float* partial;       // [count, kHead + size]
  Cell* weights;        // [count, kFewKeys] numbers, to work with
  int64_t count, size;
  float cap;            // of the scores, 0 for none

  // Updates it with some keys, of which query m sees the first seen + m / group. `first` ones
  // start it.
  template <typename Stored>
  void attend(const Neighbours<Stored>& tokens, int64_t seen, int64_t group, bool first) {
    by_several([&](auto queries, int64_t m) {
      Vector found[queries][kFewKeys / kLanes];
      for (int64_t t = 0; t < tokens.count; t += kLanes) {
        Vector at_once[queries];
        scores<queries>(tokens, m, t, at_once);
        for (int i = 0; i < queries; ++i)
          found[i][t / kLanes] = cap > 0 ? soft_capped(at_once[i], cap) : at_once[i];
      }
      for (int i = 0; i < queries; ++i)
        weigh(found[i], tokens.count, seen + (m + i) / group, m + i, first);
    });
    by_several([&](auto queries, int64_t m) { add_values<queries>(tokens, m); });
  }

  // Puts queries into the order in which keys are loaded.
  template <typename Stored>
  void arrange(Cell* queries) const {
    if constexpr (std::is_same_v<Cell, float> && kOwnOrder<Stored>)
      for (int64_t d = 0; d < count * size; d += kTogether<Stored>)
        reorder<Stored>(queries + d, [](float* to, const float* from, int i, int place) {
          to[place] = from[i];
        });
  }

  // Sums up the lanes' shares, and puts the weighted values from the order in which they are
  // loaded into their own.
  template <typename Stored>
  void finish() {
    for (int64_t m = 0; m < count; ++m) {
      row(m)[kSums] = over_lanes(at(row(m) + kSums), [](Vector a, Vector b) { return a + b; })[0];
      if constexpr (kOwnOrder<Stored>)
        for (int64_t d = 0; d < size; d += kTogether<Stored>)
          reorder<Stored>(row(m) + kHead + d, [](float* to, const float* from, int i, int place) {
            to[i] = from[place];
          });
    }
  }

 private:
  // Queries taken at a time: their sums with four keys, or over four vectors of values, stay in
  // registers.
  static constexpr int kMost = kLanes == 4 ? 2 : kLanes == 8 ? 3 : 4;

  float* row(int64_t m) { return partial + m * (kHead + size); }

  template <typename Stored, typename Move>
  static void reorder(float* numbers, Move move) {
    float of[kTogether<Stored>];
    std::memcpy(of, numbers, sizeof of);
    for (int i = 0; i < kTogether<Stored>; ++i) move(numbers, of, i, place_of<Stored>(i));
  }

  // Calls it with several queries at a time, as a constant, and the first's number. 4 are 2 and 2
  // rather than 3 and 1.
  template <typename Use>
  void by_several(Use use) const {
    for (int64_t m = 0, most; m < count; m += most) {
      const int64_t left = count - m, times = (left + kMost - 1) / kMost;
      most = (left + times - 1) / times;
      constant<kMost>(most, [&](auto queries) { use(queries, m); });
    }
  }
  template <int most, typename Use>
  static void constant(int64_t number, Use use) {
    if constexpr (most > 1)
      if (number < most) return constant<most - 1>(number, use);
    use(std::integral_constant<int, most>());
  }

  // A line of what comes next is fetched with each one that is read: with keys its first half, with
  // values the second. That is memory's order, which the processor's own fetching follows, and an
  // even pace: of many at once, some would be left out.
  template <typename Stored>
  struct Next {
    const Stored* from;
    bool wanted;  // by the first of several queries

    // Called with vector 0, 1, ..., each of some bytes.
    void with(int vector, int bytes) {
      if (!wanted || vector % std::max(64 / bytes, 1) != 0) return;
      __builtin_prefetch(from, 0, kLocality);
      from += 64 / sizeof(Stored);
    }
  };

  // Of some queries with kLanes keys from t, four keys at a time.
  template <int kQueries, typename Stored>
  void scores(const Neighbours<Stored>& tokens, int64_t m, int64_t t, Vector* found) const {
    constexpr int kParts = kVectorsOf<Stored>;
    const int64_t depth = size / kNumbers<Cell>, last = tokens.count - 1 - t;
    Vector fours[kQueries][kLanes / 4];
    for (int four = 0; four < kLanes / 4; ++four) {
      const Cell* query = queries + m * depth;
      const Stored* key[4];
      for (int i = 0; i < 4; ++i)
        key[i] = tokens.keys + (t + std::min<int64_t>(4 * four + i, last)) * tokens.row;
      Next<Stored> next{tokens.next + (t + 4 * four) / 2 * tokens.row, m == 0};
      Vector product[kQueries][4] = {};
      // A loop for each part: with AVX2, one for both has too few registers.
      const auto multiply = [&](auto part) {
        for (int64_t l = 0; l < depth; l += kParts * kLanes) {
          Vector left[kQueries];
          for (int q = 0; q < kQueries; ++q)
            left[q] = in_register(at(query + q * depth + l + part * kLanes));
          for (int i = 0; i < 4; ++i) {
            if (part == 0) next.with(i, kParts * kLanes * sizeof(Stored));
            const Vector right = in_register(vector_of(key[i] + l, part));
            for (int q = 0; q < kQueries; ++q)
              product[q][i] = add_product<Cell>(product[q][i], left[q], right);
          }
        }
      };
      multiply(std::integral_constant<int, 0>());
      if constexpr (kParts == 2) multiply(std::integral_constant<int, 1>());
      for (int q = 0; q < kQueries; ++q) fours[q][four] = four_joined(product[q]);
    }
    for (int q = 0; q < kQueries; ++q) found[q] = all_joined(fours[q]);
  }

  // Query m's weights of n keys, of which it sees some.
  void weigh(Vector* score, int64_t n, int64_t seen, int64_t m, bool first) {
    const int64_t scores = (n + kLanes - 1) / kLanes;
    float* subtracted = row(m);
    Vector top = everywhere(kLowest);
    for (int64_t k = 0; k < scores; ++k) {
      if (std::min(n, seen) < (k + 1) * kLanes)
        score[k] = numbered(kEach) + int(k * kLanes) < int(std::clamp<int64_t>(seen, 0, n))
                       ? score[k]
                       : everywhere(kLowest);
      top = larger(top, score[k]);
    }
    if (first || any_above(top, *subtracted + kSlack)) {
      const float highest = over_lanes(top, larger)[0];
      if (!first) {
        const Vector scale = power_of_two<float>(everywhere(*subtracted - highest));
        for (int64_t d = kSums; d < kHead + size; d += kLanes) at(row(m) + d) *= scale;
      }
      *subtracted = highest;
    }
    Vector total = at(row(m) + kSums);
    for (int64_t k = 0; k < scores; ++k)
      total += score[k] = power_of_two<Cell>(score[k] - everywhere(*subtracted));
    at(row(m) + kSums) = total;
    if (scores % kNumbers<Cell>) score[scores] = Vector{};
    for (int64_t k = 0; k < scores; k += kNumbers<Cell>)
      store_numbers(score + k, weights + m * kStep + k * kLanes / kNumbers<Cell>);
  }

  template <int kQueries, typename Stored>
  void add_values(const Neighbours<Stored>& tokens, int64_t m) {
    constexpr int kLeast = kTogether<Stored> / kLanes;
    int64_t d = 0;
    for (; d + 4 * kLanes <= size; d += 4 * kLanes) add_values<kQueries, 4>(tokens, m, d);
    for (; d < size; d += kLeast * kLanes) add_values<kQueries, kLeast>(tokens, m, d);
  }

  // Entries d .. d + kWide * kLanes - 1 of the values, for kQueries queries.
  template <int kQueries, int kWide, typename Stored>
  void add_values(const Neighbours<Stored>& tokens, int64_t m, int64_t d) {
    constexpr int N = kNumbers<Cell>;
    Vector sum[kQueries][kWide];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kWide; ++j) sum[i][j] = at(row(m + i) + kHead + d + j * kLanes);
    const Cell* weight = weights + m * kStep;
    const Stored* value = tokens.values + d / N;
    Next<Stored> next{tokens.next + tokens.count * (tokens.row / 2 + d / N), m == 0};
    for (int64_t t = 0; t < tokens.count; t += N, ++weight, value += N * tokens.row) {
      const Stored* beside = t + 1 < tokens.count ? value + tokens.row : value;
      Vector left[kQueries];
      for (int i = 0; i < kQueries; ++i) left[i] = in_register(everywhere(weight + i * kStep));
      for (int j = 0; j < kWide; ++j) {
        next.with(j, kLanes * sizeof(Stored));
        const Vector right = in_register(value_of(value, beside, j));
        for (int i = 0; i < kQueries; ++i) sum[i][j] = add_product<Cell>(sum[i][j], left[i], right);
      }
    }
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kWide; ++j) at(row(m + i) + kHead + d + j * kLanes) = sum[i][j];
  }
};

}  // namespace
