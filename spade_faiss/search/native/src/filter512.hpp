// What the 512-bit filters share: how sums of products become minima. Products are computed in avx512vnni.cpp and amx.cpp.
#pragma once

#include <immintrin.h>

#include <limits>

#include "filter.hpp"
#include "target.hpp"

#define SPADE_AVX512VNNI_FEATURES "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define SPADE_TARGET_AVX512VNNI __attribute__((target(SPADE_AVX512VNNI_FEATURES)))

namespace spade {

// The minima of no rows yet.
SPADE_TARGET_AVX512VNNI SPADE_INLINE __m512 no_minima() { return _mm512_set1_ps(std::numeric_limits<float>::infinity()); }

// The minima of a panel after one more row, of which `dots` holds the products with the panel's queries.
//
// Masks of ones change nothing; they avoid GCC's unmasked intrinsics, whose definitions raise false warnings (GCC bug 105593).
SPADE_TARGET_AVX512VNNI SPADE_INLINE __m512 with_row(__m512 least, __m512i dots, const RowCodes& rows, int row,
                                                     __m512 query_step) {
    constexpr __mmask16 all = 0xFFFF;
    const __m512 dot = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(all, dots), _mm512_set1_ps(rows.step[row]));
    const __m512 estimate = _mm512_fnmadd_ps(dot, query_step, _mm512_set1_ps(rows.half_sq_norm[row]));
    return _mm512_maskz_min_ps(all, estimate, least);
}

}  // namespace spade
