// Dual chunk attention over the paged cache on the CPU: any rows of a batch, in one pass.
//
// Neighbouring rows of one request and one chunk make a tile. A task is a tile, a KV head and a
// split of the keys: it reads each key and value once for all the tile's queries, and turns these
// where the keys' region changes. With many queries, these lie along the lanes of vectors, in
// panels, while keys and values are scalars, so that nothing is packed; with few, as in decode,
// the entries of a head lie along the lanes. Tiles that are not full have several splits, which a
// second loop merges. Tiles and splits depend on their own request only. Everything is computed in
// fp32, and no key past a tile's last row is read. Beside it, how new keys and values are stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kHeight = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kHeight = 4;  // it has half as many registers
#else
constexpr int kLanes = 4, kHeight = 8;
#endif
constexpr int kWidth = 3 * kLanes;   // of a panel; kHeight * 3 vectors of sums stay in registers
constexpr int64_t kFew = 16;         // queries of a tile
constexpr int64_t kQueries = 384;    // at most, those of all heads that share keys
constexpr int64_t kKeys = 128;       // taken at a time
constexpr int64_t kFewKeys = 16;     // with few queries
constexpr int64_t kSplit = 1024;     // keys of a split, at least,
constexpr int64_t kRowKeys = 32;     // and this many for each row of its tile
constexpr int64_t kHead = kLanes;    // before a partial result's values: a vector, to align them
constexpr float kLowest = -1e30f;

// At any address that holds floats.
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector& at(float* place) { return *reinterpret_cast<Vector*>(place); }
inline const Vector& at(const float* place) { return *reinterpret_cast<const Vector*>(place); }

// As vllm_dca/cpu/compiled.py fills it. Strides are in elements; the last axes are dense.
struct Arguments {
  const void* query;         // [rows, heads, head_size], rotated to their offsets
  const void* kv_cache;      // [blocks, kv_heads, block_size, 2 * head_size]
  void* output;              // [rows, heads, head_size]
  const float* cos_sin;      // [turns, rotary_dim]
  const float* temperature;  // [rows], or null
  const int64_t* position;   // [rows]
  const int64_t* request;    // [rows], each one's row of the block table
  const int64_t* turn;       // [3, rows]: intra, succ, inter
  const int32_t* block_table;
  int64_t rows, kv_heads, group, head_size, rotary_dim, is_neox, block_size, chunk_len;
  int64_t query_stride[2], output_stride[2], cache_stride[3], table_stride;
  float scale;
};

// Rows first .. first + count - 1 with keys begin .. end - 1 of their request. Their
// count * group queries are in `panels` panels of `lanes` lanes; few, in panels of one lane.
// The partial results, [kv_heads, panels, kHead + size, lanes], start at `offset`: the largest score,
// the sum of the weights and the weighted values of each query.
struct Split {
  int64_t first, count, begin, end, lanes, panels, offset;
};

// Entries of a head, with zeros up to whole vectors.
inline int64_t padded(int64_t head_size) { return (head_size + kLanes - 1) / kLanes * kLanes; }

// e^x for x <= 0 (e^-87 below that) to some units in the last place, vectorised: x = n ln 2 + r,
// and a polynomial for e^r (Cephes).
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = (1.9875691e-4f * r + 1.3981999e-3f) * r + 8.3334519e-3f;
  p = ((p * r + 4.1665795e-2f) * r + 1.6666665e-1f) * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// One of two vectors' even lanes (odd = 0) or odd ones, the first's before the second's.
template <int odd, size_t... i>
inline Vector every_other(Vector a, Vector b, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * i + odd)...);
#else
  typedef int Lanes __attribute__((vector_size(kLanes * sizeof(int))));
  return __builtin_shuffle(a, b, Lanes{int(2 * i + odd)...});
#endif
}

// Lane i of the result is the sum of the lanes of vector i.
template <int kCount = kLanes>
inline Vector sums(const Vector* of) {
  if constexpr (kCount == 1) return *of;
  else {
    const Vector a = sums<kCount / 2>(of), b = sums<kCount / 2>(of + kCount / 2);
    constexpr auto lanes = std::make_index_sequence<kLanes>();
    return every_other<0>(a, b, lanes) + every_other<1>(a, b, lanes);
  }
}

// c[i, j] (+)= sum over l of a[i, l] b[l, j] for any rows i, kTall at a time, and kVectors
// vectors of columns j; a by both its strides, b and c by the stride of their rows.
template <int kTall, int kVectors>
void multiply(int64_t rows, const float* a, int64_t a_row, int64_t a_column, const float* b,
              int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
  for (; rows >= kTall; rows -= kTall, a += kTall * a_row, c += kTall * c_row) {
    Vector sum[kTall][kVectors] = {};
    if (add)
      for (int i = 0; i < kTall; ++i)
        for (int j = 0; j < kVectors; ++j) sum[i][j] = at(c + i * c_row + j * kLanes);
    for (int64_t l = 0; l < depth; ++l) {
      Vector right[kVectors];
      for (int j = 0; j < kVectors; ++j) right[j] = at(b + l * b_row + j * kLanes);
      for (int i = 0; i < kTall; ++i) {
        const float left = a[i * a_row + l * a_column];
        for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
      }
    }
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kVectors; ++j) at(c + i * c_row + j * kLanes) = sum[i][j];
  }
  if constexpr (kTall > 1)
    multiply<1, kVectors>(rows, a, a_row, a_column, b, b_row, c, c_row, depth, add);
}

// Zeros at first, from the start of a cache line.
struct Floats {
  struct alignas(64) Line {
    float entries[16];
  };
  std::vector<Line> lines;

  explicit Floats(int64_t count = 0) : lines((count + 15) / 16) {}
  float* data() { return lines.data()->entries; }
};

// What a thread works on: some keys and values, [keys, size], with the queries of a split,
// [panels, size, lanes].
struct Workspace {
  int64_t size;
  Floats queries, scores = Floats(kKeys * kWidth), keys, values;

  explicit Workspace(int64_t size) : size(size), keys(kKeys * size), values(kKeys * size) {}

  // Updates a panel's running softmax with n keys. Lane m must not see the keys from where
  // hidden + t * group > m.
  void attend_panel(int64_t panel, float* row_max, int64_t n, int64_t hidden, int64_t group) {
    constexpr int W = kWidth;
    float *row_sum = row_max + W, *acc = row_max + kHead * W, *score = scores.data();
    multiply<kHeight, 3>(n, keys.data(), size, 1, queries.data() + panel * size * W, W, score, W,
                         size, false);
    for (int64_t t = 0; t < n; ++t)
      std::fill(score + t * W, score + t * W + std::clamp<int64_t>(hidden + t * group, 0, W),
                kLowest);
    float top[W], rescale[W], added[W] = {};
    std::copy(row_max, row_max + W, top);
    for (int64_t t = 0; t < n; ++t)
#pragma omp simd
      for (int m = 0; m < W; ++m) top[m] = std::max(top[m], score[t * W + m]);
    for (int64_t t = 0; t < n; ++t)
#pragma omp simd
      for (int m = 0; m < W; ++m)
        added[m] += score[t * W + m] = exponential(score[t * W + m] - top[m]);
#pragma omp simd
    for (int m = 0; m < W; ++m) {
      rescale[m] = exponential(row_max[m] - top[m]);
      row_sum[m] = row_sum[m] * rescale[m] + added[m];
      row_max[m] = top[m];
    }
    for (int64_t d = 0; d < size; ++d)
#pragma omp simd
      for (int m = 0; m < W; ++m) acc[d * W + m] *= rescale[m];
    multiply<kHeight, 3>(size, values.data(), 1, size, score, W, acc, W, n, true);
  }

  // The same for few queries, a multiple of four, each with its partial[kHead + size]; query m sees
  // the first seen + m / group keys.
  void attend_few(int64_t count, float* partial, int64_t n, int64_t seen, int64_t group) {
    constexpr int kTogether = kLanes / 4;  // keys whose products with four queries fill a vector
    for (int64_t m = 0; m < count; m += 4)
      for (int64_t t = 0; t < n; t += kTogether) {
        Vector product[kLanes] = {};
        for (int64_t d = 0; d < size; d += kLanes)
          for (int i = 0; i < kLanes; ++i)
            product[i] += at(queries.data() + (m + i / kTogether) * size + d) *
                          at(keys.data() + (t + i % kTogether) * size + d);
        const Vector sum = sums(product);
        for (int i = 0; i < 4; ++i)
          std::memcpy(scores.data() + (m + i) * kFewKeys + t,
                      reinterpret_cast<const float*>(&sum) + i * kTogether,
                      kTogether * sizeof(float));
      }
    for (int64_t m = 0; m < count; ++m) {
      float *score = scores.data() + m * kFewKeys, *row_max = partial + m * (kHead + size);
      std::fill(score + std::clamp<int64_t>(seen + m / group, 0, n), score + n, kLowest);
      float top = *row_max, added = 0.0f;
#pragma omp simd reduction(max : top)
      for (int64_t t = 0; t < n; ++t) top = std::max(top, score[t]);
#pragma omp simd reduction(+ : added)
      for (int64_t t = 0; t < n; ++t) added += score[t] = exponential(score[t] - top);
      if (top > *row_max) {
        const float rescale = exponential(*row_max - top);
        for (int64_t d = 1; d < kHead + size; ++d) row_max[d] *= rescale;
        *row_max = top;
      }
      row_max[1] += added;
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= size; d += 4 * kLanes)
      multiply<kHeight / 2, 4>(count, scores.data(), kFewKeys, 1, values.data() + d, size,
                               partial + kHead + d, kHead + size, n, true);
    for (; d < size; d += kLanes)
      multiply<4, 1>(count, scores.data(), kFewKeys, 1, values.data() + d, size, partial + kHead + d,
                     kHead + size, n, true);
  }
};

// queries[panels, size, lanes]: those of a tile, turned for a region, and scaled.
template <typename T>
void turn_queries(const Arguments& a, const Split& split, int64_t kv_head, int64_t region,
                  float* queries) {
  const int64_t pairs = a.rotary_dim / 2, lanes = split.lanes;
  for (int64_t m = 0; m < split.count * a.group; ++m) {
    const int64_t row = split.first + m / a.group;
    const float scale = a.scale * (a.temperature ? a.temperature[row] : 1.0f);
    const float* cos = a.cos_sin + a.turn[region * a.rows + row] * a.rotary_dim;
    const float* sin = cos + pairs;
    const T* from = static_cast<const T*>(a.query) + row * a.query_stride[0] +
                    (kv_head * a.group + m % a.group) * a.query_stride[1];
    float* to = queries + m / lanes * padded(a.head_size) * lanes + m % lanes;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t first = a.is_neox ? pair : 2 * pair;
      const int64_t second = a.is_neox ? pair + pairs : 2 * pair + 1;
      const float x = float(from[first]) * scale, y = float(from[second]) * scale;
      to[first * lanes] = x * cos[pair] - y * sin[pair];
      to[second * lanes] = y * cos[pair] + x * sin[pair];
    }
    for (int64_t d = a.rotary_dim; d < a.head_size; ++d) to[d * lanes] = float(from[d]) * scale;
  }
}

// The partial results of a split for one KV head.
template <typename T>
void attend(const Arguments& a, const Split& split, int64_t kv_head, Workspace& work,
            float* partial) {
  const int64_t size = work.size, block = a.block_size, lanes = split.lanes;
  const int64_t panel_size = (kHead + size) * lanes, step = lanes == 1 ? kFewKeys : kKeys;
  const int64_t position = a.position[split.first], chunk = position / a.chunk_len;
  const int32_t* pages = a.block_table + a.request[split.first] * a.table_stride;
  auto for_each_slot = [&](int64_t token, int64_t end, auto use) {
    while (token < end) {
      const int64_t page = token / block, stop = std::min(end, (page + 1) * block);
      const T* from = static_cast<const T*>(a.kv_cache) + pages[page] * a.cache_stride[0] +
                      kv_head * a.cache_stride[1] + (token - page * block) * a.cache_stride[2];
      for (; token < stop; ++token, from += a.cache_stride[2]) use(token, from);
    }
  };
  std::fill(partial, partial + split.panels * panel_size, 0.0f);
  for (int64_t panel = 0; panel < split.panels; ++panel)
    std::fill_n(partial + panel * panel_size, lanes, kLowest);
  work.queries = Floats(split.panels * size * lanes);
  int64_t turned_for = -1;

  for (int64_t begin = split.begin, end; begin < split.end; begin = end) {
    const int64_t key_chunk = begin / a.chunk_len;
    const int64_t region = std::min<int64_t>(chunk - key_chunk, 2);
    end = std::min({begin + step, split.end, (key_chunk + 1) * a.chunk_len});
    if (region != turned_for)
      turn_queries<T>(a, split, kv_head, turned_for = region, work.queries.data());
    for_each_slot(begin, end, [&](int64_t t, const T* from) {
      std::copy_n(from, a.head_size, work.keys.data() + (t - begin) * size);
      std::copy_n(from + a.head_size, a.head_size, work.values.data() + (t - begin) * size);
    });
    // What comes next is fetched while this is multiplied.
    for_each_slot(end, std::min(end + step, split.end), [&](int64_t, const T* from) {
      for (int64_t d = 0; d < 2 * a.head_size; d += 64 / sizeof(T)) __builtin_prefetch(from + d);
    });
    if (lanes == 1)
      work.attend_few(split.panels, partial, end - begin, position + 1 - begin, a.group);
    else
      for (int64_t panel = 0; panel < split.panels; ++panel)
        work.attend_panel(panel, partial + panel * panel_size, end - begin,
                          (begin - position) * a.group - panel * kWidth, a.group);
  }
}

// Cuts rows into tiles, and each tile's keys into splits start[tile] .. start[tile + 1] - 1;
// returns the size of all partial results.
int64_t plan(const Arguments& a, std::vector<Split>& splits, std::vector<int64_t>& start) {
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
    const int64_t panels = lanes == 1 ? (queries + 3) / 4 * 4 : (queries + lanes - 1) / lanes;
    // A full tile has others beside it. The more rows, the longer, as their partials are larger.
    const bool full = count > 1 && count == most;
    const int64_t length = full ? keys : std::max(kSplit, kRowKeys * count);
    for (int64_t begin = 0; begin < keys; begin += length) {
      splits.push_back({first, count, begin, std::min(begin + length, keys), lanes, panels, offset});
      offset += a.kv_heads * panels * (kHead + padded(a.head_size)) * lanes;
    }
    start.push_back(splits.size());
  }
  return offset;
}

template <typename T>
void attend_all(const Arguments& a) {
  const int64_t size = padded(a.head_size);
  std::vector<Split> splits;
  std::vector<int64_t> start;
  const std::unique_ptr<Floats::Line[]> partials(new Floats::Line[plan(a, splits, start) / 16 + 1]);
  auto partial = [&](const Split& split, int64_t kv_head) {
    return partials[0].entries + split.offset +
           kv_head * split.panels * (kHead + size) * split.lanes;
  };

#pragma omp parallel
  {
    Workspace work(size);
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
        std::fill(acc.begin(), acc.end(), 0.0f);
        for (int64_t i = begin; i < end; ++i) {
          const float* part = partial(splits[i], kv_head) + query;
          const float weight = exponential(part[0] - row_max);
          row_sum += part[lanes] * weight;
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

extern "C" int lanes() { return kLanes; }
extern "C" void write_kv(const Tokens* a) { store(*a); }
extern "C" void attend_float32(const Arguments* a) { attend_all<float>(*a); }
extern "C" void attend_bfloat16(const Arguments* a) { attend_all<c10::BFloat16>(*a); }
extern "C" void attend_float16(const Arguments* a) { attend_all<c10::Half>(*a); }
