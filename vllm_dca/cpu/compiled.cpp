// Dual chunk attention over the paged cache on the CPU: any rows of a batch, in one pass.
//
// Neighbouring rows of one request and one chunk make a tile. A task is a tile, a KV head and a
// split of the keys: it reads each key and value once for all the tile's queries, and turns these
// where the keys' region changes. Many queries go through panels.h, a few, as in decode, through
// few.h. Tiles that are not full have several splits, which a second loop merges. Tiles and splits
// depend on their own request only. Sums are in fp32, and no key past a tile's last row is read.
// Beside it, how new keys and values are stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"
#include "panels.h"
#include "few.h"

namespace {

constexpr int64_t kFew = 16;         // queries of a tile
constexpr int64_t kQueries = 384;    // at most, those of all heads that share keys
constexpr int64_t kSplit = 1024;     // keys of a split, at least,
constexpr int64_t kRowKeys = 32;     // and this many for each row of its tile;
constexpr int64_t kSplits = 8;       // of more keys, no more than these, until one is
constexpr int64_t kLongest = 4096;   // as long as that: its start costs as much as 50 keys or so
constexpr float kLog2E = 1.44269504f;

// As vllm_dca/cpu/structures.py has it. Strides are in elements; the last axes are dense.
struct Arguments {
  const void* query;         // [rows, heads, head_size], rotated to their offsets
  const void* kv_cache;      // [blocks, kv_heads, block_size, 2 * head_size]
  void* output;              // [rows, heads, head_size]
  const float* cos_sin;      // [turns, rotary_dim]
  const float* temperature;  // [rows], or null
  const float* sinks;        // [heads], or null
  const int64_t* position;   // [rows]
  const int64_t* request;    // [rows], each one's row of the block table
  const int64_t* turn;       // [3, rows]: intra, succ, inter
  const int32_t* block_table;
  int64_t rows, kv_heads, group, head_size, rotary_dim, is_neox, block_size, chunk_len;
  int64_t query_stride[2], output_stride[2], cache_stride[3], table_stride;
  float scale;
  float soft_cap;  // 0 for none
};

// Rows first .. first + count - 1 with keys begin .. end - 1 of their request. Their
// count * group queries are in `panels` panels of `lanes` lanes; few, in panels of one lane.
// The partial results, [kv_heads, panels, kHead + size, lanes], start at `offset`: what was
// subtracted from the scores, the sum of the weights and the weighted values of each query.
struct Split {
  int64_t first, count, begin, end, lanes, panels, offset;
};

// What numbers of type T are multiplied as.
#if defined(__AVX512BF16__)
template <typename T>
using CellOf = std::conditional_t<std::is_same_v<T, c10::BFloat16>, Pair, float>;
#else
template <typename T>
using CellOf = float;
#endif
// Whether they lie in memory as cells.
template <typename T>
constexpr bool kAsCells = std::is_same_v<T, float> || std::is_same_v<CellOf<T>, Pair>;
template <typename T>
using StoredAs = std::conditional_t<kAsCells<T>, CellOf<T>, T>;

// Entries of a head, with zeros up to whole vectors.
template <typename T>
int64_t padded(int64_t head_size) {
  constexpr int64_t whole = kLanes * kNumbers<CellOf<T>>;
  return (head_size + whole - 1) / whole * whole;
}

// Zeros at first, from the start of a cache line.
struct Floats {
  struct alignas(64) Line {
    float entries[16];
  };
  std::vector<Line> lines;

  explicit Floats(int64_t count = 0) : lines((count + 15) / 16) {}
  template <typename Cell = float>
  Cell* data() {
    return reinterpret_cast<Cell*>(lines.data());
  }
};

// What a thread works on: the queries of a split, [panels, size, lanes]; weights; and, where keys
// and values are not read in place, some of them, [keys, size], and those values in pairs. Nothing
// is made before it is needed: it may take longer than a decode does.
struct Workspace {
  Floats queries, weights, keys, values, paired;

  void make(bool is_few, bool in_place, int64_t size) {
    if (is_few ? weights.lines.empty() : weights.lines.size() * 16 < kCells * kWidth)
      weights = Floats(is_few ? kFew * kFewKeys : kCells * kWidth);
    if (!in_place && keys.lines.empty())
      for (Floats* each : {&keys, &values, &paired}) *each = Floats(kCells * size);
  }
};

template <typename T>
void copy_numbers(const T* from, int64_t count, CellOf<T>* to) {
  if constexpr (kAsCells<T>) std::memcpy(to, from, count * sizeof(T));
  else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) at(to + i) = as_floats(from + i);
    for (; i < count; ++i) to[i] = float(from[i]);
  }
}

// queries[panels, size, lanes]: those of a tile, turned for a region, and scaled, for weights that
// are powers of two.
template <typename T>
void turn_queries(const Arguments& a, const Split& split, int64_t kv_head, int64_t region,
                  CellOf<T>* queries) {
  constexpr int64_t N = kNumbers<CellOf<T>>;
  const int64_t pairs = a.rotary_dim / 2, lanes = split.lanes;
  std::vector<float> turned(a.head_size);
  for (int64_t m = 0; m < split.count * a.group; ++m) {
    const int64_t row = split.first + m / a.group;
    const float scale = kLog2E * a.scale * (a.temperature ? a.temperature[row] : 1.0f);
    const float* cos = a.cos_sin + a.turn[region * a.rows + row] * a.rotary_dim;
    const float* sin = cos + pairs;
    const T* from = static_cast<const T*>(a.query) + row * a.query_stride[0] +
                    (kv_head * a.group + m % a.group) * a.query_stride[1];
    auto turn = [&](int64_t pair, int64_t first, int64_t second) {
      const float x = float(from[first]) * scale, y = float(from[second]) * scale;
      turned[first] = x * cos[pair] - y * sin[pair];
      turned[second] = y * cos[pair] + x * sin[pair];
    };
    if (a.is_neox)
      for (int64_t pair = 0; pair < pairs; ++pair) turn(pair, pair, pair + pairs);
    else
      for (int64_t pair = 0; pair < pairs; ++pair) turn(pair, 2 * pair, 2 * pair + 1);
    for (int64_t d = a.rotary_dim; d < a.head_size; ++d) turned[d] = float(from[d]) * scale;

    CellOf<T>* to = queries + m / lanes * padded<T>(a.head_size) / N * lanes + m % lanes;
    for (int64_t d = 0; d < a.head_size; ++d)
      if constexpr (N == 1) to[d * lanes] = turned[d];
      else to[d / 2 * lanes].numbers[d % 2] = c10::BFloat16(turned[d]).x;
  }
  // What another tile left in lanes without a query could raise the maxima of all.
  for (int64_t m = split.count * a.group; m < split.panels * lanes; ++m) {
    const int64_t depth = padded<T>(a.head_size) / N;
    CellOf<T>* to = queries + m / lanes * depth * lanes + m % lanes;
    for (int64_t d = 0; d < depth; ++d) to[d * lanes] = CellOf<T>{};
  }
}

// The partial results of a split for one KV head.
template <typename T>
void attend(const Arguments& a, const Split& split, int64_t kv_head, Workspace& work,
            float* partial) {
  using Cell = CellOf<T>;
  constexpr int64_t N = kNumbers<Cell>;
  const int64_t size = padded<T>(a.head_size), block = a.block_size, lanes = split.lanes;
  const int64_t panel_size = (kHead + size) * lanes, depth = size / N;
  const int64_t position = a.position[split.first], chunk = position / a.chunk_len;
  using Stored = StoredAs<T>;
  const bool is_few = lanes == 1;
  const bool in_place = is_few && kVectorLoads<T> && a.head_size % kTogether<Stored> == 0;
  const int32_t* pages = a.block_table + a.request[split.first] * a.table_stride;
  auto slot = [&](int64_t token) {
    return static_cast<const T*>(a.kv_cache) + pages[token / block] * a.cache_stride[0] +
           kv_head * a.cache_stride[1] + token % block * a.cache_stride[2];
  };
  auto for_each_slot = [&](int64_t token, int64_t end, auto use) {
    while (token < end) {
      const T* from = slot(token);
      const int64_t stop = std::min(end, (token / block + 1) * block);
      for (; token < stop; ++token, from += a.cache_stride[2]) use(token, from);
    }
  };
  // What comes next is fetched while something else is computed.
  auto fetch = [&](int64_t begin, int64_t end) {
    for_each_slot(begin, end, [&](int64_t, const T* from) {
      for (int64_t d = 0; d < 2 * a.head_size; d += 64 / sizeof(T)) __builtin_prefetch(from + d);
    });
  };
  work.queries = Floats(split.panels * depth * lanes);
  work.make(is_few, in_place, size);
  Cell *queries = work.queries.data<Cell>(), *weights = work.weights.data<Cell>();
  Cell *keys = work.keys.data<Cell>(), *values = work.values.data<Cell>();
  Cell* paired = work.paired.data<Cell>();
  if (is_few) std::fill(partial, partial + split.panels * panel_size, 0.0f);
  const float cap = kLog2E * a.soft_cap;
  Few<Cell> few{queries, partial, weights, split.panels, size, cap};
  const int64_t number = in_place ? sizeof(T) : sizeof(Cell) / N;
  const int64_t few_keys = kFewBytes / (2 * size * number) / kLanes * kLanes;
  const int64_t step = is_few ? std::clamp<int64_t>(few_keys, 2 * kLanes, kFewKeys) : kCells * N;
  int64_t turned_for = -1;
  if (is_few) fetch(split.begin, std::min(split.begin + step, split.end));

  for (int64_t begin = split.begin, end; begin < split.end; begin = end) {
    const int64_t key_chunk = begin / a.chunk_len;
    const int64_t region = std::min<int64_t>(chunk - key_chunk, 2);
    end = std::min({begin + step, split.end, (key_chunk + 1) * a.chunk_len});
    if (in_place) end = std::min(end, (begin / block + 1) * block);
    if (region != turned_for) {
      turn_queries<T>(a, split, kv_head, turned_for = region, queries);
      if (in_place) few.template arrange<Stored>(queries);
    }
    const int64_t n = end - begin;
    const bool first = begin == split.begin;
    if (in_place) {
      constexpr int64_t n_stored = sizeof(Stored) / sizeof(T);
      const int64_t values = a.head_size / n_stored, row = a.cache_stride[2] / n_stored;
      const Stored* from = reinterpret_cast<const Stored*>(slot(begin));
      const Stored* next = end < split.end ? reinterpret_cast<const Stored*>(slot(end)) : from;
      few.attend(Neighbours<Stored>{from, from + values, next, row, n}, position + 1 - begin,
                 a.group, first);
      continue;
    }
    fetch(end, std::min(end + step, split.end));
    for_each_slot(begin, end, [&](int64_t t, const T* from) {
      copy_numbers(from, a.head_size, keys + (t - begin) * depth);
      copy_numbers(from + a.head_size, a.head_size, values + (t - begin) * depth);
    });
    if (is_few) {
      few.attend(Neighbours<Cell>{keys, values, keys, depth, n}, position + 1 - begin, a.group,
                 first);
      continue;
    }
    const int64_t rows = (n + kTall - 1) / kTall * kTall;
    std::fill(keys + n * depth, keys + rows * depth, Cell{});
    std::fill(values + n * depth, values + rows * depth, Cell{});
    if constexpr (N == 2)
      for (int64_t t = 0; t < rows; t += 2)
        pair_up(values + t * depth, values + (t + 1) * depth, size, paired + t * depth);
    for (int64_t i = 0; i < split.panels; ++i) {
      float* place = partial + i * panel_size;
      Panel<Cell> panel{queries + i * depth * kWidth, place, place + kSums * kWidth,
                        place + kHead * kWidth, weights, size, cap};
      panel.attend(keys, N == 2 ? paired : values, n, (begin - position) * a.group - i * kWidth,
                   a.group, first);
    }
  }
  if (is_few && in_place) few.template finish<Stored>();
  else if (is_few) few.template finish<Cell>();
}

// Cuts rows into tiles, and each tile's keys into splits start[tile] .. start[tile + 1] - 1;
// returns the size of all partial results.
int64_t plan(const Arguments& a, int64_t size, std::vector<Split>& splits,
             std::vector<int64_t>& start) {
  const int64_t most = std::max<int64_t>(kQueries / a.group, 1);
  int64_t offset = 0;
  start.push_back(0);
  for (int64_t first = 0, next; first < a.rows; first = next) {
    const int64_t chunk = a.position[first] / a.chunk_len;
    next = first + 1;
    while (next < a.rows && next - first < most && a.request[next] == a.request[first] &&
           a.position[next] / a.chunk_len == chunk)
      ++next;
    const int64_t count = next - first, keys = a.position[next - 1] + 1;
    const int64_t queries = count * a.group, lanes = queries <= kFew ? 1 : kWidth;
    const int64_t panels = lanes == 1 ? queries : (queries + lanes - 1) / lanes;
    // A full tile has others beside it. The more rows, the longer, as their partials are larger.
    const bool full = count > 1 && count == most;
    const int64_t share = std::min(keys / (kSplits * kSplit) * kSplit, kLongest);
    const int64_t length = full ? keys : std::max({kSplit, kRowKeys * count, share});
    for (int64_t begin = 0; begin < keys; begin += length) {
      const int64_t end = std::min(begin + length, keys);
      splits.push_back({first, count, begin, end, lanes, panels, offset});
      offset += a.kv_heads * panels * (kHead + size) * lanes;
    }
    start.push_back(splits.size());
  }
  return offset;
}

template <typename T>
void attend_all(const Arguments& a) {
  const int64_t size = padded<T>(a.head_size);
  std::vector<Split> splits;
  std::vector<int64_t> start;
  const int64_t floats = plan(a, size, splits, start);
  const std::unique_ptr<Floats::Line[]> partials(new Floats::Line[floats / 16 + 1]);
  auto partial = [&](const Split& split, int64_t kv_head) {
    return partials[0].entries + split.offset +
           kv_head * split.panels * (kHead + size) * split.lanes;
  };

#pragma omp parallel
  {
    Workspace work;
    // A prefill's last tiles see the most keys: the longest tasks come first.
#pragma omp for schedule(dynamic)
    for (int64_t task = int64_t(splits.size()) * a.kv_heads - 1; task >= 0; --task) {
      const Split& split = splits[task / a.kv_heads];
      attend<T>(a, split, task % a.kv_heads, work, partial(split, task % a.kv_heads));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < int64_t(start.size() - 1) * a.kv_heads; ++task) {
      const int64_t begin = start[task / a.kv_heads], end = start[task / a.kv_heads + 1];
      const int64_t kv_head = task % a.kv_heads, lanes = splits[begin].lanes;
      std::vector<float> acc(size);
      for (int64_t m = 0; m < splits[begin].count * a.group; ++m) {
        const int64_t query = m / lanes * (kHead + size) * lanes + m % lanes;
        float row_max = kLowest, row_sum = 0.0f;
        for (int64_t i = begin; i < end; ++i)
          row_max = std::max(row_max, partial(splits[i], kv_head)[query]);
        const float sink = a.sinks ? kLog2E * a.sinks[kv_head * a.group + m % a.group] : kLowest;
        row_max = std::max(row_max, sink);
        if (a.sinks) row_sum = power_of_two<float>(everywhere(sink - row_max))[0];
        std::fill(acc.begin(), acc.end(), 0.0f);
        for (int64_t i = begin; i < end; ++i) {
          const float* part = partial(splits[i], kv_head) + query;
          const float weight = power_of_two<float>(everywhere(part[0] - row_max))[0];
          row_sum += part[kSums * lanes] * weight;
          for (int64_t d = 0; d < size; ++d) acc[d] += part[(kHead + d) * lanes] * weight;
        }
        T* output = static_cast<T*>(a.output) +
                    (splits[begin].first + m / a.group) * a.output_stride[0] +
                    (kv_head * a.group + m % a.group) * a.output_stride[1];
        for (int64_t d = 0; d < a.head_size; ++d) output[d] = T(acc[d] / row_sum);
      }
    }
  }
}

// New keys and values, and where they go. Strides are in bytes.
struct Tokens {
  const char *key, *value;   // [tokens, kv_heads, head_size]
  char* kv_cache;            // as above
  const int64_t* slots;      // [tokens], block * block_size + offset; less than 0, none
  int64_t tokens, kv_heads, head_bytes, block_size;
  int64_t key_stride[2], value_stride[2], cache_stride[3];
};

void store(const Tokens& a) {
#pragma omp parallel for if (a.tokens * a.kv_heads * a.head_bytes > 32768)
  for (int64_t token = 0; token < a.tokens; ++token) {
    const int64_t slot = a.slots[token];
    for (int64_t head = 0; slot >= 0 && head < a.kv_heads; ++head) {
      char* to = a.kv_cache + slot / a.block_size * a.cache_stride[0] +
                 head * a.cache_stride[1] + slot % a.block_size * a.cache_stride[2];
      std::memcpy(to, a.key + token * a.key_stride[0] + head * a.key_stride[1], a.head_bytes);
      std::memcpy(to + a.head_bytes, a.value + token * a.value_stride[0] + head * a.value_stride[1],
                  a.head_bytes);
    }
  }
}

}  // namespace

#include "sparse.h"
#include "weigh.h"
#include "select.h"

extern "C" const char* instructions() { return kInstructions; }
// What Python must agree with: bytes of the structures that it fills, and a tile's rows.
extern "C" void layout(int64_t* numbers) {
  const int64_t own[] = {sizeof(Arguments), sizeof(Tokens), sizeof(Lines), kTileRows};
  std::copy(std::begin(own), std::end(own), numbers);
}
extern "C" void write_kv(const Tokens* a) { store(*a); }
extern "C" void attend_float32(const Arguments* a) { attend_all<float>(*a); }
extern "C" void attend_bfloat16(const Arguments* a) { attend_all<c10::BFloat16>(*a); }
extern "C" void attend_float16(const Arguments* a) { attend_all<c10::Half>(*a); }
