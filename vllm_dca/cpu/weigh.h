// How much of the attention of a segment's last rows each line has, of the lines of sparse.h.

namespace {

using NarrowTile = Vector[kTall][kNarrow];

// Keys of one region, which a task takes.
struct Span {
  int64_t region, begin, end;
};

// The last rows of a segment are a tile of their own. Heads that share keys read them together.
template <typename T>
struct Probe {
  using Cell = CellOf<T>;
  static constexpr int64_t kSpan = 2048;
  static_assert(kSpan % kTileRows == 0 && kCells % kTileRows == 0);
  static constexpr auto kPower = [](Vector x) { return power_of_two<Cell>(x); };

  const Arguments& a;
  const Lines& lines;
  int64_t heads = a.kv_heads * a.group, size = padded<T>(a.head_size);
  int64_t depth = size / kNumbers<Cell>, first = lines.end - kTileRows;
  std::vector<Span> spans = {};
  Floats queries{heads * 3 * kTileRows * size};  // [heads, regions, panels, depth, kNarrowWidth]
  Floats subtracted{heads * kTileRows};  // [heads, kTileRows]
  // [heads, spans, kTileRows]: a row's highest score, and the sum of its powers of two over that.
  Floats highest = Floats(), total = Floats();

  void operator()() {
    for (int64_t region = 2; region >= 0; --region) {
      const auto [from, to] = keys_of(region, first / a.chunk_len, a.chunk_len, lines.end);
      // Each gives to kTileRows + kLanes lines beyond its keys. Those on both sides of a shorter one
      // would share some; a region has 256 keys or more, and the last span is between no others.
      for (int64_t begin = from, end; begin < to; begin = end) {
        end = to - begin < kSpan + kCells ? to : begin + kSpan;
        spans.push_back({region, begin, end});
      }
    }
    const int64_t count = spans.size();
    highest = total = Floats(heads * count * kTileRows);
    std::fill_n(highest.data(), heads * count * kTileRows, kLowest);
#pragma omp parallel
    {
      Workspace work;
      work.make(false, false, size);
#pragma omp for
      for (int64_t i = 0; i < heads * 3; ++i) turn(i / 3, i % 3);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < count * a.kv_heads; ++task)
        sum_up(task % a.kv_heads, task / a.kv_heads, work);
#pragma omp for
      for (int64_t head = 0; head < heads; ++head) normalise(head);
      // Spans have lines in common with those beside them.
      for (int64_t odd = 0; odd < 2; ++odd)
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < (count + 1 - odd) / 2 * a.kv_heads; ++task)
          give(task % a.kv_heads, spans[2 * (task / a.kv_heads) + odd], work);
    }
  }

 private:
  Cell* turned(int64_t head, int64_t region) {
    return queries.template data<Cell>() + (head * 3 + region) * kTileRows * depth;
  }

  void turn(int64_t head, int64_t region) {
    const auto has = [=](const Span& span) { return span.region == region; };
    if (std::none_of(spans.begin(), spans.end(), has)) return;
    const Split rows{0, kTileRows, 0, 0, kNarrowWidth, kPanels, 0};
    turn_queries<T>(of_head<T>(a, head), rows, 0, region, turned(head, region));
  }

  void sum_up(int64_t kv_head, int64_t span, Workspace& work) {
    const int64_t count = spans.size();
    for_each_tile(
        kv_head, spans[span], work,
        [&](int64_t head, int64_t i, int64_t, int64_t, NarrowTile& tile) {
          const int64_t row = (head * count + span) * kTileRows + i * kNarrowWidth;
          for (int j = 0; j < kNarrow; ++j) {
            float *own = highest.data() + row + j * kLanes, *all = total.data() + row + j * kLanes;
            Vector top = at(own), sum = at(all);
            const Vector before = top;
            for (int k = 0; k < kTall; ++k) top = larger(top, tile[k][j]);
            if (any_above(top - before, 0.0f)) {
              // Not by a power that is nearly 1, over and over.
              sum *= top > before ? power_of_two<float>(before - top) : everywhere(1.0f);
              at(own) = top;
            }
            for (int k = 0; k < kTall; ++k) sum += kPower(tile[k][j] - top);
            at(all) = sum;
          }
        },
        [](int64_t, int64_t, int64_t) {});
  }

  // From now on the scores' powers of two are weights.
  void normalise(int64_t head) {
    const int64_t count = spans.size();
    for (int64_t m = 0; m < kTileRows; ++m) {
      const auto place = [&](int64_t span) { return (head * count + span) * kTileRows + m; };
      const float* scores = highest.data();
      float top = kLowest, sum = 0.0f;
      for (int64_t span = 0; span < count; ++span) top = std::max(top, scores[place(span)]);
      for (int64_t span = 0; span < count; ++span)
        sum += total.data()[place(span)] * std::exp2(scores[place(span)] - top);
      subtracted.data()[head * kTileRows + m] = top + std::log2(sum);
    }
  }

  void give(int64_t kv_head, const Span& span, Workspace& work) {
    // Lanes from `cut` on are of the next tile.
    const int64_t tile_before = first / kTileRows, cut = kTileRows - lines.end % kTileRows;
    constexpr int kVectorsOfRows = kPanels * kNarrow, kBlocks = kCells / kTileRows;
    alignas(64) Vector of_key[kCells] = {}, of_block[kBlocks * kVectorsOfRows] = {};
    for_each_tile(
        kv_head, span, work,
        [&](int64_t head, int64_t i, int64_t key, int64_t t, NarrowTile& tile) {
          for (int k = 0; k < kTall; ++k)
            for (int j = 0; j < kNarrow; ++j) tile[k][j] = kPower(tile[k][j]);
          for (int k = 0; k < kTall; ++k) {
            Vector sum = tile[k][0];
            for (int j = 1; j < kNarrow; ++j) sum += tile[k][j];
            of_key[t + k] += sum;
          }
          if (lines.width == 1) {
            add_diagonals(slash(head) + first - key + i * kNarrowWidth, tile);
            return;
          }
          for (int j = 0; j < kNarrow; ++j) {
            Vector sum = tile[0][j];
            for (int k = 1; k < kTall; ++k) sum += tile[k][j];
            of_block[t / kTileRows * kVectorsOfRows + i * kNarrow + j] += sum;
          }
        },
        [&](int64_t head, int64_t begin, int64_t count) {
          float* vertical = lines.vertical + head * lines.end + begin;
          for (int64_t t = 0; t < count; t += kLanes) {
            const Vector found = sums(of_key + t);
            std::memcpy(vertical + t, &found, std::min<int64_t>(count - t, kLanes) * 4);
          }
          std::fill_n(of_key, kCells, Vector{});
          if (lines.width == 1) return;
          for (int64_t b = 0; b * kTileRows < count; ++b) {
            const float* of_lane = reinterpret_cast<float*>(of_block + b * kVectorsOfRows);
            const int64_t line = tile_before - begin / kTileRows - b;
            const float own = std::accumulate(of_lane, of_lane + cut, 0.0f);
            const float next = std::accumulate(of_lane + cut, of_lane + kTileRows, 0.0f);
            if (line >= 0) slash(head)[line] += own;
            if (line >= -1 && cut < kTileRows) slash(head)[line + 1] += next;
          }
          std::fill_n(of_block, kBlocks * kVectorsOfRows, Vector{});
        });
  }

  // A diagonal runs along the lanes. Those before the first are later keys'.
  static void add_diagonals(float* lane, const NarrowTile& tile) {
    constexpr auto next = [](int i) { return i + 1; };
    Vector sum[kNarrow + 1] = {};  // from lane -kLanes on
    for (int k = kTall - 1; k >= 0; --k) {
      for (int j = 0; j < kNarrow; ++j) sum[j] = shuffle(sum[j], sum[j + 1], next, kEach);
      sum[kNarrow] = shuffle(sum[kNarrow], Vector{}, next, kEach);
      for (int j = 0; j < kNarrow; ++j) sum[j + 1] += tile[k][j];
    }
    for (int j = 0; j <= kNarrow; ++j) at(lane + (j - 1) * kLanes) += sum[j];
  }

  float* slash(int64_t head) const { return lines.slash + head * lines.slash_stride; }

  // use(head, panel, first key, its place in the block, scores) for all tiles of keys, and
  // after(head, first key, number of keys) for all blocks.
  template <typename Use, typename After>
  void for_each_tile(int64_t kv_head, const Span& span, Workspace& work, Use use, After after) {
    const int64_t first_head = kv_head * a.group;
    const Arguments own = of_head<T>(a, first_head);
    Gathered<T> taken(own, work, a.head_size);
    for (int64_t begin = span.begin; begin < span.end; begin += kCells) {
      taken.count = 0;
      for_each_token<T>(own, begin, std::min(begin + kCells, span.end), all_of,
                        [&](const T* place) { taken.add(place); });
      taken.copy_keys();
      for (int64_t head = first_head; head < first_head + a.group; ++head) {
        for (int64_t i = 0; i < kPanels; ++i)
          for (int64_t t = 0; t < taken.count; t += kTall) {
            const float* minus = subtracted.data() + head * kTileRows + i * kNarrowWidth;
            NarrowTile tile;
            for (int k = 0; k < kTall; ++k)
              for (int j = 0; j < kNarrow; ++j) tile[k][j] = -at(minus + j * kLanes);
            multiply(tile, taken.keys() + t * depth, depth, 1,
                     turned(head, span.region) + i * depth * kNarrowWidth, depth);
            hide(tile, begin + t - first - i * kNarrowWidth);
            use(head, i, begin + t, t, tile);
          }
        after(head, begin, taken.count);
      }
    }
  }

  // Key k from lanes below hidden + k, which are before it. What is past the end, from all.
  static void hide(NarrowTile& tile, int64_t hidden) {
    const Integers lane = numbered(kEach);
    for (int k = std::max<int64_t>(1 - hidden, 0); k < kTall; ++k)
      for (int j = 0; j < kNarrow; ++j) {
        const int from = std::min<int64_t>(hidden + k, kNarrowWidth);
        tile[k][j] = lane + j * kLanes < from ? everywhere(kLowest) : tile[k][j];
      }
  }
};

}  // namespace

#define WEIGH(name, T)                                                       \
  extern "C" void weigh_##name(const Arguments* a, const Lines* lines) { \
    Probe<T>{*a, *lines}();                                              \
  }
WEIGH(float32, float)
WEIGH(bfloat16, c10::BFloat16)
WEIGH(float16, c10::Half)
#undef WEIGH
