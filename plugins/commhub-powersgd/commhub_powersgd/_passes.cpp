// The three passes of a power iteration over one matrix M (n x m, by row), each at the speed of memory.
//
// Factors are R vectors one after another: left ones of n elements, right ones of m. Every row, and in `project` every
// column, is summed in an order that depends on m and n alone: not on addresses, nor on how many threads there are.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kRows = 4;  // rows that `project` takes at once
constexpr int64_t kAhead = 2048;  // bytes to ask memory for in advance, by row; half as many or twice are little worse

// Ask memory for what comes soon; it may lie beyond the end. The processor's own guesses end with a page, and it makes
// them for few rows at once.
template <typename T>
void fetch(const T* from) {
  __builtin_prefetch(from);
}

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(64)));
  static constexpr int64_t count = 64 / sizeof(T);

  static Vector load(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void store(T* to, Vector v) { std::memcpy(to, &v, sizeof v); }
  // Past the caches, to an address that is a multiple of 64: a plain store reads memory before it writes it, and this
  // does not. `drain` before another thread reads what was written.
  static void stream(T* to, Vector v) {
#if defined(__AVX512F__)
    __m512i whole;
    std::memcpy(&whole, &v, sizeof v);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), whole);
#elif defined(__AVX__)
    __m256i halves[2];
    std::memcpy(halves, &v, sizeof v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), halves[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, halves[1]);
#else
    store(to, v);
#endif
  }
};

inline void drain() {
#ifdef __AVX__
  _mm_sfence();
#endif
}

// Whether every row of a matrix begins at a multiple of 64.
template <typename T>
bool aligned(const T* matrix, int64_t m) {
  return (reinterpret_cast<uintptr_t>(matrix) | m * sizeof(T)) % 64 == 0;
}

// R vectors of m elements, by columns: what belongs to the same ones lies together and at an aligned address. R rows a
// power of two apart would share a few lines of the first-level cache.
template <typename T, int R>
class Interleaved {
 public:
  Interleaved(const T* vectors, int64_t m) : memory_(m * R + L::count) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
    for (int64_t j = 0; j + L::count <= m; j += L::count)
      for (int r = 0; r < R; ++r) L::store(start_ + j * R + r * L::count, L::load(vectors + r * m + j));
  }
  typename Lanes<T>::Vector at(int64_t column, int r) const { return L::load(start_ + column * R + r * L::count); }

 private:
  using L = Lanes<T>;
  std::vector<T> memory_;
  T* start_;
};

// P = M Q; where there is an addend, M = M + scale addend first.
template <typename T, int R, bool Adds>
void multiply(T* matrix, const T* addend, T scale, const T* right, T* left, int64_t n, int64_t m, int threads) {
  using L = Lanes<T>;
  constexpr int64_t chains = R >= 4 ? 1 : 4 / R;  // independent sums for each vector, to hide an addition's latency
  constexpr int64_t step = chains * L::count;
  const Interleaved<T, R> factors(right, m);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    T* row = matrix + i * m;
    const T* other = Adds ? addend + i * m : nullptr;
    typename L::Vector sums[R][chains] = {};
    int64_t j = 0;
    for (; j + step <= m; j += step) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < chains; ++c) {
        const int64_t k = j + c * L::count;
        fetch(row + k + kAhead / sizeof(T));
        if (Adds) fetch(other + k + kAhead / sizeof(T));
        auto value = L::load(row + k);
        if (Adds) {
          value += scale * L::load(other + k);
          L::store(row + k, value);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][c] += value * factors.at(k, r);
      }
    }
    T totals[R] = {};
    for (; j < m; ++j) {
      if (Adds) row[j] += scale * other[j];
      for (int r = 0; r < R; ++r) totals[r] += row[j] * right[r * m + j];
    }
    for (int r = 0; r < R; ++r) {
      auto sum = sums[r][0];
      for (int64_t c = 1; c < chains; ++c) sum += sums[r][c];
      for (int64_t k = 0; k < L::count; ++k) totals[r] += sum[k];
      left[r * n + i] = totals[r];
    }
  }
}

// Q = M^T P; where there is an addend, M = M + scale addend first. Threads share the columns, so each sum is one
// thread's.
template <typename T, int R, bool Adds>
void project(T* matrix, const T* addend, T scale, const T* left, T* right, int64_t n, int64_t m, int threads) {
  using L = Lanes<T>;
  const int64_t pieces = (m + L::count - 1) / L::count;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t first = pieces * t / threads * L::count;
    const int64_t end = t + 1 == threads ? m : pieces * (t + 1) / threads * L::count;
    for (int r = 0; r < R; ++r) std::fill(right + r * m + first, right + r * m + end, T(0));
    for (int64_t i = 0; i < n; i += kRows) {
      const int64_t rows = n - i < kRows ? n - i : kRows;
      T* row = matrix + i * m;
      const T* other = Adds ? addend + i * m : nullptr;
      T weights[R][kRows] = {};
      for (int r = 0; r < R; ++r)
        for (int64_t k = 0; k < rows; ++k) weights[r][k] = left[r * n + i + k];
      int64_t j = first;
      if (rows == kRows) {
        for (; j + L::count <= end; j += L::count) {
          typename L::Vector values[kRows];
#pragma GCC unroll 4
          for (int64_t k = 0; k < kRows; ++k) {
            fetch(row + (k + kRows) * m + j);
            if (Adds) fetch(other + (k + kRows) * m + j);
            values[k] = L::load(row + k * m + j);
            if (Adds) {
              values[k] += scale * L::load(other + k * m + j);
              L::store(row + k * m + j, values[k]);
            }
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            T* sum = right + r * m + j;
            const T* w = weights[r];
            const auto pair = values[0] * w[0] + values[1] * w[1], other_pair = values[2] * w[2] + values[3] * w[3];
            L::store(sum, L::load(sum) + (pair + other_pair));
          }
        }
      }
      for (; j < end; ++j)
        for (int64_t k = 0; k < rows; ++k) {
          if (Adds) row[k * m + j] += scale * other[k * m + j];
          for (int r = 0; r < R; ++r) right[r * m + j] += row[k * m + j] * weights[r][k];
        }
    }
  }
}

// Where there is room for an error, error = M - P Q^T; it may be M itself. Then, where there are new factors,
// M = P' Q'^T. Returns whether every element of the error is finite: zero times anything else is not zero.
//
// What is written and was not read here goes past the caches. Nobody asks for it soon, and to fetch it first would be a
// quarter of all that this pass moves.
template <typename T, int R, bool Keeps, bool Stores>
bool settle(T* matrix, T* error, const T* left, const T* right, const T* new_left, const T* new_right, int64_t n,
            int64_t m, int threads) {
  using L = Lanes<T>;
  const Interleaved<T, R> factors(right, Keeps ? m : 0), new_factors(new_right, Stores ? m : 0);
  const bool past = Keeps ? error != matrix && aligned(error, m) : aligned(matrix, m);
  int64_t odd = 0;
#pragma omp parallel num_threads(threads) reduction(+ : odd) if (threads > 1)
  {
#pragma omp for nowait
    for (int64_t i = 0; i < n; ++i) {
      T* row = matrix + i * m;
      T* rest = Keeps ? error + i * m : nullptr;
      T own[R], mean[R];
      for (int r = 0; r < R; ++r) {
        if (Keeps) own[r] = left[r * n + i];
        if (Stores) mean[r] = new_left[r * n + i];
      }
      typename L::Vector zeros = {};
      T zero = 0;
      int64_t j = 0;
      for (; j + L::count <= m; j += L::count) {
        if (Keeps) {
          fetch(row + j + kAhead / sizeof(T));
          auto value = L::load(row + j);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) value -= own[r] * factors.at(j, r);
          past ? L::stream(rest + j, value) : L::store(rest + j, value);
          zeros += value * T(0);
        }
        if (Stores) {
          auto result = mean[0] * new_factors.at(j, 0);
#pragma GCC unroll 8
          for (int r = 1; r < R; ++r) result += mean[r] * new_factors.at(j, r);
          past && !Keeps ? L::stream(row + j, result) : L::store(row + j, result);
        }
      }
      for (; j < m; ++j) {
        T value = row[j], result = 0;
        for (int r = 0; r < R; ++r) {
          if (Keeps) value -= own[r] * right[r * m + j];
          if (Stores) result += mean[r] * new_right[r * m + j];
        }
        if (Keeps) {
          rest[j] = value;
          zero += value * T(0);
        }
        if (Stores) row[j] = result;
      }
      for (int64_t k = 0; k < L::count; ++k) zero += zeros[k];
      odd += zero != 0;
    }
    drain();
  }
  return odd == 0;
}

}  // namespace

#define ADDING(PASS, T, NAME, R)                                                                                    \
  extern "C" void PASS##_##NAME##_##R(T* matrix, const T* addend, double scale, const T* given, T* made, int64_t n, \
                                      int64_t m, int threads) {                                                     \
    if (addend)                                                                                                     \
      PASS<T, R, true>(matrix, addend, static_cast<T>(scale), given, made, n, m, threads);                          \
    else                                                                                                            \
      PASS<T, R, false>(matrix, nullptr, 1, given, made, n, m, threads);                                            \
  }

#define PASSES(T, NAME, R)                                                                                   \
  ADDING(multiply, T, NAME, R)                                                                               \
  ADDING(project, T, NAME, R)                                                                                \
  extern "C" int settle_##NAME##_##R(T* matrix, T* error, const T* left, const T* right, const T* new_left, \
                                      const T* new_right, int64_t n, int64_t m, int threads) {               \
    if (error && new_left)                                                                                   \
      return settle<T, R, true, true>(matrix, error, left, right, new_left, new_right, n, m, threads);              \
    else if (error)                                                                                          \
      return settle<T, R, true, false>(matrix, error, left, right, nullptr, nullptr, n, m, threads);                \
    else                                                                                                     \
      return settle<T, R, false, true>(matrix, nullptr, nullptr, nullptr, new_left, new_right, n, m, threads);      \
  }

#define RANKS(T, NAME) \
  PASSES(T, NAME, 1) PASSES(T, NAME, 2) PASSES(T, NAME, 3) PASSES(T, NAME, 4) \
  PASSES(T, NAME, 5) PASSES(T, NAME, 6) PASSES(T, NAME, 7) PASSES(T, NAME, 8)

RANKS(float, float32)
RANKS(double, float64)
