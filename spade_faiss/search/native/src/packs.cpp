#include "packs.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "floats.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// The inverse of a smaller step could overflow: a vector without larger values is encoded as 0, and all of it is residual.
constexpr float kSmallestValue = 1e-30f;
// Sums are computed in two registers of eight lanes.
constexpr int kLanes = 16;
// Vectors that are shortened together, because their sums do not wait for each other.
constexpr int kBatch = 4;

// What is known of an encoded vector v: its quantization step, |v|^2 and |v - v'|.
struct Quantized {
    float step, sq_norm, residual;
};

// Narrows sixteen 32-bit integers to bytes, in their order.
SPADE_TARGET_AVX2 SPADE_INLINE __m128i to_bytes(__m256i low, __m256i high) {
    const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi16(shorts, shorts), 0xD8));
}

// |v|^2 of a vector that is padded with zeros to `padded` channels, a multiple of kLanes.
SPADE_TARGET_AVX2 float sq_norm_of(const float* v, int padded) {
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int i = 0; i < padded; i += kLanes) {
        const __m256 a = _mm256_loadu_ps(v + i), b = _mm256_loadu_ps(v + i + 8);
        low = _mm256_fmadd_ps(a, a, low);
        high = _mm256_fmadd_ps(b, b, high);
    }
    return sum_of_lanes(_mm256_add_ps(low, high));
}

// Shortens kBatch vectors, `stride` floats apart, to their components and the length of what the basis leaves over, which is
// rounded so that it is never too short. The shortened vectors are `out_stride` floats apart and padded with zeros.
SPADE_TARGET_AVX2 void shorten(const Packing& packing, const float* v, int stride, float* out, int out_stride) {
    for (int j = 0; j < packing.padded_components; j += kLanes) {
        __m256 low[kBatch], high[kBatch];
        for (int t = 0; t < kBatch; ++t) low[t] = high[t] = _mm256_setzero_ps();
        const float* channel = packing.basis.data() + j;
        for (int i = 0; i < packing.d; ++i, channel += packing.padded_components) {
            const __m256 a = _mm256_load_ps(channel), b = _mm256_load_ps(channel + 8);
#pragma GCC unroll 4
            for (int t = 0; t < kBatch; ++t) {
                const __m256 value = _mm256_broadcast_ss(v + static_cast<std::size_t>(t) * stride + i);
                low[t] = _mm256_fmadd_ps(value, a, low[t]);
                high[t] = _mm256_fmadd_ps(value, b, high[t]);
            }
        }
        for (int t = 0; t < kBatch; ++t) {
            _mm256_storeu_ps(out + static_cast<std::size_t>(t) * out_stride + j, low[t]);
            _mm256_storeu_ps(out + static_cast<std::size_t>(t) * out_stride + j + 8, high[t]);
        }
    }
    for (int t = 0; t < kBatch; ++t, v += stride, out += out_stride) {
        const float whole = sq_norm_of(v, round_up(packing.d, kLanes));
        const float spanned = sq_norm_of(out, packing.padded_components);
        out[packing.components] = std::sqrt(std::fmax(whole - spanned, 0.0f) + 4 * packing.basis_rounding() * whole);
        std::fill(out + packing.components + 1, out + out_stride, 0.0f);
    }
}

// Encodes a vector of `stride` floats as signed codes of magnitude up to `max_code`.
SPADE_TARGET_AVX2 Quantized encode(const float* v, int max_code, int stride, std::int8_t* codes) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps();
    for (int i = 0; i < stride; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_loadu_ps(v + i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    const float max_value = *std::max_element(lanes, lanes + 8);
    const float sq_norm = sq_norm_of(v, stride);
    const bool is_finite = sq_norm <= std::numeric_limits<float>::max();
    if (!is_finite || max_value < kSmallestValue) {
        std::memset(codes, 0, stride);
        // The infinite residual of a vector that is not a number, or whose norm is beyond float32, rules nothing out.
        if (!is_finite) return {0, kInfinity, kInfinity};
        return {0, sq_norm, std::sqrt(sq_norm)};
    }
    const float step = max_value / static_cast<float>(max_code);
    const __m256 inverse_step = _mm256_set1_ps(1 / step), steps = _mm256_set1_ps(step);
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int i = 0; i < stride; i += kLanes) {
        const __m256 a = _mm256_loadu_ps(v + i), b = _mm256_loadu_ps(v + i + 8);
        const __m256i codes_a = _mm256_cvtps_epi32(_mm256_mul_ps(a, inverse_step));
        const __m256i codes_b = _mm256_cvtps_epi32(_mm256_mul_ps(b, inverse_step));
        const __m256 error_a = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_a), steps, a);
        const __m256 error_b = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(codes_b), steps, b);
        low = _mm256_fmadd_ps(error_a, error_a, low);
        high = _mm256_fmadd_ps(error_b, error_b, high);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), to_bytes(codes_a, codes_b));
    }
    return {step, sq_norm, std::sqrt(sum_of_lanes(_mm256_add_ps(low, high)))};
}

// An upper bound of a length that was computed in float32: a sum of squares is rounded, and small squares vanish.
float upper_bound(float length, const Packing& packing) {
    return length * (1 + packing.rounding) + std::sqrt(static_cast<float>(packing.stride)) * kVanishing;
}

// Writes codes as 16-bit integers, and returns their sum.
SPADE_TARGET_AVX2 std::int32_t widen(const std::int8_t* codes, int stride, std::int16_t* out) {
    std::int32_t total = 0;
    int c = 0;
    __m256i sums = _mm256_setzero_si256();
    for (; c + 16 <= stride; c += 16) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + c)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), wide);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(wide, _mm256_set1_epi16(1)));
    }
    for (; c < stride; ++c) total += out[c] = codes[c];
    alignas(32) std::int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    for (const std::int32_t lane : lanes) total += lane;
    return total;
}

// Writes a - b, for a multiple of eight channels.
SPADE_TARGET_AVX2 void subtract(float* a, const float* b, int padded) {
    for (int c = 0; c < padded; c += 8) _mm256_storeu_ps(a + c, _mm256_sub_ps(_mm256_loadu_ps(a + c), _mm256_loadu_ps(b + c)));
}

// Encodes `total` vectors, the i-th at `address(i)`, and calls `store(i, quantized, codes)` for each.
template <typename Address, typename Store>
void encode_all(const Packing& packing, int total, ElementType type, Address address, int max_code, Store store) {
    const ScopedDefaultFloatMode float_mode;
    const int stride = std::max(round_up(packing.d, kLanes), packing.stride);
    const int short_stride = std::max(packing.padded_components + 1, packing.stride);
    Buffer<float> centered(static_cast<std::size_t>(kBatch) * stride);
    Buffer<float> shortened(static_cast<std::size_t>(kBatch) * short_stride);
    Buffer<std::int8_t> codes(packing.stride);
    for (int first = 0; first < total; first += kBatch) {
        const int count = std::min(kBatch, total - first);
        for (int t = 0; t < count; ++t) {
            float* v = centered.data() + static_cast<std::size_t>(t) * stride;
            decode(address(first + t), type, packing.d, stride, v);
            subtract(v, packing.center.data(), round_up(packing.d, 8));
        }
        if (packing.components) shorten(packing, centered.data(), stride, shortened.data(), short_stride);
        for (int t = 0; t < count; ++t) {
            const float* v = packing.components ? shortened.data() + static_cast<std::size_t>(t) * short_stride
                                                : centered.data() + static_cast<std::size_t>(t) * stride;
            store(first + t, encode(v, max_code, packing.stride, codes.data()), codes.data());
        }
    }
}

// Encodes queries into a pack that has room for them, the i-th at `address(i)`.
template <typename Address>
void encode_queries(QueryPack& pack, int count, ElementType type, Address address) {
    const Packing& packing = *pack.packing;
    const int stride = pack.stride;
    pack.count = count;
    pack.panels = round_up(count, kPanel) / kPanel;
    const auto store = [&](int i, const Quantized& quantized, const std::int8_t* query_codes) {
        auto* lane = pack.codes.data() + static_cast<std::size_t>(i / kPanel) * kPanel * stride + i % kPanel * 4;
        for (int c = 0; c < stride; c += 4) std::memcpy(lane + static_cast<std::size_t>(c) * kPanel, query_codes + c, 4);
        const std::int32_t total =
            widen(query_codes, stride, pack.codes_by_query.data() + static_cast<std::size_t>(i) * stride);
        pack.step[i] = quantized.step;
        pack.initial_dot[i] = -packing.format.row_offset * total;
        pack.sq_norm[i] = quantized.sq_norm;
        pack.residual[i] = upper_bound(quantized.residual, packing);
        pack.norm[i] = upper_bound(std::sqrt(quantized.sq_norm), packing) + pack.residual[i];
    };
    encode_all(packing, count, type, address, packing.format.max_query_code, store);
}

}  // namespace

Packing::Packing(CodeFormat format_, int d_, const float* center_, const float* basis_, int components_)
    : format(format_),
      d(d_),
      components(components_),
      stride(round_up(length(), format_.alignment)),
      // A sum of d products in 16 lanes takes d / 16 additions; the rest is for what is not proportional to d.
      rounding((static_cast<float>(d_) / 8 + 64) * 0x1p-24f + 4 * basis_rounding()),
      center(round_up(d_, 8)),
      padded_components(round_up(components_, kLanes)),
      basis(static_cast<std::size_t>(d_) * padded_components) {
    std::copy_n(center_, d, center.data());
    for (int j = 0; j < components; ++j)
        for (int i = 0; i < d; ++i)
            basis[static_cast<std::size_t>(i) * padded_components + j] = basis_[static_cast<std::size_t>(j) * d + i];
}

RowPack::RowPack(std::shared_ptr<const Packing> packing_, const Vectors& rows)
    : packing(std::move(packing_)),
      count(rows.count),
      stride(packing->stride),
      groups(round_up(rows.count, kRowAlign) / kGroup),
      codes(static_cast<std::size_t>(groups) * kGroup * stride),
      step(static_cast<std::size_t>(groups) * kGroup),
      half_sq_norm(static_cast<std::size_t>(groups) * kGroup),
      norm(static_cast<std::size_t>(groups) * kGroup),
      residual(static_cast<std::size_t>(groups) * kGroup),
      max_norm(groups),
      max_residual(groups),
      repeats(groups) {
    std::fill_n(half_sq_norm.data(), static_cast<std::size_t>(groups) * kGroup, kInfinity);
    const CodeFormat format = packing->format;
    const auto address = [&](int i) { return rows.row(i); };
    const auto store = [&](int i, const Quantized& quantized, const std::int8_t* row_codes) {
        auto* out = codes.data() + static_cast<std::size_t>(i) * stride;
        for (int c = 0; c < stride; ++c) out[c] = static_cast<std::uint8_t>(row_codes[c] + format.row_offset);
        const int group = i / kGroup;
        step[i] = quantized.step;
        half_sq_norm[i] = quantized.sq_norm / 2;
        norm[i] = upper_bound(std::sqrt(quantized.sq_norm), *packing);
        residual[i] = upper_bound(quantized.residual, *packing);
        max_norm[group] = std::max(max_norm[group], norm[i]);
        max_residual[group] = std::max(max_residual[group], residual[i]);
        if (i > 0 && std::memcmp(rows.row(i), rows.row(i - 1), rows.row_bytes()) == 0)
            repeats[group] |= static_cast<std::uint8_t>(1 << i % kGroup);
    };
    encode_all(*packing, rows.count, rows.type, address, format.max_row_code, store);
}

QueryPack::QueryPack(std::shared_ptr<const Packing> packing_, int capacity)
    : packing(std::move(packing_)),
      count(0),
      stride(packing->stride),
      panels(round_up(capacity, kPanel) / kPanel),
      codes(static_cast<std::size_t>(panels) * kPanel * stride),
      codes_by_query(static_cast<std::size_t>(panels) * kPanel * stride),
      step(static_cast<std::size_t>(panels) * kPanel),
      initial_dot(static_cast<std::size_t>(panels) * kPanel),
      sq_norm(static_cast<std::size_t>(panels) * kPanel),
      norm(static_cast<std::size_t>(panels) * kPanel),
      residual(static_cast<std::size_t>(panels) * kPanel) {}

QueryPack::QueryPack(std::shared_ptr<const Packing> packing_, const Vectors& queries)
    : QueryPack(std::move(packing_), queries.count) {
    encode_queries(*this, queries.count, queries.type, [&](int i) { return queries.row(i); });
}

void QueryPack::assign(std::shared_ptr<const Packing> packing_, const void* const* queries, ElementType type, int count_) {
    packing = std::move(packing_);
    encode_queries(*this, count_, type, [&](int i) { return queries[i]; });
}

}  // namespace spade
