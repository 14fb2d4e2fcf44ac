// Dual chunk attention over the paged cache on the CPU: any rows of a batch, in one pass.
//
// Rows of one request and one chunk that stand next to each other make a tile. A task is a tile,
// a KV head and a run of keys. It reads each key and value once for all the tile's queries, and
// turns these where the keys' region changes. Queries lie along the lanes of vectors, in panels;
// keys and values are scalars, so that nothing is packed and both products are the same few
// lines; but the entries of a head lie along the lanes where a tile has few queries, as in decode.
// Tiles of few rows split their keys into several runs, whose partial results a second loop
// merges. Tiles and runs depend on their own request only. Everything is computed in fp32, and no
// key past a tile's last row is read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
constexpr int kWidth = 3;          // kHeight * kWidth vectors of sums stay in registers
constexpr int64_t kFew = 8;        // queries of a tile, or less
constexpr int64_t kQueries = 384;  // of a tile, those of all heads that share keys
constexpr int64_t kKeys = 128;     // taken at a time
constexpr int64_t kFewKeys = 32;   // with few queries
constexpr int64_t kRun = 1024;      // keys a run of a tile with one row
constexpr float kLowest = -1e30f;

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));

// As vllm_dca/attention_compiled.py fills it. Strides are in elements; the last axes are dense.
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

// Rows first .. first + count - 1, with keys begin .. end - 1 of their request. Their
// count * group queries are in `panels` panels of `lanes` lanes; few, in panels of one.
struct Run {
  int64_t first, count, begin, end, lanes, panels;
};

// A thread's memory.
struct Workspace {
  std::vector<float> queries, scores, keys, values;
};

// Entries of a head, with zeros up to whole vectors.
inline int64_t padded(int64_t head_size) { return (head_size + kLanes - 1) / kLanes * kLanes; }

// e^x for x <= 0 (e^-87 below that) to some units in the last place, vectorised: x = n ln 2 + r,
// and a polynomial for e^r (Cephes).
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// c[i, j] (+)= sum over l of a[i, l] b[l, j], for kTall rows and kVectors vectors of columns.
template <int kTall, int kVectors>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_column, const float* b,
                          int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
  Vector sum[kTall][kVectors] = {};
  if (add)
    for (int i = 0; i < kTall; ++i)
      for (int j = 0; j < kVectors; ++j) sum[i][j] = load(c + i * c_row + j * kLanes);
  for (int64_t l = 0; l < depth; ++l) {
    Vector right[kVectors];
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + l * b_row + j * kLanes);
    for (int i = 0; i < kTall; ++i) {
      const float left = a[i * a_row + l * a_column];
      for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < kTall; ++i)
    for (int j = 0; j < kVectors; ++j)
      std::memcpy(c + i * c_row + j * kLanes, &sum[i][j], sizeof(Vector));
}

// The same for any number of rows.
template <int kTall, int kVectors>
void multiply(int64_t rows, const float* a, int64_t a_row, int64_t a_column, const float* b,
              int64_t b_row, float* c, int64_t c_row, int64_t depth, bool add) {
  int64_t i = 0;
  for (; i + kTall <= rows; i += kTall)
    multiply_tile<kTall, kVectors>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row,
                                   c_row, depth, add);
  for (; i < rows; ++i)
    multiply_tile<1, kVectors>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row,
                               depth, add);
}

// queries[panels, size, lanes], size as padded: those of a tile, turned for a region, and scaled.
template <typename T>
void turn_queries(const Arguments& a, const Run& run, int64_t head, int64_t region,
                  float* queries) {
  const int64_t pairs = a.rotary_dim / 2, lanes = run.lanes;
  for (int64_t m = 0; m < run.count * a.group; ++m) {
    const int64_t row = run.first + m / a.group;
    const float scale = a.scale * (a.temperature ? a.temperature[row] : 1.0f);
    const float* cos = a.cos_sin + a.turn[region * a.rows + row] * a.rotary_dim;
    const float* sin = cos + pairs;
    const T* from = static_cast<const T*>(a.query) + row * a.query_stride[0] +
                    (head * a.group + m % a.group) * a.query_stride[1];
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

// One panel's queries with n keys: best[W], total[W] and sum[size, W] of their softmax go on.
// hidden(t) is how many of the panel's first lanes must not see key t.
template <int W, typename F>
void attend_panel(const float* queries, const float* keys, const float* values, int64_t stride,
                  int64_t n, int64_t size, float* scores, float* best, F hidden) {
  constexpr int kTall = W == kLanes ? 2 * kHeight : kHeight;
  float *total = best + W, *sum = total + W;
  multiply<kTall, W / kLanes>(n, keys, stride, 1, queries, W, scores, W, size, false);
  for (int64_t t = n - 1; t >= 0 && hidden(t) > 0; --t)
    std::fill(scores + t * W, scores + t * W + std::min<int64_t>(hidden(t), W), kLowest);
  float top[W], shrink[W], added[W] = {};
  std::copy(best, best + W, top);
  for (int64_t t = 0; t < n; ++t)
#pragma omp simd
    for (int m = 0; m < W; ++m) top[m] = std::max(top[m], scores[t * W + m]);
  for (int64_t t = 0; t < n; ++t)
#pragma omp simd
    for (int m = 0; m < W; ++m)
      added[m] += scores[t * W + m] = exponential(scores[t * W + m] - top[m]);
#pragma omp simd
  for (int m = 0; m < W; ++m) {
    shrink[m] = exponential(best[m] - top[m]);
    total[m] = total[m] * shrink[m] + added[m];
    best[m] = top[m];
  }
  for (int64_t d = 0; d < size; ++d)
#pragma omp simd
    for (int m = 0; m < W; ++m) sum[d * W + m] *= shrink[m];
  multiply<kTall, W / kLanes>(size, values, 1, stride, scores, W, sum, W, n, true);
}

// The same for few queries, a multiple of four, each with its partial[2 + size]; query m sees the
// first visible(m) keys.
template <typename F>
void attend_few(int64_t count, const float* queries, const float* keys, const float* values,
                int64_t stride, int64_t n, int64_t size, float* scores, float* partial,
                F visible) {
  for (int64_t m = 0; m < count; m += 4)
    for (int64_t t = 0; t < n; ++t) {
      Vector product[4] = {};
      for (int64_t d = 0; d < size; d += kLanes) {
        const Vector key = load(keys + t * stride + d);
        for (int i = 0; i < 4; ++i) product[i] += key * load(queries + (m + i) * size + d);
      }
      for (int i = 0; i < 4; ++i) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int lane = 0; lane < kLanes; ++lane) sum += product[i][lane];
        scores[(m + i) * kKeys + t] = sum;
      }
    }
  for (int64_t m = 0; m < count; ++m) {
    float *own = scores + m * kKeys, *best = partial + m * (2 + size);
    std::fill(own + std::clamp<int64_t>(visible(m), 0, n), own + n, kLowest);
    float top = *best, added = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < n; ++t) top = std::max(top, own[t]);
#pragma omp simd reduction(+ : added)
    for (int64_t t = 0; t < n; ++t) added += own[t] = exponential(own[t] - top);
    const float shrink = exponential(*best - top);
    *best = top;
    best[1] = best[1] * shrink + added;
    for (int64_t d = 0; d < size; ++d) best[2 + d] *= shrink;
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes)
    multiply<4, 4>(count, scores, kKeys, 1, values + d, stride, partial + 2 + d, 2 + size, n,
                   true);
  for (; d < size; d += kLanes)
    multiply<4, 1>(count, scores, kKeys, 1, values + d, stride, partial + 2 + d, 2 + size, n,
                   true);
}

// A run for one KV head; partials[panels, 2 + size, W], size as padded.
template <typename T, int W>
void attend(const Arguments& a, const Run& run, int64_t head, Workspace& memory,
            float* partials) {
  const int64_t size = padded(a.head_size), block = a.block_size, panel_size = (2 + size) * W;
  for (int64_t panel = 0; panel < run.panels; ++panel) {
    float* best = partials + panel * panel_size;
    std::fill(best, best + W, kLowest);
    std::fill(best + W, best + panel_size, 0.0f);
  }
  memory.queries.assign(run.panels * size * W, 0.0f);
  memory.scores.resize(kKeys * std::max<int64_t>(W, kFew));
  memory.keys.resize(kKeys * size);
  memory.values.resize(kKeys * size);
  const int32_t* pages = a.block_table + a.request[run.first] * a.table_stride;
  const int64_t position = a.position[run.first], chunk = position / a.chunk_len;
  auto slot = [&](int64_t token) {
    return static_cast<const T*>(a.kv_cache) + pages[token / block] * a.cache_stride[0] +
           head * a.cache_stride[1] + token % block * a.cache_stride[2];
  };
  // Long pages of fp32 are read in place, but not for so few queries that a copy, which reads
  // memory in order, costs less than it saves.
  const bool in_place =
      W > 1 && std::is_same_v<T, float> && block >= kKeys / 2 && size == a.head_size;
  const int64_t step = W > 1 ? kKeys : kFewKeys;
  int64_t turned_for = -1;

  for (int64_t begin = run.begin, end; begin < run.end; begin = end) {
    const int64_t key_chunk = begin / a.chunk_len;
    end = std::min({begin + step, run.end, (key_chunk + 1) * a.chunk_len});
    if (in_place) end = std::min(end, (begin / block + 1) * block);
    const int64_t n = end - begin, region = std::min<int64_t>(chunk - key_chunk, 2);
    if (region != turned_for)
      turn_queries<T>(a, run, head, turned_for = region, memory.queries.data());

    const float *keys = memory.keys.data(), *values = memory.values.data();
    int64_t stride = size;
    if (in_place) {
      keys = reinterpret_cast<const float*>(slot(begin));
      values = keys + size;
      stride = a.cache_stride[2];
    } else {
      for (int64_t t = 0; t < n; ++t) {
        const T* from = slot(begin + t);
        std::copy(from, from + a.head_size, memory.keys.data() + t * size);
        from += a.head_size;
        std::copy(from, from + a.head_size, memory.values.data() + t * size);
      }
    }
    // What comes next is fetched while this is multiplied.
    for (int64_t t = end; t < std::min(end + step, run.end); ++t)
      for (int64_t d = 0; d < 2 * a.head_size; d += 64 / sizeof(T))
        __builtin_prefetch(slot(t) + d);

    float *queries = memory.queries.data(), *scores = memory.scores.data();
    if constexpr (W == 1) {
      attend_few(run.panels, queries, keys, values, stride, n, size, scores, partials,
                 [&](int64_t m) { return position + m / a.group + 1 - begin; });
    } else {
      for (int64_t panel = 0; panel < run.panels; ++panel)
        attend_panel<W>(queries + panel * size * W, keys, values, stride, n, size, scores,
                        partials + panel * panel_size, [&](int64_t t) {
                          return (begin + t - position) * a.group - panel * W;
                        });
    }
  }
}

// Cuts rows into tiles, and each tile's keys into runs start[tile] .. start[tile + 1] - 1.
void plan(const Arguments& a, std::vector<Run>& runs, std::vector<int64_t>& start) {
  const int64_t most = std::max<int64_t>(kQueries / a.group, 1);
  start.push_back(0);
  for (int64_t first = 0, next; first < a.rows; first = next) {
    const int64_t chunk = a.position[first] / a.chunk_len;
    next = first + 1;
    while (next < a.rows && next - first < most && a.request[next] == a.request[first] &&
           a.position[next] / a.chunk_len == chunk)
      ++next;
    const int64_t count = next - first, keys = a.position[next - 1] + 1;
    const int64_t queries = count * a.group;
    const int64_t lanes = queries <= kFew ? 1 : queries <= kLanes ? kLanes : kWidth * kLanes;
    const int64_t panels =
        lanes == 1 ? (queries + 3) / 4 * 4 : (queries + lanes - 1) / lanes;
    const int64_t length = kRun * count * count;
    for (int64_t begin = 0; begin < keys; begin += length)
      runs.push_back({first, count, begin, std::min(begin + length, keys), lanes, panels});
    start.push_back(runs.size());
  }
}

template <typename T>
void attend_all(const Arguments& a) {
  const int64_t size = padded(a.head_size), kv_heads = a.kv_heads;
  std::vector<Run> runs;
  std::vector<int64_t> start, place{0};  // place: of each run's partial results
  plan(a, runs, start);
  for (const Run& run : runs)
    place.push_back(place.back() + kv_heads * run.panels * (2 + size) * run.lanes);
  std::vector<float> partials(place.back());
  auto partial = [&](int64_t run, int64_t head) {
    return partials.data() + place[run] + (place[run + 1] - place[run]) / kv_heads * head;
  };

#pragma omp parallel
  {
    Workspace memory;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < int64_t(runs.size()) * kv_heads; ++task) {
      const int64_t run = task / kv_heads, head = task % kv_heads;
      auto one = runs[run].lanes == 1        ? attend<T, 1>
                 : runs[run].lanes == kLanes ? attend<T, kLanes>
                                             : attend<T, kWidth * kLanes>;
      one(a, runs[run], head, memory, partial(run, head));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < int64_t(start.size() - 1) * kv_heads; ++task) {
      const int64_t begin = start[task / kv_heads], end = start[task / kv_heads + 1];
      const int64_t head = task % kv_heads;
      const Run& tile = runs[begin];
      std::vector<float> sum(size);
      for (int64_t m = 0; m < tile.count * a.group; ++m) {
        // [2 + head_size] with a stride of the lanes: best, total and sum.
        const int64_t lane = m / tile.lanes * (2 + size) * tile.lanes + m % tile.lanes;
        float best = kLowest, total = 0.0f;
        for (int64_t run = begin; run < end; ++run)
          best = std::max(best, partial(run, head)[lane]);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t run = begin; run < end; ++run) {
          const float* part = partial(run, head) + lane;
          const float weight = exponential(part[0] - best);
          total += part[tile.lanes] * weight;
          for (int64_t d = 0; d < size; ++d) sum[d] += part[(2 + d) * tile.lanes] * weight;
        }
        T* output = static_cast<T*>(a.output) +
                    (tile.first + m / a.group) * a.output_stride[0] +
                    (head * a.group + m % a.group) * a.output_stride[1];
        for (int64_t d = 0; d < a.head_size; ++d) output[d] = T(sum[d] / total);
      }
    }
  }
}

}  // namespace

extern "C" void attend_float32(const Arguments* a) { attend_all<float>(*a); }
extern "C" void attend_bfloat16(const Arguments* a) { attend_all<c10::BFloat16>(*a); }
extern "C" void attend_float16(const Arguments* a) { attend_all<c10::Half>(*a); }
