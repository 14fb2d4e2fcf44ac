// Many queries: they lie along the lanes of vectors, kWidth of them a panel, while keys and values
// are scalars. So scores, [keys, kWidth], come out as the second product takes them, and a
// softmax's maxima and sums are a lane's own.

namespace {

constexpr int64_t kCells = 128;  // of keys, taken at a time

// A panel's queries, [size, kWidth] numbers in cells, and where its results are: the subtracted
// maxima, the sums of weights and the weighted values, [kHead + size, kWidth].
template <typename Cell, int kWide = kVectors>
struct Panel {
  static constexpr int64_t kWidth = kWide * kLanes;

  const Cell* queries;
  float *maxima, *weight_sums, *sums;
  Cell* weights;  // [kCells, kWidth], to work with
  int64_t size;
  float cap;      // of the scores, 0 for none

  using Tile = Vector[kTall][kWide];

  // Updates it with n keys, [n, size], and values, [n / kNumbers, size], whose rows up to a whole
  // tile's are zeros. Lane m must not see the keys from where hidden + t * group > m. Keys that are
  // `first` start it.
  void attend(const Cell* keys, const Cell* values, int64_t n, int64_t hidden, int64_t group,
              bool first) {
    const int64_t depth = size / kNumbers<Cell>;
    // What the last lane does not see, no lane does.
    n = hidden >= kWidth ? 0 : std::min(n, (kWidth - 1 - hidden) / group + 1);
    if (first) {
      std::fill(maxima, maxima + kWidth, n > 0 ? 0.0f : kLowest);
      std::fill(weight_sums, weight_sums + kWidth, 0.0f);
      std::fill(sums, sums + size * kWidth, 0.0f);
    }
    int64_t added = 0;
    for (int64_t t = 0; t < n; t += kTall) {
      Tile tile;
      for (int i = 0; i < kTall; ++i)
        for (int j = 0; j < kWide; ++j) tile[i][j] = -at(maxima + j * kLanes);
      if (cap > 0) capped(tile, keys + t * depth, depth);
      else multiply(tile, keys + t * depth, depth, 1, queries, depth);
      if (t + kTall > n || hidden + (t + kTall - 1) * group > 0)
        hide(tile, n - t, hidden + t * group, group);
      if (first || too_large(tile)) {
        add_values(values, added, t);
        added = t;
        raise(tile, first);
        first = false;
      }
      weigh(tile, t);
    }
    add_values(values, added, (n + kTall - 1) / kTall * kTall);
  }

 private:
  // Into a tile that holds what is to be subtracted.
  void capped(Tile& tile, const Cell* keys, int64_t depth) {
    Tile scores{};
    multiply(scores, keys, depth, 1, queries, depth);
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kWide; ++j) tile[i][j] += soft_capped(scores[i][j], cap);
  }

  static void hide(Tile& tile, int64_t n, int64_t hidden, int64_t group) {
    const Integers lane = numbered(kEach);
    for (int i = 0; i < kTall; ++i) {
      const int from = i < n ? std::clamp<int64_t>(hidden + i * group, 0, kWidth) : kWidth;
      for (int j = 0; j < kWide; ++j)
        tile[i][j] = lane + j * kLanes < from ? everywhere(kLowest) : tile[i][j];
    }
  }

  static Vector top(const Tile& tile, int j) {
    Vector found = tile[0][j];
    for (int i = 1; i < kTall; ++i) found = larger(found, tile[i][j]);
    return found;
  }

  static bool too_large(const Tile& tile) {
    Vector found = top(tile, 0);
    for (int j = 1; j < kWide; ++j) found = larger(found, top(tile, j));
    return any_above(found, kSlack);
  }

  void raise(Tile& tile, bool first) {
    for (int j = 0; j < kWide; ++j) {
      Vector by = top(tile, j);
      if (!first) {
        by = larger(by, Vector{});
        // Exactly 1 where nothing rises: the power of 0 is only nearly that.
        const Vector scale = by > Vector{} ? power_of_two<float>(-by) : everywhere(1.0f);
        at(weight_sums + j * kLanes) *= scale;
        for (int64_t d = 0; d < size; ++d) at(sums + d * kWidth + j * kLanes) *= scale;
      }
      at(maxima + j * kLanes) += by;
      for (int i = 0; i < kTall; ++i) tile[i][j] -= by;
    }
  }

  void weigh(Tile& tile, int64_t t) {
    for (int j = 0; j < kWide; ++j) {
      Vector total{};
      for (int i = 0; i < kTall; ++i) total += tile[i][j] = power_of_two<Cell>(tile[i][j]);
      at(weight_sums + j * kLanes) += total;
      Cell* to = weights + t / kNumbers<Cell> * kWidth + j * kLanes;
      for (int i = 0; i < kTall; i += kNumbers<Cell>, to += kWidth)
        store_rows(tile[i][j], tile[i + kNumbers<Cell> - 1][j], to);
    }
  }

  // Keys that are taken at a time are summed by themselves: one sum over tens of thousands would
  // round that much more.
  void add_values(const Cell* values, int64_t begin, int64_t end) {
    begin /= kNumbers<Cell>, end /= kNumbers<Cell>;
    for (int64_t d = 0; begin < end && d < size; d += kTall) {
      Tile tile{};
      float* to = sums + d * kWidth;
      multiply(tile, values + begin * size + d, 1, size, weights + begin * kWidth, end - begin);
      for (int i = 0; i < kTall; ++i)
        for (int j = 0; j < kWide; ++j) at(to + i * kWidth + j * kLanes) += tile[i][j];
    }
  }
};

}  // namespace
