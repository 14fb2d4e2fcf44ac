// Few queries, as in decode: the entries of a head lie along the lanes, and what counts is that
// keys and values are read once, as fast as memory gives them.

namespace {

constexpr int64_t kFewKeys = 64;       // taken at a time, at most,
constexpr int64_t kFewBytes = 1 << 14;  // and of these keys and values: two times that is in L1

// Keys and values of neighbouring tokens, in rows of `row` cells, and where those that come next
// are, which are fetched meanwhile.
template <typename Cell>
struct Neighbours {
  const Cell *keys, *values, *next_keys, *next_values;
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
  void attend(const Neighbours<Cell>& tokens, int64_t seen, int64_t group, bool first) {
    const auto score = [&](auto queries, int64_t m) {
      Vector found[queries][kFewKeys / kLanes];
      for (int64_t t = 0; t < tokens.count; t += kLanes) {
        Vector at_once[queries];
        scores<queries>(tokens, m, t, at_once);
        for (int i = 0; i < queries; ++i)
          found[i][t / kLanes] = cap > 0 ? soft_capped(at_once[i], cap) : at_once[i];
      }
      for (int i = 0; i < queries; ++i)
        weigh(found[i], tokens.count, seen + (m + i) / group, m + i, first);
    };
    const auto value = [&](auto queries, int64_t m) { add_values<queries>(tokens, m); };
    by_several<kLanes / 4>(score);
    by_several<4>(value);
  }

  // Sums up the lanes' shares, and puts the weighted values into their order.
  void finish() {
    for (int64_t m = 0; m < count; ++m)
      row(m)[kSums] = over_lanes(at(row(m) + kSums), [](Vector a, Vector b) { return a + b; })[0];
#if defined(__AVX512BF16__)
    if constexpr (kNumbers<Cell> == 2)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t d = 0; d < size; d += 2 * kLanes) in_order(row(m) + kHead + d);
#endif
  }

 private:
  float* row(int64_t m) { return partial + m * (kHead + size); }

  // Calls it with several queries at a time, as a constant, and the first's number.
  template <int most, typename Use>
  void by_several(Use use, int64_t m = 0) {
    for (; m + most <= count; m += most) use(std::integral_constant<int, most>(), m);
    if constexpr (most > 1)
      if (m < count) by_several<most - 1>(use, m);
  }

  // Of some queries with kLanes keys from t, four keys at a time.
  template <int kQueries>
  void scores(const Neighbours<Cell>& tokens, int64_t m, int64_t t, Vector* found) const {
    const int64_t depth = size / kNumbers<Cell>, last = tokens.count - 1 - t;
    Vector fours[kQueries][kLanes / 4];
    for (int four = 0; four < kLanes / 4; ++four) {
      const Cell *query = queries + m * depth, *key[4];
      for (int i = 0; i < 4; ++i)
        key[i] = tokens.keys + (t + std::min<int64_t>(4 * four + i, last)) * tokens.row;
      const Cell* next = tokens.next_keys + (t + 4 * four) * tokens.row;
      Vector product[kQueries][4] = {};
      for (int64_t l = 0; l < depth; l += kLanes) {
        for (int i = 0; i < 4; ++i) {
          if (m == 0 && l % 16 == 0) __builtin_prefetch(next + i * tokens.row + l);
          const Vector right = at(key[i] + l);
          for (int q = 0; q < kQueries; ++q)
            product[q][i] = add_product<Cell>(product[q][i], at(query + q * depth + l), right);
        }
      }
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

  template <int kQueries>
  void add_values(const Neighbours<Cell>& tokens, int64_t m) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= size; d += 4 * kLanes) add_values<kQueries, 4>(tokens, m, d);
    for (; d < size; d += kNumbers<Cell> * kLanes)
      add_values<kQueries, kNumbers<Cell>>(tokens, m, d);
  }

  // Entries d .. d + kWide * kLanes - 1 of the values, for kQueries queries.
  template <int kQueries, int kWide>
  void add_values(const Neighbours<Cell>& tokens, int64_t m, int64_t d) {
    Vector sum[kQueries][kWide];
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kWide; ++j) sum[i][j] = at(row(m + i) + kHead + d + j * kLanes);
    for (int64_t t = 0; t < tokens.count; t += kNumbers<Cell>) {
      const Cell* value = tokens.values + t * tokens.row + d / kNumbers<Cell>;
      Vector right[kWide];
      if (m == 0)
        for (int i = 0; i < kNumbers<Cell>; ++i)
          for (int64_t l = 0; l < kWide * kLanes / kNumbers<Cell>; l += 16)
            __builtin_prefetch(tokens.next_values + (t + i) * tokens.row + d / kNumbers<Cell> + l);
      load_values(right, value, t + 1 < tokens.count ? value + tokens.row : value);
      for (int i = 0; i < kQueries; ++i) {
        const Vector left = everywhere(weights + (m + i) * kStep + t / kNumbers<Cell>);
        for (int j = 0; j < kWide; ++j) sum[i][j] = add_product<Cell>(sum[i][j], left, right[j]);
      }
    }
    for (int i = 0; i < kQueries; ++i)
      for (int j = 0; j < kWide; ++j) at(row(m + i) + kHead + d + j * kLanes) = sum[i][j];
  }
};

}  // namespace
