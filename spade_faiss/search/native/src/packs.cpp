#include "packs.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "lanes.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Below, a step's inverse could overflow: such a vector is kept as 0, all of it a residual.
constexpr float kLeast = 1e-30f;
constexpr int kLanes = 16;
// Vectors that are shortened together: their sums are independent of each other.
constexpr int kTogether = 4;

int up(int value, int align) { return (value + align - 1) / align * align; }

struct Coded {
    float step, sq_norm, residual;
};

// Sixteen integers as bytes.
SPADE_AVX2 SPADE_INLINE __m128i bytes(__m256i low, __m256i high) {
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi16(shorts, shorts), 0xD8));
}

// |v|^2; v is padded with zeros.
SPADE_AVX2 float square(const float* v, int padded) {
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int i = 0; i < padded; i += kLanes) {
        const __m256 a = _mm256_loadu_ps(v + i), b = _mm256_loadu_ps(v + i + 8);
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    return sum(_mm256_add_ps(low, high));
}

// Components of kTogether vectors and the length of what they leave over, which is never too short.
SPADE_AVX2 void shorten(const Packing& packing, const float* v, int between, float* to, int between_short) {
    for (int j = 0; j < packing.columns; j += kLanes) {
        __m256 low[kTogether], high[kTogether];
        for (int t = 0; t < kTogether; ++t) low[t] = high[t] = _mm256_setzero_ps();
        const float* column = packing.basis.data() + j;
        for (int i = 0; i < packing.d; ++i, column += packing.columns) {
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
        const float all = square(v, up(packing.d, kLanes)), kept = square(to, packing.columns);
        to[packing.components] = std::sqrt(std::fmax(all - kept, 0.0f) + 4 * packing.of_basis() * all);
        std::fill(to + packing.components + 1, to + between_short, 0.0f);
    }
}

// A vector as codes of magnitude up to `most`, signed; `v` and `codes` are of `stride`.
SPADE_AVX2 Coded encode(const float* v, int most, int stride, std::int8_t* codes) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps();
    for (int i = 0; i < stride; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_loadu_ps(v + i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    const float most_of_it = *std::max_element(lanes, lanes + 8);
    const float sq_norm = square(v, stride);
    if (!(sq_norm <= std::numeric_limits<float>::max()) || most_of_it < kLeast) {
        std::memset(codes, 0, stride);
        // Not a number, or beyond float32: a residual that rules nothing out.
        if (!(sq_norm <= std::numeric_limits<float>::max())) return {0, kInfinity, kInfinity};
        return {0, sq_norm, std::sqrt(sq_norm)};
    }
    const float step = most_of_it / static_cast<float>(most);
    const __m256 by = _mm256_set1_ps(1 / step), of = _mm256_set1_ps(step);
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int i = 0; i < stride; i += kLanes) {
        const __m256 a = _mm256_loadu_ps(v + i), b = _mm256_loadu_ps(v + i + 8);
        const __m256i codes_a = _mm256_cvtps_epi32(_mm256_mul_ps(a, by)), codes_b = _mm256_cvtps_epi32(_mm256_mul_ps(b, by));
        const __m256 left_a = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_a), of, a);
        const __m256 left_b = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_b), of, b);
        low = _mm256_fmadd_ps(left_a, left_a, low);
        high = _mm256_fmadd_ps(left_b, left_b, high);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes(codes_a, codes_b));
    }
    return {step, sq_norm, std::sqrt(sum(_mm256_add_ps(low, high)))};
}

// A length rounded up: by what a sum of squares may lose, and by what squares that vanish do.
float at_least(float length, const Packing& packing) {
    return length * (1 + packing.rounding) + std::sqrt(static_cast<float>(packing.stride)) * kVanishing;
}

// Calls `take(i, coded, codes)` for each of the vectors.
template <typename Take>
void encode_all(const Packing& packing, const Vectors& vectors, int most, Take take) {
    const UsualArithmetic usual;
    const int between = std::max(up(packing.d, kLanes), packing.stride), between_short = std::max(packing.columns + 1, packing.stride);
    Buffer<float> v(static_cast<std::size_t>(kTogether) * between), shortened(static_cast<std::size_t>(kTogether) * between_short);
    Buffer<std::int8_t> codes(packing.stride);
    for (int first = 0; first < vectors.count; first += kTogether) {
        const int count = std::min(kTogether, vectors.count - first);
        for (int t = 0; t < count; ++t) {
            float* to = v.data() + static_cast<std::size_t>(t) * between;
            decode(vectors.row(first + t), vectors.type, packing.d, between, to);
            for (int c = 0; c < packing.d; ++c) to[c] -= packing.center[c];
        }
        if (packing.components) shorten(packing, v.data(), between, shortened.data(), between_short);
        for (int t = 0; t < count; ++t) {
            const float* of = packing.components ? shortened.data() + static_cast<std::size_t>(t) * between_short
                                                 : v.data() + static_cast<std::size_t>(t) * between;
            take(first + t, encode(of, most, packing.stride, codes.data()), codes.data());
        }
    }
}

}  // namespace

Packing::Packing(Format format_, int d_, const float* center_, const float* basis_, int components_)
    : format(format_),
      d(d_),
      components(components_),
      stride(up(length(), format_.align)),
      // Sums are made in 16 lanes.
      rounding((static_cast<float>(d_) / 8 + 64) * 0x1p-24f + 4 * of_basis()),
      center(d_),
      columns(up(components_, kLanes)),
      basis(static_cast<std::size_t>(d_) * columns) {
    std::copy_n(center_, d, center.data());
    for (int j = 0; j < components; ++j)
        for (int i = 0; i < d; ++i)
            basis[static_cast<std::size_t>(i) * columns + j] = basis_[static_cast<std::size_t>(j) * d + i];
}

RowPack::RowPack(std::shared_ptr<const Packing> packing_, const Vectors& rows)
    : packing(std::move(packing_)),
      count(rows.count),
      stride(packing->stride),
      groups(up(rows.count, kRowAlign) / kGroup),
      codes(static_cast<std::size_t>(groups) * kGroup * stride),
      step(static_cast<std::size_t>(groups) * kGroup),
      half(static_cast<std::size_t>(groups) * kGroup),
      reach(static_cast<std::size_t>(groups) * kGroup),
      residual(static_cast<std::size_t>(groups) * kGroup),
      group_reach(groups),
      group_residual(groups),
      repeats(groups) {
    std::fill_n(half.data(), static_cast<std::size_t>(groups) * kGroup, kInfinity);
    const Format format = packing->format;
    encode_all(*packing, rows, format.row_most, [&](int i, const Coded& coded, const std::int8_t* from) {
        auto* to = codes.data() + static_cast<std::size_t>(i) * stride;
        for (int c = 0; c < stride; ++c) to[c] = static_cast<std::uint8_t>(from[c] + format.zero);
        const int group = i / kGroup;
        step[i] = coded.step;
        half[i] = coded.sq_norm / 2;
        reach[i] = at_least(std::sqrt(coded.sq_norm), *packing);
        residual[i] = at_least(coded.residual, *packing);
        group_reach[group] = std::max(group_reach[group], reach[i]);
        group_residual[group] = std::max(group_residual[group], residual[i]);
        if (i > 0 && std::memcmp(rows.row(i), rows.row(i - 1), rows.row_bytes()) == 0)
            repeats[group] |= static_cast<std::uint8_t>(1 << i % kGroup);
    });
}

QueryPack::QueryPack(std::shared_ptr<const Packing> packing_, const Vectors& queries)
    : packing(std::move(packing_)),
      count(queries.count),
      stride(packing->stride),
      panels(up(queries.count, kPanel) / kPanel),
      codes(static_cast<std::size_t>(panels) * kPanel * stride),
      lines(static_cast<std::size_t>(panels) * kPanel * stride),
      step(static_cast<std::size_t>(panels) * kPanel),
      start(static_cast<std::size_t>(panels) * kPanel),
      sq_norm(static_cast<std::size_t>(panels) * kPanel),
      norm(static_cast<std::size_t>(panels) * kPanel),
      residual(static_cast<std::size_t>(panels) * kPanel) {
    const Format format = packing->format;
    encode_all(*packing, queries, format.query_most, [&](int i, const Coded& coded, const std::int8_t* from) {
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
        residual[i] = at_least(coded.residual, *packing);
        norm[i] = at_least(std::sqrt(coded.sq_norm), *packing) + residual[i];
    });
}

}  // namespace spade
