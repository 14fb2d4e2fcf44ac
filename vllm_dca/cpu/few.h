// Few queries, as in decode: the entries of a head lie along the lanes, and what counts is that
// keys and values are read once, as fast as memory gives them.

namespace {

constexpr int64_t kFewKeys = 32;  // taken at a time

// Keys and values of neighbouring tokens, in rows of `row` cells.
template <typename Cell>
struct Neighbours {
  const Cell *keys, *values;
  int64_t row, count;
};

template <typename Cell>
struct Few {
  static constexpr int64_t kStep = kFewKeys / kNumbers<Cell>;  // cells of a query's weights

  const Cell* queries;  // [count, size] numbers
  float* partial;       // [count, kHead + size]: maximum, sum of weights, then weighted values
  Cell* weights;        // [count, kFewKeys] numbers, to work with
  int64_t count, size;

  // Updates it with some keys, of which query m sees the first seen + m / group.
  void attend(const Neighbours<Cell>& tokens, int64_t seen, int64_t group) {
    for (int64_t m = 0; m < count; ++m) {
      Vector score[kFewKeys / kLanes] = {};
      for (int64_t t = 0; t < tokens.count; t += kLanes)
        score[t / kLanes] = scores(tokens, queries + m * size / kNumbers<Cell>, t);
      weigh(score, std::clamp<int64_t>(seen + m / group, 0, tokens.count), m);
    }
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) add_values<4>(tokens, m);
    if (count - m == 3) add_values<3>(tokens, m);
    if (count - m == 2) add_values<2>(tokens, m);
    if (count - m == 1) add_values<1>(tokens, m);
  }

  // Puts the weighted values into their order.
  void finish() {
#if defined(__AVX512BF16__)
    if constexpr (kNumbers<Cell> == 2)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t d = 0; d < size; d += 2 * kLanes) in_order(row(m) + kHead + d);
#endif
  }

 private:
  float* row(int64_t m) { return partial + m * (kHead + size); }

  // Of one query with kLanes keys from t.
  Vector scores(const Neighbours<Cell>& tokens, const Cell* query, int64_t t) const {
    const int64_t depth = size / kNumbers<Cell>;
    const Cell* key = tokens.keys + t * tokens.row;
    Vector product[kLanes] = {};
    auto add = [&](int64_t i, int64_t l) {
      product[i] = add_product<Cell>(product[i], at(query + l), at(key + i * tokens.row + l));
    };
    if (t + kLanes <= tokens.count)
      for (int64_t l = 0; l < depth; l += kLanes)
        for (int i = 0; i < kLanes; ++i) add(i, l);
    else
      for (int64_t i = 0; i < tokens.count - t; ++i)
        for (int64_t l = 0; l < depth; l += kLanes) add(i, l);
    return sums(product);
  }

  void weigh(Vector* score, int64_t seen, int64_t m) {
    constexpr int kScores = kFewKeys / kLanes;
    Vector top = everywhere(kLowest), total{};
    for (int k = 0; k < kScores; ++k) {
      score[k] = numbered(kEach) + k * kLanes < int(seen) ? score[k] : everywhere(kLowest);
      top = larger(top, score[k]);
    }
    float *maximum = row(m), *sum = maximum + 1;
    const float highest = over_lanes(top, larger)[0];
    if (highest > *maximum) {
      const Vector scale = power_of_two<float>(everywhere(*maximum - highest));
      *sum *= scale[0];
      for (int64_t d = 0; d < size; d += kLanes) at(row(m) + kHead + d) *= scale;
      *maximum = highest;
    }
    for (int k = 0; k < kScores; ++k)
      total += score[k] = power_of_two<Cell>(score[k] - *maximum);
    *sum += over_lanes(total, [](Vector a, Vector b) { return a + b; })[0];
    for (int k = 0; k < kScores; k += kNumbers<Cell>)
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
