// Rows of numbers as codes, and back: the arithmetic of `_coding.py`, operation by operation, so that the results are the
// same. Each pass reads and writes every number once.
//
// Whoever compiles this says before it what the coding is: kRow, kBits, kSymmetric, kWhole, kStochastic, and Real.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace {

using Int = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;

constexpr int kParts = 8 / kBits;      // codes in a byte
constexpr int kBytes = kRow / kParts;  // of a row; also the numbers of one part
constexpr int kMarks = kSymmetric ? 1 : 2;
constexpr Int kHalf = Int(1) << (kBits - 1), kTop = kHalf - 1, kMask = 2 * kHalf - 1;
constexpr Int kMagnitude = std::numeric_limits<Int>::max();
constexpr int kSign = std::numeric_limits<Int>::digits;
constexpr Real kFloor = std::numeric_limits<Real>::min() * 256;
// Added to a number below 2^22 (2^51), it leaves the nearest integer, ties to even, in the last bits.
constexpr Real kRounding = static_cast<Real>(sizeof(Real) == 4 ? 0x1.8p23 : 0x1.8p52);

// As many numbers as 64 bytes hold, or fewer, so that a part is a multiple of it.
constexpr int kDivisor = kBytes & -kBytes, kMost = 64 / sizeof(Real), kLanes = kDivisor < kMost ? kDivisor : kMost;

template <typename T, int N>
struct Vector {
  typedef T Of __attribute__((vector_size(N * sizeof(T))));
};
using Reals = Vector<Real, kLanes>::Of;
using Ints = Vector<Int, kLanes>::Of;
using Bytes = Vector<int8_t, kLanes>::Of;

template <typename V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&from);
}

// Other integers by one doubling or halving after the other: in one step, some compilers take them one by one.
Ints widened(Bytes codes) {
  const auto two = __builtin_convertvector(codes, Vector<int16_t, kLanes>::Of);
  if constexpr (sizeof(Int) == 4) {
    return __builtin_convertvector(two, Ints);
  } else {
    return __builtin_convertvector(__builtin_convertvector(two, Vector<int32_t, kLanes>::Of), Ints);
  }
}
Bytes narrowed(Ints digits) {
  const auto four = __builtin_convertvector(digits, Vector<int32_t, kLanes>::Of);
  return __builtin_convertvector(__builtin_convertvector(four, Vector<int16_t, kLanes>::Of), Bytes);
}

Ints larger(Ints a, Ints b) { return a > b ? a : b; }
Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

template <int N>
Int largest(typename Vector<Int, N>::Of v) {
  if constexpr (N == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typename Vector<Int, N / 2>::Of halves[2];
    std::memcpy(halves, &v, sizeof v);
    return largest<N / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

// Bits as integers in the order of the numbers they mean, and back. What is no number lies beyond the infinities.
template <typename I>
I ordered(I bits) {
  return bits ^ ((bits >> kSign) & kMagnitude);
}

// To the nearest integer, ties to even, as an integer. What is no number gives any.
Int nearest(Real value) { return bits_of<Int>(value + kRounding) - bits_of<Int>(kRounding); }
Ints nearest(Reals values) { return bits_of<Ints>(values + kRounding) - bits_of<Int>(kRounding); }

struct Marks {
  Real scale, inverse, zero;
  Int shift;  // the zero point as an integer

  explicit Marks(const Real* from) : scale(from[0]), inverse(scale == 0 ? 0 : 1 / scale), zero(0), shift(0) {
    if constexpr (!kSymmetric) {
      zero = from[1];
      // If it is no number, the scale spoils what the codes stand for, whatever they are.
      if (zero >= -kHalf && zero < kHalf) shift = static_cast<Int>(zero);
    }
  }
};

void extent_of(const Real* values, Real* out) {
  if constexpr (kSymmetric) {
    Ints most = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRow; i += kLanes) most = larger(most, load<Ints>(values + i) & kMagnitude);
    out[0] = bits_of<Real>(largest<kLanes>(most));
  } else {
    Ints high = ordered(load<Ints>(values)), low = high;
#pragma GCC unroll 16
    for (int i = kLanes; i < kRow; i += kLanes) {
      const auto value = ordered(load<Ints>(values + i));
      high = larger(high, value);
      low = smaller(low, value);
    }
    const Real below = -bits_of<Real>(ordered(~largest<kLanes>(~low)));
    const Real above = bits_of<Real>(ordered(largest<kLanes>(high)));
    out[0] = below < 0 ? 0 : below;
    out[1] = above < 0 ? 0 : above;
  }
}

void marks_of(const Real* extent, Real* marks) {
  if constexpr (kSymmetric) {
    marks[0] = (extent[0] < kFloor ? 0 : extent[0]) / kTop;
  } else {
    const Real scale = (extent[0] + extent[1]) / kMask;
    marks[0] = scale < kFloor ? 0 : scale;
    marks[1] = static_cast<Real>((marks[0] == 0 ? 0 : nearest(extent[0] / marks[0])) - kHalf);
  }
}

Reals stand_for(Ints digits, const Marks& marks) {
  const auto exact = __builtin_convertvector(digits, Reals);
  if constexpr (kSymmetric) return exact * marks.scale;
  return (exact - marks.zero) * marks.scale;
}

Ints digits_of(Reals values, const Real* noise, const Marks& marks) {
  auto scaled = values * marks.inverse;
  if constexpr (kStochastic) scaled += load<Reals>(noise);
  auto digits = nearest(scaled);
  if constexpr (kStochastic) digits += bits_of<Ints>(__builtin_convertvector(digits, Reals) > scaled);  // true is -1
  if constexpr (!kSymmetric) digits += marks.shift;
  constexpr Int lowest = kSymmetric ? -kTop : -kHalf;
  return smaller(larger(digits, Ints{} + lowest), Ints{} + kTop);
}

// Parts are read side by side, which the hardware does not foresee.
void fetch(const Real* row) {
  const auto bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < kRow * sizeof(Real); i += 64) __builtin_prefetch(bytes + i);
}

template <bool Keeps>
void encode_row(Real* values, const Real* noise, const Marks& marks, int8_t* codes) {
#pragma GCC unroll 4
  for (int i = 0; i < kBytes; i += kLanes) {
    Ints packed = {};
    for (int part = kParts; part-- > 0;) {
      const int at = part * kBytes + i;
      const auto value = load<Reals>(values + at);
      const auto digits = digits_of(value, kStochastic ? noise + at : nullptr, marks);
      if constexpr (Keeps) store(values + at, value - stand_for(digits, marks));
      packed = part + 1 == kParts ? digits : packed * (kMask + 1) + (digits + kHalf);
    }
    store(codes + i, narrowed(packed));
  }
}

template <bool Adds>
void decode_row(const int8_t* codes, const Marks& marks, Real* values) {
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
    for (int i = 0; i < kBytes; i += kLanes) {
      auto digits = widened(load<Bytes>(codes + i)) >> (kBits * part);
      if (part + 1 < kParts) digits = (digits & kMask) - kHalf;
      const auto result = stand_for(digits, marks);
      Real* at = values + part * kBytes + i;
      store(at, Adds ? load<Reals>(at) + result : result);
    }
  }
}

template <bool Keeps>
void encode_rows(Real* values, const Real* noise, Real* marks, int8_t* codes, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    Real *its_values = values + row * kRow, *its_marks = marks + row * kMarks;
    const Real* its_noise = kStochastic ? noise + row * kRow : nullptr;
    if constexpr (kParts > 1 && kStochastic) fetch(its_noise + kRow);
    if constexpr (kWhole) {
      if constexpr (kParts > 1) fetch(its_values + kRow);
    } else {
      Real extent[kMarks];
      extent_of(its_values, extent);
      marks_of(extent, its_marks);
    }
    encode_row<Keeps>(its_values, its_noise, Marks(its_marks), codes + row * kBytes);
  }
}

template <bool Adds>
void decode_rows(const int8_t* codes, const Real* marks, Real* values, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row)
    decode_row<Adds>(codes + row * kBytes, Marks(marks + row * kMarks), values + row * kRow);
}

}  // namespace

extern "C" {

void extents(const Real* values, Real* out, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) extent_of(values + row * kRow, out + row * kMarks);
}

void encode(Real* values, const Real* noise, Real* marks, int8_t* codes, bool keeps, int64_t rows, int threads) {
  (keeps ? encode_rows<true> : encode_rows<false>)(values, noise, marks, codes, rows, threads);
}

void decode(const int8_t* codes, const Real* marks, Real* values, bool adds, int64_t rows, int threads) {
  (adds ? decode_rows<true> : decode_rows<false>)(codes, marks, values, rows, threads);
}
}
