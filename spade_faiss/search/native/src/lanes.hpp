// What packing and searching do alike with eight numbers at a time.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "packs.hpp"
#include "target.hpp"

namespace spade {

// The sum of all numbers, by halves.
SPADE_AVX2 SPADE_INLINE float sum(__m256 eight) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Channels of a vector at any address as float32, zeros up to `padded`.
SPADE_AVX2 inline void decode(const void* vector, Type type, int d, int padded, float* to) {
    const char* from = static_cast<const char*>(vector);
    int i = 0;
    if (type == Type::kFloat16) {
        for (; i + 8 <= d; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
        for (; i < d; ++i) {
            std::uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            to[i] = _cvtsh_ss(half);
        }
    } else {
        std::memcpy(to, from, static_cast<std::size_t>(d) * 4);
    }
    std::fill(to + d, to + padded, 0.0f);
}

// Rounds to nearest and keeps small numbers while it lives, whatever else in the process has set: results depend on neither.
class UsualArithmetic {
public:
    UsualArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~UsualArithmetic() { _mm_setcsr(before_); }
    UsualArithmetic(const UsualArithmetic&) = delete;
    UsualArithmetic& operator=(const UsualArithmetic&) = delete;

private:
    unsigned before_;
};

}  // namespace spade
