// The heaviest of the lines that weigh.h weighed.

namespace {

// Weights are no less than 0, so that their bits are in their order.
inline uint32_t bits_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits;
}

inline float weight_of(uint32_t bits) {
  float weight;
  std::memcpy(&weight, &bits, sizeof weight);
  return weight;
}

// The fewest of the largest weights that amount to what is needed: how many, the smallest, and how
// many of them equal it.
struct Largest {
  int64_t count, equal;
  uint32_t smallest;
};

template <typename Amount>
Largest largest(const float* weights, int64_t n, double needed, Amount amount) {
  constexpr int kShift = 19;  // an octave is 16 buckets
  std::vector<double> amounts(size_t(1) << (32 - kShift));
  for (int64_t i = 0; i < n; ++i) amounts[bits_of(weights[i]) >> kShift] += amount(weights[i]);
  uint32_t bucket = amounts.size();
  double covered = 0;
  while (bucket > 1 && covered + amounts[bucket - 1] < needed) covered += amounts[--bucket];
  Largest found{0, 0, (bucket << kShift) - 1};
  std::vector<uint32_t> last;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(weights[i]), own = (bits >> kShift) + 1;
    found.count += own > bucket;
    if (own == bucket) last.push_back(bits);
  }
  std::sort(last.begin(), last.end(), std::greater<uint32_t>());
  for (uint32_t bits : last) {
    if (covered >= needed) break;
    found.equal = bits == found.smallest ? found.equal + 1 : 1;
    found.smallest = bits;
    covered += amount(weight_of(bits));
    ++found.count;
  }
  return found;
}

// Marks the first `always`, and of the rest the largest, `budget` in all, or if that is negative as
// many as cover a share, but `least`; of equal ones, the first.
inline void mark_largest(const float* weights, int64_t n, int64_t always, int64_t budget,
                         double coverage, int64_t least, uint8_t* marked) {
  always = std::min(always, n);
  std::fill(marked, marked + always, 1);
  const float* rest = weights + always;
  const auto weight = [](float weight) { return double(weight); };
  const auto one = [](float) { return 1.0; };
  Largest found{};
  if (budget < 0) {
    const double first = std::accumulate(weights, rest, 0.0);
    const double all = std::accumulate(rest, weights + n, first);
    found = largest(rest, n - always, coverage * all - first, weight);
    budget = least;
  }
  if (found.count < budget - always) found = largest(rest, n - always, budget - always, one);
  if (found.count == 0) return;
  for (int64_t i = always; i < n; ++i) {
    const uint32_t bits = bits_of(weights[i]);
    marked[i] = bits > found.smallest || (bits == found.smallest && found.equal-- > 0);
  }
}

// As vllm_dca/method/vertical_slash.py does; `verticals` and `distances` are zeros before.
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
    for (int64_t line = 0; line < lines.lines; ++line)
      if (chosen[line]) std::fill_n(distances + line * lines.width + 1, kTileRows, 1);
  }
}

}  // namespace

extern "C" void select_lines(const Lines* lines, int64_t heads, int64_t first_keys,
                             int64_t near_diagonals) {
  select_lines(*lines, heads, first_keys, near_diagonals);
}
