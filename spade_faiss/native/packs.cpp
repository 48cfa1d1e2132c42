#include "packs.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "target.hpp"

namespace spade {
namespace {

// Below, a step's inverse could overflow: such a vector is kept as 0, all of it a residual.
constexpr float kLeast = 1e-30f;

int up(int value, int align) { return (value + align - 1) / align * align; }

struct Coded {
    float step, sq_norm, residual;
};

SPADE_AVX2 SPADE_INLINE float sum(__m256 low, __m256 high) {
    low = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Sixteen integers as bytes.
SPADE_AVX2 SPADE_INLINE __m128i bytes(__m256i low, __m256i high) {
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi16(shorts, shorts), 0xD8));
}

// A vector less the centre, to `v`.
SPADE_AVX2 void centred(const void* vector, Type type, const float* centre, int d, float* v) {
    int i = 0;
    if (type == Type::kFloat16) {
        const auto* from = static_cast<const char*>(vector);
        for (; i + 8 <= d; i += 8) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i));
            _mm256_storeu_ps(v + i, _mm256_sub_ps(_mm256_cvtph_ps(half), _mm256_loadu_ps(centre + i)));
        }
        for (; i < d; ++i) {
            std::uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            v[i] = _cvtsh_ss(half) - centre[i];
        }
    } else {
        std::memcpy(v, vector, static_cast<std::size_t>(d) * 4);
        for (; i + 8 <= d; i += 8)
            _mm256_storeu_ps(v + i, _mm256_sub_ps(_mm256_loadu_ps(v + i), _mm256_loadu_ps(centre + i)));
        for (; i < d; ++i) v[i] -= centre[i];
    }
}

// Vectors that are shortened together: their sums are independent of each other.
constexpr int kTogether = 4;

// Shortens vectors: a basis by columns, so that one channel's are side by side.
class Shortener {
public:
    explicit Shortener(const Shape& shape)
        : shape_(shape), padded_(up(shape.components, kLanes)), columns_(shape.basis ? static_cast<std::size_t>(shape.d) * padded_ : 0) {
        if (shape.basis)
            for (int j = 0; j < shape.components; ++j)
                for (int i = 0; i < shape.d; ++i)
                    columns_[static_cast<std::size_t>(i) * padded_ + j] = shape.basis[static_cast<std::size_t>(j) * shape.d + i];
    }

    // Components of kTogether vectors and the length of what they leave over, which is never too short.
    SPADE_AVX2 void operator()(const float* v, int between, float* to, int between_short) const {
        for (int j = 0; j < padded_; j += kLanes) {
            __m256 low[kTogether], high[kTogether];
            for (int t = 0; t < kTogether; ++t) low[t] = high[t] = _mm256_setzero_ps();
            const float* column = columns_.data() + j;
            for (int i = 0; i < shape_.d; ++i, column += padded_) {
                const __m256 a = _mm256_load_ps(column), b = _mm256_load_ps(column + 8);
#pragma GCC unroll 4
                for (int t = 0; t < kTogether; ++t) {
                    const __m256 of = _mm256_broadcast_ss(v + static_cast<std::size_t>(t) * between + i);
                    low[t] = _mm256_fmadd_ps(of, a, low[t]);
                    high[t] = _mm256_fmadd_ps(of, b, high[t]);
                }
            }
            for (int t = 0; t < kTogether; ++t) {
                _mm256_storeu_ps(to + static_cast<std::size_t>(t) * between_short + j, low[t]);
                _mm256_storeu_ps(to + static_cast<std::size_t>(t) * between_short + j + 8, high[t]);
            }
        }
        for (int t = 0; t < kTogether; ++t, v += between, to += between_short) {
            const float all = square(v, shape_.d), kept = square(to, shape_.components);
            to[shape_.components] = std::sqrt(std::fmax(all - kept, 0.0f) + 4 * shape_.of_basis() * all);
            std::fill(to + shape_.components + 1, to + between_short, 0.0f);
        }
    }

private:
    static constexpr int kLanes = 16;

    SPADE_AVX2 static float square(const float* v, int d) {
        __m256 low = _mm256_setzero_ps(), high = low;
        int i = 0;
        for (; i + 16 <= d; i += 16) {
            const __m256 a = _mm256_loadu_ps(v + i), b = _mm256_loadu_ps(v + i + 8);
            low = _mm256_fmadd_ps(a, a, low);
            high = _mm256_fmadd_ps(b, b, high);
        }
        float total = sum(low, high);
        for (; i < d; ++i) total += v[i] * v[i];
        return total;
    }

    const Shape& shape_;
    int padded_;
    Buffer<float> columns_;
};

// A vector as codes of magnitude up to `most`, signed. `scratch` and `codes` are of `stride`.
SPADE_AVX2 Coded encode(const float* scratch, int most, int stride, std::int8_t* codes) {
    int i;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps(), low = largest, high = largest;
    for (i = 0; i < stride; i += 16) {
        const __m256 a = _mm256_loadu_ps(scratch + i), b = _mm256_loadu_ps(scratch + i + 8);
        largest = _mm256_max_ps(largest, _mm256_max_ps(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b)));
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    float most_of_it = 0;
    for (float lane : lanes) most_of_it = std::fmax(most_of_it, lane);
    const float sq_norm = sum(low, high);
    // Not a number, or beyond float32: codes of 0, and a residual that rules nothing out.
    if (!(sq_norm <= std::numeric_limits<float>::max()))
        return std::memset(codes, 0, stride), Coded{0, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
    if (most_of_it < kLeast) return std::memset(codes, 0, stride), Coded{0, sq_norm, std::sqrt(sq_norm)};
    const float step = most_of_it / static_cast<float>(most), per_step = 1 / step;
    const __m256 by = _mm256_set1_ps(per_step), of = _mm256_set1_ps(step);
    low = high = _mm256_setzero_ps();
    for (i = 0; i < stride; i += 16) {
        const __m256 a = _mm256_loadu_ps(scratch + i), b = _mm256_loadu_ps(scratch + i + 8);
        const __m256i codes_a = _mm256_cvtps_epi32(_mm256_mul_ps(a, by)), codes_b = _mm256_cvtps_epi32(_mm256_mul_ps(b, by));
        const __m256 left_a = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_a), of, a);
        const __m256 left_b = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_b), of, b);
        low = _mm256_fmadd_ps(left_a, left_a, low);
        high = _mm256_fmadd_ps(left_b, left_b, high);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes(codes_a, codes_b));
    }
    return {step, sq_norm, std::sqrt(sum(low, high))};
}

// Bounds are rounded up.
float at_least(float value, float rounding) { return value * (1 + rounding) + std::numeric_limits<float>::min(); }

// Calls `take(i, coded, codes)` for each of the vectors.
template <typename Take>
void encode_all(const Vectors& vectors, const Shape& shape, int most, int stride, Take take) {
    const Shortener shorten(shape);
    const int between = up(shape.d, 16) + stride, between_short = stride + 32;
    Buffer<float> v(static_cast<std::size_t>(kTogether) * between), shortened(static_cast<std::size_t>(kTogether) * between_short);
    Buffer<std::int8_t> codes(stride);
    for (int first = 0; first < vectors.count; first += kTogether) {
        const int count = std::min(kTogether, vectors.count - first);
        for (int t = 0; t < count; ++t)
            centred(vectors.row(first + t), vectors.type, shape.centre, shape.d, v.data() + static_cast<std::size_t>(t) * between);
        if (shape.basis) shorten(v.data(), between, shortened.data(), between_short);
        for (int t = 0; t < count; ++t) {
            const float* of = shape.basis ? shortened.data() + static_cast<std::size_t>(t) * between_short
                                          : v.data() + static_cast<std::size_t>(t) * between;
            take(first + t, encode(of, most, stride, codes.data()), codes.data());
        }
    }
}

}  // namespace

RowPack::RowPack(const Vectors& rows, const Shape& shape, Format format_)
    : format(format_),
      count(rows.count),
      d(rows.d),
      stride(up(shape.length(), format_.align)),
      groups(up(rows.count, kRowAlign) / kGroup),
      rounding(shape.rounding()),
      codes(static_cast<std::size_t>(groups) * kGroup * stride),
      step(static_cast<std::size_t>(groups) * kGroup),
      half(static_cast<std::size_t>(groups) * kGroup),
      reach(groups),
      residual(groups) {
    std::fill_n(half.data(), static_cast<std::size_t>(groups) * kGroup, std::numeric_limits<float>::infinity());
    encode_all(rows, shape, format.row_most, stride, [&](int i, const Coded& coded, const std::int8_t* from) {
        auto* to = codes.data() + static_cast<std::size_t>(i) * stride;
        for (int c = 0; c < stride; ++c) to[c] = static_cast<std::uint8_t>(from[c] + format.zero);
        step[i] = coded.step;
        half[i] = coded.sq_norm / 2;
        float &most = reach[i / kGroup], &left = residual[i / kGroup];
        most = std::fmax(most, at_least(std::sqrt(coded.sq_norm), rounding));
        left = std::fmax(left, at_least(coded.residual, rounding));
    });
}

QueryPack::QueryPack(const Vectors& queries, const Shape& shape, Format format_)
    : format(format_),
      count(queries.count),
      d(queries.d),
      stride(up(shape.length(), format_.align)),
      panels(up(queries.count, kPanel) / kPanel),
      rounding(shape.rounding()),
      codes(static_cast<std::size_t>(panels) * kPanel * stride),
      lines(static_cast<std::size_t>(panels) * kPanel * stride),
      step(static_cast<std::size_t>(panels) * kPanel),
      start(static_cast<std::size_t>(panels) * kPanel),
      sq_norm(static_cast<std::size_t>(panels) * kPanel),
      norm(static_cast<std::size_t>(panels) * kPanel),
      residual(static_cast<std::size_t>(panels) * kPanel) {
    encode_all(queries, shape, format.query_most, stride, [&](int i, const Coded& coded, const std::int8_t* from) {
        auto* panel = codes.data() + static_cast<std::size_t>(i / kPanel) * kPanel * stride + i % kPanel * 4;
        std::int32_t total = 0;
        for (int c = 0; c < stride; ++c) {
            lines[static_cast<std::size_t>(i) * stride + c] = from[c];
            total += from[c];
        }
        for (int c = 0; c < stride; c += 4) std::memcpy(panel + static_cast<std::size_t>(c) * kPanel, from + c, 4);
        step[i] = coded.step;
        start[i] = -format.zero * total;
        sq_norm[i] = coded.sq_norm;
        residual[i] = at_least(coded.residual, rounding);
        norm[i] = at_least(std::sqrt(coded.sq_norm), rounding) + residual[i];
    });
}

}  // namespace spade
