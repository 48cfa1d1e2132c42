// Operations on float32 vectors that packing and refining share.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "target.hpp"
#include "vectors.hpp"

namespace spade {

// Adds the eight lanes up: first lanes four apart, then two apart, then the last two.
SPADE_TARGET_AVX2 SPADE_INLINE float sum_of_lanes(__m256 eight) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Eight codes times their scales. A product is rounded once, so that all ways to decode give the same numbers.
SPADE_TARGET_AVX2 SPADE_INLINE __m256 decode_codes(const char* codes, const float* scale) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), _mm256_loadu_ps(scale));
}

// Writes a vector's d channels as float32, followed by zeros up to `padded`. `scale`: (d), of integers alone.
SPADE_TARGET_AVX2 inline void decode(const void* vector, ElementType type, const float* scale, int d, int padded, float* out) {
    const char* in = static_cast<const char*>(vector);
    if (type == ElementType::kInt8) {
        int i = 0;
        for (; i + 8 <= d; i += 8) _mm256_storeu_ps(out + i, decode_codes(in + i, scale + i));
        for (; i < d; ++i) out[i] = static_cast<float>(static_cast<signed char>(in[i])) * scale[i];
    } else if (type == ElementType::kFloat16) {
        int i = 0;
        for (; i + 8 <= d; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i))));
        for (; i < d; ++i) {
            std::uint16_t float16;
            std::memcpy(&float16, in + 2 * i, 2);
            out[i] = _cvtsh_ss(float16);
        }
    } else {
        std::memcpy(out, in, static_cast<std::size_t>(d) * 4);
    }
    std::fill(out + d, out + padded, 0.0f);
}

// While it lives, this thread rounds to nearest and keeps denormal numbers, so that results do not depend on what other code in
// the process has set the processor to.
class ScopedDefaultFloatMode {
public:
    ScopedDefaultFloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~ScopedDefaultFloatMode() { _mm_setcsr(before_); }
    ScopedDefaultFloatMode(const ScopedDefaultFloatMode&) = delete;
    ScopedDefaultFloatMode& operator=(const ScopedDefaultFloatMode&) = delete;

private:
    unsigned before_;
};

}  // namespace spade
