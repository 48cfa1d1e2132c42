#include "window_codes.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "floats.hpp"
#include "packs.hpp"
#include "target.hpp"

namespace spade {
namespace {

constexpr int kChannels = 8;
// The most that one float32 operation is off by, relative to its result.
constexpr double kHalfUnit = 0x1p-24;
// Smaller squares may vanish.
constexpr double kVanishingSquare = 0x1p-125;

// What sums of vectors without codes are, which pass all thresholds.
constexpr std::int32_t kAlways = std::numeric_limits<std::int32_t>::max();

}  // namespace

WindowCoding::WindowCoding(int d, const float* center, int most, float step, int height, int width,
                           std::vector<std::int32_t> cells)
    : d(d),
      quads((d + kQuad - 1) / kQuad),
      most(most),
      step(step),
      center(round_up(d, kChannels)),
      height(height),
      width(width),
      cells(std::move(cells)) {
    std::copy(center, center + d, this->center.data());
    if (this->cells.empty()) return;
    numbers.assign(static_cast<std::size_t>(height) * width, -1);
    for (std::size_t i = 0; i < this->cells.size(); ++i) numbers[this->cells[i]] = static_cast<std::int32_t>(i);
}

int WindowCoding::line_end(int first, int last) const {
    const int begin = cell_of(first), right = (begin / width + 1) * width;
    int end = first + 1;
    while (end < last && cell_of(end) == begin + end - first && cell_of(end) < right) ++end;
    return end;
}

SPADE_TARGET_AVX2 bool WindowCoding::round(const float* vector, std::int8_t* codes, float& residual) const {
    const __m256 inverse = _mm256_set1_ps(1 / step), steps = _mm256_set1_ps(step);
    const __m256 largest = _mm256_set1_ps(static_cast<float>(most)),
                 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 sum = _mm256_setzero_ps(), extreme = _mm256_setzero_ps(), within = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    const int padded = round_up(d, kChannels);
    alignas(32) float last[kChannels] = {};
    std::copy(vector + d / kChannels * kChannels, vector + d, last);
    alignas(32) std::int32_t rounded[kChannels];
    for (int c = 0; c < padded; c += kChannels) {
        const __m256 number = c + kChannels <= d ? _mm256_loadu_ps(vector + c) : _mm256_load_ps(last);
        const __m256 centered = _mm256_sub_ps(number, _mm256_load_ps(center.data() + c));
        const __m256 code = _mm256_round_ps(_mm256_mul_ps(centered, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        // What is no number is within nothing, and becomes the second operand of a minimum.
        within = _mm256_and_ps(within, _mm256_cmp_ps(_mm256_and_ps(code, no_sign), largest, _CMP_LE_OQ));
        const __m256 held = _mm256_max_ps(_mm256_min_ps(code, largest), _mm256_sub_ps(_mm256_setzero_ps(), largest));
        const __m256 rest = _mm256_sub_ps(centered, _mm256_mul_ps(held, steps));
        sum = _mm256_fmadd_ps(rest, rest, sum);
        extreme = _mm256_max_ps(extreme, _mm256_and_ps(centered, no_sign));
        _mm256_store_si256(reinterpret_cast<__m256i*>(rounded), _mm256_cvtps_epi32(held));
        for (int i = 0; i < kChannels && c + i < quads * kQuad; ++i) codes[c + i] = static_cast<std::int8_t>(rounded[i]);
    }
    alignas(32) float extremes[kChannels];
    _mm256_store_ps(extremes, extreme);
    // Each difference is off by some units of the largest number that it is made of; the sum of squares by one for each term.
    const double size = std::max<double>(*std::max_element(extremes, extremes + kChannels), static_cast<double>(most) * step);
    const double off = std::sqrt(static_cast<double>(d)) * 8 * kHalfUnit * size + std::sqrt(d * kVanishingSquare);
    const double length = std::sqrt(static_cast<double>(sum_of_lanes(sum))) * (1 + (d + 8) * kHalfUnit);
    residual = static_cast<float>((length + off) / step * (1 + 4 * kHalfUnit));
    return _mm256_movemask_ps(within) == 0xFF;
}

WindowCodes::WindowCodes(const WindowCoding& coding, const Gallery& gallery, int image, const bool* inside)
    : height(coding.height),
      width(coding.width),
      padded_width(std::max(width, kCells)),
      quads(coding.quads),
      codes(static_cast<std::size_t>(height) * quads * padded_width * kQuad),
      initial(static_cast<std::size_t>(height) * padded_width) {
    const ScopedDefaultFloatMode float_mode;
    const int padded = round_up(gallery.d, kChannels);
    Buffer<float> vector(padded + kChannels);
    std::vector<std::int8_t> code(static_cast<std::size_t>(quads) * kQuad);
    std::fill(initial.data(), initial.data() + static_cast<std::size_t>(height) * padded_width, kNever);
    for (int location = 0; location < gallery.locations; ++location) {
        if (inside && !inside[location]) {
            is_whole = false;
            continue;
        }
        gallery.decode(static_cast<std::int64_t>(image) * gallery.locations + location, padded, vector.data());
        const int cell = coding.cell_of(location), y = cell / width, x = cell % width;
        std::int32_t& begin = initial[static_cast<std::size_t>(y) * padded_width + x];
        float found;
        if (!coding.round(vector.data(), code.data(), found)) {
            begin = kAlways;  // its codes stay zeros
            continue;
        }
        residual = std::max(residual, found);
        std::int32_t sum = 0, sq_norm = 0;
        for (int c = 0; c < quads; ++c) {
            std::int8_t* to = codes.data() + ((static_cast<std::size_t>(y) * quads + c) * padded_width + x) * kQuad;
            std::memcpy(to, code.data() + c * kQuad, kQuad);
            for (int i = 0; i < kQuad; ++i) {
                sum += to[i];
                sq_norm += to[i] * to[i];
            }
        }
        // Codes of queries are shifted to be unsigned. Half an odd number is rounded to the side of passing.
        begin = -(sq_norm / 2) - (coding.most + 1) * sum;
    }
}

WindowQueryCodes::WindowQueryCodes(const WindowCoding& coding, int count)
    : coding(coding), codes(static_cast<std::size_t>(count) * coding.quads * kQuad), sq_norm(count), residual(count) {}

void WindowQueryCodes::assign(int i, const float* query) {
    const std::size_t length = static_cast<std::size_t>(coding.quads) * kQuad;
    std::uint8_t* to = codes.data() + i * length;
    auto* code = reinterpret_cast<std::int8_t*>(to);
    coding.round(query, code, residual[i]);
    std::int32_t sum = 0;
    for (std::size_t c = 0; c < length; ++c) {
        sum += code[c] * code[c];
        to[c] = static_cast<std::uint8_t>(code[c] + coding.most + 1);
    }
    sq_norm[i] = sum;
}

SPADE_TARGET_AVX2 void WindowQueryCodes::thresholds(int first, int count, const float* limit, int stride,
                                                    const WindowCodes& map, float margin, std::int32_t* threshold) const {
    // A direct distance is a sum of d squares in 32 lanes, of differences that are rounded, too; and so is all that follows
    // here.
    const auto more = static_cast<float>(1 + (coding.d / 32 + 32) * kHalfUnit);
    const auto vanished = static_cast<float>(coding.d * kVanishingSquare);
    const __m256 per_step = _mm256_set1_ps(more / coding.step), of_map = _mm256_set1_ps(map.residual);
    for (int i = 0; i < count; i += kChannels) {
        alignas(32) float limits[kChannels] = {};
        for (int lane = 0; lane < kChannels && i + lane < count; ++lane)
            limits[lane] = limit[static_cast<std::size_t>(i + lane) * stride];
        const __m256 reach = _mm256_sqrt_ps(_mm256_add_ps(_mm256_load_ps(limits), _mm256_set1_ps(vanished)));
        const __m256 residuals = _mm256_add_ps(_mm256_loadu_ps(residual.data() + first + i), of_map);
        const __m256 most = _mm256_fmadd_ps(reach, per_step, _mm256_mul_ps(residuals, _mm256_set1_ps(margin)));
        const __m256 sq_most = _mm256_mul_ps(_mm256_mul_ps(most, most), _mm256_set1_ps(0.5f * (1 + 0x1p-20f)));
        const __m256 half_sq_norm =
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sq_norm.data() + first + i))),
                          _mm256_set1_ps(0.5f * (1 - 0x1p-21f)));
        const __m256 least = _mm256_floor_ps(_mm256_sub_ps(_mm256_sub_ps(half_sq_norm, sq_most), _mm256_set1_ps(2)));
        // What is beyond the range of integers, or no number, becomes the smallest of them.
        const __m256i thresholds = _mm256_cvtps_epi32(least);
        alignas(32) std::int32_t lanes[kChannels];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), thresholds);
        std::copy(lanes, lanes + std::min(kChannels, count - i), threshold + i);
    }
}

void screen_windows_reference(const WindowMap& map, const WindowLine& line, const WindowShape& window, std::uint8_t* within) {
    const int top = window.top(line.y), rows = window.bottom(line.y, map.height) - top + 1;
    for (int i = 0; i < line.count; ++i, within += window.bytes()) {
        std::fill(within, within + window.bytes(), std::uint8_t{0});
        for (int number = 0; number < window.spans(); ++number) {
            const WindowSpan span = window.at(line.first + i, number, map);
            for (int row = 0; row < rows; ++row)
                for (int cell = 0; cell < kCells; ++cell) {
                    const std::size_t y = top + row;
                    std::uint32_t sum = map.initial[y * map.padded_width + span.begin + cell];
                    for (int c = 0; c < map.quads * kQuad; ++c)
                        sum +=
                            line.codes[static_cast<std::size_t>(i) * map.quads * kQuad + c] *
                            map.codes[((y * map.quads + c / kQuad) * map.padded_width + span.begin + cell) * kQuad + c % kQuad];
                    const bool passes = static_cast<std::int32_t>(sum) > line.threshold[i];
                    if (passes && (span.inside >> cell & 1))
                        within[number * rows + row] |= static_cast<std::uint8_t>(1u << cell);
                }
        }
    }
}

}  // namespace spade
