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
// A smaller product of two steps could vanish.
constexpr float kSmallestStep = 0x1p-100f;

// A vector before it is encoded: its largest magnitude and |v|^2, which is infinite if the vector is no number or too long.
struct Measured {
    float largest, sq_norm;
    bool is_finite() const { return sq_norm != kInfinity; }
    // The step of codes of magnitude up to `max_code`; 0 where there is nothing to encode.
    float step(int max_code) const {
        return is_finite() && largest >= kSmallestValue ? largest / static_cast<float>(max_code) : 0.0f;
    }
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

SPADE_TARGET_AVX2 Measured measure(const float* v, int stride) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps();
    for (int i = 0; i < stride; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_loadu_ps(v + i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, largest);
    const float sq_norm = sq_norm_of(v, stride);
    const bool is_finite = sq_norm <= std::numeric_limits<float>::max();
    return {*std::max_element(lanes, lanes + 8), is_finite ? sq_norm : kInfinity};
}

// Encodes a vector of `stride` floats as signed codes, bytes or 16-bit integers, that many times `step`. Returns |v - v'|.
template <typename Code>
SPADE_TARGET_AVX2 float encode(const float* v, const Measured& measured, float step, int stride, Code* codes) {
    if (step == 0) {
        std::memset(codes, 0, stride * sizeof(Code));
        // The infinite residual of a vector that is not a number, or whose norm is beyond float32, rules nothing out.
        return std::sqrt(measured.sq_norm);
    }
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
        if constexpr (sizeof(Code) == 1) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), to_bytes(codes_a, codes_b));
        } else {
            const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes_a, codes_b), 0xD8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), shorts);
        }
    }
    return std::sqrt(sum_of_lanes(_mm256_add_ps(low, high)));
}

// An upper bound of a length that was computed in float32: a sum of squares is rounded, and small squares vanish.
float upper_bound(float length, const Packing& packing) {
    return length * (1 + packing.rounding) + std::sqrt(static_cast<float>(packing.stride)) * kVanishing;
}

template <typename Code>
std::int32_t sum_of(const Code* codes, int stride) {
    std::int32_t total = 0;
    for (int c = 0; c < stride; ++c) total += codes[c];
    return total;
}

// Writes a - b, for a multiple of eight channels.
SPADE_TARGET_AVX2 void subtract(float* a, const float* b, int padded) {
    for (int c = 0; c < padded; c += 8) _mm256_storeu_ps(a + c, _mm256_sub_ps(_mm256_loadu_ps(a + c), _mm256_loadu_ps(b + c)));
}

// Prepares `total` vectors for encoding, the i-th at `address(i)`, a group at a time: `store(first, count, values)` takes
// those from `first` on, padded with zeros to the packing's stride and to whole registers. `codes`: of kCodes alone.
template <typename Address, typename Store>
void prepare_all(const Packing& packing, int total, ElementType type, const StoredCodes* codes, Address address, Store store) {
    static_assert(kGroup == 2 * kBatch);
    const ScopedDefaultFloatMode float_mode;
    const int stride = std::max(round_up(packing.d, kLanes), packing.code_stride);
    const int short_stride = std::max(packing.padded_components + 1, packing.code_stride);
    Buffer<float> centered(static_cast<std::size_t>(kGroup) * stride);
    Buffer<float> shortened(static_cast<std::size_t>(kGroup) * short_stride);
    for (int first = 0; first < total; first += kGroup) {
        const int count = std::min(kGroup, total - first);
        for (int t = 0; t < count; ++t) {
            float* v = centered.data() + static_cast<std::size_t>(t) * stride;
            decode(address(first + t), type, codes, packing.d, stride, v);
            subtract(v, packing.center.data(), round_up(packing.d, 8));
        }
        const float* values[kGroup];
        for (int t = 0; t < count; ++t)
            values[t] = packing.components ? shortened.data() + static_cast<std::size_t>(t) * short_stride
                                           : centered.data() + static_cast<std::size_t>(t) * stride;
        for (int t = 0; packing.components && t < count; t += kBatch)
            shorten(packing, centered.data() + static_cast<std::size_t>(t) * stride, stride,
                    shortened.data() + static_cast<std::size_t>(t) * short_stride, short_stride);
        store(first, count, values);
    }
}

// Writes the digits of a query whose step is 1 / c of the unit. What they add up to is no more than the largest code each.
void write_digits(const Packing& packing, int c, std::int8_t* digits) {
    digits[0] = static_cast<std::int8_t>(-c);
    const int coarse = packing.digits - 1;
    for (int i = 0; i < coarse; ++i) {
        const int until = c * packing.base * (i + 1) / coarse, before = c * packing.base * i / coarse;
        digits[i + 1] = static_cast<std::int8_t>(before - until);
    }
}

// Encodes queries into a pack that has room for them, the i-th at `address(i)`.
template <typename Address>
void encode_queries(QueryPack& pack, int count, ElementType type, Address address) {
    const Packing& packing = *pack.packing;
    const int stride = pack.stride, code_stride = packing.code_stride;
    const int max_code = packing.format.max_query_code, row_offset = packing.format.row_offset;
    // The largest 16-bit codes whose products with codes of rows add up to 32 bits.
    const int max_fine_code = std::max(max_code, std::min(32767, (1 << 23) / packing.length()));
    Buffer<std::int8_t> codes(std::max(stride, code_stride));
    pack.count = count;
    pack.panels = round_up(count, kPanel) / kPanel;
    const auto encode_query = [&](int i, const float* v) {
        const Measured measured = measure(v, code_stride);
        float step = measured.step(max_code);
        std::fill(codes.data() + packing.length(), codes.data() + std::max(stride, code_stride), std::int8_t{0});
        int c = 0;
        if (packing.has_digits() && step > 0) {
            c = static_cast<int>(std::min(packing.unit / step, static_cast<float>(packing.most_parts)));
            if (c > 0) step = packing.unit / static_cast<float>(c);
        }
        const float residual = upper_bound(encode(v, measured, step, code_stride, codes.data()), packing);
        pack.initial_dot[i] = -row_offset * sum_of(codes.data(), code_stride);
        if (c > 0) write_digits(packing, c, codes.data() + packing.length());
        auto* lane = pack.codes.data() + static_cast<std::size_t>(i / kPanel) * kPanel * stride + i % kPanel * 4;
        for (int at = 0; at < stride; at += 4) std::memcpy(lane + static_cast<std::size_t>(at) * kPanel, codes.data() + at, 4);
        std::int16_t* const fine_codes = pack.fine_codes.data() + static_cast<std::size_t>(i) * code_stride;
        pack.fine_step[i] = measured.step(max_fine_code);
        pack.fine_residual[i] = upper_bound(encode(v, measured, pack.fine_step[i], code_stride, fine_codes), packing);
        pack.fine_initial_dot[i] = -row_offset * sum_of(fine_codes, code_stride);
        pack.step[i] = step;
        pack.sq_norm[i] = measured.sq_norm;
        pack.residual[i] = std::max(residual, pack.fine_residual[i]);
        pack.norm[i] = upper_bound(std::sqrt(measured.sq_norm), packing) + pack.residual[i];
    };
    prepare_all(packing, count, type, nullptr, address, [&](int first, int of, const float* const* values) {
        for (int t = 0; t < of; ++t) encode_query(first + t, values[t]);
    });
}

}  // namespace

Packing::Packing(CodeFormat format_, int d_, const float* center_, const float* basis_, int components_, float unit_)
    : format(format_),
      d(d_),
      components(components_),
      unit(unit_ >= kSmallestStep && unit_ <= 1 / kSmallestStep ? unit_ : 0.0f),
      stride(round_up(length() + (unit > 0 ? kLeastDigits : 0), format_.alignment)),
      code_stride(round_up(length(), kLanes)),
      digits(unit > 0 ? std::min(stride - length(), kMostDigits) : 0),
      most_parts(0),
      base(0),
      // A sum of d products in 16 lanes takes d / 16 additions; the rest is for what is not proportional to d.
      rounding((static_cast<float>(d_) / 8 + 64) * 0x1p-24f + 4 * basis_rounding()),
      center(round_up(d_, 8)),
      padded_components(round_up(components_, kLanes)),
      basis(static_cast<std::size_t>(d_) * padded_components) {
    if (has_digits()) {
        // c * base is what the coarse digits of a query hold. A larger c is nearer to the step that fits, a larger base is
        // more that the digits of a row hold.
        const int most = (digits - 1) * format.max_query_code;
        most_parts = static_cast<int>(std::sqrt(static_cast<float>(most) / 1.5f));
        base = most / most_parts;
    }
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
      repeats(groups),
      group_step(packing->has_digits() ? groups : 0),
      least_half_sq_norm(packing->has_digits() ? groups : 0) {
    std::fill_n(half_sq_norm.data(), static_cast<std::size_t>(groups) * kGroup, kInfinity);
    if (packing->has_digits()) std::fill_n(least_half_sq_norm.data(), groups, kInfinity);
    const CodeFormat format = packing->format;
    const int code_stride = packing->code_stride, most_height = packing->most_height();
    Buffer<std::int8_t> row_codes(code_stride);
    const auto store = [&](int first, int of, const float* const* values) {
        const int group = first / kGroup;
        Measured measured[kGroup];
        float group_largest = 0, least = kInfinity;
        for (int t = 0; t < of; ++t) {
            measured[t] = measure(values[t], code_stride);
            if (!measured[t].is_finite()) continue;
            group_largest = std::max(group_largest, measured[t].largest);
            least = std::min(least, measured[t].sq_norm / 2);
        }
        const float common_step = Measured{group_largest, 0}.step(format.max_row_code);
        if (packing->has_digits()) {
            group_step[group] = common_step;
            least_half_sq_norm[group] = least;
        }
        for (int t = 0; t < of; ++t) {
            const int i = first + t;
            auto* out = codes.data() + static_cast<std::size_t>(i) * stride;
            step[i] = packing->has_digits() && measured[t].is_finite() ? common_step : measured[t].step(format.max_row_code);
            const float error = encode(values[t], measured[t], step[i], code_stride, row_codes.data());
            for (int c = 0; c < packing->length(); ++c) out[c] = static_cast<std::uint8_t>(row_codes[c] + format.row_offset);
            half_sq_norm[i] = measured[t].sq_norm / 2;
            norm[i] = upper_bound(std::sqrt(measured[t].sq_norm), *packing);
            residual[i] = upper_bound(error, *packing);
            max_norm[group] = std::max(max_norm[group], norm[i]);
            max_residual[group] = std::max(max_residual[group], residual[i]);
            if (i > 0 && std::memcmp(rows.row(i), rows.row(i - 1), rows.row_bytes()) == 0)
                repeats[group] |= static_cast<std::uint8_t>(1 << i % kGroup);
            if (!packing->has_digits()) continue;
            const float height_step = common_step * packing->unit;
            int height = 0;
            if (height_step >= kSmallestStep && measured[t].is_finite())
                height = static_cast<int>(std::min((half_sq_norm[i] - least) / height_step, static_cast<float>(most_height)));
            std::uint8_t* const digits = out + packing->length();
            digits[0] = static_cast<std::uint8_t>(height % packing->base);
            std::memset(digits + 1, height / packing->base, packing->digits - 1);
            std::memset(digits + packing->digits, 0, stride - packing->length() - packing->digits);
        }
    };
    prepare_all(*packing, rows.count, rows.type, rows.codes, [&](int i) { return rows.row(i); }, store);
    // Padding is 0, with the largest digits.
    for (int i = count; i < groups * kGroup; ++i) {
        std::uint8_t* const out = codes.data() + static_cast<std::size_t>(i) * stride;
        std::memset(out, format.row_offset, packing->length());
        std::memset(out + packing->length() + 1, format.max_row_code + format.row_offset, std::max(0, packing->digits - 1));
    }
}

QueryPack::QueryPack(std::shared_ptr<const Packing> packing_, int capacity)
    : packing(std::move(packing_)),
      count(0),
      stride(packing->stride),
      panels(round_up(capacity, kPanel) / kPanel),
      codes(static_cast<std::size_t>(panels) * kPanel * stride),
      fine_codes(static_cast<std::size_t>(panels) * kPanel * packing->code_stride),
      step(static_cast<std::size_t>(panels) * kPanel),
      fine_step(static_cast<std::size_t>(panels) * kPanel),
      initial_dot(static_cast<std::size_t>(panels) * kPanel),
      fine_initial_dot(static_cast<std::size_t>(panels) * kPanel),
      sq_norm(static_cast<std::size_t>(panels) * kPanel),
      norm(static_cast<std::size_t>(panels) * kPanel),
      residual(static_cast<std::size_t>(panels) * kPanel),
      fine_residual(static_cast<std::size_t>(panels) * kPanel) {}

QueryPack::QueryPack(std::shared_ptr<const Packing> packing_, const Vectors& queries)
    : QueryPack(std::move(packing_), queries.count) {
    encode_queries(*this, queries.count, queries.type, [&](int i) { return queries.row(i); });
}

void QueryPack::assign(std::shared_ptr<const Packing> packing_, const void* const* queries, ElementType type, int count_) {
    packing = std::move(packing_);
    encode_queries(*this, count_, type, [&](int i) { return queries[i]; });
}

}  // namespace spade
