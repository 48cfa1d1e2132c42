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

SPADE_TARGET_AVX2 SPADE_INLINE __m256i load_words(const std::uint64_t* four) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(four));
}

// Eight packed codes of a vector, as 32-bit integers.
SPADE_TARGET_AVX2 SPADE_INLINE __m256i unpack(const char* vector, std::size_t vector_bytes, const PackedEight& eight) {
    std::int64_t word = 0;
    if (vector_bytes >= sizeof(word))
        std::memcpy(&word, vector + eight.begin, sizeof(word));
    else
        std::memcpy(&word, vector, vector_bytes);
    const __m256i words = _mm256_set1_epi64x(word);
    const __m256i even = _mm256_and_si256(_mm256_srlv_epi64(words, load_words(eight.even_shift)), load_words(eight.even_mask));
    const __m256i odd = _mm256_and_si256(_mm256_srlv_epi64(words, load_words(eight.odd_shift)), load_words(eight.odd_mask));
    const __m256i stored = _mm256_or_si256(even, _mm256_slli_epi64(odd, 32));
    return _mm256_sub_epi32(_mm256_slli_epi32(stored, 1), _mm256_load_si256(reinterpret_cast<const __m256i*>(eight.least)));
}

// The numbers of a vector's codes from channel c on, a multiple of eight; those beyond the last channel are 0. A product is
// rounded once, so that all ways to decode give the same numbers.
SPADE_TARGET_AVX2 SPADE_INLINE __m256 decode_codes(const char* vector, const StoredCodes& codes, int c) {
    __m256i eight;
    if (!codes.packed.empty()) {
        eight = unpack(vector, codes.vector_bytes, codes.packed[c / 8]);
    } else {
        std::int64_t word = 0;
        if (c + 8 <= codes.d)
            std::memcpy(&word, vector + c, 8);
        else
            std::memcpy(&word, vector + c, codes.d - c);
        eight = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(word));
    }
    return _mm256_mul_ps(_mm256_cvtepi32_ps(eight), _mm256_loadu_ps(codes.scale.data() + c));
}

// Writes a vector's d channels as float32, followed by zeros up to `padded`. `codes`: of kCodes alone.
SPADE_TARGET_AVX2 inline void decode(const void* vector, ElementType type, const StoredCodes* codes, int d, int padded,
                                     float* out) {
    const char* in = static_cast<const char*>(vector);
    if (codes != nullptr) {
        alignas(32) float last[8];
        int i = 0;
        for (; i + 8 <= d; i += 8) _mm256_storeu_ps(out + i, decode_codes(in, *codes, i));
        if (i < d) {
            _mm256_store_ps(last, decode_codes(in, *codes, i));
            std::copy(last, last + d - i, out + i);
        }
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
