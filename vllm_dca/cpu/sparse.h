// Sparse prefill of a segment, rows of one request inside one chunk: tiles of them attend along
// lines. weigh.h lets the last rows weigh these, select.h takes the heaviest. Heads have lines of
// their own, so here each is alone, with the keys of its KV head. vllm_dca/reference/sparse.py says
// what is computed.

namespace {

constexpr int64_t kTileRows = 64;
constexpr int kNarrow = 2;  // vectors of a panel, so that tiles fill their panels
constexpr int64_t kNarrowWidth = kNarrow * kLanes, kPanels = kTileRows / kNarrowWidth;

// As vllm_dca/cpu/structures.py has it, and vllm_dca/cpu/compiled_sparse.py fills it.
struct Lines {
  float* vertical;           // [heads, end], weight of each key
  float* slash;              // [heads, lines], weight of each diagonal or block of them; `weigh`
                             // wants 2 kTileRows more before each head's, to work with
  uint8_t* verticals;        // [heads, end], whether it is selected
  uint8_t* distances;        // [heads, end + kTileRows + 1], whether it is, by distance
  const int64_t* budgets;    // [2, heads], verticals and slashes, or null: by coverage
  int64_t end, width, lines, slash_stride, min_keys;
  double coverage;
};

// What a head of a segment has; its block table is that of the request alone.
template <typename T>
Arguments of_head(const Arguments& a, int64_t head) {
  Arguments own = a;
  own.query = static_cast<const T*>(a.query) + head * a.query_stride[1];
  own.kv_cache = static_cast<const T*>(a.kv_cache) + head / a.group * a.cache_stride[1];
  own.output = static_cast<T*>(a.output) + head * a.output_stride[1];
  own.kv_heads = own.group = 1;
  return own;
}

// Keys, and values if they are wanted, as panels take them.
template <typename T>
struct Gathered {
  using Cell = CellOf<T>;
  static constexpr int64_t N = kNumbers<Cell>, kMost = kCells * N;

  const Arguments& a;
  Workspace& work;
  int64_t numbers;  // of each token that are wanted
  int64_t depth, count = 0;
  const T* from[kMost];

  Gathered(const Arguments& a, Workspace& work, int64_t numbers)
      : a(a), work(work), numbers(numbers), depth(padded<T>(a.head_size) / N) {}

  bool full() const { return count == kMost; }

  void add(const T* place) {
    for (int64_t d = 0; d < numbers; d += 64 / sizeof(T)) __builtin_prefetch(place + d);
    from[count++] = place;
  }

  const Cell* keys() { return work.keys.template data<Cell>(); }

  void copy_keys() { copy(work.keys.template data<Cell>(), 0); }

  const Cell* copy_values() {
    Cell* values = work.values.template data<Cell>();
    const bool in_place = N == 2 && depth * N == a.head_size;
    if (!in_place) copy(values, a.head_size);
    if constexpr (N == 1) return values;
    else {
      // A last one alone is paired with itself, which nothing sees.
      auto value = [&](int64_t t) {
        return in_place ? reinterpret_cast<const Cell*>(from[std::min(t, count - 1)] + a.head_size)
                        : values + t * depth;
      };
      Cell* paired = work.paired.template data<Cell>();
      const int64_t end = in_place ? (count + 1) / 2 * 2 : whole();
      for (int64_t t = 0; t < end; t += 2)
        pair_up(value(t), value(t + 1), depth * N, paired + t * depth);
      std::fill(paired + end * depth, paired + whole() * depth, Cell{});
      return paired;
    }
  }

 private:
  int64_t whole() const { return (count + kTall - 1) / kTall * kTall; }

  void copy(Cell* to, int64_t offset) {
    for (int64_t t = 0; t < count; ++t) copy_numbers(from[t] + offset, a.head_size, to + t * depth);
    std::fill(to + count * depth, to + whole() * depth, Cell{});
  }
};

// use(place) for the tokens from .. end - 1 that are wanted, in order.
template <typename T, typename Wanted, typename Use>
void for_each_token(const Arguments& a, int64_t token, int64_t end, Wanted wanted, Use use) {
  while (token < end) {
    const int64_t page = token / a.block_size;
    const int64_t begin = page * a.block_size, stop = std::min(end, begin + a.block_size);
    const T* first = static_cast<const T*>(a.kv_cache) + a.block_table[page] * a.cache_stride[0];
    while ((token = wanted(token, stop)) < stop) {
      use(first + (token - begin) * a.cache_stride[2]);
      ++token;
    }
  }
}

inline int64_t all_of(int64_t token, int64_t) { return token; }

// The next token before `stop` that `of` wants: of bytes, one a token, which say whether it is a
// vertical, and whether it is at a distance from a tile's end.
template <typename Of>
struct OnLines {
  const uint8_t *verticals, *distances;
  int64_t tile_end;
  Of of;

  int64_t operator()(int64_t token, int64_t stop) const {
    for (; token < stop; ++token) {
      uint64_t some, more;
      for (; token + 8 <= stop; token += 8) {
        std::memcpy(&some, verticals + token, 8);
        std::memcpy(&more, distances + tile_end - token - 7, 8);
        if (of(some, __builtin_bswap64(more))) break;
      }
      if (token >= stop) break;
      if (of(verticals[token], distances[tile_end - token])) return token;
    }
    return stop;
  }
};

// Keys of a region for rows of a chunk, which end where they may: 0, 1, 2 are intra, succ, inter.
inline std::pair<int64_t, int64_t> keys_of(int64_t region, int64_t chunk, int64_t chunk_len,
                                           int64_t end) {
  if (region == 2) return {0, std::max<int64_t>(chunk - 1, 0) * chunk_len};
  if (region == 1) return {std::max<int64_t>(chunk - 1, 0) * chunk_len, chunk * chunk_len};
  return {chunk * chunk_len, end};
}

// Neighbouring tiles of a head: rows first .. first + count - 1 of a segment. They share what they
// read. Verticals are gathered once for all of them. Keys at distances are each tile's own, but the
// tiles take turns in going on, so that what one has read is in the cache for the next.
template <typename T>
struct Run {
  using Cell = CellOf<T>;
  static constexpr int64_t kTiles = 6, kWindow = 1 << 18;  // at most, and bytes of a turn

  struct Tile {
    int64_t first, count, begin;  // its rows, and the token with which it begins
    Gathered<T> taken;
    bool nothing = true;          // has been attended to
  };

  const Arguments& a;
  const uint8_t *verticals, *distances;
  Workspace& work;
  float* partials;
  int64_t size = padded<T>(a.head_size), depth = size / kNumbers<Cell>;
  int64_t panel_size = (kHead + size) * kNarrowWidth;
  std::vector<Tile> tiles = {};

  void operator()(int64_t first, int64_t count) {
    const int64_t position = a.position[first], chunk = position / a.chunk_len;
    tiles.clear();
    tiles.reserve(kTiles);
    for (int64_t row = first, stop; row < first + count; row = stop) {
      const int64_t begin = a.position[row] / kTileRows * kTileRows;
      stop = std::min(row + begin + kTileRows - a.position[row], first + count);
      tiles.push_back({row, stop - row, begin, {a, work, 2 * a.head_size}});
    }
    const int64_t begin = tiles[0].begin, tokens = kWindow / (2 * a.head_size * sizeof(T));
    for (int64_t region = 2; region >= 0; --region) {
      const auto [from, to] = keys_of(region, chunk, a.chunk_len, tiles.back().begin);
      const int64_t shared = std::min(begin, to);
      if (from < to || region == 0) turn(region);
      attend_verticals(from, shared);
      for (int64_t start = from; start < to; start += tokens)
        for (Tile& tile : tiles) {
          const int64_t stop = std::min(start + tokens, to);
          take(tile, start, std::min(stop, shared),
               [](uint64_t vertical, uint64_t distance) { return distance & ~vertical; });
          take(tile, std::max(start, shared), std::min(stop, tile.begin),
               [](uint64_t vertical, uint64_t distance) { return distance | vertical; });
        }
      for (Tile& tile : tiles) attend(tile);
    }
    // The nearest distances are always seen.
    for (Tile& tile : tiles) {
      const int64_t own = a.position[tile.first];
      for_each_token<T>(a, tile.begin, own + tile.count, all_of,
                        [&](const T* place) { tile.taken.add(place); });
      attend(tile, tile.begin - own);
      write(tile);
    }
  }

 private:
  static constexpr int64_t kAllSee = -Gathered<T>::kMost;

  static int64_t panels_of(const Tile& tile) { return (tile.count - 1) / kNarrowWidth + 1; }
  int64_t panel(const Tile& tile, int64_t i) const { return (&tile - &tiles[0]) * kPanels + i; }
  Cell* queries(int64_t panel) {
    return work.queries.template data<Cell>() + panel * depth * kNarrowWidth;
  }

  void turn(int64_t region) {
    for (const Tile& tile : tiles) {
      const Split rows{tile.first, tile.count, 0, 0, kNarrowWidth, panels_of(tile), 0};
      turn_queries<T>(a, rows, 0, region, queries(panel(tile, 0)));
    }
  }

  void attend_verticals(int64_t from, int64_t to) {
    Gathered<T>& taken = tiles[0].taken;
    const auto attend_all = [&] {
      if (taken.count == 0) return;
      taken.copy_keys();
      const Cell* values = taken.copy_values();
      for (Tile& tile : tiles) update(tile, values, taken.count, kAllSee);
      taken.count = 0;
    };
    const auto is_vertical = [](uint64_t vertical, uint64_t) { return vertical; };
    // Of any tile: distances are not asked for.
    const OnLines<decltype(is_vertical)> wanted{verticals, distances, to, is_vertical};
    for_each_token<T>(a, from, to, wanted, [&](const T* place) {
      taken.add(place);
      if (taken.full()) attend_all();
    });
    attend_all();
  }

  template <typename Of>
  void take(Tile& tile, int64_t from, int64_t to, Of of) {
    const OnLines<Of> wanted{verticals, distances, tile.begin + kTileRows, of};
    for_each_token<T>(a, from, to, wanted, [&](const T* place) {
      tile.taken.add(place);
      if (tile.taken.full()) attend(tile);
    });
  }

  // `hidden` as Panel has it: the first key's place from the first row's, or all see all.
  void attend(Tile& tile, int64_t hidden = kAllSee) {
    if (tile.taken.count == 0) return;
    tile.taken.copy_keys();
    update(tile, tile.taken.copy_values(), tile.taken.count, hidden);
    tile.taken.count = 0;
  }

  void update(Tile& tile, const Cell* values, int64_t count, int64_t hidden) {
    Cell* weights = work.weights.template data<Cell>();
    for (int64_t i = 0; i < panels_of(tile); ++i) {
      float* place = partials + panel(tile, i) * panel_size;
      Panel<Cell, kNarrow> own{queries(panel(tile, i)), place, place + kSums * kNarrowWidth,
                               place + kHead * kNarrowWidth, weights, size};
      own.attend(tile.taken.keys(), values, count, hidden - i * kNarrowWidth, 1, tile.nothing);
    }
    tile.nothing = false;
  }

  void write(const Tile& tile) const {
    for (int64_t m = 0; m < tile.count; ++m) {
      const float* of = partials + panel(tile, m / kNarrowWidth) * panel_size + m % kNarrowWidth;
      T* output = static_cast<T*>(a.output) + (tile.first + m) * a.output_stride[0];
      for (int64_t d = 0; d < a.head_size; ++d)
        output[d] = T(of[(kHead + d) * kNarrowWidth] / of[kSums * kNarrowWidth]);
    }
  }
};

template <typename T>
void attend_lines(const Arguments& a, const Lines& lines) {
  const int64_t heads = a.kv_heads * a.group, begin = a.position[0];
  const int64_t size = padded<T>(a.head_size), rows = Run<T>::kTiles * kTileRows;
  const int64_t before = begin / kTileRows * kTileRows;
  const int64_t runs = (lines.end - before + rows - 1) / rows;
#pragma omp parallel
  {
    Workspace work;
    work.make(false, false, size);
    work.queries = Floats(rows * size);
    Floats partials(rows * (kHead + size));
#pragma omp for schedule(dynamic)
    for (int64_t task = runs * heads - 1; task >= 0; --task) {
      const int64_t head = task % heads, start = before + task / heads * rows;
      const int64_t first = std::max(start, begin), stop = std::min(start + rows, lines.end);
      const Arguments own = of_head<T>(a, head);
      Run<T> run{own, lines.verticals + head * lines.end,
                 lines.distances + head * (lines.end + kTileRows + 1), work, partials.data()};
      run(first - begin, stop - first);
    }
  }
}

}  // namespace

#define ATTEND_LINES(name, T)                                                       \
  extern "C" void attend_lines_##name(const Arguments* a, const Lines* lines) { \
    attend_lines<T>(*a, *lines);                                                \
  }
ATTEND_LINES(float32, float)
ATTEND_LINES(bfloat16, c10::BFloat16)
ATTEND_LINES(float16, c10::Half)
#undef ATTEND_LINES
