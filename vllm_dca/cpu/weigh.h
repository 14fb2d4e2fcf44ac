// How much of the attention of a segment's last rows each line has, of the lines of sparse.h.

namespace {

using NarrowTile = Vector[kTall][kNarrow];

// What the last rows of a segment give the lines of a head. They are a tile of their own.
template <typename T>
struct Weigher {
  using Cell = CellOf<T>;
  const Arguments& a;
  const Lines& lines;
  Workspace& work;
  int64_t first, depth;
  float subtracted[kTileRows] = {};

  Weigher(const Arguments& a, const Lines& lines, Workspace& work)
      : a(a), lines(lines), work(work), first(lines.end - kTileRows),
        depth(padded<T>(a.head_size) / kNumbers<Cell>) {}

  void operator()(float* vertical, float* slash) {
    normalise();
    // Lanes from `cut` on are of the next tile.
    const int64_t tile_before = first / kTileRows, cut = kTileRows - lines.end % kTileRows;
    Vector of_key[kCells] = {}, of_block[kCells / kTileRows][kPanels * kNarrow] = {};
    for_each_tile(
        [&](int64_t i, int64_t key, int64_t t, NarrowTile& tile) {
          for (int k = 0; k < kTall; ++k)
            for (int j = 0; j < kNarrow; ++j) tile[k][j] = power_of_two<float>(tile[k][j]);
          for (int k = 0; k < kTall; ++k) {
            Vector sum = tile[k][0];
            for (int j = 1; j < kNarrow; ++j) sum += tile[k][j];
            of_key[t + k] += sum;
          }
          for (int j = 0; j < kNarrow; ++j)
            if (lines.width == 1) {
              // A diagonal runs along the lanes; those before the first are later keys'.
              float* lane = slash + first - key + i * kNarrowWidth + j * kLanes;
              for (int k = 0; k < kTall; ++k) at(lane - k) += tile[k][j];
            } else {
              Vector sum = tile[0][j];
              for (int k = 1; k < kTall; ++k) sum += tile[k][j];
              of_block[t / kTileRows][i * kNarrow + j] += sum;
            }
        },
        [&](int64_t begin, int64_t count) {
          for (int64_t t = 0; t < count; t += kLanes) {
            const Vector found = sums(of_key + t);
            std::memcpy(vertical + begin + t, &found, std::min<int64_t>(count - t, kLanes) * 4);
          }
          std::fill_n(of_key, kCells, Vector{});
          if (lines.width == 1) return;
          for (int64_t b = 0; b * kTileRows < count; ++b)
            for (int64_t lane = 0; lane < kTileRows; ++lane) {
              const int64_t line = tile_before + (lane >= cut) - begin / kTileRows - b;
              if (line >= 0) slash[line] += of_block[b][lane / kLanes][lane % kLanes];
            }
          std::fill_n(of_block[0], kCells / kTileRows * kPanels * kNarrow, Vector{});
        });
  }

 private:
  // From now on the scores' powers of two are weights.
  void normalise() {
    float highest[kTileRows], total[kTileRows] = {};
    std::fill(highest, highest + kTileRows, kLowest);
    for_each_tile(
        [&](int64_t i, int64_t, int64_t, NarrowTile& tile) {
          for (int j = 0; j < kNarrow; ++j) {
            const int64_t lane = i * kNarrowWidth + j * kLanes;
            Vector top = at(highest + lane), sum = at(total + lane);
            for (int k = 0; k < kTall; ++k) top = larger(top, tile[k][j]);
            // Not by a power that is nearly 1, over and over.
            const Vector before = at(highest + lane);
            sum *= top > before ? power_of_two<float>(before - top) : everywhere(1.0f);
            for (int k = 0; k < kTall; ++k) sum += power_of_two<float>(tile[k][j] - top);
            at(highest + lane) = top, at(total + lane) = sum;
          }
        },
        [](int64_t, int64_t) {});
    for (int64_t m = 0; m < kTileRows; ++m) subtracted[m] = highest[m] + std::log2(total[m]);
  }

  // use(panel, first key, its place in the block, scores) for all tiles of keys, and
  // after(first key, number of keys) for all blocks.
  template <typename Use, typename After>
  void for_each_tile(Use use, After after) {
    Gathered<T> taken(a, work, a.head_size);
    Cell* queries = work.queries.template data<Cell>();
    const int64_t chunk = first / a.chunk_len;
    for (int64_t region = 2; region >= 0; --region) {
      const auto [from, to] = keys_of(region, chunk, a.chunk_len, lines.end);
      if (from == to) continue;
      const Split rows{0, kTileRows, 0, 0, kNarrowWidth, kPanels, 0};
      turn_queries<T>(a, rows, 0, region, queries);
      for (int64_t begin = from; begin < to; begin += kCells) {
        taken.count = 0;
        for_each_token<T>(a, begin, std::min(begin + kCells, to), all_of,
                          [&](const T* place) { taken.add(place); });
        taken.copy_keys();
        for (int64_t i = 0; i < kPanels; ++i)
          for (int64_t t = 0; t < taken.count; t += kTall) {
            NarrowTile tile;
            for (int k = 0; k < kTall; ++k)
              for (int j = 0; j < kNarrow; ++j)
                tile[k][j] = -at(subtracted + i * kNarrowWidth + j * kLanes);
            multiply(tile, taken.keys() + t * depth, depth, 1, queries + i * depth * kNarrowWidth,
                     depth);
            hide(tile, begin + t - first - i * kNarrowWidth);
            use(i, begin + t, t, tile);
          }
        after(begin, taken.count);
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

template <typename T>
void weigh_lines(const Arguments& a, const Lines& lines) {
  const int64_t size = padded<T>(a.head_size);
#pragma omp parallel
  {
    Workspace work;
    work.make(false, false, size);
    work.queries = Floats(kTileRows * size);
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < a.kv_heads * a.group; ++head) {
      const Arguments own = of_head<T>(a, head);
      Weigher<T> weigh(own, lines, work);
      weigh(lines.vertical + head * lines.end, lines.slash + head * lines.slash_stride);
    }
  }
}

}  // namespace

#define WEIGH(name, T)                                                       \
  extern "C" void weigh_##name(const Arguments* a, const Lines* lines) { \
    weigh_lines<T>(*a, *lines);                                                \
  }
WEIGH(float32, float)
WEIGH(bfloat16, c10::BFloat16)
WEIGH(float16, c10::Half)
#undef WEIGH
