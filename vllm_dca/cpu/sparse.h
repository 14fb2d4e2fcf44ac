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

// The next token before `stop` that is a vertical or at a distance from the tile's end.
struct OnLines {
  const uint8_t *verticals, *distances;
  int64_t tile_end;

  int64_t operator()(int64_t token, int64_t stop) const {
    for (; token < stop; ++token) {
      uint64_t some, more;
      for (; token + 8 <= stop; token += 8) {
        std::memcpy(&some, verticals + token, 8);
        std::memcpy(&more, distances + tile_end - token - 7, 8);
        if (some | more) break;
      }
      if (token >= stop) break;
      if (verticals[token] | distances[tile_end - token]) return token;
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

// A tile of a head.
template <typename T>
void attend_tile(const Arguments& a, int64_t first, int64_t count, const OnLines& lines,
                 Workspace& work, float* partial) {
  using Cell = CellOf<T>;
  const int64_t size = padded<T>(a.head_size), depth = size / kNumbers<Cell>;
  const int64_t position = a.position[first], chunk = position / a.chunk_len;
  const int64_t begin = position / kTileRows * kTileRows;
  const int64_t panels = (count + kNarrowWidth - 1) / kNarrowWidth;
  const int64_t panel_size = (kHead + size) * kNarrowWidth;
  Cell *queries = work.queries.data<Cell>(), *weights = work.weights.data<Cell>();
  Gathered<T> taken(a, work, 2 * a.head_size);
  bool nothing = true;

  // hidden is at least 0 for the tile's own keys, less where all see all.
  auto attend = [&](int64_t hidden) {
    if (taken.count == 0) return;
    taken.copy_keys();
    const Cell* values = taken.copy_values();
    for (int64_t i = 0; i < panels; ++i) {
      float* place = partial + i * panel_size;
      Panel<Cell, kNarrow> panel{queries + i * depth * kNarrowWidth, place,
                                 place + kSums * kNarrowWidth, place + kHead * kNarrowWidth,
                                 weights, size};
      panel.attend(taken.keys(), values, taken.count, hidden - i * kNarrowWidth, 1, nothing);
    }
    nothing = false;
    taken.count = 0;
  };

  const Split rows{first, count, 0, 0, kNarrowWidth, panels, 0};
  for (int64_t region = 2; region >= 0; --region) {
    const auto [from, to] = keys_of(region, chunk, a.chunk_len, begin);
    bool turned = region == 0;
    if (turned) turn_queries<T>(a, rows, 0, region, queries);
    for_each_token<T>(a, from, to, lines, [&](const T* place) {
      if (!turned) turn_queries<T>(a, rows, 0, region, queries);
      turned = true;
      taken.add(place);
      if (taken.full()) attend(-Gathered<T>::kMost - kTileRows);
    });
    attend(-Gathered<T>::kMost - kTileRows);
  }
  // The nearest distances are always seen.
  for_each_token<T>(a, begin, position + count, all_of, [&](const T* place) { taken.add(place); });
  attend(begin - position);

  for (int64_t m = 0; m < count; ++m) {
    const float* of = partial + m / kNarrowWidth * panel_size + m % kNarrowWidth;
    T* output = static_cast<T*>(a.output) + (first + m) * a.output_stride[0];
    for (int64_t d = 0; d < a.head_size; ++d)
      output[d] = T(of[(kHead + d) * kNarrowWidth] / of[kSums * kNarrowWidth]);
  }
}

template <typename T>
void attend_lines(const Arguments& a, const Lines& lines) {
  const int64_t heads = a.kv_heads * a.group, begin = a.position[0];
  const int64_t size = padded<T>(a.head_size), before = begin / kTileRows;
  const int64_t tiles = (lines.end - 1) / kTileRows - before + 1;
#pragma omp parallel
  {
    Workspace work;
    work.make(false, false, size);
    work.queries = Floats(kTileRows * size);
    Floats partial(kPanels * (kHead + size) * kNarrowWidth);
#pragma omp for schedule(dynamic)
    for (int64_t task = tiles * heads - 1; task >= 0; --task) {
      const int64_t head = task % heads, tile = before + task / heads;
      const int64_t first = std::max(tile * kTileRows, begin);
      const int64_t stop = std::min((tile + 1) * kTileRows, lines.end);
      const OnLines own{lines.verticals + head * lines.end,
                        lines.distances + head * (lines.end + kTileRows + 1),
                        (tile + 1) * kTileRows};
      attend_tile<T>(of_head<T>(a, head), first - begin, stop - first, own, work, partial.data());
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
