// The heaviest of the lines that weigh.h weighed.

namespace {

// Weights are no less than 0, so that their bits are in their order.
inline uint32_t bits_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits;
}

// How many of the largest weights have a sum of `needed`.
inline int64_t count_to(const float* weights, int64_t n, double needed) {
  constexpr int kShift = 16;
  std::vector<double> sum(size_t(1) << (32 - kShift));
  for (int64_t i = 0; i < n; ++i) sum[bits_of(weights[i]) >> kShift] += weights[i];
  double covered = 0;
  int64_t bucket = sum.size();
  while (covered < needed && bucket > 0) covered += sum[--bucket];
  if (bucket == int64_t(sum.size())) return 0;
  covered -= sum[bucket];
  std::vector<float> last;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t own = bits_of(weights[i]) >> kShift;
    count += own > bucket;
    if (own == bucket) last.push_back(weights[i]);
  }
  std::sort(last.begin(), last.end(), std::greater<float>());
  for (size_t i = 0; i < last.size() && covered < needed; ++i, ++count) covered += last[i];
  return count;
}

// Marks the first `always`, and of the rest the largest, `budget` in all, or if that is negative as
// many as cover a share, but `least`; of equal ones, the first.
inline void mark_largest(const float* weights, int64_t n, int64_t always, int64_t budget,
                         double coverage, int64_t least, uint8_t* marked) {
  always = std::min(always, n);
  std::fill(marked, marked + always, 1);
  const float* rest = weights + always;
  const int64_t others = n - always;
  int64_t count = budget - always;
  if (budget < 0) {
    const double first = std::accumulate(weights, rest, 0.0);
    const double all = std::accumulate(rest, weights + n, first);
    count = std::max(count_to(rest, others, coverage * all - first), least - always);
  }
  count = std::clamp<int64_t>(count, 0, others);
  if (count == 0) return;
  std::vector<uint32_t> order(others);
  std::transform(rest, rest + others, order.begin(), bits_of);
  std::nth_element(order.begin(), order.begin() + count - 1, order.end(), std::greater<uint32_t>());
  const uint32_t smallest = order[count - 1];
  int64_t equal = count;
  for (int64_t i = 0; i < others; ++i) equal -= bits_of(rest[i]) > smallest;
  for (int64_t i = 0; i < others; ++i) {
    const uint32_t bits = bits_of(rest[i]);
    marked[always + i] = bits > smallest || (bits == smallest && equal-- > 0);
  }
}

// As vllm_dca/method/vertical_slash.py does; what is marked is zeros at first.
void select_lines(const Lines& lines, int64_t heads, int64_t first_keys,
                  int64_t near_diagonals) {
  const int64_t near = (near_diagonals + lines.width - 2) / lines.width + 1;
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t* budgets = lines.budgets;
    const int64_t end = lines.end;
    mark_largest(lines.vertical + head * end, end, first_keys, budgets ? budgets[head] : -1,
                 lines.coverage, lines.min_keys, lines.verticals + head * end);
    std::vector<uint8_t> chosen(lines.lines);
    mark_largest(lines.slash + head * lines.slash_stride, lines.lines, near,
                 budgets ? budgets[heads + head] : -1, lines.coverage,
                 (lines.min_keys + lines.width - 1) / lines.width, chosen.data());
    // A line is at the distances of the tile's keys that its rows have on it.
    uint8_t* distances = lines.distances + head * (end + kTileRows + 1);
    int64_t until = 0;
    for (int64_t distance = 1; distance <= end + kTileRows; ++distance) {
      const int64_t line = (distance - 1) / lines.width;
      if ((distance - 1) % lines.width == 0 && line < lines.lines && chosen[line])
        until = distance + kTileRows;
      distances[distance] = distance < until;
    }
  }
}

}  // namespace

extern "C" void select_lines(const Lines* lines, int64_t heads, int64_t first_keys,
                             int64_t near_diagonals) {
  select_lines(*lines, heads, first_keys, near_diagonals);
}
